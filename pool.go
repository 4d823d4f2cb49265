package connpool

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// Pool lends connections. Make one with [New]; the zero Pool is closed. All
// methods may be called by many goroutines at once.
//
// These invariants always hold (tests check them after every step):
//
//  1. One mutex, mu, guards the books. Under mu there is no system call, dial,
//     close, hook or log line: a critical section writes what is to be done
//     into an agenda, which runs after the unlock.
//  2. A connection is in exactly one phase. An idle connection is on the list of
//     its site and nobody owns it; in every other phase it has exactly one owner.
//     Taking it off the list under mu is the only way to become its owner, and
//     only the owner does I/O on it or closes it.
//  3. open = dialing + idle + borrowed + closing, per site and in total, and
//     open never exceeds a limit (except under FullOverflow, and after a limit was
//     lowered). The slot of a connection is free when the socket is closed, not
//     before (noteRemoved). The slot of a dial that failed without a socket is free
//     at once (noteDialFailedLocked).
//  4. No waiter waits while a connection of its site is idle. A waiter has a dial
//     under way, or no dial may start: looking for an idle connection, looking for
//     room, and queueing are one critical section. A freed connection goes to the
//     oldest waiter of its site, a freed slot to the oldest waiter without a dial,
//     and every event that frees anything ends in admitLocked.
//  5. A waiter that gave up is never handed anything; see waiter.
//  6. Only idle connections are evicted, least recently used first; see recency.
//  7. The key of sites is the canonical Addr, compared with ==. A connection
//     never changes its site.
//  8. Nothing of one loan is visible in the next; see conn.
type Pool struct {
	env // what connections and dials use of the pool; it never changes

	ctx  context.Context // the parent of the ctx of every hook and dial; Close ends it
	stop context.CancelFunc

	inSession atomic.Int64 // sessions that have not ended; With looks for a session in its ctx only if there are any

	handles handleBudget

	hookCalls sync.Pool // of *hookCall

	follow follower  // for Config.FollowDNS
	certs  certAsker // for Config.TLSExpiry

	checkers chan struct{} // holds an element for each running ping of a sweep, see examineInTurn

	// mu guards the books, the fields of site, conn and waiter that say so, and
	// the fields below. See invariant 1 for what must not happen under mu.
	mu sync.Mutex
	books

	watching      watching       // the watcher and its state; its comments say which fields mu guards
	sweeping      bool           // a sweep is running
	examiners     int            // goroutines of the pool that check idle connections
	checkingSites map[*site]bool // the sites whose idle connections such a goroutine checks with Config.Check; nil before the first
	sweeper       *time.Timer    // the timer of the next sweep; nil until there is something to sweep
}

// newSite makes the state of an address, without any connection.
func (p *Pool) newSite(addr Addr) *site {
	return &site{env: &p.env, addr: addr, queue: &noQueue, heapIndex: -1}
}

// realSystem is the operating system.
var realSystem = system{dialSocket, sock.Identify, sock.Still, sock.Peek, sock.ReadNow, sock.FileLimit, sock.NoFileFree}

// New makes a pool. It starts no goroutine and opens nothing. If two fields of
// cfg contradict each other, the error names both and is fs.ErrInvalid.
func New(cfg Config) (*Pool, error) {
	given := cfg.limits()
	if err := cfg.meant(); err != nil {
		return nil, &configError{err}
	}
	cfg, err := cfg.resolved()
	if err != nil {
		return nil, &configError{err}
	}
	p := &Pool{
		env:      env{cfg: cfg, sys: &realSystem, sessions: newSessionCaches()},
		checkers: make(chan struct{}, maxCheckers),

		watching: watching{create: sock.NewWatcher, add: (*sock.Watcher).Add},
	}
	p.pool = p
	p.sessions.expiry = cfg.TLSExpiry
	p.follow.pool, p.follow.bound, p.certs.pool = p, lookupTimeout, p
	p.report.logger = cfg.Logger
	p.loanLog.init(&p.cfg, &p.clock, &p.report)
	p.begin(rulesOf(&cfg, &p.clock, &p.handles), given, cfg.limits())
	// Short times, and observers, need the exact time.
	p.clock.Read = time.Now
	p.young.Do = (*conn).atTick
	p.clock.Exact = cfg.IdleTimeout > 0 && cfg.IdleTimeout < 100*clock.Tick ||
		cfg.Check != nil && cfg.CheckAfterIdle < 100*clock.Tick || cfg.Trace != nil
	var end context.CancelCauseFunc
	p.ctx, end = context.WithCancelCause(context.Background())
	p.stop = func() { end(ErrClosed) }
	p.handles.refresh(p.sys)
	if err := given.reachable("Config", int(p.handles.Load())); err != nil {
		p.stop()
		return nil, &configError{err}
	}
	return p, nil
}

// claim is the critical section of a borrow. Looking for an idle connection, looking for
// room, and queueing are one critical section, or a waiter could wait while a connection of
// its site is idle (invariant 4). todo holds the connection that was found unfit in the last
// round. Its slot must not be free before the borrower is in the queue again, or a younger
// borrower would get the slot. own is what LimitsFor has answered this borrower, if it was
// asked.
func (p *Pool) claim(ctx context.Context, r *request, own *ownLimits, now clock.Instant, todo *agenda) claim {
	p.mu.Lock()
	for _, o := range todo.closes {
		p.moveLocked(o.c, phaseClosing)
	}
	s := p.sites.get(r.hash, r.addr)
	if s == nil || p.limitsVersion != 0 {
		// A borrower in a later round does not ask: it has a connection to close first.
		if (s != nil || r.known) && len(todo.closes) == 0 && p.mustAskLocked(s, r, own) {
			p.mu.Unlock()
			return claim{ask: true}
		}
		s = p.siteLocked(s, r, own, todo)
	}
	got := p.claimLocked(ctx, s, r, now, todo)
	p.mu.Unlock()
	return got
}

// siteLocked is s, the site of r.addr, made if there is none and the address is canonical, and
// with the limits that LimitsFor has answered this borrower.
func (p *Pool) siteLocked(s *site, r *request, own *ownLimits, todo *agenda) *site {
	if p.closed || s == nil && !r.known {
		return s
	}
	if s == nil {
		s = p.newSite(*r.addr)
		p.addSiteLocked(s, todo)
	}
	if own != nil && p.obeyLocked(s, own, todo) {
		p.admitLocked(todo) // older waiters first
	}
	return s
}

// borrow makes the caller the owner of a connection that may be lent.
func (p *Pool) borrow(ctx context.Context, addr *Addr, t *Trace) (_ *conn, waited time.Duration, _ error) {
	var (
		todo   agenda // begins with the connection that was found unfit in the last round
		hollow int    // new connections that the peer gave up before they were of use, see pool_lived.go
		own    *ownLimits
	)
	if ctx.Err() != nil {
		return nil, 0, p.tooLate(ctx, *addr)
	}
	r := request{addr: addr, hash: p.sites.hash(addr)}
	for {
		now := p.clock.Now()
		if t != nil {
			now = p.clock.Exactly()
		}
		got := p.claim(ctx, &r, own, now, &todo)
		c, unproven := got.c, false
		switch {
		case c != nil:
			todo.run(p)
		case got.w != nil:
			r.seq = got.w.seq
			got.w.announce(t, &todo)
			var err error
			c, err = got.w.await(ctx, r.start)
			if t != nil {
				waited = p.clock.Exactly().Sub(r.start)
			}
			if err != nil {
				stage, err := stageAndCause(err)
				return nil, 0, p.failed(*r.addr, stage, err, r.start)
			}
			fresh := got.w.fresh
			unproven = fresh || c.uses == 0 && c.word.Load()&flagHungUp != 0
			if fresh && c.word.Load()&(flagHungUp|flagStolen|flagBroken) == 0 && !c.sock.isStolen() { // Setup may have taken long
				return c, waited, nil
			}
		case got.refused != nil:
			todo.run(p)
			return nil, 0, got.refused.classify()
		case got.closed:
			todo.run(p)
			return nil, 0, p.failed(*r.addr, StageWait, ErrClosed, r.start)
		case got.ask:
			var err error
			if own, err = p.askLimits(&r); err != nil {
				return nil, 0, p.failed(*r.addr, StageLimits, err, r.start)
			}
			continue
		default:
			// Keys are canonical, so an addr that is found needs no check. This addr was not
			// found, so the books have nothing of it, and todo is empty.
			canonical, err := p.cfg.canonical(*r.addr)
			if err != nil {
				return nil, 0, usage(canonical, err)
			}
			r.addr, r.known, r.hash = &canonical, true, p.sites.hash(&canonical)
			continue
		}
		reason, err := c.whyUnfit(ctx)
		if reason == ClosedUnknown {
			return c, waited, nil
		}
		var vain error // why this borrower stops trying
		if unproven {
			hollow++
			why := lostBeforeUse(reason, err)
			if !reason.innocent() && c.noteHollow(why) || hollow >= maxHollow {
				vain = why
			}
		}
		if p.cfg.isForPush(reason) {
			// It goes to Push. The borrower takes another connection, or this one
			// when Push is done.
			c.push()
			todo = agenda{}
			switch {
			case ctx.Err() != nil:
				return nil, 0, p.failed(*r.addr, StageWait, causeOf(ctx), r.start)
			case vain != nil:
				return nil, 0, p.failed(*r.addr, StageDial, vain, r.start)
			}
			continue
		}
		if c.isDone(ctx, reason, err) || isPanic(err) {
			c.discard(reason, err)
			passOn(err)
			return nil, 0, p.failed(*r.addr, StageWait, causeOf(ctx), r.start)
		}
		if vain != nil {
			c.discard(reason, err)
			return nil, 0, p.failed(*r.addr, StageDial, vain, r.start)
		}
		todo = agenda{}
		todo.close(c, reason, err)
	}
}

// isDone asks ctx whether it is done, while the borrower owns c. If ctx, which is foreign
// code, panics, isDone closes c for reason.
func (c *conn) isDone(ctx context.Context, reason CloseReason, err error) bool {
	asked := false
	defer func() {
		if !asked {
			c.discard(reason, err)
		}
	}()
	done := ctx.Err() != nil
	asked = true
	return done
}

// failed is the error of a borrow that failed at stage for err; it began at start.
func (p *Pool) failed(addr Addr, stage Stage, err error, start clock.Instant) *Error {
	p.mu.Lock()
	e := p.failedLocked(addr, stage, err, start)
	p.mu.Unlock()
	return e.classify()
}

// tooLate returns the error of a borrow whose ctx was done before the borrow began. Its
// Waited is 0.
func (p *Pool) tooLate(ctx context.Context, addr Addr) *Error {
	e := p.failed(addr, StageWait, causeOf(ctx), 0)
	e.Limit, e.LimitName = 0, ""
	return e
}
