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

// What Setup returned may hold bytes: some that came and nobody has read, some
// that a borrower wrote and did not flush. Neither may meet the next borrower.
//
// A state tells of them by a method Buffered() int. But that of a *bufio.Reader
// which is embedded knows nothing of the bufio.Writer beside it, and a struct that
// embeds a *bufio.ReadWriter has none at all, since there are two. So the buffers
// of package bufio that are plainly the state's own are looked at as well: the
// state itself, its fields, exported or not, those of a struct inside it or
// embedded by a pointer, and those of what packages bufio and net/textproto make. So is
// a *json.Decoder, which reads ahead.
// Other pointers are not followed: behind them may be what many connections share.

// holdings counts bytes that are in a state.
type holdings struct {
	unread    int // received, and read by nobody
	unflushed int // written by a borrower, and sent to nobody

	reader  *bufio.Reader // the last that was counted; a state may have two names for one
	writer  *bufio.Writer
	decoder *json.Decoder
}

// clean says what is wrong with a state that holds something, with the name of
// whoever left it; nil if it holds nothing.
func (h holdings) clean(who string) error {
	switch {
	case h.unflushed > 0:
		return &brokenContract{fmt.Sprintf("%s left %d bytes unflushed in its state: flush them", who, h.unflushed)}
	case h.unread > 0:
		return &leftUnread{&brokenContract{fmt.Sprintf("%s left %d bytes unread in its state", who, h.unread)}}
	}
	return nil
}

// held looks into the state of c. It runs in the borrower's own time, as fn does;
// whoever else wants to know calls heldSoon. The caller owns c.
func (c *conn) held() (h holdings) {
	if c.state == nil {
		return h
	}
	if r, ok := c.state.(*bufio.Reader); ok { // as most have
		countReader(r, &h)
		return h
	}
	shape, looked := shapeOf(reflect.TypeOf(c.state)), false
	defer func() {
		if looked {
			return
		}
		v := recover()
		pan := panicOf("Buffered of the state", v)
		if v != nil { // it goes on to the borrower, who is told whose it is
			panic(pan)
		}
		c.site.pool.report.outlived(pan, c.site.addr)
	}()
	h = c.search(shape)
	looked = true
	return h
}

// heldSoon is held on a goroutine of the pool's. A state that does not answer is one
// that nobody can be given.
func (c *conn) heldSoon() (h holdings, _ error) {
	if c.state == nil {
		return h, nil
	}
	shape := shapeOf(reflect.TypeOf(c.state))
	if !shape.asks {
		return c.search(shape), nil // no foreign code
	}
	got := make(chan holdings, 1)
	err := briefly("Buffered of the state", foreignPatience, func() error {
		got <- c.search(shape)
		return nil
	})
	if err != nil {
		c.site.pool.report.outlived(err, c.site.addr)
		return h, err
	}
	return <-got, nil
}

func (c *conn) search(shape *shape) (h holdings) {
	if shape.paths != nil {
		v := reflect.ValueOf(c.state)
		for _, p := range shape.paths {
			p.look(v, &h)
		}
	}
	if shape.asks {
		// Its own count may have both halves in it, or know of more than is seen.
		h.unread = max(h.unread, c.state.(interface{ Buffered() int }).Buffered()-h.unflushed)
	}
	return h
}

// shape is where a type of states has its buffers.
type shape struct {
	asks  bool // it has a method Buffered() int
	paths []path
}

// path leads to a buffer: through pointers, to the fields of these numbers.
type path []int

var shapes sync.Map // of *shape, by reflect.Type

func shapeOf(t reflect.Type) *shape {
	if s, ok := shapes.Load(t); ok {
		return s.(*shape)
	}
	s := new(shape)
	s.explore(t, nil, nil)
	if s.asks = t.Implements(reflect.TypeFor[interface{ Buffered() int }]()); t == reflect.TypeFor[*bufio.Writer]() {
		s.asks = false // what it counts is unflushed
	}
	known, _ := shapes.LoadOrStore(t, s)
	return known.(*shape)
}

// buffers are what an interface of a state may hold, be it an io.Reader, one of the
// state's own making, or any.
var buffers = [...]reflect.Type{
	reflect.TypeFor[*bufio.Reader](), reflect.TypeFor[*bufio.Writer](), reflect.TypeFor[*bufio.ReadWriter](),
}

// explore finds the buffers in a value of type t, to which at leads. outer are the
// structs that t is inside.
func (s *shape) explore(t reflect.Type, at path, outer []reflect.Type) {
	switch t {
	case reflect.TypeFor[*bufio.Reader](), reflect.TypeFor[*bufio.Writer](),
		reflect.TypeFor[bufio.Reader](), reflect.TypeFor[bufio.Writer]():
		s.paths = append(s.paths, append(path{}, at...))
		return
	case reflect.TypeFor[*json.Decoder](), reflect.TypeFor[json.Decoder]():
		s.paths = append(s.paths, append(path{}, at...)) // and what it reads from may be a buffer, too
	}
	if t.Kind() == reflect.Interface {
		for _, b := range buffers {
			if b.Implements(t) { // what is in it is seen when it is looked at
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
			return // a list, or a tree
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

// ownBuffers reports whether a pointer to t in a state is a pointer to a codec of
// this connection's.
func ownBuffers(t reflect.Type) bool {
	return t.PkgPath() == "bufio" || t.PkgPath() == "net/textproto" || t == reflect.TypeFor[json.Decoder]()
}

// look follows p into v, and counts what is there. Unexported fields are only
// read, and nothing of theirs is called but Buffered.
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
		return // a copy, which nobody else has
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

// countDecoder leaves out the space after a value, which comes with it as a rule.
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

func countReader(r *bufio.Reader, h *holdings) {
	if r != nil && r != h.reader {
		h.unread += r.Buffered()
		h.reader = r
	}
}

func countWriter(w *bufio.Writer, h *holdings) {
	if w != nil && w != h.writer {
		h.unflushed += w.Buffered()
		h.writer = w
	}
}
