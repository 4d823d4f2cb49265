package gateway

import (
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// A scanner follows one direction of a stream and finds where its frames end.
// It is fed the bytes in order, in pieces of any size, and sees the same frames
// however they are cut. It holds no bytes itself.
type scanner interface {
	// scan advances over b, but not beyond the end of the frame that is under
	// way: n bytes belong to it, and done says that it ends there. After an
	// error the stream is out of step and the scanner must not be used again.
	scan(b []byte) (n int, done bool, err error)
}

var (
	errTooLong  = errors.New("a frame is longer than -max-frame")
	errNoMemory = errors.New("the gateway holds as many bytes as -max-memory allows")
	errHalf     = errors.New("the client ended its direction in the middle of a request")
)

// malformed says what is wrong with a frame, in words that may be told to the
// peer that sent it.
type malformed struct{ what string }

func (m *malformed) Error() string { return m.what }

// budget bounds what all clients together make the gateway remember beyond
// the small buffer that each has from the beginning. nil: no bound.
type budget struct {
	limit int64
	held  atomic.Int64
}

// take reports whether n bytes more may be held, and counts them if so.
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
	clientBuffer   = 2 << 10  // what a client has from the beginning, counted by nobody
	upstreamBuffer = 16 << 10 // of each upstream connection; it never grows
	keptBuffer     = 64 << 10 // what a client keeps between two requests
)

// store is a byte slice whose growth is counted in a budget. What a peer
// announces makes it grow no faster than what the peer sends.
type store struct {
	b     []byte
	taken int // of budget
	*budget
}

// reserve makes room for n bytes beyond what b holds.
func (s *store) reserve(n int) error {
	need := len(s.b) + n
	if need <= cap(s.b) {
		return nil
	}
	size := max(clientBuffer, 2*cap(s.b))
	for size < need {
		size *= 2
	}
	// While it grows both are there, and both are counted.
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

// empty forgets the contents, and the room too if it is large.
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

// frames cuts what a client sends into frames. The store holds the frames that
// were taken since the last fill, the one under way, and what came behind it.
type frames struct {
	r       io.Reader
	sc      scanner
	max     int // bytes of one frame
	store   store
	start   int // of the frame under way in store.b
	scanned int // sc has seen store.b[start:scanned]

	broken error // nothing can be read any more: what came was dropped, for this reason
}

// take returns the next frame that is complete, if there is one, as a part of
// the store that stays valid until fill. Frames that are taken one after the
// other lie side by side.
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

// untake makes a frame the next one again. It must be the one that was taken
// last, and the scanner must be at the beginning of a frame.
func (f *frames) untake(frame []byte) {
	f.start -= len(frame)
	f.scanned = f.start
}

// partial reports whether there is the beginning of a frame.
func (f *frames) partial() bool { return len(f.store.b) > f.start }

// An ender is a scanner whose last frame may be ended by the end of the stream.
type ender interface{ end() string } // what is missing then

// fill forgets the frames that were taken and reads more, once. The end of the
// stream in the middle of a frame is errHalf, unless it is the end of the frame.
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

// more is fill, but what was taken stays.
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
		return nil // the error comes again
	case err == io.EOF && f.partial():
		// What was read ahead may have whole frames in it: the end is the
		// last frame's. It comes again.
		if e, ok := f.sc.(ender); ok && s.b[len(s.b)-1] != e.end()[0] {
			return s.append([]byte(e.end()))
		}
		return errHalf
	case errors.Is(err, io.ErrUnexpectedEOF) && f.partial(): // of TLS: it was cut off
		return errHalf
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// replies is the codec of one upstream connection: it reads frames off it. It
// is the state that the pool keeps with the connection.
type replies struct {
	sc   scanner
	max  int
	buf  [upstreamBuffer]byte
	r, w int    // buf[r:w] has been read and not been used
	tid  uint16 // the last transaction id given, see modbus; of resp, the last mark

	born     time.Time // when it could have been asked for the first time
	heard    bool      // it was silent before its first request
	listened bool      // it was listened to in this loan
	settled  bool      // it is believed without a look, see greetings
	token    []byte    // of its marks
	proves   bool      // the server proves its answers by marks

	half    bool   // next failed in the middle of a frame
	owed    []owed // modbus: what may come late
	silent  int    // ... requests in a row that got no reply in time
	matched bool   // ... a reply had the number of its request
	zero    bool   // ... its replies have none

	pushes bool // resp: a frame may be a push
	push   bool // ... and the last one was

	closed func() // runs when the connection has been closed; nil: nothing does

	// pause is called before a read that may have to wait, and told whether a
	// frame is under way; nil: not. Its error ends next.
	pause func(within bool) error
}

// Buffered tells the pool of bytes that no borrower has asked for.
func (u *replies) Buffered() int { return u.w - u.r }

// Close is called by the pool when the connection is closed.
func (u *replies) Close() error {
	if u.closed != nil {
		u.closed()
	}
	return nil
}

// reply is next for who waits for the reply to a request. A push, which RESP3 has
// for what comes unasked, is none whenever it comes; nobody here has asked for
// any, and it is dropped.
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

// next appends one frame to out. If there is no room for it, it is read to its
// end all the same, so that the connection stays in step, and the error is
// errNoMemory; any other error means that the connection is out of step. In
// both cases out is as before.
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
