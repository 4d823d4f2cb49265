package connpool

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// phase is the phase in a connection's life. Only books.moveLocked changes it, and only
// as drawn here and in phaseMoves; a test compares the two:
//
//	none     -> dialing   a dial starts
//	dialing  -> borrowed  the dial has worked; releaseLocked decides who gets the connection
//	dialing  -> none      the dial failed before there was a socket to close
//	dialing  -> closing   Setup failed
//	borrowed -> idle      given back, or probed and found fit
//	borrowed -> closing   not to be lent again
//	borrowed -> none      closed without blocking, detached, or quarantined
//	idle     -> borrowed  lent, or taken off for a probe
//	idle     -> closing   evicted, expired, or found dead
//	closing  -> none      the socket is closed, and the slot is free
type phase uint8

const (
	phaseNone     phase = iota
	phaseDialing        // owned by its dial
	phaseIdle           // owned by nobody, on the stack of its site
	phaseBorrowed       // owned by a borrower, by Push, by a sweep that probes it, or by the dial that has just ended
	phaseClosing        // owned by whoever closes it
	numPhases
)

// phaseMoves has for each phase the set of the phases that may follow it.
var phaseMoves = [numPhases]uint8{
	phaseNone:     1 << phaseDialing,
	phaseDialing:  1<<phaseBorrowed | 1<<phaseNone | 1<<phaseClosing,
	phaseIdle:     1<<phaseBorrowed | 1<<phaseClosing,
	phaseBorrowed: 1<<phaseIdle | 1<<phaseClosing | 1<<phaseNone,
	phaseClosing:  1 << phaseNone,
}

func (ph phase) String() string {
	return [numPhases]string{"none", "dialing", "idle", "borrowed", "closing"}[ph]
}

// conn is one connection of the pool. There may be a hundred thousand of them. To keep
// a conn small, the fields that only some loans need are in a loanState, the fields
// that few connections need are in coldFields, and times are instants.
//
// Nothing of one loan is visible in the next one. end clears the deadlines, stops the
// watch on ctx and revokes the handles. If something is left that end cannot clear
// (unread bytes, operations in flight, a socket that failed), checkout.finish discards
// the connection.
type conn struct {
	site *site         // never changes
	word atomic.Uint64 // the state word, drawn below

	// Pool.mu guards these; the owner may also use since.
	up, down       *conn         // neighbours in the idle stack
	younger, older *conn         // neighbours in recency, the order by last use
	since          clock.Instant // when it was given back, or, while it has an owner, when the owner got it; see lendAtLocked
	phase          phase
	round          uint8 // the last walk that visited it, see recency
	uncounted      bool  // the current loan is not in Stats yet; the owner may also use this field

	deadlineSet bool   // the socket has a deadline; dmu guards this during a loan, the owner uses it between loans
	epoch       uint32 // epoch of the site when the dial began

	// Only the owner uses these.
	idleFor time.Duration // how long it had been unused before this loan
	checked clock.Instant // when Config.Check last succeeded
	uses    int           // loans, this one included

	loan atomic.Pointer[loanState] // nil while the loan needs no state
	dmu  sync.Mutex                // orders SetDeadline against the interrupt, and guards the fields that name it; nothing that blocks runs under it but SetDeadline of package net

	// Fixed once the dial has ended.
	nc          net.Conn
	sock        socket
	state       any // what Setup returned
	id          uint64
	born        clock.Instant
	maxAge      time.Duration // MaxLifetime less the jitter, drawn once; 0: no limit
	recentLoans *[]pastLoan   // the latest loans, in debug mode; dmu

	cold atomic.Pointer[coldFields] // nil for most connections, see coldFields
}

// loanState is the state of a loan that needs more than the state word. Most loans need
// none. The others take a loanState from a pool of used ones (see dropLoanState).
type loanState struct {
	c      *conn
	trace  *Trace      // nil: none
	record *loanRecord // who has the connection, since when; nil if loans are not recorded

	// dmu of c guards these once the loan has begun.
	ctx        context.Context // nil if the loan's ctx can never be done
	limit      time.Time       // deadline of the ctx, which no deadline that fn sets may exceed; zero: none
	firstErr   error           // first error of an operation, or of a deadline that could not be set
	foreignErr bool            // the reader or writer that an operation copied from or to has failed, or may have; see noteForeignError

	over    chan struct{} // closed when the loan leaves the operations of a foreign connection behind, see leavable; nil if it never does
	left    bool          // over is closed
	setting chan struct{} // closed when the SetDeadline call in progress is over, see tellDeadline; nil: none is in progress
	mute    bool          // SetDeadline panicked or has not returned, and is not called again

	unwatch   func() bool // stops the watch on ctx
	interrupt func()      // c.interrupt, made once: a method value allocates
}

var loanStates sync.Pool // of *loanState

// loanState returns the state of the loan of c, and makes one if there is none yet.
func (c *conn) loanState() *loanState {
	for {
		if l := c.loan.Load(); l != nil {
			return l
		}
		l, _ := loanStates.Get().(*loanState)
		if l == nil {
			l = new(loanState)
			l.interrupt = func() { l.c.interrupt(l) }
		}
		l.c = c
		if c.loan.CompareAndSwap(nil, l) {
			return l
		}
	}
}

// dropLoanState puts the loanState of c back into the pool of used ones. Only the owner
// calls it, after a loan that ended in good order: no operation and no watch is left
// that could still use the loanState.
func (c *conn) dropLoanState() {
	if l := c.loan.Load(); l != nil {
		c.loan.Store(nil)
		*l = loanState{interrupt: l.interrupt}
		loanStates.Put(l)
	}
}

// observedBy makes t the Trace of the loan. t includes the pool's Trace.
func (c *conn) observedBy(t *Trace) {
	if c.loan.Load() != nil || t != c.site.env.cfg.Trace {
		c.loanState().trace = t
	}
}

// trace returns the Trace of the loan if the loan has one, else the pool's; nil if
// there is neither.
func (c *conn) trace() *Trace {
	if l := c.loan.Load(); l != nil && l.trace != nil {
		return l.trace
	}
	return c.site.env.cfg.Trace
}

// The state word:
//
//	 63            26 25         14 13           0
//	+----------------+-------------+--------------+
//	|   generation   | operations  |    flags     |
//	|  of the loan   | in flight   |              |
//	+----------------+-------------+--------------+
//
// A handle (a Conn) carries the generation of its loan. An operation of the handle
// begins with a compare-and-swap (enter): flagLent must be set, the generation must be
// equal, and the count of operations goes up. The operation ends with a subtraction
// (leave). The loan ends in one step that clears flagLent (end, abort), so no operation
// can begin after it. Operations that are still counted at that moment make the
// connection unfit to be lent again. Whoever sets flagGone (Conn.Close, Conn.Detach,
// revoke) becomes the owner in the place of the borrower.
//
// The guard is the net.Conn that Config.Setup got: a handle that outlives the loans. It
// has generation 0, and works in whichever loan is under way. Between two loans it
// fails with ErrReturned.
//
// An example: the third loan of a connection. One goroutine closes the connection while
// another is blocked in Read.
//
//	With: begin   generation 3, lent              the loan is under way
//	Read: enter   generation 3, 1 op, lent
//	Close         generation 3, 1 op, lent gone   the caller of Close owns the connection
//	... discard   generation 3, 1 op, lent gone shut
//	Read: leave   generation 3, 0 ops, ...        the operation failed, as the socket is closed
//	With: end     generation 3, gone shut ...     lent is cleared; With finds gone and touches nothing
//
// If a Conn of this loan is used later, it finds flagLent cleared or another
// generation, and returns ErrReturned.
//
// A second example: the ctx of the fourth loan is done while fn is blocked in Read on a
// socket of package net.
//
//	With: begin   generation 4, lent              the watch on ctx is set
//	Read: enter   generation 4, 1 op, lent
//	interrupt     generation 4, 1 op, lent cut    the deadline is now in the past
//	Read: leave   generation 4, 0 ops, ... timedOut
//	With: end     generation 4, cut timedOut      the verdict finds cut: the pool closes the connection
//
// A new loan (begin) clears all flags but hungUp, stolen, broken, wrote and read: other
// goroutines may set the first three at any moment, and the last two count over all
// loans.
const (
	flagLent       = 1 << iota // a loan is under way
	flagHooked                 // the loan is a hook's: Close of the hook's Conn does not make its caller the owner
	flagGone                   // the borrower has closed or detached the connection, or the pool has closed it after its ctx was done (revoke)
	flagDetached               // set together with flagGone by Detach; the guard keeps working
	flagCut                    // the ctx of the loan, or of a use nested in it, was done
	flagMoved                  // this loan has read or written bytes, or may have
	flagBroken                 // an operation failed
	flagTimedOut               // an operation timed out
	flagHalfClosed             // the sending side was shut down (CloseWrite), or fn expected the end of the stream, see noteContent
	flagHungUp                 // the peer was seen to hang up; the next probe must look
	flagStolen                 // the descriptor is proven to be another socket's
	flagShut                   // the pool closes the socket, or has closed it
	flagWrote                  // a borrower has written, in this loan or an earlier one; see lived.go
	flagRead                   // a borrower has read, likewise

	oneOp    = 1 << 14
	inFlight = (1<<12 - 1) << 14
	genShift = 26
	lastGen  = 1<<(64-genShift) - 1 // the generation after it is 1
)

// aLongTimeAgo is a deadline that makes blocked operations return at once.
var aLongTimeAgo = time.Unix(1, 0)

// adopt makes nc the socket of c.
func (c *conn) adopt(nc net.Conn) {
	env := c.site.env
	c.nc = nc
	c.born = env.clock.Exactly()
	c.since = c.born
	if m := env.cfg.MaxLifetime; m > 0 {
		c.maxAge = m - rand.N(m/10+1)
	}
	c.sock.init(nc, env.sys, &env.cfg)
}

// link puts c on the idle stack of its site: on top, or, if inOrder, at the place that
// fits the time of its last use.
func (c *conn) link(inOrder bool) {
	s := c.site
	above, below := (*conn)(nil), s.top
	for inOrder && below != nil && below.unusedSince() > c.since {
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

// lendAtLocked records that c, which was idle, has an owner from now on. now was read
// before the caller had the lock, so it may be earlier than c.since.
//
// While c has an owner, since is when the owner got c, and idleFor is how long c had
// been unused before. A connection that goes back to the idle stack unused gets its
// earlier since again.
func (c *conn) lendAtLocked(now clock.Instant) {
	now = max(now, c.since)
	c.idleFor, c.since = now.Sub(c.since), now
}

// unusedSince returns since when c has been unused: since it was given back if c is
// idle, else since the give-back before its current owner got it.
func (c *conn) unusedSince() clock.Instant {
	if c.phase == phaseIdle {
		return c.since
	}
	return c.since - clock.Instant(c.idleFor)
}

// linked reports whether c is on the idle stack of its site. An idle connection is. A
// connection that is being probed keeps its place on the stack until a borrower takes
// what lies below it, so that it goes back to the same place after the probe, however
// many others lie on top.
func (c *conn) linked() bool { return c.up != nil || c.site.top == c }

// topLocked returns the idle connection of s that was given back last, nil if s has
// none. It takes the connections that are being probed, and lie on top of that one, off
// the stack.
func (s *site) topLocked() *conn {
	if s.n[phaseIdle] == 0 {
		return nil
	}
	for s.top.phase != phaseIdle {
		s.top.unlink()
	}
	return s.top
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

// generation returns the generation of the current loan, or of the last one.
func (c *conn) generation() uint64 { return c.word.Load() >> genShift }

// begin starts a loan under ctx and returns its handle. flags are set in the state
// word. Only the owner calls it.
func (c *conn) begin(ctx context.Context, flags uint64) Conn {
	l := c.loan.Load()
	if l != nil { // left over from the loan that this one, a hook's, is part of
		l.ctx, l.limit, l.firstErr, l.foreignErr, l.over = nil, time.Time{}, nil, false, nil
	}
	watch := ctx.Done() != nil
	if watch {
		l = c.loanState()
		l.ctx = ctx
		if c.sock.foreign {
			l.over, l.left = make(chan struct{}), false
		}
		if t, ok := ctx.Deadline(); ok {
			l.limit = t
			c.startDeadline(l, t)
		}
	}
	var gen uint64
	for {
		// Other goroutines may set flagHungUp, flagStolen or flagBroken at any moment:
		// the new loan keeps these.
		w := c.word.Load()
		if gen = (w>>genShift + 1) & lastGen; gen == 0 {
			gen = 1 // 0 is the generation of the guard
		}
		if c.word.CompareAndSwap(w, gen<<genShift|w&(flagHungUp|flagStolen|flagBroken|flagWrote|flagRead)|flagLent|flags) {
			break
		}
	}
	if watch {
		l.unwatch = context.AfterFunc(ctx, l.interrupt)
	}
	if c.site.env.cfg.Debug {
		c.recordBorrower(gen)
	}
	return Conn{c, gen}
}

// interrupt makes blocked operations of the loan return. It runs when the loan's ctx is
// done. If the loan has ended in the meantime, stopping the watch has failed, and the
// owner discards the connection.
func (c *conn) interrupt(l *loanState) {
	defer func() {
		if v := recover(); v != nil { // from a ctx of the caller's making
			c.site.env.report.log(slog.LevelError, "interrupting a loan panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	if !c.cutShort() {
		return
	}
	if c.sock.foreign {
		c.interruptForeign(l)
		return
	}
	c.dmu.Lock()
	c.deadlineSet = true
	err := c.nc.SetDeadline(aLongTimeAgo)
	c.dmu.Unlock()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		c.revoke()
	}
}

// cutShort sets flagCut: the loan's ctx was done. It reports false if the connection
// was detached (also by a use nested in this one, see underCtx): the pool must not
// interrupt a detached connection.
func (c *conn) cutShort() bool {
	for {
		w := c.word.Load()
		if w&flagDetached != 0 {
			return false
		}
		if c.word.CompareAndSwap(w, w|flagCut) {
			return true
		}
	}
}

// end ends the loan and returns the state word as it was before. Unless that has
// flagGone, the caller is the owner again. A second call does nothing.
func (c *conn) end() uint64 {
	word := c.word.And(^uint64(flagLent))
	if word&flagGone == 0 || word&flagHooked != 0 {
		if !c.stopWatch() {
			word |= flagCut
		}
		if word&(inFlight|flagCut|flagGone) == 0 && c.deadlineSet { // with one of these flags another goroutine may be setting a deadline
			if c.clearDeadline() != nil {
				word |= flagBroken // a deadline that cannot be cleared would strike the next borrower
			}
		}
	}
	return word
}

// abort ends a loan whose connection the caller will discard, without calling foreign
// code. It reports whether the caller is the owner.
func (c *conn) abort() bool {
	if c.word.And(^uint64(flagLent))&flagGone != 0 {
		return false
	}
	c.stopWatch()
	return true
}

// stopWatch stops the watch on the loan's ctx. It reports false if the interrupt has
// begun already. Only the owner calls it.
func (c *conn) stopWatch() bool {
	l := c.loan.Load()
	if l == nil || l.unwatch == nil {
		return true
	}
	if !l.unwatch() {
		return false
	}
	c.dmu.Lock() // the guard of a detached connection may be setting deadlines already
	l.unwatch, l.ctx, l.limit = nil, nil, time.Time{}
	c.dmu.Unlock()
	return true
}

// enter begins an operation of the loan with generation gen; 0 is the guard. After a
// nil error the caller must call leave, leaveRead or leaveWrite.
func (c *conn) enter(gen uint64) error {
	if c == nil {
		return ErrReturned
	}
	for {
		w := c.word.Load()
		switch {
		case gen == 0 && w&flagDetached != 0:
		case w&flagLent == 0, gen != 0 && w>>genShift != gen, w&flagDetached != 0:
			c.reportUseAfterReturn(gen)
			return ErrReturned
		case w&(flagGone|flagCut) == flagGone|flagCut: // the pool has closed the connection, because a deadline had no effect
			return c.note(os.ErrDeadlineExceeded)
		case w&flagGone != 0:
			return net.ErrClosed
		case w&inFlight == inFlight:
			return errors.New("connpool: too many operations at once on one connection")
		case w&flagStolen != 0:
			return errStolen
		}
		if c.word.CompareAndSwap(w, w+oneOp) {
			return nil
		}
	}
}

// leave ends an operation that moved n bytes and returned err. It returns the error to
// report.
func (c *conn) leave(n int64, err error) error {
	if n > 0 && c.word.Load()&flagMoved == 0 {
		c.word.Or(flagMoved)
	}
	if err != nil {
		err = c.note(err)
	}
	c.word.Add(^uint64(oneOp - 1))
	return err
}

// leaveRead is leave for an operation that read.
func (c *conn) leaveRead(n int64, err error) error {
	if sock := c.sock.belowTLS(); sock != nil {
		sock.record.Delivered(n)
	} else if err != nil && c.sock.tls != nil {
		// The crypto/tls of a dialer's own *tls.Conn may have read more than it
		// returned. flagMoved makes leftovers ask it. note runs first, because the kind
		// of its error depends on flagMoved.
		err = c.note(err)
		c.word.Or(flagMoved)
		c.word.Add(^uint64(oneOp - 1))
		return err
	}
	if n > 0 {
		c.noteTraffic(flagRead)
	}
	return c.leave(n, err)
}

// leaveWrite is leave for an operation that wrote. A write that timed out is as bad as
// a write that failed: a part of the bytes may have been sent, and crypto/tls refuses
// every later write.
func (c *conn) leaveWrite(n int64, err error) error {
	if err != nil {
		c.word.Or(flagBroken)
	}
	if n > 0 {
		c.noteTraffic(flagWrote)
	}
	return c.leave(n, err)
}

// note records that an operation failed, and returns the error to report. If time ran
// out, that error says whether it was the time of the loan's ctx.
func (c *conn) note(err error) error {
	if _, known := err.(*net.OpError); !known && err != io.EOF {
		err = tame(err) // the error of a foreign connection, or of the other end of a copy
	}
	if errors.Is(err, net.ErrClosed) && c.word.Load()&(flagGone|flagCut) == flagGone {
		return err
	}
	// ETIMEDOUT of the system also has Timeout() true, but no deadline has passed: the
	// peer has answered neither data nor keep-alive probes, and the connection is dead.
	// A time-out of a nested borrow (*Error) is not a deadline of this connection
	// either.
	ne, ok := err.(net.Error)
	if _, borrow := err.(*Error); borrow {
		ok = false
	}
	late := ok && ne.Timeout() && !errors.Is(err, sock.ErrTimedOut)
	_, left := err.(*lateError) // the operation still runs, and may read bytes that belong to others
	if late && !left {
		c.word.Or(flagTimedOut)
	} else {
		c.word.Or(flagBroken)
	}
	word := c.word.Load()
	if word&flagDetached != 0 {
		if late {
			err = ioErrorOf(word, err)
		}
		return err
	}
	l := c.loanState()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if late || word&flagCut != 0 {
		ioe := ioErrorOf(word, err)
		switch {
		case l.ctx == nil:
		case l.ctx.Err() != nil:
			ioe.cause = causeOf(l.ctx)
			if l.ctx.Err() == context.Canceled { // whatever type the cause has
				ioe.kind = KindCanceled
			}
		case !l.limit.IsZero() && !c.site.env.clock.Read().Before(l.limit):
			// The deadline of the socket fired a moment before the ctx was done.
			ioe.cause = context.DeadlineExceeded
			c.word.Or(flagCut)
		}
		err = ioe
	}
	if l.firstErr == nil {
		l.firstErr = err
	}
	return err
}

// ioErrorOf returns err as a time-out. Its kind says whether the loan has moved bytes.
func ioErrorOf(word uint64, err error) *ioError {
	ioe := &ioError{kind: KindTimeout, err: spent(err)}
	if word&flagMoved != 0 {
		ioe.kind = KindTimeoutInTransfer
	}
	return ioe
}

// failure returns the first error of the loan, nil if there was none.
func (c *conn) failure() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil {
		return l.firstErr
	}
	return nil
}

// interruption returns why the loan was interrupted: the cause of its ctx. If the ctx
// of a nested use was done, that ctx is no longer known, and the error is
// context.Canceled.
func (c *conn) interruption() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil && l.ctx != nil && l.ctx.Err() != nil {
		return causeOf(l.ctx)
	}
	return context.Canceled
}

// setDeadline sets a deadline for fn, at most the deadline of the loan's ctx.
func (c *conn) setDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if c.sock.foreign {
		return c.setForeignDeadline(t, set)
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.word.Load()&flagCut != 0 {
		return nil // interrupted: the deadline in the past stays
	}
	c.deadlineSet = true
	return set(c.nc, c.limited(t))
}

// limited returns t, or the deadline of the loan's ctx if that is earlier. The caller
// holds dmu.
func (c *conn) limited(t time.Time) time.Time {
	if l := c.loan.Load(); l != nil && !l.limit.IsZero() && (t.IsZero() || t.After(l.limit)) {
		return l.limit
	}
	return t
}
