package connpool

import (
	"container/list"
	"context"
	"fmt"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// books is the state that Pool.mu guards: who has which connection, who waits, and
// what is free. The books decide; they never act. A method changes the state and
// writes what has to be done to an agenda, which the caller runs after the unlock.
//
// The books have no reference to a Pool, so no method of theirs can dial, close,
// log, or call a hook; floor_test.go holds this for all that a method calls. A
// method may read and write what lies in memory: the sites, the connections (their
// phase, their place in the lists, their state word), the waiters, the attempts.
//
// The methods keep the suffix Locked, which says that the caller holds Pool.mu.
// Pool embeds the books, so a call in a flow reads p.refreshLocked(s), and the
// suffix is all that tells such a call from one of a method of the pool's own,
// many of which take the lock.
type books struct {
	rules // what never changes

	limits Limits // in force: resolved, as SetLimits or New has set them
	given  Limits // the same as the caller gave them, for Pool.Limits

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
	swept     bool               // a sweep is due, or under way
	slow      int                // closes that take longer than closePatience
	checking  int                // idle connections of addresses with a reserve that are being looked at
	left      chan struct{}      // closed and renewed when, after Close, something leaves the books
	deficit   list.List          // of the sites that want dials for nobody who waits, see pool_warm.go
	overflows int                // calls under way of what DialOverflow returned
	wrongMove string             // the last change of phase that must not be; "": there was none
	lowered   bool               // SetLimits has lowered a limit, and what was in use may exceed it
	auditIn   int                // critical sections to come before the next audit; in debug mode only
	admitted  int                // the limit on connections by which admitLocked last judged; in debug mode only
	unpooled  map[*site]struct{} // the books of connections that DialContext made, or is making; nil before the first
}

// rules are what the books go by and what never changes: fields of Config, and two
// things that need no lock of the pool's, because each guards itself.
type rules struct {
	whenFull      FullPolicy
	maxUses       int
	idleTimeout   time.Duration
	sweepInterval time.Duration
	debug         bool

	clock   *clock.Clock
	handles *handleBudget
}

func rulesOf(cfg *Config, k *clock.Clock, handles *handleBudget) rules {
	return rules{
		whenFull: cfg.WhenFull, maxUses: cfg.MaxUses, idleTimeout: cfg.IdleTimeout, sweepInterval: cfg.SweepInterval, debug: cfg.Debug,
		clock: k, handles: handles,
	}
}

// begin makes the books of a pool, in which there is nothing.
func (b *books) begin(r rules, given, resolved Limits) {
	b.rules, b.given, b.limits = r, given, resolved
	b.sites = newSiteTable()
	b.byFD = make(map[uintptr]*conn)
	b.left, b.freed = make(chan struct{}), make(chan struct{})
	b.recency.init()
}

// addSiteLocked begins the books of an address.
func (b *books) addSiteLocked(s *site, todo *agenda) {
	b.sites.add(s)
	b.armSweepLocked(todo)
}

// dropIfEmptyLocked drops the books of s if they say nothing.
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

// limitLocked is MaxOpen in force, math.MaxInt if there is none.
func (b *books) limitLocked() int {
	if b.limits.MaxOpen > 0 {
		return b.limits.MaxOpen
	}
	return int(b.handles.Load())
}

// roomLocked is how many connections may still be opened, in all; less than 0 while
// more are open than MaxOpen allows.
func (b *books) roomLocked() int { return b.limitLocked() - b.n.open() }

// roomAtLocked is the same for the connections to s, and MaxPerAddr.
func (b *books) roomAtLocked(s *site) int { return b.limits.MaxPerAddr - s.n.open() }

// fullLocked names the limit that forbids a dial to s; "" if none does. Connections
// that are being closed, idle ones that could be evicted, and dials that were broken
// off for others, count as free.
// aheadHere and ahead are the waiters that will take that room first: in the queue
// of s, and in all queues.
func (b *books) fullLocked(s *site, aheadHere, ahead int) string {
	switch {
	case s.n.kept()+aheadHere >= b.limits.MaxPerAddr:
		return "MaxPerAddr"
	case b.n.kept()-int(b.n[phaseIdle])-b.displaced+ahead >= b.limitLocked():
		return "MaxOpen"
	}
	return ""
}

// refreshLocked brings the pool's view of what s wants up to date. It follows
// every change to the queue, the phases or the back-off of s.
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
		want = int32(min(int(want), b.limits.MaxDialingPerAddr-int(s.n[phaseDialing])))
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

// readyOf is the heap that s belongs in.
func (b *books) readyOf(s *site) *siteHeap {
	if s.unpooled() {
		return &b.readyOwn
	}
	return &b.ready
}

// nextLocked is the site that gets the next slot: the first of both heaps. There is
// one.
func (b *books) nextLocked() *site {
	if len(b.readyOwn) == 0 || len(b.ready) > 0 && b.ready[0].before(b.readyOwn[0]) {
		return b.ready[0]
	}
	return b.readyOwn[0]
}

// admitLocked gives away what is free: it starts dials for the waiters that
// have none, oldest first, and evicts idle connections as long as that is what
// they lack. What nobody waits for comes last.
func (b *books) admitLocked(todo *agenda) {
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
				return // enough is on its way
			}
			// Under FullOverflow the pool's own dials need no slot, and what one
			// of them gave up the next would take again.
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

// startDialLocked starts a dial, for the oldest waiter of s that has none.
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

// moveLocked is the only place where a connection changes its phase.
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
		c.unlink() // it was looked at
	}
	if from == phaseNone {
		b.counts.PeakOpen = max(b.counts.PeakOpen, b.n.open())
	}
}

// wrongMoveLocked is told of a change of phase that must not be. It is a bug in the
// pool: in debug mode it panics, else the pool goes on, and tests find it in undrawn.
func (b *books) wrongMoveLocked(c *conn, to phase) {
	b.wrongMove = fmt.Sprintf("connpool: a connection to %v went from %v to %v", c.site.addr, c.phase, to)
	if b.debug {
		panic(b.wrongMove)
	}
}

// countLoanLocked counts the loan of c that has just ended, if one has.
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

// evictLocked closes an idle connection: nobody owns it, so from now on the agenda
// does.
func (b *books) evictLocked(c *conn, reason CloseReason, err error, todo *agenda) {
	c.unlink()
	b.moveLocked(c, phaseClosing)
	todo.close(c, reason, err)
}

// use says where a connection that is parked comes from.
type origin uint8

const (
	fromLoan  origin = iota // a loan ended in good order
	fromCheck               // it was handed to a waiter that had given up, or looked at by a sweep
	fromDial                // its dial ended
)

// releaseLocked is the part of park that concerns the books. It reports whether the
// connection was kept.
//
// A returned connection and one that was just dialled come the same way, and both go
// to the oldest waiter of their address (what net/http calls socket late binding): a
// borrower for whom a dial was started may be served by a returned connection, and
// the connection of the dial goes to another, or onto the idle stack.
func (b *books) releaseLocked(c *conn, u origin, now clock.Instant, todo *agenda) bool {
	s := c.site
	if u != fromCheck {
		// Its clock was read before the lock: it may be a moment behind
		// that of a connection that was parked meanwhile.
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
	if b.limits.MinIdlePerAddr > 0 {
		if u == fromLoan || s.queue.head != nil {
			b.noteLentLocked(s, now)
		}
	}
	news := u == fromLoan && c.word.Load()&flagsLived != flagsLived && b.noteLivedLocked(c, true)
	if reason := b.whyUnwantedLocked(c, u, now); reason != ClosedUnknown {
		b.moveLocked(c, phaseClosing)
		todo.close(c, reason, nil)
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
	b.noteFreedLocked() // a dial that lacks a handle may evict it
	b.armSweepLocked(todo)
	if b.want > 0 || b.deficit.Len() > 0 {
		b.admitLocked(todo)
	}
	return true
}

// whyUnwantedLocked says why a connection may not stay, ClosedUnknown if it may.
func (b *books) whyUnwantedLocked(c *conn, u origin, now clock.Instant) CloseReason {
	s, limit := c.site, b.limitLocked()
	marked, _ := c.condemned()
	switch {
	case b.closed:
		return ClosedWithPool
	case marked != ClosedUnknown:
		return marked
	case c.epoch != s.epoch:
		return ClosedRetired
	case u == fromDial && s.queue.head != nil:
		// It was opened for a borrower that waits; whatever else may be
		// said against it, another dial would end no better.
		return ClosedUnknown
	case s.unpooled() && s.queue.head == nil:
		return ClosedCanceled // who dialled has gone, and it is good for nobody else
	case c.uses >= b.maxUses:
		return ClosedMaxUses
	case c.maxAge > 0 && b.clock.Age(c.born, now) >= c.maxAge:
		return ClosedLifetime
	case s.n.kept() > b.limits.MaxPerAddr, b.n.kept() > limit:
		return ClosedSurplus
	case b.limits.MaxIdle == 0 && c.uses > 0, b.limits.MaxIdlePerAddr == 0 && c.uses > 0:
		return ClosedSurplus
	}
	if s.queue.head == nil {
		if int(b.n[phaseIdle]) >= b.limits.MaxIdle || int(s.n[phaseIdle]) >= b.limits.MaxIdlePerAddr {
			return ClosedSurplus
		}
		if b.pressure >= handlesLow {
			return ClosedLowHandles
		}
		return ClosedUnknown
	}
	// A busy address could keep its connections for ever while older
	// waiters of other addresses need the slot. They are overtaken at most
	// as often as there are slots.
	//
	// An example: MaxOpen is 3, all three connections are of A, whose borrowers
	// queue, and an older borrower waits for a first connection to B. The next
	// three connections that come back go to borrowers of A: overtook is 1, 2, 3.
	// The fourth is closed, and its slot goes to the oldest waiter without a dial:
	// the borrower of B.
	if b.eager > 0 && b.n.open() >= limit && b.nextLocked().queue.nextToDial.seq < s.queue.head.seq {
		if b.overtook++; b.overtook > limit {
			b.overtook = 0
			return ClosedEvicted
		}
	}
	return ClosedUnknown
}

// agenda is what a critical section decided and its caller does after the
// unlock. The connections in it are the caller's.
type agenda struct {
	dials   []*attempt
	closes  []closeOrder
	cancels []context.CancelFunc // of dials that are broken off
	timers  []timerOrder
}

// timerOrder is a timer to be started, for one of three things.
//
// Between the unlock and the start the books may change their mind, so whoever
// starts a timer looks again, under the lock: the pause of an address may have
// ended (startPause), and the pool may be closed (startSweeper).
type timerOrder struct {
	after time.Duration
	pause *pause // to end it
	doubt *queue // to look at its surplus; of site
	site  *site  // whose pause or queue it is; nil: the next sweep
}

func (a *agenda) retry(s *site, t *pause, after time.Duration) {
	a.timers = append(a.timers, timerOrder{after: after, pause: t, site: s})
}

func (a *agenda) doubt(s *site) {
	a.timers = append(a.timers, timerOrder{after: surplusPatience, doubt: s.queue, site: s})
}

func (a *agenda) sweep(after time.Duration) {
	a.timers = append(a.timers, timerOrder{after: after})
}

type closeOrder struct {
	c      *conn
	reason CloseReason
	err    error
}

func (a *agenda) close(c *conn, reason CloseReason, err error) {
	a.closes = append(a.closes, closeOrder{c, reason, err})
}

// reasonOf is why c is to be closed, ClosedUnknown if it is not.
func (a *agenda) reasonOf(c *conn) CloseReason {
	for _, o := range a.closes {
		if o.c == c {
			return o.reason
		}
	}
	return ClosedUnknown
}
