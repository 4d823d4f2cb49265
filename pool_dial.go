package connpool

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// A dial belongs to the pool. It is started for the oldest waiter without a dial, and runs
// under that waiter's ctx values but not under its cancellation. It serves the waiter that
// is the oldest when the dial ends. But an error goes only to the waiter for whom the dial
// was started: the dialer and Setup see that waiter's values, and the values may be the
// cause of the error. The connection has a slot from the start of the dial.
//
// An example: a dial is started for w1. w1's ctx ends before the dial does: w1 leaves, and
// the dial goes on. If the dial succeeds, the oldest waiter gets the connection; if nobody
// waits, the connection becomes idle. If the dial fails, no waiter gets the error; the
// address counts one failure.
//
// Each dial has exactly one outcome, and the first caller of takeOutcome records it: dialEnded
// when the dial has ended in any way, or the timer of dial when the dialer or Setup ignores
// its ctx for longer than DialTimeout plus hookGrace.

// enter records the stage of the dial.
func (a *attempt) enter(s Stage) {
	a.stage = s
	a.reached.Store(uint32(s))
}

// hold makes the attempt responsible for closing nc, until c adopts nc.
func (a *attempt) hold(nc net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.socket = nc
}

// wrap replaces the socket with nc, whose Close closes the socket. It reports false if the
// socket was given up meanwhile.
func (a *attempt) wrap(nc net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.socket == nil {
		return false
	}
	a.socket = nc
	return true
}

// closeSocket closes what was dialed and not adopted, within closeTimeout.
func (a *attempt) closeSocket() {
	a.mu.Lock()
	nc := a.socket
	a.socket = nil
	a.mu.Unlock()
	if nc != nil {
		a.closeUnowned(nc)
	}
}

// takeOutcome gives the caller the right to record the outcome of the dial, if nobody had it yet
// (mine).
func (a *attempt) takeOutcome() (mine, adopted bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	mine = !a.taken
	a.taken = true
	return mine, a.adopted
}

// outcomeTaken reports whether somebody has the right to record the outcome.
func (a *attempt) outcomeTaken() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken
}

// dial opens c for the pool and records the outcome, whatever the dialer and the hooks do:
// return, panic, end their goroutine, or never return.
func (a *attempt) dial() {
	p := a.c.site.env.pool
	p.handles.refresh(p.sys)
	t := p.cfg.Trace
	cancel := context.CancelFunc(func() {})
	c, start := a.c, p.clock.Exactly()
	var traced atomic.Pointer[Trace] // t, for the timer that may record the outcome meanwhile
	traced.Store(t)
	var late *time.Timer
	if p.cfg.DialTimeout > 0 {
		late = time.AfterFunc(p.cfg.DialTimeout+hookGrace, func() {
			if mine, adopted := a.takeOutcome(); mine {
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
			a.err = panicOf(a.where, recover()) // a panic, or a runtime.Goexit
		}
		a.dialEnded(start, t, cancel)
	}()
	a.stage, a.where = StageDial, "a method of the borrower's ctx"
	t = p.trace(a.ctx)
	traced.Store(t)
	var end time.Time
	if d := p.cfg.DialTimeout; d > 0 {
		end = time.Now().Add(d)
	}
	var ctx context.Context
	ctx, cancel = p.within(a.ctx, c.site.unpooled(), end) // a connection outside the pool can serve nobody but the caller
	a.enter(StageDial)
	p.mu.Lock()
	if a.outcomeTaken() { // the borrower's ctx took too long, and the outcome is booked, or about to be
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

	a.err = sanitizeError(a.open(ctx))
	a.ended = true
}

// dialEnded is deferred by dial, and ends the dial however open ended.
func (a *attempt) dialEnded(start clock.Instant, t *Trace, cancel context.CancelFunc) {
	defer cancel()
	if a.err != nil {
		a.closeSocket()
	}
	if mine, _ := a.takeOutcome(); !mine {
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

// dialFailed records a dial that failed. If there is an adopted socket (Setup failed), the
// slot is free when that socket is closed.
func (a *attempt) dialFailed(start clock.Instant, t *Trace, err error) {
	a.noteDialed(start, t, failedDial(a.stage, err))
	if a.stage == StageSetup {
		a.c.discard(ClosedSetupFailed, err)
	}
}

// abandon records the failure of a dialer, handshake or Setup that has not returned long
// after the end of its ctx. When it returns at last, dialEnded closes what it returned.
func (a *attempt) abandon(adopted bool, start clock.Instant, t *Trace) {
	late := fmt.Errorf("it ignores its ctx: %w", context.DeadlineExceeded)
	if !adopted {
		go a.closeSocket()
		a.noteDialed(start, t, failedDial(StageDial, fmt.Errorf("dialer: %w", late)))
		return
	}
	a.c.word.And(^uint64(flagLent)) // revokes the loan of Setup
	late = fmt.Errorf("Config.Setup: %w", late)
	a.noteDialed(start, t, failedDial(StageSetup, late))
	a.c.discard(ClosedSetupFailed, late)
}

// open dials, does the handshake and runs Setup.
func (a *attempt) open(ctx context.Context) error {
	p := a.c.site.env.pool
	c := a.c
	nc, err := a.connect(ctx)
	if err != nil {
		return err
	}
	if _, carried := nc.(*carrier); carried && c.site.unpooled() {
		return &brokenContract{a.where + " returned a client of Carry, which is no connection that DialContext can return"}
	}
	a.where = "SyscallConn or NetConn of the connection"
	c.adopt(nc)
	if a.cert != nil {
		c.ensureCold().cert = a.cert
	}
	if a.lasts > 0 {
		c.expireAfter(a.lasts)
	}
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
	late := a.taken
	if a.adopted = !late; a.adopted {
		a.socket = nil
	}
	a.mu.Unlock()
	if late { // dialEnded closes it
		return ctx.Err()
	}
	c.registerFD()
	if setup == nil {
		a.where = "Expires of the state"
		return c.askExpiry()
	}
	a.state, err = setup(ctx, c.site.addr, Conn{c, 0})
	err = cmp.Or(err, a.takeClient(err == nil))
	word := c.end()
	switch {
	case err != nil:
	case word&flagStolen != 0:
		err = errStolen
	case ctx.Err() != nil, word&flagCut != 0:
		err = cmp.Or(causeOf(ctx), context.DeadlineExceeded)
	case operating(word):
		err = &brokenContract{"Config.Setup left an operation running"}
	case word&(flagGone|flagBroken|flagTimedOut|flagHalfClosed) != 0:
		err = c.failureOf(word, "Config.Setup closed the connection")
	}
	if err == nil {
		err = a.setUp()
	}
	return err
}

// takeClient finds out whether the state that Setup returned is a client with I/O of its own. If
// Setup has worked, the client gets the connection, before the end of Setup's loan, so that its
// operations go on.
func (a *attempt) takeClient(worked bool) error {
	c := a.c
	r, marked := a.state.(*resident)
	if marked {
		a.state = r.client
	}
	carried := c.resident()
	if carried != nil && same(a.state, carried.client) {
		a.state = nil // the close of the connection closes it
	}
	switch {
	case carried != nil && marked:
		return &brokenContract{"Config.Setup returned a Resident for a client that Carry has brought"}
	case marked && worked:
		c.settle(r)
	}
	return nil
}

// same reports whether two values are the same client. Values of one type that cannot be compared
// are taken for the same.
func same(a, b any) bool {
	if reflect.TypeOf(a) != reflect.TypeOf(b) {
		return false
	}
	return a == nil || !reflect.ValueOf(a).Comparable() || a == b
}

// connect makes the net.Conn. If no file handle is free for it, the pool closes the least
// recently used idle connection and connect tries again, as often as there is an idle
// connection to close. If all connections are in use, connect waits for one to be given
// back (handlePatience). At last it asks Config.NoneRemovable whether to try once more.
//
// crypto/x509 and some dialers keep an error and return it again when many handles are free.
// So two kinds of errors need a check that there really is no free handle: an error that
// hides its errno in another error, always; an error that a foreign dialer returns as if it
// came from the system, from the second try on. The pool's own dialer keeps no errors.
func (a *attempt) connect(ctx context.Context) (net.Conn, error) {
	p := a.c.site.env.pool
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

// connectOnce dials once and does the TLS handshake, if there is one. On success the attempt
// holds the socket.
func (a *attempt) connectOnce(ctx context.Context) (net.Conn, error) {
	p := a.c.site.env.pool
	addr := a.c.site.addr
	if a.c.site.absolute {
		addr.Host += "."
	}
	a.enter(StageDial)
	byPool := addr.Transport == TLS && p.cfg.Dialers[TLS] == nil // the handshake
	if byPool {
		if err := p.sys.loadRoots(&p.cfg); err != nil {
			return nil, err
		}
	}
	below := a.dialer(ctx)
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
	if !byPool {
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

// dialer returns what opens the socket, and notes whose that is.
func (a *attempt) dialer(ctx context.Context) DialFunc {
	s, cfg := a.c.site, &a.c.site.env.cfg
	name := s.addr.Transport
	if name == TLS && cfg.Dialers[TLS] == nil {
		name = TCP
	}
	if s.unpooled() {
		if through, ok := ctx.Value(throughKey{s}).(DialFunc); ok {
			a.ours, a.where = false, "the dial function of DialThrough"
			return through
		}
	}
	below := cfg.Dialers[name]
	a.ours, a.where = below == nil, "Config.Dialers[\""+string(name)+"\"]"
	if below == nil {
		below = s.ownDial()
	}
	return below
}

// ownDial is the pool's own dialer of sockets, for the addresses of s.
func (s *site) ownDial() DialFunc {
	f, base := s.family, s.env.cfg.Dialer
	if base == nil {
		if f <= familyAny {
			return s.env.sys.dial
		}
		base = new(net.Dialer)
	}
	return func(ctx context.Context, addr Addr) (net.Conn, error) {
		if f > familyAny {
			return f.dial(ctx, base, addr)
		}
		return dialFrom(ctx, base, addr)
	}
}

// closeUnowned closes a connection that never got into the books. The Close of a foreign
// connection may take long.
func (a *attempt) closeUnowned(nc net.Conn) {
	s := a.c.site
	s.env.report.outlived(briefly("Close of the connection", closeTimeout, nc.Close), s.addr)
}

// noteDialed records the outcome of a dial; failure is nil if the dial succeeded.
func (a *attempt) noteDialed(start clock.Instant, t *Trace, failure *dialError) {
	p := a.c.site.env.pool
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
		p.countKindLocked(c, 1)
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
		s.queue.silent = false // no dial to the address is under way any more
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

// evictFor closes the least recently used idle connection of all addresses. It waits until
// the connection is closed, for patience at most or until ctx is done.
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
