package connpool

import (
	"context"
	"errors"
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

// env is what the code of connections and dials uses of the pool beside the books. No field is
// ever replaced, and each can be used without Pool.mu.
type env struct {
	cfg      Config // the limits in use are in the books
	clock    clock.Clock
	sys      *system
	report   reporter
	loanLog  loanLog        // the loans and who has them
	sessions *sessionCaches // TLS sessions to resume

	pool *Pool // for the flows, which change the books and do what these decide
}

// site is the state of one address. A site exists while there is a connection, a
// dial, a waiter, a reserve, a call of Warm, or a recent failure. Its fields need Pool.mu.
type site struct {
	env       *env  // for functions outside the books: no method of books uses it
	addr      Addr  // canonical
	top       *conn // top of the idle stack: the idle connection given back last
	n         tally
	want      int32    // dials for waiters that this site's own limits would let start
	waiting   int32    // how many waiters of the queue Stats.Waiting has counted
	heapIndex int32    // index in books.ready or readyOwn; -1 if the site is in neither
	epoch     uint32   // raised by Retire; a connection of an older epoch is not lent again
	family    family   // address family that DialContext asked for; familyPooled for any other site; never changes
	absolute  bool     // for DialContext: the host had a final dot
	overflow  uint8    // for DialContext: how many connections may be open beyond MaxOpen for it, see DialOverflow
	rank      int8     // as of the last refreshLocked, see books_silence.go
	queue     *queue   // never nil, see noQueue
	dial      *attempt // the youngest dial under way that waiters count on
	backoff   *backoff // nil after a dial that succeeded
	prefill   *prefill // nil unless Warm, MinIdlePerAddr or DialContext is used

	loans, dials, dialErrors uint64
}

// newSite makes the state of an address, without any connection.
func (p *Pool) newSite(addr Addr) *site {
	return &site{env: &p.env, addr: addr, queue: &noQueue, heapIndex: -1}
}

// tally counts connections by phase.
type tally [numPhases]int32

// open is the number of connections that have a slot.
func (n *tally) open() int {
	return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed] + n[phaseClosing])
}

// kept is the number of these connections without those being closed.
func (n *tally) kept() int { return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed]) }

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
	p.report.logger = cfg.Logger
	p.loanLog.init(&p.cfg, &p.clock, &p.report)
	p.begin(rulesOf(&cfg, &p.clock, &p.handles), given, cfg.limits())
	// Short times, and observers, need the exact time.
	p.clock.Read = time.Now
	p.clock.Exact = cfg.IdleTimeout > 0 && cfg.IdleTimeout < 100*clock.Tick ||
		cfg.Check != nil && cfg.CheckAfterIdle < 100*clock.Tick || cfg.Trace != nil
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.handles.refresh(p.sys)
	if err := given.reachable("Config", int(p.handles.Load())); err != nil {
		p.stop()
		return nil, &configError{err}
	}
	return p, nil
}

// With borrows a connection to addr, runs fn with it, and gives it back.
//
// fn has the connection alone until fn returns. A [Conn] that is kept longer
// answers ErrReturned. ctx governs the wait for the connection and the I/O inside
// fn: the pool sets the deadline of ctx on the socket, and the end of ctx
// interrupts a blocked call. ctx does not govern the dial, because another borrower
// may get the connection (the dial does get the values of ctx). With itself returns
// when ctx is done, even during a dial.
//
// With returns the error of fn unchanged, but without the marks of Keep (if one is
// inside the error, in a wrapper that errors.Is and errors.As see through). nil or
// Keep(err) gives the connection back to the pool. The pool closes the connection
// and does not lend it again if fn returned any other error, panicked (With passes
// the panic on), called runtime.Goexit, or called Conn.Close; if ctx is done; if an
// operation on the connection is still running, failed, or timed out (only Keep
// forgives a time-out); if it was closed for writing; if bytes are left unread in
// the connection, in crypto/tls or in the state's buffer, or unflushed in that buffer;
// or if Config.Reset fails. Conn.Detach takes the connection out of the pool for
// good. A panic of Reset, Check or a Prober that runs on the borrower's time reaches
// the borrower, as a *PanicError.
//
// An *[Error] means that fn never ran, and says at which stage the borrow failed
// and why: errors.Is finds ErrClosed, ErrExhausted, ErrNoneRemovable, the error of
// ctx or the error of the dial in it. fn is never run twice. A connection that died
// while it was idle never reaches the caller: the pool takes the next one or opens
// one. If the peer gives up new connections before fn has them, the pool opens three
// at most for one borrow.
//
// Under the ctx of a [Pool.Session], fn gets the connection of the session. The
// session keeps the connection between two uses, and the rules above about giving
// back apply at the session's end.
//
// A ctx that can never be done costs nothing; one that can costs a
// context.AfterFunc. A nil ctx or fn is an error.
func (p *Pool) With(ctx context.Context, addr Addr, fn func(Conn) error) error {
	switch {
	case p.stop == nil:
		return usage(addr, ErrClosed)
	case ctx == nil:
		return usage(addr, errors.New("ctx is nil: pass context.Background()"))
	case fn == nil:
		return usage(addr, errors.New("fn is nil"))
	}
	if p.inSession.Load() != 0 {
		if joined, err := p.withinSession(ctx, addr, fn); joined {
			return err
		}
	}
	k := checkout{p: p, trace: p.cfg.trace(ctx)}
	k.get(&addr)
	if err := k.borrow(ctx, &addr); err != nil {
		return err
	}
	defer k.rescue()
	if p.loanLog.wanted {
		k.record(1)
	}
	loan := k.start(ctx)
	k.got()
	err := fn(loan)
	if err == nil {
		k.c.noteContent()
	}
	return k.finish(ctx, err)
}

// request is a borrow under way. A request stays on the borrower's stack, and so does the
// address. A ctx in the request, which goes into the waiter, would move both to the heap.
type request struct {
	addr  *Addr
	hash  uint64        // hash of addr
	known bool          // addr is canonical
	start clock.Instant // when the wait began; 0 for a borrow that need not wait
	seq   uint64        // the borrower's place in the queue; 0 until it has one
}

// claim is what a borrower got in its critical section: a connection, which the borrower
// owns now; or a place in the queue; or an error, which still has to be classified. It is
// none of these if the pool is closed, or if the address is not known and has to be checked
// first.
type claim struct {
	c       *conn
	w       *waiter
	refused *Error
	closed  bool
}

// claim is the critical section of a borrow. Looking for an idle connection, looking for
// room, and queueing are one critical section, or a waiter could wait while a connection of
// its site is idle (invariant 4). todo holds the connection that was found unfit in the last
// round. Its slot must not be free before the borrower is in the queue again, or a younger
// borrower would get the slot.
func (p *Pool) claim(ctx context.Context, r *request, now clock.Instant, todo *agenda) claim {
	p.mu.Lock()
	for _, o := range todo.closes {
		p.moveLocked(o.c, phaseClosing)
	}
	s := p.sites.get(r.hash, r.addr)
	if s == nil && r.known && !p.closed {
		s = p.newSite(*r.addr)
		p.addSiteLocked(s, todo)
	}
	got := p.claimLocked(ctx, s, r, now, todo)
	p.mu.Unlock()
	return got
}

// borrow makes the caller the owner of a connection that may be lent.
func (p *Pool) borrow(ctx context.Context, addr *Addr, t *Trace) (_ *conn, waited time.Duration, _ error) {
	var (
		todo   agenda // begins with the connection that was found unfit in the last round
		hollow int    // new connections that the peer gave up before they were of use, see lived.go
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
		got := p.claim(ctx, &r, now, &todo)
		c, dead := got.c, false
		switch {
		case c != nil:
			todo.run(p)
		case got.w != nil:
			r.seq = got.w.seq
			got.w.announce(t, &todo)
			var err error
			c, err = got.w.await(ctx)
			if t != nil {
				waited = p.clock.Exactly().Sub(r.start)
			}
			if err != nil {
				stage, err := stageAndCause(err)
				return nil, 0, p.failed(*r.addr, stage, err, r.start)
			}
			fresh := got.w.fresh
			dead = fresh || c.uses == 0 && c.word.Load()&flagHungUp != 0
			if fresh && c.word.Load()&(flagHungUp|flagStolen|flagBroken) == 0 && !c.sock.isStolen() { // Setup may have taken long
				return c, waited, nil
			}
		case got.refused != nil:
			todo.run(p)
			return nil, 0, got.refused.classify()
		case got.closed:
			todo.run(p)
			return nil, 0, p.failed(*r.addr, StageWait, ErrClosed, r.start)
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
		if dead {
			hollow++
			why := unborn(reason, err)
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

// announce runs the agenda of a borrower that was queued, and calls Trace.Wait. If foreign
// code ends the borrower's goroutine there, the borrower leaves the queue.
func (w *waiter) announce(t *Trace, todo *agenda) {
	p := w.site.env.pool
	told := false
	defer func() {
		if !told { // a Trace function called runtime.Goexit
			w.leave()
		}
	}()
	todo.run(p)
	if t != nil && t.Wait != nil {
		p.report.observe("Trace.Wait", func() { t.Wait(WaitInfo{Addr: w.site.addr, Waiting: w.met}) })
	}
	told = true
}

// ctxError is the error of a ctx that has a cause.
type ctxError struct{ err, cause error }

func (e *ctxError) Error() string   { return oneLine(e.err.Error() + ": " + e.cause.Error()) }
func (e *ctxError) Unwrap() []error { return []error{e.err, spent(e.cause)} }

// causeOf is why ctx is done: its error, with the cause if the cause says more.
func causeOf(ctx context.Context) error {
	err := ctx.Err()
	if cause := tame(context.Cause(ctx)); cause != nil && !errors.Is(cause, err) {
		return &ctxError{err, cause}
	}
	return err
}
