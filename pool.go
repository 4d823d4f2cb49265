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
// What always holds (tests check it after every step):
//
//  1. One mutex, mu, guards the books. Under it there is no system call, dial,
//     close, hook or log line: a critical section writes what is to be done
//     into an agenda, which runs after the unlock.
//  2. A connection is in one phase. Idle, it is on the list of its site and
//     belongs to nobody; in every other phase it has exactly one owner. Taking
//     it off the list under mu is the only way to become owner, and only the
//     owner does I/O on it or closes it.
//  3. open = dialing + idle + borrowed + closing, per site and in total, and
//     never exceeds a limit (FullOverflow apart). A slot is free when the socket
//     is closed, not before, and it is freed in one function, removed.
//  4. No waiter sits beside an idle connection of its site. A waiter has a dial
//     under way, or none may start: looking for an idle one, for room, and
//     queueing are one critical section. A freed connection goes to the oldest
//     waiter of its site, a freed slot to the oldest waiter without a dial, and
//     every event that frees anything ends in admitLocked.
//  5. A waiter that gave up is never handed anything; see waiter.
//  6. Only idle connections are evicted, least recently used first; see recency.
//  7. The key of sites is the canonical Addr, compared with ==. A connection
//     keeps its site for life.
//  8. Nothing of one loan is visible in the next; see conn.
type Pool struct {
	cfg   Config          // never changes; of its limits those in force are in the books
	ctx   context.Context // of every dial
	stop  context.CancelFunc
	clock clock.Clock

	sys    *system
	report reporter

	inSession atomic.Int64 // sessions that have not ended; With looks into its ctx only if there are any
	loanLog   loanLog      // who holds what

	sessions *sessionCaches // for TLS

	handles handleBudget

	checkers chan struct{} // holds one for each ping of a sweep that counts, see examineInTurn

	// mu guards the books, the fields of site, conn and waiter that say so, and
	// what follows. See invariant 1 for what must not happen under it.
	mu sync.Mutex
	books

	watching      watching       // the watcher, and how it stands with it; what mu guards of that, it says
	sweeping      bool           // a sweep is under way
	examiners     int            // goroutines of the pool's that look at idle connections
	checkingSites map[*site]bool // whose connections one of them asks Check; nil before the first
	sweeper       *time.Timer    // nil until there is something to sweep
}

// site is the books of one address. It exists while there is a connection, a
// dial, a waiter, or a recent failure to remember. Its fields need Pool.mu.
type site struct {
	pool      *Pool // for those who are not the books: no method of books uses it
	addr      Addr  // canonical
	top       *conn // of the idle stack: the one given back last
	n         tally
	want      int32    // dials that this site's own limits would let start
	waiting   int32    // what Stats.Waiting counts of the queue
	heapIndex int32    // in Pool.ready or readyOwn, -1 if not
	epoch     uint32   // raised by Retire; a connection of an older epoch is not lent again
	family    family   // of a site of DialContext's; for life
	absolute  bool     // ... and its host had a final dot
	overflow  uint8    // ... and so many may be open beyond MaxOpen for it, see DialOverflow
	rank      int8     // as of the last refreshLocked, see books_silence.go
	queue     *queue   // never nil, see noQueue
	dial      *attempt // the youngest under way that waiters count on
	backoff   *backoff // nil after a dial that worked
	prefill   *prefill // nil but for Warm, MinIdlePerAddr and DialContext

	loans, dials, dialErrors uint64
}

// newSite makes the books of an address, in which there is nothing.
func (p *Pool) newSite(addr Addr) *site {
	return &site{pool: p, addr: addr, queue: &noQueue, heapIndex: -1}
}

// tally counts connections by phase.
type tally [numPhases]int32

// open counts those that hold a slot.
func (n *tally) open() int {
	return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed] + n[phaseClosing])
}

// kept counts those of them that are not being given up.
func (n *tally) kept() int { return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed]) }

// New makes a pool. It starts no goroutine and opens nothing. The error names
// both fields of a combination that makes no sense, and is fs.ErrInvalid.
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
		cfg:      cfg,
		sys:      &realSystem,
		sessions: newSessionCaches(),
		checkers: make(chan struct{}, maxCheckers),

		watching: watching{create: sock.NewWatcher, add: (*sock.Watcher).Add},
	}
	p.report.logger = cfg.Logger
	p.loanLog.init(&p.cfg, &p.clock, &p.report)
	p.begin(rulesOf(&cfg, &p.clock, &p.handles), given, cfg.limits())
	// Who asks for short times, or watches, gets them exactly.
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
// fn has the connection alone, until it returns; a [Conn] kept longer answers
// ErrReturned. ctx governs the wait for the connection and the I/O inside fn:
// its deadline is set on the socket, and its end interrupts a blocked call. It
// does not govern the dial, which may come to serve another borrower (values
// of ctx do reach it); With itself returns when ctx is done, even so.
//
// fn's error comes back as it is, without the marks of Keep (if one is inside the
// error, in a wrapper that errors.Is and errors.As see through). nil or
// Keep(err) gives the connection back to the pool. It is closed, and not lent
// again, if fn returned any other error, panicked (the panic is passed on),
// called runtime.Goexit, or called Conn.Close; if ctx is done; if an operation
// on it is still running, failed, or timed out (only Keep forgives a
// time-out); if it was closed for writing; if bytes are left unread in the
// connection, in crypto/tls or in the state's buffer, or unflushed there; or if Config.Reset
// fails. Conn.Detach takes it out of the pool for good. A panic of Reset, Check
// or a Prober on the borrower's time reaches the borrower, as a *PanicError.
//
// An *[Error] means that fn never ran, and says at which stage and why:
// errors.Is finds ErrClosed, ErrExhausted, ErrNoneRemovable, the ctx's error
// or the dial's in it. fn is never run twice, and a connection that died while
// it was idle is never the caller's problem: the pool takes the next one, or
// opens one. Of new ones that the peer gives up before fn has them it opens
// three at most.
//
// Under the ctx of a [Pool.Session] the connection is that of the session, which
// keeps it between two uses; what is said there about giving back comes true
// at the session's end.
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

// request is a borrow under way. It stays on the borrower's stack, and so does the
// address; a ctx in it, which goes into the waiter, would take both to the heap.
type request struct {
	addr  *Addr
	hash  uint64        // of addr
	known bool          // addr is canonical
	start clock.Instant // of the wait; a borrow that need not wait has none
	seq   uint64        // this borrower's place in the queue, once it has one
}

// claim is what a borrower got in its critical section: a connection, of which the
// borrower is the owner now; or a place in the queue; or an error, still to be
// classified. It is none of these if the pool is closed, and if the address is not
// known and has to be checked first.
type claim struct {
	c       *conn
	w       *waiter
	refused *Error
	closed  bool
}

// claim is the critical section of a borrow: looking for an idle connection, for
// room, and queueing are one, or a waiter could sit beside an idle connection
// (invariant 4). todo has the connection that was found unfit in the last round. Its
// slot must not be free before the borrower has its place in the queue again, or a
// younger borrower would get the slot.
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
		todo   agenda // begins with the connection found unfit in the last round
		hollow int    // connections that were opened in vain, see lived.go
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
			if fresh && c.word.Load()&(flagHungUp|flagStolen|flagBroken) == 0 && !c.sock.isStolen() { // Setup may have taken its time
				return c, waited, nil
			}
		case got.refused != nil:
			todo.run(p)
			return nil, 0, got.refused.classify()
		case got.closed:
			todo.run(p)
			return nil, 0, p.failed(*r.addr, StageWait, ErrClosed, r.start)
		default:
			// Keys are canonical, so an addr that is found needs no checking. This one
			// was not found, so nothing of it is in the books, and todo is empty.
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
		var vain error // why this borrower tries no more
		if dead {
			hollow++
			why := unborn(reason, err)
			if !reason.innocent() && c.noteHollow(why) || hollow >= maxHollow {
				vain = why
			}
		}
		if p.cfg.isForPush(reason) {
			// It goes to Push, and this borrower takes another, or it
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

// isDone asks a ctx while its borrower has c, which is closed for reason if the ctx
// panics.
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

// announce runs the agenda of a borrower that was queued, and tells Trace.Wait. If
// either ends the borrower's goroutine, the borrower leaves the queue.
func (w *waiter) announce(t *Trace, todo *agenda) {
	p := w.site.pool
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

// ctxError is the end of a ctx for which somebody gave a cause.
type ctxError struct{ err, cause error }

func (e *ctxError) Error() string   { return oneLine(e.err.Error() + ": " + e.cause.Error()) }
func (e *ctxError) Unwrap() []error { return []error{e.err, spent(e.cause)} }

// causeOf is why ctx is done: its error, with the cause if that says more.
func causeOf(ctx context.Context) error {
	err := ctx.Err()
	if cause := tame(context.Cause(ctx)); cause != nil && !errors.Is(cause, err) {
		return &ctxError{err, cause}
	}
	return err
}
