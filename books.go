package connpool

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// The books: every function that changes them, and the agenda in which a
// critical section writes what its caller does after the unlock.

func (p *Pool) newSiteLocked(addr Addr) *site {
	s := &site{pool: p, addr: addr, queue: &noQueue, heapIndex: -1}
	p.sites.add(s)
	p.armSweepLocked()
	return s
}

// forgetLocked drops the books of s if they say nothing.
func (p *Pool) forgetLocked(s *site) {
	if openOf(&s.n) > 0 || s.queue.len > 0 || s.failing() || s.special.keeps() {
		return
	}
	if s.tracked() {
		delete(p.tracked, s)
		return
	}
	p.sites.remove(s)
}

// limitLocked is MaxOpen in force, math.MaxInt if there is none.
func (p *Pool) limitLocked() int {
	if p.cfg.MaxOpen > 0 {
		return p.cfg.MaxOpen
	}
	return int(p.handles.Load())
}

// fullLocked names the limit that forbids a dial to s; "" if none does. What is
// being closed or was broken off, or could be evicted, is room; those who are ahead in the queue
// of s, and in all queues, will take it.
func (p *Pool) fullLocked(s *site, aheadHere, ahead int) string {
	switch {
	case openOf(&s.n)-int(s.n[closing])+aheadHere >= p.cfg.MaxPerAddr:
		return "MaxPerAddr"
	case openOf(&p.n)-int(p.n[closing]+p.n[idle])-p.displaced+ahead >= p.limitLocked():
		return "MaxOpen"
	}
	return ""
}

// refreshLocked brings the pool's view of what s wants up to date. It follows
// every change to the queue, the phases or the back-off of s.
func (p *Pool) refreshLocked(s *site) {
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
		want = int32(min(int(want), p.cfg.MaxDialingPerAddr-int(s.n[dialing])))
		if p.cfg.WhenFull != Overflow {
			want = int32(min(int(want), p.cfg.MaxPerAddr-openOf(&s.n)))
		}
		want = max(want, 0)
	}
	p.eager -= s.eager()
	p.want += int(want - s.want)
	s.want = want
	p.rankLocked(s)
	p.eager += s.eager()
	p.counts.Waiting += s.queue.len - int(s.waiting)
	s.waiting = int32(s.queue.len)
	p.readyOf(s).set(s, want > 0)
	if s.special != nil {
		p.refreshSpareLocked(s)
	}
}

// readyOf is the heap that s belongs in.
func (p *Pool) readyOf(s *site) *siteHeap {
	if s.tracked() {
		return &p.readyOwn
	}
	return &p.ready
}

// nextLocked is the site that gets the next slot: the first of both heaps. There is
// one.
func (p *Pool) nextLocked() *site {
	if len(p.readyOwn) == 0 || len(p.ready) > 0 && p.ready[0].before(p.readyOwn[0]) {
		return p.ready[0]
	}
	return p.readyOwn[0]
}

// admitLocked gives away what is free: it starts dials for the waiters that
// have none, oldest first, and evicts idle connections as long as that is what
// they lack. What nobody waits for comes last.
func (p *Pool) admitLocked(todo *agenda) {
	for p.want > 0 && !p.closed {
		room := p.cfg.MaxDialing - int(p.n[dialing])
		if room <= 0 {
			p.shareLocked(todo)
			return
		}
		s := p.nextLocked()
		if openOf(&p.n) >= p.limitLocked() {
			want := p.want
			if p.eager > 0 {
				want = p.eager
			}
			if int(p.n[closing])-p.slow+p.displaced >= min(want, room) {
				return // enough is on its way
			}
			// Under Overflow the pool's own dials need no slot, and what one
			// of them gave up the next would take again.
			if p.cfg.WhenFull != Overflow && p.shareLocked(todo) {
				continue
			}
			if v := p.recency.oldestIdle(int(p.n[idle])); v != nil && p.eager > 0 {
				p.takeLocked(v)
				p.moveLocked(v, closing)
				todo.close(v, ClosedEvicted, nil)
				continue
			}
			switch own := p.stalledLocked(); {
			case own != nil:
				s = own
			case p.cfg.WhenFull == Overflow && p.cfg.MaxOpen > 0 && len(p.ready) > 0:
				s = p.ready[0]
			default:
				return
			}
		}
		p.overtook = 0
		p.startDialLocked(s, &attempt{ctx: s.queue.bare.ctx, waiter: s.queue.bare}, todo)
	}
	if p.short.Len() > 0 {
		p.openSparesLocked(todo)
	}
}

// startDialLocked starts a dial, for the oldest waiter of s that has none.
func (p *Pool) startDialLocked(s *site, a *attempt, todo *agenda) {
	a.c, a.older = &conn{site: s, epoch: s.epoch}, s.dial
	if s.dial != nil {
		s.dial.newer = a
	}
	s.dial = a
	todo.dials = append(todo.dials, a)
	p.moveLocked(a.c, dialing)
	s.queueLocked().dialStarted()
	s.dials++
	p.counts.Dials++
	p.refreshLocked(s)
}

// moveLocked is the only place where a connection changes its phase.
func (p *Pool) moveLocked(c *conn, to phase) {
	s, from := c.site, c.phase
	p.n[from]--
	s.n[from]--
	c.phase = to
	p.n[to]++
	s.n[to]++
	if (to == closing || to == none) && c.linked() {
		c.unlink() // it was looked at
	}
	if from == none {
		p.counts.PeakOpen = max(p.counts.PeakOpen, openOf(&p.n))
	}
}

// countLoanLocked counts the loan of c that has just ended, if one has.
func (p *Pool) countLoanLocked(c *conn) {
	if !c.uncounted {
		return
	}
	c.uncounted = false
	p.counts.Loans++
	c.site.loans++
	if c.uses > 1 {
		p.counts.Reused++
	}
}

// takeLocked makes the caller the owner of an idle connection.
func (p *Pool) takeLocked(c *conn) {
	c.unlink()
	p.moveLocked(c, borrowed)
}

// use says what lies behind a connection that is parked.
type use uint8

const (
	used      use = iota // a loan ended in good order
	untouched            // it was handed to a waiter that had given up, or looked at by a sweep
	justBorn             // its dial ended
)

// park is what an owner does who has no more use for a connection: it goes to
// the oldest waiter, onto the idle stack, or, if it may not be lent again, out.
// It reports whether the connection was kept.
func (p *Pool) park(c *conn, u use) bool {
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	now := p.clock.Now()
	var todo agenda
	p.mu.Lock()
	kept := p.parkLocked(c, u, now, &todo)
	at := sighting{c, c.generation()}
	p.mu.Unlock()
	todo.run(p)
	p.hearAgain(at)
	return kept
}

func (p *Pool) parkLocked(c *conn, u use, now clock.Instant, todo *agenda) bool {
	s := c.site
	if u != untouched {
		// Its clock was read before the lock: it may be a moment behind
		// that of a connection that was parked meanwhile.
		if s.top != nil {
			now = max(now, s.top.since)
		}
		c.since, c.idleFor = now, 0
	} else {
		c.since -= clock.Instant(c.idleFor)
		c.lookedAtLocked(false)
	}
	p.countLoanLocked(c)
	reserve := u == untouched && p.reservedLocked(s, 1, now)
	if p.cfg.MinSpare > 0 {
		if u == used || s.queue.head != nil {
			p.lentLocked(s, now)
		}
	}
	news := u == used && c.word.Load()&lived != lived && p.livedLocked(c, true)
	if reason := p.unwantedLocked(c, u, now); reason != ClosedUnknown {
		p.moveLocked(c, closing)
		todo.close(c, reason, nil)
		p.admitLocked(todo)
		return false
	}
	c.forget()
	if u == used {
		p.recency.touch(c)
	}
	if s.queue.head != nil {
		if c.linked() {
			c.unlink()
		}
		c.lendAtLocked(now)
		c.fromReserveLocked(reserve)
		p.deliverLocked(s, c, u == justBorn, nil)
		if s.surplus() > 0 {
			p.doubtDialsLocked(s)
		}
		p.refreshLocked(s)
		if news || p.short.Len() > 0 {
			p.admitLocked(todo)
		}
		return true
	}
	p.recency.back(c)
	p.moveLocked(c, idle)
	if !c.linked() {
		c.link(u == untouched)
	}
	if s.special != nil {
		p.refreshLocked(s)
	}
	p.freedLocked() // a dial that lacks a handle may evict it
	p.armSweepLocked()
	if p.want > 0 || p.short.Len() > 0 {
		p.admitLocked(todo)
	}
	return true
}

// unwantedLocked says why a connection may not stay, ClosedUnknown if it may.
func (p *Pool) unwantedLocked(c *conn, u use, now clock.Instant) CloseReason {
	s, limit := c.site, p.limitLocked()
	marked, _ := c.condemned()
	switch {
	case p.closed:
		return ClosedWithPool
	case marked != ClosedUnknown:
		return marked
	case c.epoch != s.epoch:
		return ClosedRetired
	case u == justBorn && s.queue.head != nil:
		// It was opened for a borrower that waits; whatever else may be
		// said against it, another dial would end no better.
		return ClosedUnknown
	case s.tracked() && s.queue.head == nil:
		return ClosedCanceled // who dialled has gone, and it is good for nobody else
	case c.uses >= p.cfg.MaxUses:
		return ClosedMaxUses
	case c.life > 0 && p.clock.Age(c.born, now) >= c.life:
		return ClosedLifetime
	case openOf(&s.n)-int(s.n[closing]) > p.cfg.MaxPerAddr, openOf(&p.n)-int(p.n[closing]) > limit:
		return ClosedSurplus
	case p.cfg.MaxIdle == 0 && c.uses > 0, p.cfg.MaxIdlePerAddr == 0 && c.uses > 0:
		return ClosedSurplus
	}
	if s.queue.head == nil {
		if int(p.n[idle]) >= p.cfg.MaxIdle || int(s.n[idle]) >= p.cfg.MaxIdlePerAddr {
			return ClosedSurplus
		}
		if p.pressure >= handlesLow {
			return ClosedLowHandles
		}
		return ClosedUnknown
	}
	// A busy address could keep its connections for ever while older
	// waiters of other addresses need the slot. They are overtaken at most
	// as often as there are slots.
	if p.eager > 0 && openOf(&p.n) >= limit && p.nextLocked().queue.bare.seq < s.queue.head.seq {
		if p.overtook++; p.overtook > limit {
			p.overtook = 0
			return ClosedEvicted
		}
	}
	return ClosedUnknown
}

// discard closes a connection that its owner gives up, and frees the slot. The
// channel is closed when the socket is; it is nil if that has happened already.
func (p *Pool) discard(c *conn, reason CloseReason, err error) <-chan struct{} {
	p.judge(c, reason, err)
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	first, own := c.seal()
	if !own {
		p.removed(c, Quarantined, errStolen)
		c.wake()
		return nil
	}
	if c.closesAtOnce(reason) {
		if first {
			c.closeAbruptly()
		} else {
			c.awaitStrike()
		}
		p.removed(c, reason, err)
		return nil
	}
	p.mu.Lock()
	p.countLoanLocked(c)
	if c.phase != closing {
		p.moveLocked(c, closing)
	}
	p.mu.Unlock()
	done := make(chan struct{})
	var once sync.Once
	free := func() {
		once.Do(func() {
			p.removed(c, reason, err)
			close(done)
		})
	}
	var at atomic.Value // what runs
	at.Store("Close")
	var ended atomic.Bool
	late := time.AfterFunc(closeTimeout, func() {
		if ended.Load() {
			return // closesSlowly wound it up at the last moment
		}
		p.abandoned(at.Load().(string), c.site.addr)
		go c.closeBelow()
		free()
	})
	slow := time.AfterFunc(closePatience, func() {
		if p.closesSlowly(c) && reason == ClosedEvicted && late.Stop() {
			late.Reset(evictionPatience)
		}
	})
	go func() {
		defer func() { // also after a runtime.Goexit
			ended.Store(true)
			late.Stop()
			slow.Stop()
			free()
		}()
		c.closeFully(reason, first, &at)
	}()
	return done
}

// closesSlowly books that the slot of c, which is being closed, cannot be counted on:
// if something idle can make room, waiters need not wait for it. It reports whether
// somebody waits for a slot.
func (p *Pool) closesSlowly(c *conn) (wanted bool) {
	var todo agenda
	e := c.extra()
	p.mu.Lock()
	if c.phase == closing {
		e.slow = true
		p.slow++
		wanted = p.want > 0
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
	return wanted
}

// removed is the one place where a slot becomes free: the socket of c is closed,
// or is no longer the pool's (Quarantined; ClosedUnknown for one that was
// detached).
func (p *Pool) removed(c *conn, reason CloseReason, err error) {
	var todo agenda
	var lost error
	if c.uses == 0 && !reason.innocent() {
		lost = unborn(reason, err)
	}
	age := p.clock.Now().Sub(c.born)
	p.mu.Lock()
	s := c.site
	p.countLoanLocked(c)
	p.moveLocked(c, none)
	if c.probe.raw != nil && p.byFD[c.probe.fd()] == c {
		delete(p.byFD, c.probe.fd())
		p.unwatchLocked(c)
	}
	if e := c.more.Load(); e != nil && e.slow {
		e.slow = false
		p.slow--
	}
	p.freedLocked()
	if p.recency.remove(c) && c.unprobed() {
		p.counts.Unprobed--
	}
	if reason != ClosedUnknown {
		p.closedBy[reason]++
	}
	if s.special != nil {
		p.reserveLostLocked(c, reason, lost, age)
	}
	p.giveUpLocked(s)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.forgetLocked(s)
	p.leftLocked()
	p.mu.Unlock()
	c.endLife(reason)
	todo.run(p)
	if reason == ClosedUnknown {
		return
	}
	if t := c.trace(); t != nil && t.Closed != nil {
		p.observe("Trace.Closed", func() {
			t.Closed(CloseInfo{Addr: s.addr, ID: c.id, Reason: reason, Uses: c.uses, Age: age, Err: err})
		})
	}
	p.logClosed(c, reason, err)
}

// agenda is what a critical section decided and its caller does after the
// unlock. The connections in it are the caller's.
type agenda struct {
	dials   []*attempt
	closes  []closeOrder
	cancels []context.CancelFunc // of dials that are broken off
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

// run is inlined: on the agenda of most loans there is nothing.
func (a *agenda) run(p *Pool) {
	if a.dials != nil || a.closes != nil || a.cancels != nil {
		a.runAll(p)
	}
}

func (a *agenda) runAll(p *Pool) {
	for _, d := range a.dials {
		go p.dial(d)
	}
	for _, cancel := range a.cancels {
		cancel()
	}
	defer func() {
		if len(a.closes) > 0 { // a Trace function called runtime.Goexit
			rest := agenda{closes: a.closes}
			go rest.run(p)
		}
	}()
	for len(a.closes) > 0 {
		o := a.closes[0]
		a.closes = a.closes[1:]
		p.discard(o.c, o.reason, o.err)
	}
}
