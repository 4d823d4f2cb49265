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

// phase is where a connection is in its life. Only books.moveLocked changes it, and
// only as drawn here and in moves; a test compares the two:
//
//	none     -> dialing   a dial starts
//	dialing  -> borrowed  the dial has worked; releaseLocked takes the connection on from here
//	dialing  -> none      the dial failed before there was a socket to close
//	dialing  -> closing   Setup failed
//	borrowed -> idle      given back, or looked at and fit
//	borrowed -> closing   not to be lent again
//	borrowed -> none      closed in no time, detached, or quarantined
//	idle     -> borrowed  lent, or looked at
//	idle     -> closing   evicted, expired, or found dead
//	closing  -> none      the socket is closed, and the slot free
type phase uint8

const (
	phaseNone     phase = iota
	phaseDialing        // owned by its dial
	phaseIdle           // owned by nobody, on the stack of its site
	phaseBorrowed       // owned by a borrower, by Push, by a sweep that looks at it, or by the dial that has just ended
	phaseClosing        // owned by whoever closes it
	numPhases
)

// moves has for each phase the set of those that may follow.
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

// conn is a connection of the pool's. There may be a hundred thousand of them,
// so what only a loan under a ctx needs is in a lending, and times are instants.
//
// Nothing of one loan is visible in the next: end clears the deadlines, stops
// the watch on ctx and revokes the handles; what cannot be cleared (unread
// bytes, operations in flight, a socket that failed) makes checkout.finish discard it.
type conn struct {
	site *site         // for life
	word atomic.Uint64 // see below

	// Pool.mu guards these; since is the owner's too.
	up, down       *conn         // neighbours in the idle stack
	younger, older *conn         // neighbours in the recency
	since          clock.Instant // given back, or lent, at; see lendAtLocked
	phase          phase
	round          uint8 // the last walk that met it, see recency
	uncounted      bool  // the current loan is not in Stats yet; the owner's too

	deadlineSet bool   // there is one on the socket; dmu, between loans the owner's
	epoch       uint32 // of the site when the dial began

	// The owner's.
	idleFor time.Duration // before this loan
	checked clock.Instant // when Config.Check last said yes
	uses    int           // loans, this one included

	loan atomic.Pointer[loanState] // nil while nothing has to be remembered
	dmu  sync.Mutex                // orders deadlines against the interrupt; nothing else happens under it but SetDeadline

	// Fixed once the dial has ended.
	nc          net.Conn
	sock        socket
	state       any // what Setup returned
	id          uint64
	born        clock.Instant
	maxAge      time.Duration // MaxLifetime less the jitter, drawn once; 0: no limit
	recentLoans *[]pastLoan   // the last ones, in debug mode; dmu

	cold atomic.Pointer[coldFields] // nil but for MinIdlePerAddr, Push and Conn.Context
}

// lending is what a connection remembers while it is lent. Most loans remember
// nothing; the others take one that an earlier loan has left (see forget).
type loanState struct {
	c      *conn
	trace  *Trace      // nil: none
	record *loanRecord // what is known of who has it; nil if nobody wants to know

	// dmu of c guards these once the loan has begun.
	ctx        context.Context // nil if it can never be done
	limit      time.Time       // the ctx's deadline, which no deadline of fn's may exceed
	firstErr   error           // of an operation
	foreignErr bool            // ... or of what the operation copied from or to, see blame

	over    chan struct{} // a foreign connection's operations are left behind when it is closed, see leavable; nil if none can be
	left    bool          // it is closed
	setting chan struct{} // closed when the deadline that is being set is set, see tellDeadline
	mute    bool          // SetDeadline panicked or has not returned, and is not called again

	unwatch   func() bool // stops the watch on ctx
	interrupt func()      // c.interrupt, made once: a method value allocates
}

var loanStates sync.Pool // of *lending

// remember returns the lending of c, which there is from now on.
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

// forget ends what remember began. Only the owner calls it, after a loan that
// ended in good order: no operation is left that could look, and no watch.
func (c *conn) dropLoanState() {
	if l := c.loan.Load(); l != nil {
		c.loan.Store(nil)
		*l = loanState{interrupt: l.interrupt}
		loanStates.Put(l)
	}
}

// observedBy makes t, which has the pool's in it, the trace of the loan.
func (c *conn) observedBy(t *Trace) {
	if c.loan.Load() != nil || t != c.site.pool.cfg.Trace {
		c.loanState().trace = t
	}
}

// trace is that of the loan, or of the pool.
func (c *conn) trace() *Trace {
	if l := c.loan.Load(); l != nil && l.trace != nil {
		return l.trace
	}
	return c.site.pool.cfg.Trace
}

// The state word:
//
//	 63            26 25         14 13           0
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
//
// An example: the third loan of a connection, which one goroutine closes while another
// is blocked in Read.
//
//	With: begin   generation 3, lent              the loan stands
//	Read: enter   generation 3, 1 op, lent
//	Close         generation 3, 1 op, lent gone   the caller of Close owns the connection
//	... discard   generation 3, 1 op, lent gone shut
//	Read: leave   generation 3, 0 ops, ...        the operation failed, as the socket is closed
//	With: end     generation 3, gone shut ...     lent is cleared; With finds gone and touches nothing
//
// A Conn of this loan that is used later finds lent cleared, or a later generation, and
// answers ErrReturned.
const (
	flagLent       = 1 << iota // a loan stands
	flagHooked                 // ... and it is that of a hook: it cannot end by gone
	flagGone                   // the connection was closed or detached by its borrower
	flagDetached               // ... detached: the guard stays open
	flagCut                    // the ctx was done
	flagMoved                  // bytes were read or written in this loan, or may have been
	flagBroken                 // an operation failed
	flagTimedOut               // an operation timed out
	flagHalfClosed             // closed for writing
	flagHungUp                 // the peer was seen to hang up
	flagStolen                 // the descriptor is proven to be another socket's
	flagShut                   // the pool closes, or has closed, the socket
	flagWrote                  // a borrower has written, in this loan or before; see lived.go
	flagRead                   // ... and read

	oneOp    = 1 << 14
	inFlight = (1<<12 - 1) << 14
	genShift = 26
	lastGen  = 1<<(64-genShift) - 1 // the next one is 1 again
)

var aLongTimeAgo = time.Unix(1, 0)

// adopt makes nc the socket of c.
func (c *conn) adopt(nc net.Conn) {
	p := c.site.pool
	c.nc = nc
	c.born = p.clock.Exactly()
	c.since = c.born
	if m := p.cfg.MaxLifetime; m > 0 {
		c.maxAge = m - rand.N(m/10+1)
	}
	c.sock.init(nc, p.sys, &p.cfg)
}

// link puts c on the idle stack of its site: on top, or, in order, where its
// last use puts it.
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

// lendAtLocked books that c, which nobody had, has an owner. now was read before
// the lock was had, and may be behind what was booked meanwhile.
//
// As long as the owner has c, since is when that began, and idleFor how long c had
// been unused before; parked untouched, c is as old again as if nobody had had it.
func (c *conn) lendAtLocked(now clock.Instant) {
	now = max(now, c.since)
	c.idleFor, c.since = now.Sub(c.since), now
}

// unusedSince is when c was given back, for one on the idle stack.
func (c *conn) unusedSince() clock.Instant {
	if c.phase == phaseIdle {
		return c.since
	}
	return c.since - clock.Instant(c.idleFor)
}

// linked reports whether c is on the idle stack: if it is idle; and if it is being
// looked at, and no borrower has come by since. So a look ends where it began,
// however many others lie on top.
func (c *conn) linked() bool { return c.up != nil || c.site.top == c }

// topLocked is the idle connection of s that was given back last; nil if there is
// none. What is being looked at, and lies on top of that, is taken off the stack.
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

func (c *conn) generation() uint64 { return c.word.Load() >> genShift }

// begin starts a loan under ctx. Only the owner calls it.
func (c *conn) begin(ctx context.Context, flags uint64) Conn {
	l := c.loan.Load()
	if l != nil { // of the loan that this one, a hook's, is part of
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
		// What others find out about the connection outlives the change.
		w := c.word.Load()
		if gen = (w>>genShift + 1) & lastGen; gen == 0 {
			gen = 1 // 0 is the guard's
		}
		if c.word.CompareAndSwap(w, gen<<genShift|w&(flagHungUp|flagStolen|flagBroken|flagWrote|flagRead)|flagLent|flags) {
			break
		}
	}
	if watch {
		l.unwatch = context.AfterFunc(ctx, l.interrupt)
	}
	if c.site.pool.cfg.Debug {
		c.recordBorrower(gen)
	}
	return Conn{c, gen}
}

// interrupt makes blocked operations of the loan return. It runs when the
// loan's ctx is done. If the loan has ended meanwhile, stopping the watch has
// failed, and the connection is discarded.
func (c *conn) interrupt(l *loanState) {
	defer func() {
		if v := recover(); v != nil { // from a ctx of the caller's making
			c.site.pool.report.log(slog.LevelError, "interrupting a loan panicked", "addr", c.site.addr, "panic", v)
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

// cutShort marks the loan as one whose ctx was done. It reports false if the connection
// was detached, inside a use inside the loan (see nest): it is not the pool's to
// interrupt any more.
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

// end ends the loan and returns the word as it was. Unless that says gone, the
// caller is the owner again. Calling it again does nothing.
func (c *conn) end() uint64 {
	word := c.word.And(^uint64(flagLent))
	if word&flagGone == 0 || word&flagHooked != 0 {
		if !c.stopWatch() {
			word |= flagCut
		}
		if word&(inFlight|flagCut|flagGone) == 0 && c.deadlineSet { // else somebody else may be at it
			if c.clearDeadline() != nil {
				word |= flagBroken // or it would strike the next borrower
			}
		}
	}
	return word
}

// abort ends a loan whose connection will be discarded, and runs no foreign
// code. It reports whether the caller is the owner.
func (c *conn) abort() bool {
	if c.word.And(^uint64(flagLent))&flagGone != 0 {
		return false
	}
	c.stopWatch()
	return true
}

// stopWatch reports whether the ctx of the loan had no effect, and will have
// none. Only the owner calls it.
func (c *conn) stopWatch() bool {
	l := c.loan.Load()
	if l == nil || l.unwatch == nil {
		return true
	}
	if !l.unwatch() {
		return false
	}
	c.dmu.Lock() // a guard that was detached may set deadlines already
	l.unwatch, l.ctx, l.limit = nil, nil, time.Time{}
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
		case gen == 0 && w&flagDetached != 0:
		case w&flagLent == 0, gen != 0 && w>>genShift != gen, w&flagDetached != 0:
			c.reportUseAfterReturn(gen)
			return ErrReturned
		case w&(flagGone|flagCut) == flagGone|flagCut: // by the pool, as deadlines had no effect
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

// leave ends an operation that moved n bytes and got err, and returns the error
// to report.
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
		// A dialer's crypto/tls may have read what it did not hand over,
		// so it is asked. What the error says depends on moved.
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

// leaveWrite is leave for an operation that wrote. A write that timed out is as
// bad as one that failed: half of it may be out, and crypto/tls never writes
// again.
func (c *conn) leaveWrite(n int64, err error) error {
	if err != nil {
		c.word.Or(flagBroken)
	}
	if n > 0 {
		c.noteTraffic(flagWrote)
	}
	return c.leave(n, err)
}

// note remembers that an operation failed, and says whose time ran out.
func (c *conn) note(err error) error {
	if _, known := err.(*net.OpError); !known && err != io.EOF {
		err = tame(err) // it is a foreign connection's, or of the other end of a copy
	}
	if errors.Is(err, net.ErrClosed) && c.word.Load()&(flagGone|flagCut) == flagGone {
		return err
	}
	// The system's own ETIMEDOUT says Timeout, too, but no deadline passed: the peer
	// has answered neither data nor probes, and the connection is gone.
	// Nor is it this connection's deadline that a borrow of a transport's own met.
	ne, ok := err.(net.Error)
	if _, borrow := err.(*Error); borrow {
		ok = false
	}
	late := ok && ne.Timeout() && !errors.Is(err, sock.ErrTimedOut)
	_, left := err.(*lateError) // the operation still runs, and may yet read what is for others
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
			if l.ctx.Err() == context.Canceled { // whatever the cause is made of
				ioe.kind = KindCanceled
			}
		case !l.limit.IsZero() && !c.site.pool.clock.Read().Before(l.limit):
			// The socket's clock was a moment faster than the ctx's.
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

func ioErrorOf(word uint64, err error) *ioError {
	ioe := &ioError{kind: KindTimeout, err: spent(err)}
	if word&flagMoved != 0 {
		ioe.kind = KindTimeoutInTransfer
	}
	return ioe
}

// failure is the first error of the loan.
func (c *conn) failure() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil {
		return l.firstErr
	}
	return nil
}

// interruption is why the loan was interrupted: its ctx was done, or that of a
// use inside it, which is forgotten.
func (c *conn) interruption() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil && l.ctx != nil && l.ctx.Err() != nil {
		return causeOf(l.ctx)
	}
	return context.Canceled
}

// setDeadline applies a deadline of fn's. The ctx has the last word.
func (c *conn) setDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if c.sock.foreign {
		return c.setForeignDeadline(t, set)
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.word.Load()&flagCut != 0 {
		return nil // interrupted: the past deadline stays
	}
	c.deadlineSet = true
	return set(c.nc, c.limited(t))
}

// limited is t, or the deadline of the loan's ctx if that comes first. It needs dmu.
func (c *conn) limited(t time.Time) time.Time {
	if l := c.loan.Load(); l != nil && !l.limit.IsZero() && (t.IsZero() || t.After(l.limit)) {
		return l.limit
	}
	return t
}
