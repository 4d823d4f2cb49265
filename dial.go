package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"sync"
	"time"
)

// A dial belongs to the pool. It is started for the oldest waiter that has
// none, runs under that waiter's ctx values but not its cancellation, and
// serves whoever is the oldest when it ends. From the moment it is started its
// connection holds a slot.

// dialError is a dial's failure with its stage, on its way to a waiter.
type dialError struct {
	stage Stage
	err   error
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// attempt is one dial under way.
type attempt struct {
	c   *conn
	ctx context.Context // of the borrower for whom it was started: its values

	// Pool.mu guards these.
	newer, older *attempt           // among those of the site that waiters count on
	surplus      bool               // it is not one of them any more
	spare        bool               // it was started for no waiter, and is never surplus
	warm         *warming           // for which it was started, if for one
	giveUp       context.CancelFunc // nil before it runs

	where string // the foreign code that runs
	stage Stage
	err   error
	ended bool // open returned, rather than panicked
	state any  // what Setup returned

	mu      sync.Mutex // guards adopted and settled; nothing else happens under it
	adopted bool       // c has its socket, and the guard of Setup is open
	settled bool       // somebody has booked, or is booking, the outcome
}

// settle makes the caller the one who books the outcome, if nobody was before.
func (a *attempt) settle() (mine, adopted bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	mine = !a.settled
	a.settled = true
	return mine, a.adopted
}

// dial opens c for the pool and books the outcome, whatever the dialer and the
// hooks do: return, panic, end their goroutine, or never come back.
func (p *Pool) dial(a *attempt) {
	p.lookAtHandles()
	c, start := a.c, p.clock.exactly()
	t := p.trace(a.ctx)
	ctx := a.ctx
	if !c.site.tracked() { // else it can serve nobody but the caller
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := p.within(ctx, p.cfg.DialTimeout)
	a.stage = StageDial
	p.mu.Lock()
	a.giveUp = cancel
	surplus := a.surplus
	p.mu.Unlock()
	if surplus {
		cancel()
	}

	if p.cfg.DialTimeout > 0 {
		late := time.AfterFunc(p.cfg.DialTimeout+hookGrace, func() {
			if mine, adopted := a.settle(); mine {
				p.abandoned("a dial", c.site.addr)
				p.abandonDial(a, adopted, start, t)
			}
		})
		defer late.Stop()
	}
	defer func() {
		defer cancel()
		if !a.ended {
			pan := &PanicError{Where: a.where}
			if v := recover(); v != nil {
				pan.Value, pan.Stack = v, debug.Stack()
			}
			a.err = pan
		}
		if mine, adopted := a.settle(); !mine {
			if c.nc != nil && !adopted {
				go closeStray(c.nc)
			}
			if s, ok := a.state.(io.Closer); ok {
				defer func() { _ = recover() }()
				s.Close()
			}
			return
		}
		c.state = a.state
		if a.err == nil {
			p.dialed(a, start, t, nil)
			return
		}
		p.dialFailed(a, start, t, a.err)
	}()
	a.err = p.open(ctx, a)
	a.ended = true
}

// dialFailed books a dial that came to nothing. If there is a socket already,
// the slot is free when it is closed.
func (p *Pool) dialFailed(a *attempt, start instant, t *Trace, err error) {
	p.dialed(a, start, t, &dialError{a.stage, err})
	if a.stage == StageSetup {
		p.discard(a.c, ClosedSetupFailed, err)
	}
}

// abandonDial goes on without a dialer, handshake or Setup that has not come
// back long after its ctx was done. What it returns at last is closed.
func (p *Pool) abandonDial(a *attempt, adopted bool, start instant, t *Trace) {
	late := fmt.Errorf("it ignores its ctx: %w", context.DeadlineExceeded)
	if !adopted {
		p.dialed(a, start, t, &dialError{StageDial, fmt.Errorf("dialer: %w", late)})
		return
	}
	a.c.word.And(^uint64(lent)) // shuts the guard
	late = fmt.Errorf("Config.Setup: %w", late)
	p.dialed(a, start, t, &dialError{StageSetup, late})
	p.discard(a.c, ClosedSetupFailed, late)
}

// open dials, shakes hands and sets up.
func (p *Pool) open(ctx context.Context, a *attempt) error {
	c := a.c
	nc, err := p.connect(ctx, a)
	if err != nil {
		return err
	}
	c.adopt(nc)
	a.stage, a.where = StageSetup, "Config.Setup"
	setup := p.cfg.Setup
	if c.site.tracked() {
		setup = nil
	}
	if setup != nil {
		c.begin(ctx, hooked)
	}
	a.mu.Lock()
	late := a.settled
	a.adopted = !late
	a.mu.Unlock()
	if late { // and closed by whoever finds that out, see dial
		return ctx.Err()
	}
	p.enroll(c)
	if setup == nil {
		return nil
	}
	a.state, err = setup(ctx, c.site.addr, Conn{c, 0})
	word := c.end()
	switch {
	case err != nil:
	case word&stolen != 0:
		err = errStolen
	case word&cut != 0:
		err = causeOf(ctx)
	case word&inFlight != 0:
		err = &brokenContract{"Config.Setup left an operation running"}
	case word&(gone|broken|timedOut|halfClosed) != 0:
		if err = c.failure(); err == nil {
			err = &brokenContract{"Config.Setup closed the connection"}
		}
	}
	return err
}

// connect makes the net.Conn. If that fails for want of a file handle, the
// least recently used idle connection makes room and it is tried again, as often
// as something can be closed. If all are in use, it waits for a moment for one to
// come back (handlePatience), and at last asks NoneRemovable whether to try once
// more.
func (p *Pool) connect(ctx context.Context, a *attempt) (net.Conn, error) {
	asked, patience := false, handlePatience
	for {
		nc, err := p.connectOnce(ctx, a)
		if err == nil || !p.outOfHandles(err) {
			return nc, err
		}
		if ctx.Err() != nil {
			return nil, err
		}
		if _, ok := p.evict(ctx); ok || p.awaitHandle(ctx, &patience) {
			continue
		}
		err = errors.Join(ErrNoneRemovable, err)
		decide := p.noneRemovable(ctx)
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

func (p *Pool) connectOnce(ctx context.Context, a *attempt) (net.Conn, error) {
	addr := a.c.site.addr
	if a.c.site.absolute {
		addr.Host += "."
	}
	a.stage = StageDial
	own := p.cfg.Dialers[addr.Transport]
	below, name := own, addr.Transport
	if addr.Transport == TLS && own == nil {
		below, name = p.cfg.Dialers[TCP], TCP
	}
	if below == nil {
		below = p.sys.dial
		if f := a.c.site.family; f > anyFamily {
			below = f.dial
		}
	}
	a.where = fmt.Sprintf("Config.Dialers[%q]", name)
	nc, err := below(ctx, addr)
	switch {
	case err != nil:
		if !isNil(nc) {
			go closeStray(nc)
		}
		return nil, err
	case isNil(nc):
		return nil, &brokenContract{a.where + " returned neither a connection nor an error"}
	case addr.Transport != TLS || own != nil:
		return nc, nil
	}
	a.stage, a.where = StageHandshake, "Config.TLSFor"
	return p.handshake(ctx, addr, nc)
}

// closeStray closes a connection that never got into the books. A foreign one
// may take its time over it.
func closeStray(nc net.Conn) {
	defer func() { _ = recover() }()
	nc.Close()
}

// brokenContract is foreign code that did what its contract forbids.
type brokenContract struct{ what string }

func (e *brokenContract) Error() string { return e.what }

// resolve is the canonical form of addr, for which there is a dialer.
func (p *Pool) resolve(addr Addr) (Addr, error) {
	addr, err := addr.canonical()
	if err != nil {
		return addr, err
	}
	switch addr.Transport {
	case TCP, TLS, Unix:
	default:
		if p.cfg.Dialers[addr.Transport] == nil {
			return addr, fmt.Errorf("no dialer for transport %q: set Config.Dialers[%q]", addr.Transport, addr.Transport)
		}
	}
	return addr, nil
}

// dialed books the outcome of a dial.
func (p *Pool) dialed(a *attempt, start instant, t *Trace, failure *dialError) {
	now := p.clock.exactly()
	var todo agenda
	c, s := a.c, a.c.site
	info := DialInfo{Addr: s.addr, Took: now.sub(start)}
	p.mu.Lock()
	if a.giveUp = nil; !a.surplus {
		s.dropLocked(a)
		s.queue.dialEnded()
	}
	if a.spare {
		s.special.dials--
	}
	if failure == nil {
		p.lastID++
		c.id = p.lastID
		info.ID = c.id
		p.recency.add(c)
		if c.unprobed() {
			p.counts.Unprobed++
		}
		p.stopRetryLocked(s)
		s.trouble = nil
		p.moveLocked(c, borrowed)
		p.parkLocked(c, justBorn, now, &todo)
	} else {
		info.Err = failure.err
		p.dialFailedLocked(a, failure, now)
	}
	if a.warm != nil {
		p.warmDialedLocked(a, failure, todo.reasonOf(c))
	}
	if s.queue.len+s.queue.dials == 0 {
		s.queue = &noQueue
	}
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.forgetLocked(s)
	p.leftLocked()
	at := sighting{c, c.generation()}
	p.mu.Unlock()
	todo.run(p)
	switch {
	case failure == nil:
		p.hearAgain(at)
	case !a.givenUp(failure):
		p.log(slog.LevelWarn, "dial failed", "addr", s.addr, "stage", failure.stage.String(), "err", failure.err)
	}
	if t != nil && t.DialDone != nil {
		p.observe(func() { t.DialDone(info) })
	}
}

// surplusPatience is how long a dial that no waiter needs any more goes on all
// the same: most end sooner, and the next borrowers may want them.
const surplusPatience = 25 * time.Millisecond

// doubtDialsLocked sees to it that a burst which the connections that came back
// have served does not leave one behind for each of its borrowers: what is
// surplus after surplusPatience is given up.
func (p *Pool) doubtDialsLocked(s *site) {
	q := s.queue
	if q.doubted {
		return
	}
	q.doubted = true
	time.AfterFunc(surplusPatience, func() {
		var surplus []context.CancelFunc
		p.mu.Lock()
		q.doubted = false
		for q == s.queue && s.surplus() > 0 {
			a := s.dial // the youngest
			for a.spare {
				a = a.older
			}
			s.dropLocked(a)
			a.surplus = true
			q.dialEnded()
			if a.giveUp != nil {
				surplus = append(surplus, a.giveUp)
			}
		}
		p.mu.Unlock()
		for _, giveUp := range surplus {
			giveUp()
		}
	})
}

// dropLocked takes a out of the list of the dials that waiters count on.
func (s *site) dropLocked(a *attempt) {
	if a.newer == nil {
		s.dial = a.older
	} else {
		a.newer.older = a.older
	}
	if a.older != nil {
		a.older.newer = a.newer
	}
	a.newer, a.older = nil, nil
}

// givenUp reports whether the pool itself is the cause of a failure.
func (a *attempt) givenUp(failure *dialError) bool {
	return a.surplus && errors.Is(failure.err, context.Canceled)
}

func (p *Pool) dialFailedLocked(a *attempt, failure *dialError, now instant) {
	c, s := a.c, a.c.site
	if failure.stage == StageSetup {
		p.moveLocked(c, closing) // the slot is free when the socket is closed
	} else {
		p.moveLocked(c, none)
		if !errors.Is(failure.err, ErrNoneRemovable) { // which had no handle to give back
			p.freedLocked()
		}
	}
	if failure.stage != StageSetup { // else it is counted when its socket is closed
		p.counts.DialErrors++
	}
	s.dialErrors++
	if a.givenUp(failure) {
		return
	}
	if s.trouble == nil {
		s.trouble = new(trouble)
	}
	s.trouble.lastErr = failure.err
	// A failure for want of something local says nothing about the peer.
	if kind := KindOf(failure.err); !p.closed && !s.tracked() && kind != KindResource && kind != KindUsage {
		s.trouble.failures++
		s.trouble.failedAt = now
	}
	if s.queue.head != nil && !a.surplus {
		p.deliverLocked(s, nil, false, failure)
	}
	if !s.backingOff() {
		return
	}
	p.giveUpLocked(s)
	if s.trouble.retry == nil && !p.closed {
		pause := min(backoffMax, backoffMin<<min(s.trouble.failures-backoffAfter, 16))
		pause -= rand.N(pause / 2)
		s.trouble.retry = time.AfterFunc(pause, func() { p.retry(s) })
	}
}

// evict closes the least recently used idle connection of all, and waits until
// it is closed or ctx is done.
func (p *Pool) evict(ctx context.Context) (Addr, bool) {
	p.mu.Lock()
	c := p.recency.oldestIdle(int(p.n[idle]))
	if c == nil {
		p.mu.Unlock()
		return Addr{}, false
	}
	p.takeLocked(c)
	p.moveLocked(c, closing)
	p.mu.Unlock()
	if done := p.discard(c, ClosedEvicted, nil); done != nil {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
	return c.site.addr, true
}

// detached books that a borrower took c away.
func (p *Pool) detached(c *conn) {
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	p.mu.Lock()
	p.counts.Detached++
	watcher := p.watcher
	p.mu.Unlock()
	watcher.remove(c)
	t, info := c.trace(), PutInfo{Addr: c.site.addr, ID: c.id, Held: p.clock.exactly().sub(c.since)}
	p.removed(c, ClosedUnknown, nil)
	if t != nil && t.Detached != nil {
		p.observe(func() { t.Detached(info) })
	}
}
