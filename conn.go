package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// phase is where a connection is in its life. Only Pool.moveLocked changes it.
//
//	none -> dialing -> borrowed <-> idle -> closing -> none
//	           |           |                  ^
//	           +-> idle    +--> closing ------+
//	           +-> none (failed)   borrowed -> none (detached)
type phase uint8

const (
	none     phase = iota
	dialing        // owned by its dial
	idle           // owned by nobody, on the stack of its site
	borrowed       // owned by a borrower, or by a sweep that looks at it
	closing        // owned by whoever closes it
	numPhases
)

// conn is a connection of the pool's.
//
// Nothing of one loan is visible in the next: end clears the deadlines, stops
// the watch on ctx and revokes the handles; what cannot be cleared (unread
// bytes, operations in flight, a socket that failed) makes settle discard it.
type conn struct {
	// Fixed once the dial has ended.
	pool  *Pool
	site  *site
	id    uint64
	epoch uint64 // of the site when the dial began
	nc    net.Conn
	born  time.Time
	life  time.Duration // MaxLifetime less the jitter, drawn once; 0: no limit
	state any           // what Setup returned
	probe probe

	phase    phase // Pool.mu
	up, down *conn // neighbours in the idle stack; Pool.mu

	// The owner's.
	since       time.Time       // given back, or lent, at; written under Pool.mu
	idleFor     time.Duration   // before this loan
	checked     time.Time       // when Config.Check last said yes
	uses        int             // loans, this one included
	counted     int             // those that are in Stats; Pool.mu
	loanCtx     context.Context // of the loan; nil if it can never be done
	unwatch     func() bool     // stops the watch on loanCtx
	interruptFn func()          // c.interrupt, made once: a method value allocates

	word atomic.Uint64 // see below

	dmu         sync.Mutex // orders deadlines against the interrupt; nothing else happens under it but SetDeadline
	limit       time.Time  // the ctx's deadline, which no deadline of fn's may exceed
	deadlineSet bool       // there is one on the socket
	firstErr    error      // of an operation of this loan
}

// The state word:
//
//	 63            24 23          9 8            0
//	+----------------+-------------+--------------+
//	|   generation   | operations  |    flags     |
//	|  of the loan   | in flight   |              |
//	+----------------+-------------+--------------+
//
// A handle carries the generation of its loan. Its operations enter by a
// compare-and-swap that finds lent set and the generation equal, and leave by
// a subtraction. The loan ends by clearing lent in one step, so after it no
// operation can begin, and those still counted make the connection unfit.
// Whoever sets gone (Conn.Close, Conn.Detach) becomes the owner in the place
// of the borrower. Generation 0 is the guard's, see Config.Setup: it matches
// whichever loan stands.
const (
	lent       = 1 << iota // a loan stands
	hooked                 // ... and it is that of a hook: it cannot end by gone
	gone                   // the connection was closed or detached by its borrower
	detached               // ... detached: the guard stays open
	cut                    // the ctx was done
	moved                  // bytes were read or written in this loan
	broken                 // an operation failed
	timedOut               // an operation timed out
	halfClosed             // closed for writing

	oneOp    = 1 << 9
	inFlight = (1<<15 - 1) << 9
	genShift = 24
)

var past = time.Unix(1, 0)

func newConn(p *Pool, s *site) *conn {
	c := &conn{pool: p, site: s, epoch: s.epoch}
	c.interruptFn = c.interrupt
	return c
}

// adopt makes nc the socket of c.
func (c *conn) adopt(nc net.Conn) {
	c.nc = nc
	c.born = c.pool.now()
	c.since = c.born
	if m := c.pool.cfg.MaxLifetime; m > 0 {
		c.life = m - rand.N(m/10+1)
	}
	c.probe.init(nc)
}

// link puts c on the idle stack of its site: on top, or, in order, where its
// last use puts it.
func (c *conn) link(inOrder bool) {
	s := c.site
	above, below := (*conn)(nil), s.top
	for inOrder && below != nil && below.since.After(c.since) {
		above, below = below, below.down
	}
	c.up, c.down = above, below
	if above == nil {
		s.top = c
	} else {
		above.down = c
	}
	if below != nil {
		below.up = c
	}
}

// unlink takes c off the idle stack.
func (c *conn) unlink() {
	if c.up == nil {
		c.site.top = c.down
	} else {
		c.up.down = c.down
	}
	if c.down != nil {
		c.down.up = c.up
	}
	c.up, c.down = nil, nil
}

func (c *conn) generation() uint64 { return c.word.Load() >> genShift }

// begin starts a loan under ctx. Only the owner calls it.
func (c *conn) begin(ctx context.Context, flags uint64) Conn {
	gen := c.generation() + 1
	if ctx.Done() != nil {
		c.loanCtx = ctx
		if t, ok := ctx.Deadline(); ok {
			c.limit, c.deadlineSet = t, true
			c.nc.SetDeadline(t)
		}
	}
	c.word.Store(gen<<genShift | lent | flags)
	if c.loanCtx != nil {
		c.unwatch = context.AfterFunc(ctx, c.interruptFn)
	}
	return Conn{c, gen}
}

// interrupt makes blocked operations of the loan return. It runs when the
// loan's ctx is done. If the loan has ended meanwhile, stopping the watch has
// failed, and the connection is discarded.
func (c *conn) interrupt() {
	defer func() {
		if v := recover(); v != nil {
			c.pool.log(slog.LevelError, "SetDeadline panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	c.word.Or(cut)
	c.dmu.Lock()
	defer c.dmu.Unlock()
	c.deadlineSet = true
	c.nc.SetDeadline(past)
}

// end ends the loan and returns the word as it was. Unless that says gone, the
// caller is the owner again. Calling it again does nothing.
func (c *conn) end() uint64 {
	word := c.word.And(^uint64(lent))
	if word&gone == 0 || word&hooked != 0 {
		if !c.stopWatch() {
			word |= cut
		}
		if word&(inFlight|cut) == 0 && c.deadlineSet { // else somebody else may be at it
			c.nc.SetDeadline(time.Time{})
			c.deadlineSet = false
		}
	}
	return word
}

// abort ends a loan whose connection will be discarded, and runs no foreign
// code. It reports whether the caller is the owner.
func (c *conn) abort() bool {
	if c.word.And(^uint64(lent))&gone != 0 {
		return false
	}
	c.stopWatch()
	return true
}

// stopWatch reports whether the ctx of the loan had no effect, and will have
// none. Only the owner calls it.
func (c *conn) stopWatch() bool {
	if c.unwatch == nil {
		return true
	}
	if !c.unwatch() {
		return false
	}
	c.dmu.Lock() // a guard that was detached may set deadlines already
	c.unwatch, c.loanCtx, c.limit = nil, nil, time.Time{}
	c.dmu.Unlock()
	return true
}

// enter begins an operation of the loan gen.
func (c *conn) enter(gen uint64) error {
	if c == nil {
		return ErrReturned
	}
	for {
		w := c.word.Load()
		switch {
		case gen == 0 && w&detached != 0:
		case w&lent == 0, gen != 0 && w>>genShift != gen, w&detached != 0:
			return ErrReturned
		case w&gone != 0:
			return net.ErrClosed
		}
		if c.word.CompareAndSwap(w, w+oneOp) {
			return nil
		}
	}
}

// leave ends an operation that moved n bytes and got err, and returns the error
// to report.
func (c *conn) leave(n int64, err error) error {
	if n > 0 && c.word.Load()&moved == 0 {
		c.word.Or(moved)
	}
	if err != nil {
		err = c.note(err)
	}
	c.word.Add(^uint64(oneOp - 1))
	return err
}

// leaveWrite is leave for an operation that wrote. A write that timed out is as
// bad as one that failed: half of it may be out, and crypto/tls never writes
// again.
func (c *conn) leaveWrite(n int64, err error) error {
	if err != nil {
		c.word.Or(broken)
	}
	return c.leave(n, err)
}

// note remembers that an operation failed, and says whose time ran out.
func (c *conn) note(err error) error {
	if errors.Is(err, net.ErrClosed) && c.word.Load()&gone != 0 {
		return err
	}
	ne, ok := err.(net.Error)
	late := ok && ne.Timeout()
	if late {
		c.word.Or(timedOut)
	} else {
		c.word.Or(broken)
	}
	word := c.word.Load()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if late || word&cut != 0 {
		ioe := &ioError{kind: KindTimeout, err: err}
		if word&moved != 0 {
			ioe.kind = KindTimeoutInTransfer
		}
		switch ctx := c.loanCtx; {
		case word&detached != 0 || ctx == nil:
		case ctx.Err() != nil:
			ioe.cause = causeOf(ctx)
			if errors.Is(ioe.cause, context.Canceled) {
				ioe.kind = KindCanceled
			}
		case !c.limit.IsZero() && !c.pool.now().Before(c.limit):
			// The socket's clock was a moment faster than the ctx's.
			ioe.cause = context.DeadlineExceeded
			c.word.Or(cut)
		}
		err = ioe
	}
	if c.firstErr == nil {
		c.firstErr = err
	}
	return err
}

// failure is the first error of the loan.
func (c *conn) failure() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	return c.firstErr
}

// setDeadline applies a deadline of fn's. The ctx has the last word.
func (c *conn) setDeadline(t time.Time, set func(time.Time) error) error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.word.Load()&cut != 0 {
		return nil // interrupted: the past deadline stays
	}
	if !c.limit.IsZero() && (t.IsZero() || t.After(c.limit)) {
		t = c.limit
	}
	c.deadlineSet = true
	return set(t)
}

// leftovers reports whether bytes are left that the borrower did not read: in
// the state's buffer or in crypto/tls. Those in the kernel are found by the
// look that precedes the next loan, together with those that come later.
func (c *conn) leftovers(word uint64) bool {
	if b, ok := c.state.(interface{ Buffered() int }); ok && b.Buffered() > 0 {
		return true
	}
	return word&moved != 0 && c.probe.leftovers()
}

func (c *conn) unprobed() bool { return c.nc != nil && !c.probe.can() }

// closesAtOnce reports whether closing for this reason cannot block and runs
// no foreign code, so that it may happen in a borrower's path.
func (c *conn) closesAtOnce(reason CloseReason) bool {
	if _, ok := c.state.(io.Closer); ok {
		return false
	}
	return c.probe.plain && (c.probe.tls == nil || !reason.clean())
}

// closeAbruptly closes the socket without a farewell.
func (c *conn) closeAbruptly() {
	if c.probe.sock != nil {
		c.probe.sock.Close()
		return
	}
	c.nc.Close()
}

// closeTimeout bounds a close that runs foreign code or says goodbye.
const closeTimeout = 5 * time.Second

// closeFully closes the connection and what Setup built on it. It may block.
func (c *conn) closeFully(reason CloseReason) {
	defer func() {
		if v := recover(); v != nil {
			c.pool.log(slog.LevelError, "closing panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	if s, ok := c.state.(io.Closer); ok {
		defer s.Close()
	}
	if c.probe.sock != nil && !reason.clean() {
		c.probe.sock.Close()
		return
	}
	if c.probe.sock != nil {
		c.probe.sock.sayGoodbye()
	}
	c.nc.Close()
}

// clean reports whether the peer is in step, so that TLS may say goodbye.
func (r CloseReason) clean() bool {
	switch r {
	case ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus,
		ClosedByBorrower, ClosedRetired, ClosedOnRequest, ClosedWithPool:
		return true
	}
	return false
}

// Conn is a connection on loan: a net.Conn, by value, that is valid until fn
// returns. Kept longer, its methods fail with ErrReturned and touch nothing.
// As for any net.Conn, its methods may be called by several goroutines at
// once; but an operation that is still running when fn returns costs the
// connection. The zero Conn is one that was returned.
//
// A deadline set here never exceeds the one of With's ctx, and is gone with
// the loan. Errors are those of package net; a time-out is also the ctx's
// error if it was the ctx whose time ran out.
type Conn struct {
	c   *conn
	gen uint64
}

var (
	_ net.Conn      = Conn{}
	_ syscall.Conn  = Conn{}
	_ io.ReaderFrom = Conn{}
	_ io.WriterTo   = Conn{}
)

// Read reads as net.Conn does. io.EOF comes unwrapped.
func (h Conn) Read(b []byte) (int, error) {
	if err := h.c.enter(h.gen); err != nil {
		return 0, err
	}
	n, err := h.c.nc.Read(b)
	return n, h.c.leave(int64(n), err)
}

// Write writes as net.Conn does.
func (h Conn) Write(b []byte) (int, error) {
	if err := h.c.enter(h.gen); err != nil {
		return 0, err
	}
	n, err := h.c.nc.Write(b)
	return n, h.c.leaveWrite(int64(n), err)
}

// ReadFrom implements io.ReaderFrom by the kernel's zero-copy path where the
// connection has one. An error of r counts as a failure of the connection,
// since the peer has got half of something.
func (h Conn) ReadFrom(r io.Reader) (int64, error) {
	if err := h.c.enter(h.gen); err != nil {
		return 0, err
	}
	n, err := readFrom(h.c.nc, r)
	return n, h.c.leaveWrite(n, err)
}

func readFrom(nc net.Conn, r io.Reader) (int64, error) {
	if src, ok := r.(Conn); ok { // the kernel must see both sockets
		if err := src.c.enter(src.gen); err != nil {
			return 0, err
		}
		n, err := readFrom(nc, src.c.nc)
		return n, src.c.leave(n, err)
	}
	if rf, ok := nc.(io.ReaderFrom); ok {
		return rf.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{nc}, r)
}

// WriteTo implements io.WriterTo in the same way. An error of w counts as a
// failure of the connection, since bytes were read that nobody got.
func (h Conn) WriteTo(w io.Writer) (int64, error) {
	if err := h.c.enter(h.gen); err != nil {
		return 0, err
	}
	n, err := writeTo(h.c.nc, w)
	return n, h.c.leave(n, err)
}

func writeTo(nc net.Conn, w io.Writer) (int64, error) {
	if dst, ok := w.(Conn); ok {
		if err := dst.c.enter(dst.gen); err != nil {
			return 0, err
		}
		n, err := writeTo(nc, dst.c.nc)
		return n, dst.c.leaveWrite(n, err)
	}
	if wt, ok := nc.(io.WriterTo); ok {
		return wt.WriteTo(w)
	}
	return io.Copy(w, struct{ io.Reader }{nc})
}

// Close discards the connection: it is closed now and never lent again, and
// its slot is free for the next borrower. It interrupts operations that are
// blocked. A second Close is net.ErrClosed.
func (h Conn) Close() error {
	word, err := h.leaveFor(gone)
	if err != nil {
		return err
	}
	if word&hooked != 0 { // the hook's caller finds it broken
		h.c.closeAbruptly()
		return nil
	}
	h.c.stopWatch()
	h.c.pool.discard(h.c, ClosedByBorrower, nil)
	return nil
}

// Detach takes the connection out of the pool for good: its slot is free, and
// the caller owns the result, which is what the dialer or crypto/tls made, with
// no deadline set. State and codecs built by Setup work on. It fails while an
// operation is running, when ctx is done, and in a hook.
func (h Conn) Detach() (net.Conn, error) {
	if _, err := h.leaveFor(gone | detached); err != nil {
		return nil, err
	}
	c, ctx := h.c, h.c.loanCtx
	if !c.stopWatch() {
		c.word.And(^uint64(detached))
		c.pool.discard(c, ClosedCanceled, causeOf(ctx))
		return nil, causeOf(ctx)
	}
	c.nc.SetDeadline(time.Time{})
	c.pool.detached(c)
	return c.nc, nil
}

// leaveFor makes the caller the owner of the connection in the place of the
// borrower, by setting flags, and returns the word as it was.
func (h Conn) leaveFor(flags uint64) (uint64, error) {
	c := h.c
	if c == nil {
		return 0, ErrReturned
	}
	for {
		w := c.word.Load()
		switch {
		case w&lent == 0, h.gen != 0 && w>>genShift != h.gen, w&detached != 0:
			return 0, ErrReturned
		case w&gone != 0:
			return 0, net.ErrClosed
		case flags&detached != 0 && w&hooked != 0:
			return 0, errors.New("connpool: a hook cannot detach a connection")
		case flags&detached != 0 && w&inFlight != 0:
			return 0, errors.New("connpool: cannot detach while an operation is running")
		}
		if c.word.CompareAndSwap(w, w|flags) {
			return w, nil
		}
	}
}

// CloseWrite shuts down the sending side. The connection is closed, not kept,
// when the loan ends. It fails with errors.ErrUnsupported on a connection that
// has no such thing.
func (h Conn) CloseWrite() error {
	if err := h.c.enter(h.gen); err != nil {
		return err
	}
	cw, ok := h.c.nc.(interface{ CloseWrite() error })
	if !ok {
		h.c.leave(0, nil)
		return errors.ErrUnsupported
	}
	h.c.word.Or(halfClosed)
	return h.c.leave(0, cw.CloseWrite())
}

// LocalAddr is the local end, nil after the loan.
func (h Conn) LocalAddr() net.Addr { return h.endpoint(net.Conn.LocalAddr) }

// RemoteAddr is the peer's end, nil after the loan.
func (h Conn) RemoteAddr() net.Addr { return h.endpoint(net.Conn.RemoteAddr) }

func (h Conn) endpoint(of func(net.Conn) net.Addr) net.Addr {
	if h.c.enter(h.gen) != nil {
		return nil
	}
	defer h.c.leave(0, nil)
	return of(h.c.nc)
}

// SetDeadline sets both deadlines, as net.Conn does.
func (h Conn) SetDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetDeadline) }

// SetReadDeadline sets the deadline of reads, as net.Conn does.
func (h Conn) SetReadDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetReadDeadline) }

// SetWriteDeadline sets the deadline of writes, as net.Conn does.
func (h Conn) SetWriteDeadline(t time.Time) error { return h.deadline(t, net.Conn.SetWriteDeadline) }

func (h Conn) deadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if err := h.c.enter(h.gen); err != nil {
		return err
	}
	defer h.c.leave(0, nil)
	return h.c.setDeadline(t, func(t time.Time) error { return set(h.c.nc, t) })
}

// SyscallConn gives access to the socket, also under TLS. What it returns is
// as dead after the loan as the Conn. It fails with errors.ErrUnsupported on a
// connection without a descriptor.
func (h Conn) SyscallConn() (syscall.RawConn, error) {
	if err := h.c.enter(h.gen); err != nil {
		return nil, err
	}
	defer h.c.leave(0, nil)
	if h.c.probe.raw == nil {
		return nil, errors.ErrUnsupported
	}
	return rawLoan{h}, nil
}

// rawLoan is a RawConn that ends with its loan.
type rawLoan struct{ h Conn }

func (r rawLoan) during(op func(syscall.RawConn) error) error {
	if err := r.h.c.enter(r.h.gen); err != nil {
		return err
	}
	defer r.h.c.leave(0, nil)
	return op(r.h.c.probe.raw)
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

// ConnectionState is that of TLS; on other connections and after the loan it is
// the zero value, which says HandshakeComplete false.
func (h Conn) ConnectionState() tls.ConnectionState {
	if h.c.enter(h.gen) != nil {
		return tls.ConnectionState{}
	}
	defer h.c.leave(0, nil)
	if t, ok := h.c.nc.(interface{ ConnectionState() tls.ConnectionState }); ok {
		return t.ConnectionState()
	}
	return tls.ConnectionState{}
}

// Addr is the address that was borrowed, in its canonical form; the zero Addr
// on the zero Conn.
func (h Conn) Addr() Addr {
	if h.c == nil {
		return Addr{}
	}
	return h.c.site.addr
}

// ID is the number of the connection in its pool, from 1; 0 after the loan.
func (h Conn) ID() uint64 { return about(h, func(c *conn) uint64 { return c.id }) }

// Uses counts the loans of the connection, this one included; 0 after the loan.
func (h Conn) Uses() int { return about(h, func(c *conn) int { return c.uses }) }

// Reused reports whether the connection was lent before.
func (h Conn) Reused() bool { return h.Uses() > 1 }

// Age is the time since the connection was opened; 0 after the loan.
func (h Conn) Age() time.Duration {
	return about(h, func(c *conn) time.Duration { return elapsed(c.born, c.pool.now()) })
}

// IdleFor is how long the connection had been unused when it was lent; 0 on
// its first use and after the loan.
func (h Conn) IdleFor() time.Duration {
	return about(h, func(c *conn) time.Duration { return c.idleFor })
}

func about[T any](h Conn, get func(*conn) T) (v T) {
	if h.c.enter(h.gen) == nil {
		v = get(h.c)
		h.c.leave(0, nil)
	}
	return v
}

// State is what Config.Setup returned for the connection of h: its codec, its
// session, its prepared statements. It is the zero T if there was no Setup, if
// Setup returned something that is not a T, or after the loan.
func State[T any](h Conn) T {
	return about(h, func(c *conn) T {
		v, _ := c.state.(T)
		return v
	})
}
