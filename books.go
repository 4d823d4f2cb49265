package connpool

import (
	"container/list"
	"context"
	"fmt"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// books is the state that Pool.mu guards: the phase of each connection, the waiters, and
// the free slots. The books decide and never act. A method changes the state and adds
// what has to be done to an agenda. The caller runs the agenda after the unlock.
//
// The books have no reference to a Pool, so none of their methods can dial, close, log
// or call a hook. books_test.go checks this in the source for every function that a
// method of books calls. A method may read and write memory: the sites, the connections
// (their phase, their place in the lists, their state word), the waiters and the
// attempts.
//
// The suffix Locked says that the caller holds Pool.mu. Pool embeds the books, so a
// caller writes p.refreshLocked(s). Without the suffix, such a call would look like a
// call of a method of Pool, and many methods of Pool take the lock.
type books struct {
	rules // these fields never change

	limits        Limits     // the limits in use: resolved, as New or SetLimits has set them
	given         Limits     // the same limits as the caller gave them, for Pool.Limits
	perAddr       AddrLimits // those of limits that are one for each address; limitsAt reads them
	limitsVersion uint64     // how often limits was set; 0 for ever without Config.LimitsFor

	closed      bool
	sites       siteTable
	recency     recency
	byFD        map[uintptr]*conn  // the connections with a descriptor, by descriptor, from the dial to the removal
	n           tally              // numbers of connections by phase
	ready       siteHeap           // the sites with want > 0, without those of DialContext
	readyOwn    siteHeap           // the sites of DialContext with want > 0; only DialOverflow lets these exceed MaxOpen, whatever WhenFull says
	want        int                // dials that could start if there was room: the sum of site.want
	eager       int                // how many of these dials idle connections make room for: the sum of site.eager
	unheard     map[*site]struct{} // the sites with a rank above 1, see books_silence.go; nil before the first
	unneeded    map[*site]struct{} // the sites with a dial for which nobody waits, see books_silence.go; nil before the first
	displaced   int                // dials that the pool broke off for other addresses and that have not ended
	overtook    int                // connections given to a younger waiter since a slot was last given away
	lastSeq     uint64             // sequence number of the newest waiter
	lastID      uint64             // ID of the newest connection
	counts      Stats              // the statistics, without the gauges that Pool.Stats computes from n
	closedBy    [numCloseReasons]uint64
	pressure    pressure           // pressure on file handles, as the last dial that got a descriptor found it
	pressedAt   clock.Instant      // when pressure was set
	starving    int                // dials that wait for a file handle
	freed       chan struct{}      // closed and replaced when a file handle may have become free
	swept       bool               // a sweep is due or running
	slow        int                // connections whose close has taken longer than closePatience
	checking    int                // idle connections being checked, of addresses with a reserve
	left        chan struct{}      // closed and replaced when, after Close, a connection or a goroutine leaves the pool
	deficit     list.List          // the sites that want dials for which nobody waits, see books_minidle.go
	overflows   int                // running calls of functions that DialOverflow returned
	wrongMove   string             // the last forbidden change of phase; "" if there was none
	lowered     bool               // SetLimits has lowered a limit, and what was in use may exceed it
	relimiting  int                // calls of SetLimits that have not told all addresses of the limits yet, see admitLocked
	askingAgain bool               // a SetLimits is asking LimitsFor
	auditIn     int                // critical sections to come before the next audit; in debug mode only
	admitted    int                // the limit on connections by which admitLocked last judged; in debug mode only
	unpooled    map[*site]struct{} // the sites of DialContext, one for each connection or dial; nil before the first
}

// rules are the settings that the books use and that never change: fields of Config, and
// two values that need no lock of the pool, because they are safe for concurrent use.
type rules struct {
	whenFull      FullPolicy
	maxUses       int
	idleTimeout   time.Duration
	sweepInterval time.Duration
	maxBackoff    time.Duration // as in Config: 0 is the default, negative is off
	debug         bool
	asksLimits    bool // there is a Config.LimitsFor

	clock   *clock.Clock
	handles *handleBudget
}

func rulesOf(cfg *Config, k *clock.Clock, handles *handleBudget) rules {
	return rules{
		whenFull: cfg.WhenFull, maxUses: cfg.MaxUses, idleTimeout: cfg.IdleTimeout, sweepInterval: cfg.SweepInterval,
		maxBackoff: cfg.MaxBackoff, debug: cfg.Debug, asksLimits: cfg.LimitsFor != nil,
		clock: k, handles: handles,
	}
}

// begin makes the books of a new pool, without any connection or address.
func (b *books) begin(r rules, given, resolved Limits) {
	b.rules = r
	b.setLimitsLocked(given, resolved)
	b.sites = newSiteTable()
	b.byFD = make(map[uintptr]*conn)
	b.left, b.freed = make(chan struct{}), make(chan struct{})
	b.recency.init()
}

// addSiteLocked adds the state of an address.
func (b *books) addSiteLocked(s *site, todo *agenda) {
	b.sites.add(s)
	b.armSweepLocked(todo)
}

// dropIfEmptyLocked removes the state of s if there is nothing in it to remember.
func (b *books) dropIfEmptyLocked(s *site) {
	if s.n.open() > 0 || s.queue.len > 0 || s.failing() || s.prefill.keeps() {
		return
	}
	if s.unpooled() {
		delete(b.unpooled, s)
		return
	}
	b.sites.remove(s)
}

// limitLocked is the MaxOpen in use; math.MaxInt if there is no limit.
func (b *books) limitLocked() int {
	if b.limits.MaxOpen > 0 {
		return b.limits.MaxOpen
	}
	return int(b.handles.Load())
}

// roomLocked is how many connections may still be opened in the whole pool. It is
// negative while more connections are open than MaxOpen allows.
func (b *books) roomLocked() int { return b.limitLocked() - b.n.open() }

// roomAtLocked is how many connections to s may still be opened under MaxPerAddr.
func (b *books) roomAtLocked(s *site) int { return b.limitsAt(s).MaxOpen - s.n.open() }

// fullLocked names the limit that forbids a dial to s; "" if none does. Three kinds of
// connections count as free: those being closed, idle connections that could be evicted,
// and dials that were broken off for other addresses.
// aheadHere and ahead are the waiters that will take the room first: in the queue of s,
// and in all queues.
func (b *books) fullLocked(s *site, aheadHere, ahead int) string {
	switch {
	case s.n.kept()+aheadHere >= b.limitsAt(s).MaxOpen:
		return "MaxPerAddr"
	case b.n.kept()-int(b.n[phaseIdle])-b.displaced+ahead >= b.limitLocked():
		return "MaxOpen"
	}
	return ""
}

// refreshLocked recomputes how many dials s wants, and its place in the heaps. It must
// follow every change to the queue, the phases or the back-off of s.
//
// An example: five borrowers wait for s and two dials of s are under way, so three
// waiters have no dial. With MaxDialingPerAddr 4, want is 2. With MaxPerAddr 10 and nine
// connections open, want is 1. While s is backing off, want is 1 if no dial is under way
// and no pause is running, else 0.
func (b *books) refreshLocked(s *site) {
	want := int32(s.queue.len - s.queue.dials)
	switch {
	case want <= 0:
		want = 0
	case s.retrying(), s.backingOff() && s.queue.dials > 0:
		want = 0
	default:
		if s.backingOff() {
			want = 1
		}
		want = int32(min(int(want), b.limitsAt(s).MaxDialing-int(s.n[phaseDialing])))
		if b.whenFull != FullOverflow {
			want = int32(min(int(want), b.roomAtLocked(s)))
		}
		want = max(want, 0)
	}
	b.eager -= s.eager()
	b.want += int(want - s.want)
	s.want = want
	b.rankLocked(s)
	b.eager += s.eager()
	b.counts.Waiting += s.queue.len - int(s.waiting)
	s.waiting = int32(s.queue.len)
	b.readyOf(s).set(s, want > 0)
	if s.prefill != nil {
		b.refreshPrefillLocked(s)
	}
}

// readyOf is the heap for s.
func (b *books) readyOf(s *site) *siteHeap {
	if s.unpooled() {
		return &b.readyOwn
	}
	return &b.ready
}

// nextLocked is the site that gets the next slot: the first of both heaps. The caller
// makes sure that one of the heaps is not empty (want > 0).
func (b *books) nextLocked() *site {
	if len(b.readyOwn) == 0 || len(b.ready) > 0 && b.ready[0].before(b.readyOwn[0]) {
		return b.ready[0]
	}
	return b.readyOwn[0]
}

// admitLocked gives away what is free. It starts dials for the waiters without a dial,
// oldest first, and evicts idle connections while the waiters lack only a slot. Dials
// for which nobody waits (Warm, MinIdlePerAddr) come last.
func (b *books) admitLocked(todo *agenda) {
	if b.relimiting > 0 { // the oldest waiters may be at an address that still obeys the old limits; SetLimits admits in the end
		return
	}
	if b.debug {
		b.admitted = b.limitLocked()
	}
	for b.want > 0 && !b.closed {
		room := b.limits.MaxDialing - int(b.n[phaseDialing])
		if room <= 0 {
			b.shareLocked(todo)
			return
		}
		s := b.nextLocked()
		if b.roomLocked() <= 0 {
			want := b.want
			if b.eager > 0 {
				want = b.eager
			}
			if int(b.n[phaseClosing])-b.slow+b.displaced >= min(want, room) {
				return // enough slots will be free soon
			}
			// Under FullOverflow the pool's own dials need no slot: breaking one of
			// them off would not help, because the next one would start at once.
			if b.whenFull != FullOverflow && b.shareLocked(todo) {
				continue
			}
			if v := b.recency.oldestIdle(int(b.n[phaseIdle])); v != nil && b.eager > 0 {
				b.evictLocked(v, ClosedEvicted, nil, todo)
				continue
			}
			switch own := b.stalledLocked(); {
			case own != nil:
				s = own
			case b.whenFull == FullOverflow && b.limits.MaxOpen > 0 && len(b.ready) > 0:
				s = b.ready[0]
			default:
				return
			}
		}
		b.overtook = 0
		b.startDialLocked(s, &attempt{ctx: s.queue.nextToDial.ctx, waiter: s.queue.nextToDial}, todo)
	}
	if b.deficit.Len() > 0 {
		b.openMissingLocked(todo)
	}
}

// startDialLocked starts a dial for the oldest waiter of s without a dial.
func (b *books) startDialLocked(s *site, a *attempt, todo *agenda) {
	a.c, a.older = &conn{site: s, epoch: s.epoch}, s.dial
	if s.dial != nil {
		s.dial.newer = a
	}
	s.dial = a
	todo.dials = append(todo.dials, a)
	b.moveLocked(a.c, phaseDialing)
	s.queueLocked().dialStarted()
	s.dials++
	b.counts.Dials++
	b.refreshLocked(s)
}

// moveLocked is the only function that changes the phase of a connection.
func (b *books) moveLocked(c *conn, to phase) {
	s, from := c.site, c.phase
	if phaseMoves[from]&(1<<to) == 0 {
		b.wrongMoveLocked(c, to)
	}
	b.n[from]--
	s.n[from]--
	c.phase = to
	b.n[to]++
	s.n[to]++
	if (to == phaseClosing || to == phaseNone) && c.linked() {
		c.unlink() // it was being checked and kept its place on the idle stack
	}
	if from == phaseNone {
		b.counts.PeakOpen = max(b.counts.PeakOpen, b.n.open())
	}
}

// wrongMoveLocked records a forbidden change of phase, which is a bug in the pool. In
// debug mode it panics. Otherwise the pool goes on, and tests find the record in
// wrongMove.
func (b *books) wrongMoveLocked(c *conn, to phase) {
	b.wrongMove = fmt.Sprintf("connpool: a connection to %v went from %v to %v", c.site.addr, c.phase, to)
	if b.debug {
		panic(b.wrongMove)
	}
}

// countLoanLocked counts the loan of c that has just ended, if it was not counted yet.
func (b *books) countLoanLocked(c *conn) {
	if !c.uncounted {
		return
	}
	c.uncounted = false
	b.counts.Loans++
	c.site.loans++
	if c.uses > 1 {
		b.counts.Reused++
	}
}

// takeLocked makes the caller the owner of an idle connection.
func (b *books) takeLocked(c *conn) {
	c.unlink()
	b.moveLocked(c, phaseBorrowed)
}

// evictLocked closes an idle connection. Nobody owned the connection; from now on the
// agenda owns it.
func (b *books) evictLocked(c *conn, reason CloseReason, err error, todo *agenda) {
	c.unlink()
	b.moveLocked(c, phaseClosing)
	todo.close(c, reason, err)
}

// origin says where a connection that is released comes from.
type origin uint8

const (
	fromLoan  origin = iota // its loan ended in good order
	fromCheck               // a waiter that had given up was served with it, it was checked while idle, or Push has ended
	fromDial                // its dial ended
)

// releaseLocked is the part of releaseFrom that changes the books. It reports whether the
// connection was kept.
//
// A returned connection and a connection that was just dialed take the same way: to the
// oldest waiter of their address. net/http calls this socket late binding. A borrower for
// whom a dial was started may be served with a returned connection. The connection of the
// dial then goes to another waiter or onto the idle stack.
//
// An example: w1 and w2 wait for s, and a dial for each of them is under way. A loan
// ends: w1 gets the returned connection. Both dials end within surplusPatience. The first
// serves w2, whichever waiter the dial was started for. At the end of the second nobody
// waits, so its connection becomes idle.
func (b *books) releaseLocked(c *conn, u origin, now clock.Instant, todo *agenda) bool {
	s := c.site
	if u != fromCheck {
		// The caller read the clock before it took the lock, so now may be a moment
		// before the time of a connection that was released meanwhile.
		if s.top != nil {
			now = max(now, s.top.since)
		}
		c.since, c.idleFor = now, 0
	} else {
		c.since -= clock.Instant(c.idleFor)
		b.setCheckingLocked(c, false)
	}
	b.countLoanLocked(c)
	reserve := u == fromCheck && b.reservedLocked(s, 1, now)
	if b.limitsAt(s).MinIdle > 0 {
		if u == fromLoan || s.queue.head != nil {
			b.noteLentLocked(s, now)
		}
	}
	news := u == fromLoan && c.word.Load()&flagsLived != flagsLived && b.noteLivedLocked(c, true)
	if reason := b.whyUnwantedLocked(c, u, now); reason != ClosedUnknown {
		b.moveLocked(c, phaseClosing)
		todo.close(c, reason, c.whyRetiredLocked(reason))
		b.admitLocked(todo)
		return false
	}
	c.dropLoanState()
	if u == fromLoan {
		b.recency.touch(c)
	}
	if s.queue.head != nil {
		if c.linked() {
			c.unlink()
		}
		c.lendAtLocked(now)
		c.fromReserveLocked(reserve)
		b.deliverLocked(s, c, u == fromDial, nil)
		if s.surplus() > 0 {
			b.doubtDialsLocked(s, todo)
		}
		b.refreshLocked(s)
		if news || b.deficit.Len() > 0 {
			b.admitLocked(todo)
		}
		return true
	}
	b.recency.back(c)
	b.moveLocked(c, phaseIdle)
	if !c.linked() {
		c.link(u == fromCheck)
	}
	if s.prefill != nil {
		b.refreshLocked(s)
	}
	b.noteFreedLocked() // a dial that lacks a file handle may evict c
	b.armSweepLocked(todo)
	if b.want > 0 || b.deficit.Len() > 0 {
		b.admitLocked(todo)
	}
	return true
}

// whyUnwantedLocked says why c may not stay in the pool; ClosedUnknown if it may.
func (b *books) whyUnwantedLocked(c *conn, u origin, now clock.Instant) CloseReason {
	s, limit := c.site, b.limitLocked()
	here := b.limitsAt(s)
	marked, _ := c.condemned()
	switch {
	case b.closed:
		return ClosedWithPool
	case marked != ClosedUnknown:
		return marked
	case c.epoch != s.epoch:
		return c.retiredForLocked()
	case u == fromDial && s.queue.head != nil:
		// c was opened for a borrower that waits. Whatever limit c exceeds, another
		// dial would give the same result.
		return ClosedUnknown
	case s.unpooled() && s.queue.head == nil:
		return ClosedCanceled // the caller of DialContext has gone, and no other borrower may use c
	case c.uses >= b.maxUses:
		return ClosedMaxUses
	case c.maxAge > 0 && b.clock.Age(c.born, now) >= c.maxAge:
		return c.whyTooOld()
	case s.n.kept() > here.MaxOpen, b.n.kept() > limit:
		return ClosedSurplus
	case b.limits.MaxIdle == 0 && c.uses > 0, here.MaxIdle == 0 && c.uses > 0:
		return ClosedSurplus
	}
	if s.queue.head == nil {
		if int(b.n[phaseIdle]) >= b.limits.MaxIdle || int(s.n[phaseIdle]) >= here.MaxIdle {
			return ClosedSurplus
		}
		if b.pressure >= handlesLow {
			return ClosedLowHandles
		}
		return ClosedUnknown
	}
	// A busy address could keep its connections forever while older waiters of
	// other addresses need a slot. Younger waiters may overtake those at most as
	// often as there are slots.
	//
	// An example: MaxOpen is 3, all three connections are of A, whose borrowers
	// queue, and an older borrower waits for a first connection to B. The next
	// three connections that are given back go to borrowers of A: overtook is 1,
	// 2, 3. The pool closes the fourth, and its slot goes to the oldest waiter
	// without a dial: the borrower of B. As long as an idle connection could make room, it is
	// not the slots that keep that borrower waiting, but MaxDialing.
	if b.eager > 0 && b.n[phaseIdle] == 0 && b.n.open() >= limit && b.nextLocked().queue.nextToDial.seq < s.queue.head.seq {
		if b.overtook++; b.overtook > limit {
			b.overtook = 0
			return ClosedEvicted
		}
	}
	return ClosedUnknown
}

// agenda is what a critical section decided and its caller does after the unlock. The
// caller owns the connections in it.
type agenda struct {
	dials   []*attempt
	closes  []closeOrder
	cancels []context.CancelFunc // of dials that the pool breaks off
	timers  []timerOrder
}

// timerOrder is a timer to be started. A timer ends a pause of back-off, checks the
// surplus dials of a site, or starts the next sweep.
//
// The state may change between the unlock and the start of the timer. So the function
// that starts a timer checks again under the lock: the pause may have ended
// (startPause), and the pool may be closed (startSweeper).
type timerOrder struct {
	after time.Duration
	pause *pause // the timer ends this pause
	doubt *queue // the timer checks the surplus dials of this queue, which is of site
	site  *site  // the site of pause or doubt; nil for the next sweep
}

// retry orders the end of the pause t of s.
func (a *agenda) retry(s *site, t *pause, after time.Duration) {
	a.timers = append(a.timers, timerOrder{after: after, pause: t, site: s})
}

// doubt orders the check of the surplus dials of s, after surplusPatience.
func (a *agenda) doubt(s *site) {
	a.timers = append(a.timers, timerOrder{after: surplusPatience, doubt: s.queue, site: s})
}

// sweep orders the next sweep.
func (a *agenda) sweep(after time.Duration) {
	a.timers = append(a.timers, timerOrder{after: after})
}

type closeOrder struct {
	c      *conn
	reason CloseReason
	err    error
}

// close orders the close of c.
func (a *agenda) close(c *conn, reason CloseReason, err error) {
	a.closes = append(a.closes, closeOrder{c, reason, err})
}

// reasonOf is why c is to be closed; ClosedUnknown if it is not in the agenda.
func (a *agenda) reasonOf(c *conn) CloseReason {
	for _, o := range a.closes {
		if o.c == c {
			return o.reason
		}
	}
	return ClosedUnknown
}
