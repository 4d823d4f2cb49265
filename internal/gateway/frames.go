package gateway

import (
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// A scanner follows one direction of a stream and finds the ends of frames. It is fed the
// bytes in order, in pieces of any size; the pieces do not change the frames it finds. It
// stores no bytes.
type scanner interface {
	// scan advances over b, but not beyond the end of the current frame: n bytes belong
	// to the frame, and done means that it ends there. After an error the stream is out
	// of step and the scanner must not be used again.
	scan(b []byte) (n int, done bool, err error)
}

var (
	errTooLong  = errors.New("a frame is longer than -max-frame")
	errNoMemory = errors.New("the gateway holds as many bytes as -max-memory allows")
	errHalf     = errors.New("the client ended its direction in the middle of a request")
)

// malformed describes what is wrong with a frame, in words that may be sent to the peer
// that sent the frame.
type malformed struct{ what string }

func (m *malformed) Error() string { return m.what }

// budget bounds the bytes that the gateway stores for all clients together, beyond the
// small buffer that each client has from the beginning. nil: no bound.
type budget struct {
	limit int64
	held  atomic.Int64
}

// take reports whether n more bytes may be stored, and counts them if so.
func (b *budget) take(n int) bool {
	if b == nil {
		return true
	}
	if b.held.Add(int64(n)) > b.limit {
		b.held.Add(-int64(n))
		return false
	}
	return true
}

func (b *budget) give(n int) {
	if b != nil {
		b.held.Add(-int64(n))
	}
}

const (
	clientBuffer   = 2 << 10  // a client's initial buffer, not counted in the budget
	upstreamBuffer = 16 << 10 // of each connection to the server; it never grows
	keptBuffer     = 64 << 10 // the most a client keeps between two requests
)

// store is a byte slice whose growth is counted in a budget. It grows with the bytes a
// peer sends, not with the length that the peer announces.
type store struct {
	b     []byte
	taken int // of budget
	*budget
}

// reserve makes room for n bytes after the contents of b.
func (s *store) reserve(n int) error {
	need := len(s.b) + n
	if need <= cap(s.b) {
		return nil
	}
	size := max(clientBuffer, 2*cap(s.b))
	for size < need {
		size *= 2
	}
	// While the store grows, the old and the new slice both exist, and both are counted.
	more := max(0, size-clientBuffer)
	if !s.take(more) {
		return errNoMemory
	}
	grown := make([]byte, len(s.b), size)
	copy(grown, s.b)
	s.b = grown
	s.give(s.taken)
	s.taken = more
	return nil
}

func (s *store) append(b []byte) error {
	if err := s.reserve(len(b)); err != nil {
		return err
	}
	s.b = append(s.b, b...)
	return nil
}

// empty drops the contents, and the slice too if it is large.
func (s *store) empty() {
	s.b = s.b[:0]
	if cap(s.b) > keptBuffer {
		s.release()
	}
}

func (s *store) release() {
	s.b = nil
	s.give(s.taken)
	s.taken = 0
}

// frames cuts a client's input into frames. The store holds the frames taken since the
// last fill, the current frame, and the bytes after it.
type frames struct {
	r       io.Reader
	sc      scanner
	max     int // bytes of one frame
	store   store
	start   int // start of the current frame in store.b
	scanned int // sc has seen store.b[start:scanned]

	broken error // no more input can be read; later input was dropped, for this reason
}

// take returns the next complete frame, if there is one. The frame is a part of the store
// and stays valid until fill. Frames taken one after the other lie side by side.
func (f *frames) take() (frame []byte, ok bool, err error) {
	n, done, err := f.sc.scan(f.store.b[f.scanned:])
	f.scanned += n
	if f.scanned-f.start > f.max {
		return nil, false, errTooLong
	}
	if err != nil || !done {
		return nil, false, err
	}
	frame = f.store.b[f.start:f.scanned:f.scanned]
	f.start = f.scanned
	return frame, true, nil
}

// untake makes a frame the next one again. It must be the frame that was taken last, and
// the scanner must be at the beginning of a frame.
func (f *frames) untake(frame []byte) {
	f.start -= len(frame)
	f.scanned = f.start
}

// partial reports whether the beginning of a frame has arrived.
func (f *frames) partial() bool { return len(f.store.b) > f.start }

// An ender is a scanner whose last frame may be ended by the end of the stream.
type ender interface{ end() string } // returns the missing bytes

// fill drops the frames that were taken and reads once. The end of the stream in the
// middle of a frame is errHalf, unless it ends the frame (see ender).
func (f *frames) fill() error {
	if f.start > 0 {
		rest := copy(f.store.b, f.store.b[f.start:])
		f.scanned -= f.start
		f.start = 0
		if f.store.b = f.store.b[:rest]; rest == 0 {
			f.store.empty()
		}
	}
	return f.more()
}

// more is fill, but keeps the frames that were taken.
func (f *frames) more() error {
	if f.broken != nil {
		return f.broken
	}
	if err := f.store.reserve(1); err != nil {
		return err
	}
	s := &f.store
	n, err := f.r.Read(s.b[len(s.b):cap(s.b)])
	s.b = s.b[:len(s.b)+n]
	switch {
	case n > 0:
		return nil // the next read returns the error again
	case err == io.EOF && f.partial():
		// The input read so far may hold whole frames. The end of the stream ends the
		// last frame; the next read returns it again.
		if e, ok := f.sc.(ender); ok && s.b[len(s.b)-1] != e.end()[0] {
			return s.append([]byte(e.end()))
		}
		return errHalf
	case errors.Is(err, io.ErrUnexpectedEOF) && f.partial(): // TLS ended without close_notify
		return errHalf
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// replies is the codec of one connection to the server: it reads frames. The pool keeps
// it as the state of the connection.
type replies struct {
	sc   scanner
	max  int
	buf  [upstreamBuffer]byte
	r, w int    // buf[r:w] has been read from the socket and not used
	tid  uint16 // the last transaction id given, see modbus; for resp, the last mark

	born     time.Time // the earliest moment at which the server could have been asked
	heard    bool      // the connection was silent before its first request
	listened bool      // the gateway has listened to it in this loan
	settled  bool      // its replies are trusted without a look, see greetings
	token    []byte    // the prefix of its marks
	proves   bool      // the server proves its replies by marks

	half    bool   // next failed in the middle of a frame
	owed    []owed // modbus: requests whose reply may still come
	silent  int    // modbus: requests in a row that got no reply in time
	matched bool   // modbus: a reply had the number of its request
	zero    bool   // modbus: its replies have no number

	pushes bool // resp: a frame may be a push
	push   bool // resp: the last frame was a push

	closed func() // runs when the connection has been closed; nil: nothing runs

	// pause is called before a read that may have to wait; within says whether a frame
	// has begun. If pause returns an error, next returns it. nil: no call.
	pause func(within bool) error
}

// Buffered tells the pool how many bytes have arrived that no borrower has asked for.
func (u *replies) Buffered() int { return u.w - u.r }

// The pool calls Close when it closes the connection.
func (u *replies) Close() error {
	if u.closed != nil {
		u.closed()
	}
	return nil
}

// reply is next for a caller that waits for the reply to a request. RESP3 sends pushes
// unasked, at any time; a push is no reply, no client here asked for one, and reply drops
// it.
func (u *replies) reply(from io.Reader, out *store) error {
	for {
		mark := len(out.b)
		err := u.next(from, out)
		if !u.push || err != nil && !errors.Is(err, errNoMemory) {
			return err
		}
		out.b = out.b[:mark]
	}
}

// next appends one frame to out. If there is no room for the frame, next still reads the
// frame to its end, so that the connection stays in step, and returns errNoMemory; any
// other error means that the connection is out of step. In both cases out is unchanged.
func (u *replies) next(from io.Reader, out *store) error {
	mark, size, full := len(out.b), 0, false
	fail := func(err error) error {
		out.b = out.b[:mark]
		u.half = size > 0
		return err
	}
	for {
		n, done, err := u.sc.scan(u.buf[u.r:u.w])
		if err != nil {
			return fail(err)
		}
		if size == 0 && n > 0 {
			u.push = u.pushes && u.buf[u.r] == '>'
		}
		if size += n; size > u.max {
			return fail(errTooLong)
		}
		if !full && out.append(u.buf[u.r:u.r+n]) != nil {
			full = true
			out.b = out.b[:mark]
		}
		u.r += n
		switch {
		case done && full:
			return fail(errNoMemory)
		case done:
			return nil
		}
		u.r, u.w = 0, 0 // all of it was scanned
		if u.pause != nil {
			if err := u.pause(size > 0); err != nil {
				return fail(err)
			}
		}
		n, err = from.Read(u.buf[:])
		u.w = n
		if n == 0 {
			switch err {
			case nil:
				err = io.ErrNoProgress
			case io.EOF:
				err = io.ErrUnexpectedEOF
			}
			return fail(err)
		}
	}
}
