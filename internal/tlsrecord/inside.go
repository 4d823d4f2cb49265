package tlsrecord

import (
	"crypto/tls"
	"fmt"
	"hash/fnv"
	"reflect"
	"strings"
)

// A dialer that returns a *tls.Conn of its own has connected crypto/tls to a socket that no
// Tracker follows. The public way to learn whether such a tls.Conn holds something is a read
// under a deadline in the past. It costs two deadlines, more than the rest of a loan. Quiet
// reads the lengths of crypto/tls's buffers instead. They are not exported, so Quiet looks only
// into a tls.Conn of a layout that is known: the names and types of all the fields must be
// those of a version whose code was read. Any other layout gets the answer false, and the
// caller reads under a deadline.
//
// reflect reads lengths and numbers of unexported fields, and no package unsafe is needed.

// layouts are the known layouts of a tls.Conn, and the first version of Go that has each.
var layouts = map[uint64]string{
	8696906060932079245: "go1.24",
	2211680376190721650: "go1.25",
}

// insides are the places in a tls.Conn that Quiet looks at.
type insides struct {
	complete          []int // of isHandshakeComplete, a number
	inErr, outErr     []int // first permanent error of each direction
	raw, rawOff       []int // what was read from the socket, and how far crypto/tls has got
	plain, plainOff   []int // what was decrypted, and how far the reader has got
	shakes, shakesOff []int // handshake messages, such as tickets and key updates, likewise
	unsent            []int // records not sent yet
}

// inside is nil if the layout is not known.
var inside = func() *insides {
	if layouts[layoutOf(reflect.TypeFor[tls.Conn]())] == "" {
		return nil
	}
	return &insides{
		complete: path("isHandshakeComplete", "v"),
		inErr:    path("in", "err"), outErr: path("out", "err"),
		raw: path("rawInput", "buf"), rawOff: path("rawInput", "off"),
		plain: path("input", "s"), plainOff: path("input", "i"),
		shakes: path("hand", "buf"), shakesOff: path("hand", "off"),
		unsent: path("sendBuf"),
	}
}()

// path finds the field of a tls.Conn that the names lead to.
func path(names ...string) (index []int) {
	t := reflect.TypeFor[tls.Conn]()
	for _, name := range names {
		f, ok := t.FieldByName(name)
		if !ok {
			panic("tlsrecord: a known layout of tls.Conn without " + strings.Join(names, "."))
		}
		index, t = append(index, f.Index...), f.Type
	}
	return index
}

// layoutOf is a hash of the names and types of the fields of t, and of the structs within.
func layoutOf(t reflect.Type) uint64 {
	h := fnv.New64a()
	var write func(t reflect.Type)
	write = func(t reflect.Type) {
		for i := range t.NumField() {
			f := t.Field(i)
			fmt.Fprintf(h, "%s %v\n", f.Name, f.Type)
			if f.Type.Kind() == reflect.Struct {
				write(f.Type)
			}
		}
	}
	write(t)
	return h.Sum64()
}

// Quiet reports whether c provably holds nothing: its handshake is complete, no direction has
// failed, nothing that was read is left, neither as plaintext nor as a part of a record or of a
// handshake message, and nothing waits to be sent. false proves nothing. Nobody may use c
// meanwhile.
func Quiet(c *tls.Conn) bool {
	if inside == nil {
		return false
	}
	v := reflect.ValueOf(c).Elem()
	return at(v, inside.complete).Uint() == 1 &&
		at(v, inside.inErr).IsNil() && at(v, inside.outErr).IsNil() &&
		!left(v, inside.raw, inside.rawOff) && !left(v, inside.plain, inside.plainOff) && !left(v, inside.shakes, inside.shakesOff) &&
		at(v, inside.unsent).Len() == 0
}

// Partial reports whether c holds a part of a record or of a handshake message. It reports
// false if the layout of c is not known. Nobody may use c meanwhile.
func Partial(c *tls.Conn) bool {
	if inside == nil {
		return false
	}
	v := reflect.ValueOf(c).Elem()
	return left(v, inside.raw, inside.rawOff) || left(v, inside.shakes, inside.shakesOff)
}

// left reports whether a buffer holds more bytes than were taken out of it.
func left(v reflect.Value, buf, off []int) bool { return int64(at(v, buf).Len()) > at(v, off).Int() }

// at returns the field of v at the index. It is reflect.Value.FieldByIndex, which takes longer
// because it also goes through pointers.
func at(v reflect.Value, index []int) reflect.Value {
	for _, i := range index {
		v = v.Field(i)
	}
	return v
}
