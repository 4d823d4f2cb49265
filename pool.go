package connpool

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
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
//     never exceeds a limit (Overflow apart). A slot is free when the socket
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
	cfg   Config
	ctx   context.Context // of every dial
	stop  context.CancelFunc
	clock clock.Clock

	sys *system

	inSession atomic.Int64 // sessions that have not ended; With looks into its ctx only if there are any
	holds     *holds       // nil unless somebody wants to know who holds what
	out       outs         // what is known of that

	sessions *sessionCaches // for TLS

	newWatcher func() (*sock.Watcher, error) // but for tests that of the system
	handles    atomic.Int64                  // what the process's handle limit leaves, as of the last look

	addWatch func(*sock.Watcher, syscall.RawConn, bool) error // Watcher.Add, but for tests

	checkers                chan struct{} // holds one for each ping of a sweep that counts, see examineInTurn
	stuckTraces, stuckLines atomic.Int32  // calls of Trace and Logger that have not returned, see notify

	// mu guards everything below, and the fields of site, conn and waiter
	// that say so. See invariant 1 for what must not happen under it.
	mu        sync.Mutex
	closed    bool
	sites     siteTable
	recency   recency
	byFD      map[uintptr]*conn  // by descriptor, from the dial to the removal
	n         tally              // connections by phase
	ready     siteHeap           // sites with want > 0, but for those of DialContext
	readyOwn  siteHeap           // those of DialContext, which may not exceed MaxOpen under any policy
	want      int                // dials that could start if there was room: the sum of site.want
	eager     int                // ... and for which idle connections make room: the sum of site.eager
	unheard   map[*site]struct{} // those with a rank above 1; nil before the first
	unneeded  map[*site]struct{} // those that dial for nobody who waits, see silence.go; nil before the first
	displaced int                // dials that were broken off for others and have not ended
	overtook  int                // hand-overs to a younger waiter since a slot was last given away
	lastSeq   uint64             // of waiters
	lastID    uint64             // of connections
	counts    Stats              // but for the gauges that are made from n
	closedBy  [numCloseReasons]uint64
	pressure  pressure           // on file handles, as of the last dial that told
	pressedAt clock.Instant      // when that was
	starving  int                // dials that wait for a handle
	freed     chan struct{}      // closed and renewed when something may have freed one
	watching  watching           // how it stands with watcher
	watcher   *sock.Watcher      // nil where there is none, and before the first connection
	sweeping  bool               // a sweep is under way
	lookers   int                // goroutines of the pool's that look at idle connections
	checking  map[*site]bool     // whose connections one of them asks Check; nil before the first
	slow      int                // closes that take longer than closePatience
	looked    int                // idle connections of addresses with a reserve that are being looked at
	sweeper   *time.Timer        // nil until there is something to sweep
	left      chan struct{}      // closed and renewed when, after Close, something leaves the books
	given     Limits             // as New or SetLimits got them; resolved they are in cfg, which mu guards that far
	short     list.List          // of the sites that want dials for nobody who waits, see warm.go
	reserves  int                // calls under way of what DialReserve returned
	tracked   map[*site]struct{} // the books of connections that DialContext made, or is making; nil before the first
}

// site is the books of one address. It exists while there is a connection, a
// dial, a waiter, or a recent failure to remember. Its fields need Pool.mu.
type site struct {
	pool      *Pool
	addr      Addr  // canonical
	top       *conn // of the idle stack: the one given back last
	n         tally
	want      int32    // dials that this site's own limits would let start
	waiting   int32    // what Stats.Waiting counts of the queue
	heapIndex int32    // in Pool.ready or readyOwn, -1 if not
	epoch     uint32   // raised by Retire; a connection of an older epoch is not lent again
	family    family   // of a site of DialContext's; for life
	absolute  bool     // ... and its host had a final dot
	reserve   uint8    // ... and so many may be open beyond MaxOpen for it, see DialReserve
	rank      int8     // as of the last refreshLocked, see silence.go
	queue     *queue   // never nil, see noQueue
	dial      *attempt // the youngest under way that waiters count on
	trouble   *trouble // nil after a dial that worked
	special   *special // nil but for Warm, MinSpare and DialContext

	loans, dials, dialErrors uint64
}

// tally counts connections by phase.
type tally [numPhases]int32

func openOf(n *tally) int { return int(n[dialing] + n[idle] + n[borrowed] + n[closing]) }

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
		given:    given,
		sys:      &realSystem,
		sites:    newSiteTable(),
		byFD:     make(map[uintptr]*conn),
		sessions: newSessionCaches(),
		left:     make(chan struct{}),
		freed:    make(chan struct{}),
		checkers: make(chan struct{}, checkers),

		newWatcher: sock.NewWatcher,
		addWatch:   (*sock.Watcher).Add,
	}
	p.recency.init()
	// Who asks for short times, or watches, gets them exactly.
	p.clock.Read = time.Now
	p.clock.Exact = cfg.IdleTimeout > 0 && cfg.IdleTimeout < 100*clock.Tick ||
		cfg.Check != nil && cfg.TrustIdle < 100*clock.Tick || cfg.Trace != nil
	p.ctx, p.stop = context.WithCancel(context.Background())
	if cfg.HoldWarn > 0 || cfg.Profile != nil || cfg.Debug {
		p.holds = &holds{}
	}
	p.lookAtHandles()
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
	t := p.trace(ctx)
	if t != nil && t.GetConn != nil {
		p.named("Trace.GetConn", func() { t.GetConn(addr) })
	}
	c, waited, err := p.borrow(ctx, addr, t)
	if err != nil {
		return err
	}
	owner := true // until the connection is closed, given back or gone
	defer p.rescue(c, &owner)
	c.uses++
	c.uncounted = true
	c.observedBy(t)
	if p.holds != nil {
		p.hold(c, 1)
	}
	loan := c.begin(ctx, 0)
	if t != nil && t.GotConn != nil {
		info := GotInfo{Addr: c.site.addr, ID: c.id, Reused: c.uses > 1, Uses: c.uses, IdleFor: c.idleFor, Waited: waited}
		p.named("Trace.GotConn", func() { t.GotConn(info) })
	}
	err = fn(loan)
	if err == nil {
		c.content()
	}
	return p.settle(ctx, c, err, t, &owner)
}

// rescue is deferred by an owner that runs foreign code: fn, or what settle
// calls. If that did not return, the connection is closed; a panic goes on.
func (p *Pool) rescue(c *conn, owner *bool) {
	if !*owner {
		return
	}
	reason, v := ClosedGoexit, recover()
	if v != nil {
		reason = ClosedPanic
	}
	if c.abort() {
		p.discard(c, reason, nil)
	}
	if v != nil {
		panic(v)
	}
}

// borrow makes the caller the owner of a connection that may be lent.
func (p *Pool) borrow(ctx context.Context, addr Addr, t *Trace) (_ *conn, waited time.Duration, _ error) {
	var (
		start clock.Instant // of the wait; a borrow that need not wait has none
		seq   uint64        // this borrower's place in the queue, once it has one
		known bool          // addr is canonical

		unload agenda // the connection found unfit in the last round
		hollow int    // connections that were opened in vain, see lived.go
	)
	if ctx.Err() != nil {
		return nil, 0, p.tooLate(ctx, addr)
	}
	hash := p.sites.hash(&addr)
	for {
		now := p.clock.Now()
		if t != nil {
			now = p.clock.Exactly()
		}
		p.mu.Lock()
		todo := unload
		unload = agenda{}
		for _, o := range todo.closes {
			p.moveLocked(o.c, closing)
		}
		if p.closed {
			p.mu.Unlock()
			todo.run(p)
			return nil, 0, p.failed(addr, StageWait, ErrClosed, start)
		}
		// The keys are canonical, so an addr that is found needs no checking.
		s := p.sites.get(hash, &addr)
		if s == nil {
			if !known {
				p.mu.Unlock()
				var err error
				if addr, err = p.resolve(addr); err != nil {
					return nil, 0, usage(addr, err)
				}
				known, hash = true, p.sites.hash(&addr)
				continue
			}
			s = p.newSiteLocked(addr)
		}
		c, dead := s.topLocked(), false
		if c != nil {
			p.takeLocked(c)
			c.lendAtLocked(now)
			if p.cfg.MinSpare > 0 {
				p.takenLocked(c, now)
				p.refreshLocked(s)
				p.admitLocked(&todo)
			} else {
				c.fromReserveLocked(false)
			}
			p.mu.Unlock()
			todo.run(p)
		} else {
			w, err := p.enqueueLocked(ctx, s, seq, &start, t, &todo) // unlocks
			if err != nil {
				return nil, 0, err
			}
			seq = w.seq
			c, err = p.await(ctx, s, w)
			if t != nil {
				waited = p.clock.Exactly().Sub(start)
			}
			if err != nil {
				stage := StageWait
				if de, ok := err.(*dialError); ok {
					stage, err = de.stage, de.err
				}
				return nil, 0, p.failed(addr, stage, err, start)
			}
			dead = w.fresh || c.uses == 0 && c.word.Load()&hungUp != 0
			if w.fresh && c.word.Load()&(hungUp|stolen|broken) == 0 && !c.probe.isStolen() { // Setup may have taken its time
				return c, waited, nil
			}
		}
		reason, err := p.unfit(ctx, c)
		if reason == ClosedUnknown {
			return c, waited, nil
		}
		var vain error // why this borrower tries no more
		if dead {
			hollow++
			why := unborn(reason, err)
			if !reason.innocent() && p.hollow(c, why) || hollow >= maxHollow {
				vain = why
			}
		}
		if p.pushes(reason) {
			// It goes to Push, and this borrower takes another, or it
			// when Push is done.
			p.push(c)
			switch {
			case ctx.Err() != nil:
				return nil, 0, p.failed(addr, StageWait, causeOf(ctx), start)
			case vain != nil:
				return nil, 0, p.failed(addr, StageDial, vain, start)
			}
			continue
		}
		if p.isDone(ctx, c, reason, err) || isPanic(err) {
			p.discard(c, reason, err)
			passOn(err)
			return nil, 0, p.failed(addr, StageWait, causeOf(ctx), start)
		}
		if vain != nil {
			p.discard(c, reason, err)
			return nil, 0, p.failed(addr, StageDial, vain, start)
		}
		// Its slot must not be free before this borrower has its place in
		// the queue again, or a younger one would get it.
		unload.close(c, reason, err)
	}
}

// isDone asks a ctx while its borrower has c, which is closed for reason if the ctx
// panics.
func (p *Pool) isDone(ctx context.Context, c *conn, reason CloseReason, err error) bool {
	asked := false
	defer func() {
		if !asked {
			p.discard(c, reason, err)
		}
	}()
	done := ctx.Err() != nil
	asked = true
	return done
}

// enqueueLocked puts a borrower into the queue of s and starts what may start,
// or refuses it. It unlocks mu.
func (p *Pool) enqueueLocked(ctx context.Context, s *site, seq uint64, start *clock.Instant, t *Trace, todo *agenda) (*waiter, error) {
	again := seq != 0
	now := p.clock.Exactly()
	if *start == 0 {
		*start = now
	}
	if s.backingOff() && s.queue.len > 0 && s.n[borrowed] == 0 && !again {
		// Nothing will be given back, and one borrower is there already to
		// probe the address.
		err := p.failedAtLocked(s, StageBackoff, s.lastErr(), *start)
		p.mu.Unlock()
		todo.run(p)
		return nil, err.classify()
	}
	if !again {
		p.lastSeq++
		seq = p.lastSeq
	}
	w := &waiter{seq: seq, ctx: ctx, since: now, ready: make(chan struct{}, 1), stalled: p.cfg.WhenFull == Fail}
	s.queueLocked().push(w)
	p.refreshLocked(s)
	p.admitLocked(todo)
	var refused *Error
	if bare := s.queue.bare; !again && bare != nil && w.seq >= bare.seq { // no dial for it
		here := s.queue.len - s.queue.dials // without a dial, w included
		full := p.cfg.WhenFull == Fail && p.fullLocked(s, here-1, p.want-int(s.want)+here-1) != ""
		crowded := here > p.cfg.MaxWaiters
		if full || crowded {
			s.queue.remove(w)
			p.refreshLocked(s)
			err := p.failedAtLocked(s, StageWait, ErrExhausted, *start)
			if !full {
				err.Limit, err.LimitName = p.cfg.MaxWaiters, "MaxWaiters"
			}
			refused = err
			p.forgetLocked(s)
			p.counts.Exhausted++
		}
	}
	waiting := s.queue.len
	if refused == nil && !again {
		p.counts.Waits++
	}
	p.mu.Unlock()
	if refused != nil {
		todo.run(p)
		return nil, refused.classify()
	}
	here := false
	defer func() {
		if !here { // a Trace function called runtime.Goexit
			p.leave(s, w)
		}
	}()
	todo.run(p)
	if t != nil && t.Wait != nil {
		p.observe("Trace.Wait", func() { t.Wait(WaitInfo{Addr: s.addr, Waiting: waiting}) })
	}
	here = true
	return w, nil
}

// settle is the end of a loan that ended by return: the verdict, and the give-back.
func (p *Pool) settle(ctx context.Context, c *conn, err error, t *Trace, owner *bool) error {
	word := c.end()
	if word&gone != 0 {
		*owner = false
		return unkeep(err)
	}
	reason, why := c.verdict(ctx, word, err)
	if reason == ClosedUnknown && c.leftovers(word) {
		reason, why = ClosedDirty, c.held().clean("the borrower")
	}
	p.putBack(ctx, c, reason, why, owner)
	if *owner {
		*owner = false
		id, s, lentAt := c.id, c.site, c.since // the connection is somebody else's after park
		if p.giveBack(c) && t != nil && t.PutConn != nil {
			info := PutInfo{Addr: s.addr, ID: id, Held: p.clock.Exactly().Sub(lentAt)}
			p.named("Trace.PutConn", func() { t.PutConn(info) })
		}
	}
	return unkeep(err)
}

// verdict says why a connection may not be used again after a loan that left
// word and err behind, ClosedUnknown if it may.
func (c *conn) verdict(ctx context.Context, word uint64, err error) (CloseReason, error) {
	forgiven := err != nil && isKept(err)
	switch {
	case word&stolen != 0:
		return Quarantined, errStolen
	case word&cut != 0 || ctx.Err() != nil:
		return ClosedCanceled, causeOf(ctx)
	case err != nil && !forgiven:
		return ClosedFnError, err
	case word&inFlight != 0:
		return ClosedInFlight, nil
	case word&broken != 0:
		return ClosedBroken, c.failure()
	case word&halfClosed != 0:
		return ClosedHalfClosed, nil
	case word&timedOut != 0 && !forgiven:
		return ClosedTimeout, c.failure()
	}
	return ClosedUnknown, nil
}

// putBack puts a connection in order for the next borrower, if it is not to be
// closed for reason. If it is, or cannot be put in order, the caller is no
// longer its owner.
func (p *Pool) putBack(ctx context.Context, c *conn, reason CloseReason, why error, owner *bool) {
	own := false // why is of Reset, which ran for this borrower
	if reason == ClosedUnknown {
		reason, why = c.condemned()
	}
	if reason == ClosedUnknown && c.word.Load()&hungUp != 0 {
		if reason, why = c.ask(); p.pushes(reason) {
			reason = ClosedUnknown
			c.extra().unread = true
		}
	}
	if reason == ClosedUnknown && p.cfg.Reset != nil {
		if c.probe.isStolen() {
			reason, why = Quarantined, errStolen
		} else if why = p.runHook(context.WithoutCancel(ctx), c, "Config.Reset", p.cfg.Reset); why != nil {
			reason, own = ClosedResetFailed, true
		}
	}
	if reason == ClosedUnknown {
		return
	}
	*owner = false
	p.discard(c, reason, why)
	if own {
		passOn(why)
	}
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
