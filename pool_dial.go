package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// A dial belongs to the pool. It is started for the oldest waiter that has
// none, runs under that waiter's ctx values but not its cancellation, and
// serves whoever is the oldest when it ends. But its error is for the waiter for
// whom it was started, and for nobody else: what the dialer and Setup make of
// that waiter's values may be the cause. From the moment it is started its
// connection holds a slot.

// dialError is a dial's failure with its stage, on its way to a waiter.
type dialError struct {
	stage Stage
	err   error

	local    bool // see isLocal
	noHandle bool // it is ErrNoneRemovable
}

// failedDial makes a dialError. It asks the error all that is to be known of it under
// Pool.mu, where nobody may call its methods.
func failedDial(stage Stage, err error) *dialError {
	e := &dialError{stage: stage, err: err, noHandle: errors.Is(err, ErrNoneRemovable)}
	e.local = e.isLocal()
	return e
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// isLocal reports whether the dial failed for want of something local, which says
// nothing about the peer. What Setup returned may be the want of somebody else: of
// another pool, whose address this one is not, or of a server's it has asked.
func (e *dialError) isLocal() bool {
	var other *Error
	if e.stage == StageSetup || errors.As(e.err, &other) {
		return false
	}
	kind := KindOf(e.err)
	return kind == KindResource || kind == KindUsage
}

// attempt is one dial under way.
type attempt struct {
	c   *conn
	ctx context.Context // of the borrower for whom it was started: its values

	waiter *waiter // ... as it was then; nil if it was started for nobody who waits

	// Pool.mu guards these.
	newer, older *attempt           // among those of the site that waiters count on
	surplus      bool               // it is not one of them any more: the pool breaks it off
	displaced    bool               // ... for another address
	quiet        bool               // it has gone without an answer for a while, see silence.go
	brokenOff    bool               // when it ended, the pool was the cause, whatever its error says
	prefill      bool               // it was started for no waiter, and is never surplus
	warm         *warming           // for which it was started, if for one
	giveUp       context.CancelFunc // nil before it runs

	since clock.Instant // when it began, 0 before

	reached atomic.Uint32 // a copy of stage, for who asks meanwhile

	where string // the foreign code that runs
	ours  bool   // the socket below is dialled by the pool itself
	stage Stage
	err   error
	ended bool // open returned, rather than panicked
	state any  // what Setup returned

	mu      sync.Mutex // guards what follows; nothing else happens under it
	socket  net.Conn   // what was dialled and c has not adopted: whoever books a failure closes it
	adopted bool       // c has its socket, and the guard of Setup is open
	claimed bool       // somebody has booked, or is booking, the outcome
}

// enter says how far the dial has come.
func (a *attempt) enter(s Stage) {
	a.stage = s
	a.reached.Store(uint32(s))
}

// hold makes nc the attempt's to close, until c adopts it.
func (a *attempt) hold(nc net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.socket = nc
}

// wrap puts nc, which closes it, in the place of the socket, and reports false if
// that was given up meanwhile.
func (a *attempt) wrap(nc net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.socket == nil {
		return false
	}
	a.socket = nc
	return true
}

// closeSocket closes what was dialled and not adopted, for closeTimeout at most.
func (a *attempt) closeSocket() {
	a.mu.Lock()
	nc := a.socket
	a.socket = nil
	a.mu.Unlock()
	if nc != nil {
		a.closeUnowned(nc)
	}
}

// settle makes the caller the one who books the outcome, if nobody was before.
func (a *attempt) claim() (mine, adopted bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	mine = !a.claimed
	a.claimed = true
	return mine, a.adopted
}

func (a *attempt) isClaimed() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.claimed
}

// dial opens c for the pool and books the outcome, whatever the dialer and the
// hooks do: return, panic, end their goroutine, or never come back.
func (a *attempt) dial() {
	p := a.c.site.pool
	p.handles.refresh(p.sys)
	t := p.cfg.Trace
	cancel := context.CancelFunc(func() {})
	c, start := a.c, p.clock.Exactly()
	var traced atomic.Pointer[Trace] // t, for who books the outcome meanwhile
	traced.Store(t)
	var late *time.Timer
	if p.cfg.DialTimeout > 0 {
		late = time.AfterFunc(p.cfg.DialTimeout+hookGrace, func() {
			if mine, adopted := a.claim(); mine {
				p.report.noteAbandoned("a dial", c.site.addr)
				a.abandon(adopted, start, traced.Load())
			}
		})
	}
	defer func() {
		if late != nil {
			late.Stop()
		}
		if !a.ended {
			a.err = panicOf(a.where, recover()) // or a runtime.Goexit
		}
		a.dialEnded(start, t, cancel)
	}()
	a.stage, a.where = StageDial, "a method of the borrower's ctx"
	t = p.cfg.trace(a.ctx)
	traced.Store(t)
	ctx := a.ctx
	if !c.site.unpooled() { // else it can serve nobody but the caller
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel = p.within(ctx, p.cfg.DialTimeout)
	a.enter(StageDial)
	p.mu.Lock()
	if a.isClaimed() { // the borrower's ctx took too long, and the outcome is booked, or about to be
		p.mu.Unlock()
		a.err, a.ended = ctx.Err(), true
		return
	}
	a.giveUp, a.since = cancel, start
	surplus, answers := a.surplus, c.site.queue.answers
	p.mu.Unlock()
	if surplus {
		cancel()
	}
	hush := time.AfterFunc(silence, func() { a.hush(answers) })
	defer hush.Stop()

	a.err = tame(a.open(ctx))
	a.ended = true
}

// dialEnded is deferred by dial, and is the end of it however that came.
func (a *attempt) dialEnded(start clock.Instant, t *Trace, cancel context.CancelFunc) {
	defer cancel()
	if a.err != nil {
		a.closeSocket()
	}
	if mine, _ := a.claim(); !mine {
		a.closeSocket()
		if s, ok := a.state.(io.Closer); ok {
			defer func() { _ = recover() }()
			s.Close()
		}
		return
	}
	a.handState()
	if a.err == nil {
		a.noteDialed(start, t, nil)
		return
	}
	a.dialFailed(start, t, a.err)
}

// dialFailed books a dial that came to nothing. If there is a socket already,
// the slot is free when it is closed.
func (a *attempt) dialFailed(start clock.Instant, t *Trace, err error) {
	a.noteDialed(start, t, failedDial(a.stage, err))
	if a.stage == StageSetup {
		a.c.discard(ClosedSetupFailed, err)
	}
}

// abandon goes on without a dialer, handshake or Setup that has not come
// back long after its ctx was done. What it returns at last is closed.
func (a *attempt) abandon(adopted bool, start clock.Instant, t *Trace) {
	late := fmt.Errorf("it ignores its ctx: %w", context.DeadlineExceeded)
	if !adopted {
		go a.closeSocket()
		a.noteDialed(start, t, failedDial(StageDial, fmt.Errorf("dialer: %w", late)))
		return
	}
	a.c.word.And(^uint64(flagLent)) // shuts the guard
	late = fmt.Errorf("Config.Setup: %w", late)
	a.noteDialed(start, t, failedDial(StageSetup, late))
	a.c.discard(ClosedSetupFailed, late)
}

// open dials, shakes hands and sets up.
func (a *attempt) open(ctx context.Context) error {
	p := a.c.site.pool
	c := a.c
	nc, err := a.connect(ctx)
	if err != nil {
		return err
	}
	a.where = "SyscallConn or NetConn of the connection"
	c.adopt(nc)
	a.enter(StageSetup)
	a.where = "Config.Setup"
	setup := p.cfg.Setup
	if c.site.unpooled() {
		setup = nil
	}
	if setup != nil {
		c.begin(ctx, flagHooked)
	}
	a.mu.Lock()
	late := a.claimed
	if a.adopted = !late; a.adopted {
		a.socket = nil
	}
	a.mu.Unlock()
	if late { // and closed by dialEnded
		return ctx.Err()
	}
	c.registerFD()
	if setup == nil {
		return nil
	}
	a.state, err = setup(ctx, c.site.addr, Conn{c, 0})
	word := c.end()
	switch {
	case err != nil:
	case word&flagStolen != 0:
		err = errStolen
	case word&flagCut != 0:
		err = causeOf(ctx)
	case word&inFlight != 0:
		err = &brokenContract{"Config.Setup left an operation running"}
	case word&(flagGone|flagBroken|flagTimedOut|flagHalfClosed) != 0:
		err = c.failureOf(word, "Config.Setup closed the connection")
	}
	if err == nil {
		err = a.setUp()
	}
	return err
}

// connect makes the net.Conn. If that fails for want of a file handle, the
// least recently used idle connection makes room and it is tried again, as often
// as something can be closed. If all are in use, it waits for a moment for one to
// come back (handlePatience), and at last asks NoneRemovable whether to try once
// more.
//
// Errors are kept, by crypto/x509 and by dialers, and told again when there are
// handles in plenty. So one that hides its errno in another error is believed
// only if there is none indeed, and one that a dialer of somebody else's returns as
// if it came from the system only once. The pool's own dialer keeps none.
func (a *attempt) connect(ctx context.Context) (net.Conn, error) {
	p := a.c.site.pool
	asked, patience := false, handlePatience
	for tries := 0; ; tries++ {
		nc, err := a.connectOnce(ctx)
		if err == nil || !p.sys.outOfHandles(err) {
			return nc, err
		}
		if !asked && (tries > 0 && !a.ours || a.stage != StageDial || !asFromSystem(err)) && !p.sys.noHandleFree() {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, err
		}
		if _, ok := p.evictFor(ctx, foreignPatience); ok || a.awaitHandle(ctx, &patience) {
			continue
		}
		err = &noHandle{err}
		decide := p.cfg.noneRemovable(ctx)
		if asked || decide == nil {
			return nil, err
		}
		asked = true
		a.where = "Config.NoneRemovable"
		if !decide(p.failed(a.c.site.addr, a.stage, err, 0)) {
			return nil, err
		}
	}
}

func (a *attempt) connectOnce(ctx context.Context) (net.Conn, error) {
	p := a.c.site.pool
	addr := a.c.site.addr
	if a.c.site.absolute {
		addr.Host += "."
	}
	a.enter(StageDial)
	own := p.cfg.Dialers[addr.Transport]
	below, name := own, addr.Transport
	if addr.Transport == TLS && own == nil {
		below, name = p.cfg.Dialers[TCP], TCP
	}
	a.ours = below == nil
	if below == nil {
		below = p.sys.dial
		if f := a.c.site.family; f > familyAny {
			below = f.dial
		}
	}
	if addr.Transport == TLS && own == nil {
		if err := a.loadRoots(); err != nil {
			return nil, err
		}
	}
	a.where = fmt.Sprintf("Config.Dialers[%q]", name)
	nc, err := below(ctx, addr)
	switch {
	case err != nil:
		if !isNil(nc) {
			go a.closeUnowned(nc)
		}
		return nil, err
	case isNil(nc):
		return nil, &brokenContract{a.where + " returned neither a connection nor an error"}
	}
	a.hold(nc)
	if addr.Transport != TLS || own != nil {
		return nc, nil
	}
	a.enter(StageHandshake)
	tc, err := a.handshake(ctx, nc)
	if err != nil {
		a.closeSocket()
		return nil, err
	}
	return tc, nil
}

// closeUnowned closes a connection that never got into the books. A foreign one
// may take its time over it.
func (a *attempt) closeUnowned(nc net.Conn) {
	s := a.c.site
	s.pool.report.outlived(briefly("Close of the connection", closeTimeout, nc.Close), s.addr)
}

// brokenContract is foreign code that did what its contract forbids.
type brokenContract struct{ what string }

func (e *brokenContract) Error() string { return e.what }

// leftUnread is somebody who left bytes unread, which ErrUnread stands for.
type leftUnread struct{ broken *brokenContract }

func (e *leftUnread) Error() string   { return e.broken.what }
func (e *leftUnread) Unwrap() []error { return []error{e.broken, ErrUnread} }

// canonical is the canonical form of addr, for which there is a dialer.
func (cfg *Config) canonical(addr Addr) (Addr, error) {
	addr, err := addr.canonical()
	if err != nil {
		return addr, err
	}
	switch addr.Transport {
	case TCP, TLS, Unix:
	default:
		if cfg.Dialers[addr.Transport] == nil {
			return addr, fmt.Errorf("no dialer for transport %q: set Config.Dialers[%q]", addr.Transport, addr.Transport)
		}
	}
	return addr, nil
}

// dialed books the outcome of a dial.
func (a *attempt) noteDialed(start clock.Instant, t *Trace, failure *dialError) {
	p := a.c.site.pool
	now := p.clock.Exactly()
	var todo agenda
	c, s := a.c, a.c.site
	info := DialInfo{Addr: s.addr, Took: now.Sub(start)}
	p.mu.Lock()
	a.brokenOff = a.surplus || p.closed
	if a.displaced {
		p.displaced--
	}
	if a.giveUp = nil; !a.surplus {
		s.dropLocked(a)
		s.queue.dialEnded()
	}
	if a.prefill {
		s.prefill.dials--
	}
	if failure == nil {
		p.lastID++
		c.id = p.lastID
		info.ID = c.id
		p.recency.add(c)
		if c.unprobed() {
			p.counts.Unprobed++
		}
		p.noteReachedLocked(s, &todo)
		s.noteAnsweredLocked()
		p.moveLocked(c, phaseBorrowed)
		p.releaseLocked(c, fromDial, now, &todo)
	} else {
		info.Err = failure.err
		p.noteDialFailedLocked(a, failure, now, &todo)
	}
	if a.warm != nil {
		p.noteWarmDialedLocked(a, failure, todo.reasonOf(c))
	}
	if s.queue.dials == 0 && s.queue.silent {
		s.queue.silent = false // nobody dials it any more
	}
	if s.queue.len+s.queue.dials == 0 {
		s.queue = &noQueue
	}
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.dropIfEmptyLocked(s)
	p.noteLeftLocked()
	at, brokenOff := idleRef{c, c.generation()}, a.brokenOff
	p.mu.Unlock()
	todo.run(p)
	switch {
	case failure == nil:
		at.recheckHangUp()
	case !brokenOff:
		p.report.log(slog.LevelWarn, "dial failed", "addr", s.addr, "stage", failure.stage.String(), "err", failure.err)
	}
	if t != nil && t.DialDone != nil {
		p.report.observe("Trace.DialDone", func() { t.DialDone(info) })
	}
}

// evictFor closes the least recently used idle connection of all, and waits until it
// is closed, for patience at most or until ctx is done.
func (p *Pool) evictFor(ctx context.Context, patience time.Duration) (Addr, bool) {
	p.mu.Lock()
	c := p.recency.oldestIdle(int(p.n[phaseIdle]))
	if c == nil {
		p.mu.Unlock()
		return Addr{}, false
	}
	p.takeLocked(c)
	p.moveLocked(c, phaseClosing)
	p.mu.Unlock()
	if done := c.discard(ClosedEvicted, nil); done != nil {
		enough := time.NewTimer(patience)
		defer enough.Stop()
		select {
		case <-done:
		case <-enough.C:
		case <-ctx.Done():
		}
	}
	return c.site.addr, true
}
