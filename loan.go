package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"syscall"
	"time"
)

var (
	_ net.Conn      = Conn{}
	_ syscall.Conn  = Conn{}
	_ io.ReaderFrom = Conn{}
	_ io.WriterTo   = Conn{}
)

// Read reads as net.Conn does. io.EOF is returned unwrapped.
func (h Conn) Read(b []byte) (int, error) {
	if err := h.c.enterIO(h.gen); err != nil {
		return 0, err
	}
	if h.c.sock.foreign || h.c.cold.Load() != nil {
		n, err := h.c.reader().Read(b)
		return n, h.c.leaveRead(int64(n), err)
	}
	n, err := h.c.nc.Read(b)
	return n, h.c.leaveRead(int64(n), err)
}

// Write writes as net.Conn does.
func (h Conn) Write(b []byte) (int, error) {
	if err := h.c.enterIO(h.gen); err != nil {
		return 0, err
	}
	if h.c.sock.foreign {
		n, err := h.c.writer().Write(b)
		return n, h.c.leaveWrite(int64(n), err)
	}
	n, err := h.c.nc.Write(b)
	return n, h.c.leaveWrite(int64(n), err)
}

// ReadFrom implements io.ReaderFrom, by the kernel's zero-copy path where the
// connection has one. An error of r counts as a failure of the connection, since the
// peer may have received only a part of the data.
func (h Conn) ReadFrom(r io.Reader) (int64, error) {
	if err := h.c.enterIO(h.gen); err != nil {
		return 0, err
	}
	n, err := h.c.copyIn(r)
	h.c.noteForeignError(err)
	return n, h.c.leaveWrite(n, err)
}

// WriteTo implements io.WriterTo in the same way. An error of w counts as a failure of
// the connection, since bytes may have been read that nobody received.
func (h Conn) WriteTo(w io.Writer) (int64, error) {
	if err := h.c.enterIO(h.gen); err != nil {
		return 0, err
	}
	n, err := h.c.copyOut(w)
	h.c.noteForeignError(err)
	return n, h.c.leaveRead(n, err)
}

// Close discards the connection: it is closed now and never lent again, and its slot is
// free for the next borrower. Operations that are blocked return. A second Close
// returns net.ErrClosed.
func (h Conn) Close() error {
	if h.gen == 0 && h.c != nil && h.c.isResident() {
		return h.c.closeGuard()
	}
	word, err := h.leaveFor(flagGone)
	if err != nil {
		return err
	}
	if word&flagHooked != 0 { // the hook's caller remains the owner, and finds the socket closed
		h.c.closeUnderHook()
		return nil
	}
	h.c.quitCtx(word)
	h.c.discard(ClosedByBorrower, nil)
	return nil
}

// closeGuard is Close of the guard of a connection with a client: the client has closed its
// connection. In a loan it does what Conn.Close does, unless the client has met its end.
func (c *conn) closeGuard() error {
	r := c.resident()
	h := Conn{c, c.generation()}
	if c.word.Load()&flagDetached != 0 {
		return c.nc.Close()
	}
	if w := c.word.Load(); w&(flagShut|flagHooked) == 0 && w&flagLent != 0 && r.ended() == nil {
		if err := h.Close(); err == nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
	}
	c.closeUnderHook()
	c.loseResident(errClientClosed)
	return nil
}

// Detach takes the connection out of the pool for good. Its slot is free, and the
// caller owns the result: the net.Conn that the dialer or crypto/tls made, with no
// deadline set. The state and the codecs that Setup built keep working. Detach fails
// while an operation is running, when ctx is done (or the ctx of a use nested in this
// one was), in a hook, and if the descriptor has become another socket's.
func (h Conn) Detach() (net.Conn, error) {
	why := h.c.overBecause(h.gen) // asked first: a ctx that panics must not take the connection along
	word, err := h.leaveFor(flagGone | flagDetached)
	if err != nil {
		return nil, err
	}
	c := h.c
	if !c.quitCtx(word) || why != nil || word&flagCut != 0 {
		c.word.And(^uint64(flagDetached))
		if why == nil {
			why = context.Canceled // what is known of a nested use that is over
		}
		c.discard(ClosedCanceled, why)
		return nil, why
	}
	if word&flagStolen != 0 || c.sock.isStolen() {
		c.word.And(^uint64(flagDetached))
		c.discard(ClosedQuarantined, errStolen)
		return nil, errStolen
	}
	if c.deadlineSet {
		if err := c.clearDeadline(); err != nil {
			c.word.And(^uint64(flagDetached))
			c.discard(ClosedBroken, err)
			return nil, err
		}
	}
	c.noteDetached()
	return c.nc, nil
}

// leaveFor sets flags (flagGone, and flagDetached for Detach), which makes the caller
// the owner of the connection in the place of the borrower. It returns the state word
// as it was before.
func (h Conn) leaveFor(flags uint64) (uint64, error) {
	c := h.c
	if c == nil {
		return 0, ErrReturned
	}
	for {
		w := c.word.Load()
		switch {
		case w&flagLent == 0, h.gen != 0 && w>>genShift != h.gen, w&flagDetached != 0:
			return 0, ErrReturned
		case w&flagGone != 0:
			return 0, net.ErrClosed
		case flags&flagDetached != 0 && w&flagHooked != 0:
			return 0, errors.New("connpool: a hook cannot detach a connection")
		case flags&flagDetached != 0 && operating(w):
			return 0, errors.New("connpool: cannot detach while an operation is running")
		}
		if c.word.CompareAndSwap(w, w|flags) {
			return w, nil
		}
	}
}

// CloseWrite shuts down the sending side. When the loan ends, the pool closes the
// connection. On a connection without a CloseWrite method it fails with
// errors.ErrUnsupported.
func (h Conn) CloseWrite() error {
	if err := h.c.enterIO(h.gen); err != nil {
		return err
	}
	cw, ok := h.c.nc.(interface{ CloseWrite() error })
	if !ok {
		h.c.leave(0, nil)
		return errors.ErrUnsupported
	}
	h.c.word.Or(flagHalfClosed)
	err := h.c.query("CloseWrite of the connection", cw.CloseWrite)
	if h.c.isResident() {
		h.c.loseResident(errClientClosed)
	}
	return h.c.leave(0, err)
}

// LocalAddr returns the address of the local end, nil after the loan.
func (h Conn) LocalAddr() net.Addr { return h.endpoint(net.Conn.LocalAddr) }

// RemoteAddr returns the address of the peer's end, nil after the loan.
func (h Conn) RemoteAddr() net.Addr { return h.endpoint(net.Conn.RemoteAddr) }

// endpoint returns an address of the connection. On a foreign connection the call may
// block, see query.
func (h Conn) endpoint(of func(net.Conn) net.Addr) net.Addr {
	if h.c.enter(h.gen) != nil {
		return nil
	}
	defer h.c.leave(0, nil)
	if !h.c.sock.foreign {
		return of(h.c.nc)
	}
	return answer(h.c, "an address of the connection", func() net.Addr { return of(h.c.nc) })
}

// answer asks the foreign connection of a loan and returns its answer. It returns the
// zero T if the loan's ctx ended and the connection had not answered.
func answer[T any](c *conn, what string, ask func() T) (v T) {
	got := make(chan T, 1) // an answer that comes too late must not be seen
	c.query(what, func() error {
		got <- ask()
		return nil
	})
	select {
	case v = <-got:
	default:
	}
	return v
}

// SetDeadline sets both deadlines, as net.Conn does.
func (h Conn) SetDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetDeadline) }

// SetReadDeadline sets the read deadline, as net.Conn does.
func (h Conn) SetReadDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetReadDeadline) }

// SetWriteDeadline sets the write deadline, as net.Conn does.
func (h Conn) SetWriteDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetWriteDeadline) }

func (h Conn) deadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if err := h.c.enterIO(h.gen); err != nil {
		return err
	}
	defer h.c.leave(0, nil)
	return h.c.setDeadline(t, set)
}

// SyscallConn gives access to the socket, also under TLS. The result ends with the
// loan, as the Conn does. On a connection without a descriptor it fails with
// errors.ErrUnsupported.
func (h Conn) SyscallConn() (syscall.RawConn, error) {
	if err := h.c.enter(h.gen); err != nil {
		return nil, err
	}
	defer h.c.leave(0, nil)
	if h.c.sock.raw == nil {
		return nil, errors.ErrUnsupported
	}
	return rawLoan{h}, nil
}

// rawLoan is a RawConn that is valid until its loan ends.
type rawLoan struct{ h Conn }

// during runs op as an operation of the loan.
func (r rawLoan) during(op func(syscall.RawConn) error) error {
	if err := r.h.c.enter(r.h.gen); err != nil {
		return err
	}
	defer r.h.c.leave(0, nil)
	return op(r.h.c.sock.raw)
}

func (r rawLoan) Control(f func(uintptr)) error {
	return r.during(func(rc syscall.RawConn) error { return rc.Control(f) })
}
func (r rawLoan) Read(f func(uintptr) bool) error {
	return r.during(func(rc syscall.RawConn) error { return rc.Read(f) })
}
func (r rawLoan) Write(f func(uintptr) bool) error {
	return r.during(func(rc syscall.RawConn) error { return rc.Write(f) })
}

// ConnectionState returns the state of TLS. On other connections and after the loan it
// returns the zero value, in which HandshakeComplete is false.
func (h Conn) ConnectionState() tls.ConnectionState {
	if h.c.enter(h.gen) != nil {
		return tls.ConnectionState{}
	}
	defer h.c.leave(0, nil)
	switch t := h.c.nc.(type) {
	case *tls.Conn:
		return t.ConnectionState()
	case interface{ ConnectionState() tls.ConnectionState }:
		return answer(h.c, "ConnectionState of the connection", t.ConnectionState)
	}
	return tls.ConnectionState{}
}

// Addr returns the address that was borrowed, in its canonical form; the zero Addr on
// the zero Conn.
func (h Conn) Addr() Addr {
	if h.c == nil {
		return Addr{}
	}
	return h.c.site.addr
}

// State returns what Config.Setup returned for the connection of h: its codec, its
// session, its prepared statements, its [Resident] client; or the client of [Carry]. It goes
// on to return that in a loan whose connection is closed. It returns the zero T if there
// was no Setup, if Setup returned nil, after the loan, and after Detach. If Setup returned a
// value that is not a T, State panics with the names of both types.
func State[T any](h Conn) T {
	state := h.state()
	v, ok := state.(T)
	if !ok && state != nil {
		panic(fmt.Sprintf("connpool: State[%v]: Config.Setup returned a %T", reflect.TypeFor[T](), state))
	}
	return v
}

// state returns the state of the connection: what Setup returned, or the client that the dialer
// returned. It also works in a loan whose connection is closed already, because the end of a ctx
// closes the connection of a client at any moment of the loan.
func (h Conn) state() any {
	c := h.c
	if c == nil {
		return nil
	}
	switch w := c.word.Load(); {
	case h.gen == 0 && w&(flagLent|flagDetached|flagResident) != 0:
	case w&flagLent == 0, h.gen == 0, w>>genShift != h.gen, w&flagDetached != 0:
		c.reportUseAfterReturn(h.gen)
		return nil
	}
	if r := c.resident(); r != nil && c.state == nil {
		return r.client
	}
	return c.state
}

// Context returns a ctx that is done when the connection leaves the pool: when it is
// evicted, expires, is found dead, is closed by its borrower or with the pool, or is
// detached. The cause of the ctx says why. The ctx is for what lives as long as the
// connection and longer than a loan: Setup may start a goroutine with it.
//
//	Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
//		a := newActor()
//		go a.run(nc.(connpool.Conn).Context())
//		return a, nil
//	}
//
// The ctx carries no values. After the loan, Context returns a ctx that is already
// done.
func (h Conn) Context() context.Context {
	if err := h.c.enter(h.gen); err != nil {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(err)
		return ctx
	}
	defer h.c.leave(0, nil)
	c, e := h.c, h.c.ensureCold()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if e.ctx.ctx == nil {
		e.ctx.ctx, e.ctx.end = context.WithCancelCause(context.Background())
		switch { // the connection may have left the pool: an operation may outlive its loan
		case e.ctx.cause != nil:
			e.ctx.end(e.ctx.cause)
		case c.word.Load()&(flagShut|flagStolen|flagDetached) != 0:
			e.ctx.end(ErrReturned)
		}
	}
	return e.ctx.ctx
}
