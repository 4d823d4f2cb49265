package connpool

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"sync"
	"unsafe"
)

// The state that Setup returned may hold bytes: bytes that arrived and nobody has read,
// or bytes that a borrower wrote and did not flush. Neither may reach the next
// borrower.
//
// A state counts them in a method Buffered() int. But the method of an embedded
// *bufio.Reader does not count the bufio.Writer beside it, and a struct that embeds a
// *bufio.ReadWriter has no such method, since there are two candidates. So the pool
// also looks at buffers of package bufio that clearly belong to the state: the state
// itself, its fields, exported or not, the fields of a struct inside it or embedded by
// a pointer, and the buffers in types of packages bufio and net/textproto. A
// *json.Decoder in the same places counts too, because it reads ahead. The pool does
// not follow other pointers: many connections may share what they point to.

// holdings counts the bytes in a state.
type holdings struct {
	unread    int // received, and not read yet
	unflushed int // written by a borrower, and not sent yet

	reader  *bufio.Reader // the last one counted; a state may refer to the same one twice
	writer  *bufio.Writer
	decoder *json.Decoder
}

// clean returns an error that says what a state holds, with the name of whoever left it
// there; nil if it holds nothing.
func (h holdings) clean(who string) error {
	switch {
	case h.unflushed > 0:
		return &brokenContract{fmt.Sprintf("%s left %d bytes unflushed in its state: flush them", who, h.unflushed)}
	case h.unread > 0:
		return &leftUnread{&brokenContract{fmt.Sprintf("%s left %d bytes unread in its state", who, h.unread)}}
	}
	return nil
}

// shape says where a type of states has its buffers.
type shape struct {
	asks  bool // it has a method Buffered() int that the pool calls
	paths []path
}

// path leads from a state to a buffer: the numbers of the fields to follow, through
// pointers.
type path []int

var shapes sync.Map // of *shape, by reflect.Type

// shapeOf returns the shape of t, which it computes once.
func shapeOf(t reflect.Type) *shape {
	if s, ok := shapes.Load(t); ok {
		return s.(*shape)
	}
	s := new(shape)
	s.explore(t, nil, nil)
	if s.asks = t.Implements(reflect.TypeFor[interface{ Buffered() int }]()); t == reflect.TypeFor[*bufio.Writer]() {
		s.asks = false // its Buffered counts unflushed bytes
	}
	known, _ := shapes.LoadOrStore(t, s)
	return known.(*shape)
}

// buffers are the types that the pool recognises inside an interface of a state, be it
// an io.Reader, an interface type of the state's own package, or any.
var buffers = [...]reflect.Type{
	reflect.TypeFor[*bufio.Reader](), reflect.TypeFor[*bufio.Writer](), reflect.TypeFor[*bufio.ReadWriter](),
}

// explore finds the buffers in a value of type t. at is the path to the value. outer
// are the struct types that the value is nested in.
func (s *shape) explore(t reflect.Type, at path, outer []reflect.Type) {
	switch t {
	case reflect.TypeFor[*bufio.Reader](), reflect.TypeFor[*bufio.Writer](),
		reflect.TypeFor[bufio.Reader](), reflect.TypeFor[bufio.Writer]():
		s.paths = append(s.paths, append(path{}, at...))
		return
	case reflect.TypeFor[*json.Decoder](), reflect.TypeFor[json.Decoder]():
		s.paths = append(s.paths, append(path{}, at...)) // what the decoder reads from may be a buffer, too
	}
	if t.Kind() == reflect.Interface {
		for _, b := range buffers {
			if b.Implements(t) { // what is in it is known only when a state is searched
				s.paths = append(s.paths, append(path{}, at...))
				break
			}
		}
		return
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for _, o := range outer {
		if o == t {
			return // a type that contains itself: a list, or a tree
		}
	}
	outer = append(outer[:len(outer):len(outer)], t)
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Type.Kind() == reflect.Pointer && !f.Anonymous && !ownBuffers(f.Type.Elem()) {
			continue
		}
		s.explore(f.Type, append(at[:len(at):len(at)], i), outer)
	}
}

// ownBuffers reports whether a pointer to t in a state points to a codec that belongs
// to this connection alone.
func ownBuffers(t reflect.Type) bool {
	return t.PkgPath() == "bufio" || t.PkgPath() == "net/textproto" || t == reflect.TypeFor[json.Decoder]()
}

// look follows p from v and counts the bytes in the buffer there. It reads unexported
// fields, and calls no method of theirs but Buffered.
func (p path) look(v reflect.Value, h *holdings) {
	for _, i := range p {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				return
			}
			v = v.Elem()
		}
		v = v.Field(i)
	}
	if v.Kind() == reflect.Interface {
		if v = v.Elem(); v.Kind() != reflect.Pointer || v.IsNil() {
			return
		}
		if t := v.Type(); t == reflect.TypeFor[*bufio.ReadWriter]() {
			rw := (*bufio.ReadWriter)(v.UnsafePointer())
			countReader(rw.Reader, h)
			countWriter(rw.Writer, h)
			return
		}
	}
	var at unsafe.Pointer
	t := v.Type()
	switch {
	case v.Kind() == reflect.Pointer:
		at, t = v.UnsafePointer(), t.Elem()
	case v.CanAddr():
		at = v.Addr().UnsafePointer()
	default:
		return // a copy inside an interface, which nobody else uses
	}
	switch t {
	case reflect.TypeFor[bufio.Reader]():
		countReader((*bufio.Reader)(at), h)
	case reflect.TypeFor[bufio.Writer]():
		countWriter((*bufio.Writer)(at), h)
	case reflect.TypeFor[json.Decoder]():
		countDecoder((*json.Decoder)(at), h)
	}
}

// countDecoder leaves out white space after a value: peers usually send a newline
// there.
func countDecoder(d *json.Decoder, h *holdings) {
	if d == nil || d == h.decoder {
		return
	}
	h.decoder = d
	left, ok := d.Buffered().(interface {
		io.ByteReader
		Len() int
	})
	for ok {
		switch b, err := left.ReadByte(); {
		case err != nil:
			return
		case b != ' ' && b != '\t' && b != '\r' && b != '\n':
			h.unread += left.Len() + 1
			return
		}
	}
}

// countReader adds the bytes that r has read ahead, unless r was counted just before.
func countReader(r *bufio.Reader, h *holdings) {
	if r != nil && r != h.reader {
		h.unread += r.Buffered()
		h.reader = r
	}
}

// countWriter adds the bytes that w has not flushed, unless w was counted just before.
func countWriter(w *bufio.Writer, h *holdings) {
	if w != nil && w != h.writer {
		h.unflushed += w.Buffered()
		h.writer = w
	}
}
