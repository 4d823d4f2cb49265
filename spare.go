package connpool

import (
	"context"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// What Warm and the reserves want is opened here, and this is when an address
// has a reserve.

// refreshSpareLocked brings up to date what s wants beside what its waiters
// want. It is a part of refreshLocked.
func (p *Pool) refreshSpareLocked(s *site) {
	p.noteUnneededLocked(s)
	p.endWarmingsLocked(s)
	x := s.special
	if p.closed {
		x.reserve = false
	}
	x.spare = p.spareLocked(s)
	asked := s.warming() != nil
	if x.inShort != nil && (x.spare == 0 || x.asked != asked) {
		p.short.Remove(x.inShort)
		x.inShort = nil
	}
	switch x.asked = asked; {
	case x.spare == 0 || x.inShort != nil:
	case asked: // goes before those for which nobody asked
		x.inShort = p.short.PushFront(s)
	default:
		x.inShort = p.short.PushBack(s)
	}
}

// spareLocked counts the dials that s's own limits would let start for no waiter.
func (p *Pool) spareLocked(s *site) int {
	x := s.special
	if p.closed || s.queue.bare != nil || s.retrying() || s.backingOff() && s.n[dialing] > 0 {
		return 0
	}
	want := 0
	for _, w := range x.warm {
		if w.err == nil {
			want = max(want, w.n-s.live())
		}
	}
	if x.reserve && s.queue.len == 0 && (!x.shaky && !s.failing() || x.probe) {
		short := p.cfg.MinSpare - int(s.n[idle]+s.n[dialing]) - x.looked
		if s.failing() {
			short = min(short, 1)
		}
		want = max(want, short)
	}
	if s.backingOff() {
		want = min(want, 1)
	}
	return max(0, min(want, p.cfg.MaxDialingPerAddr-int(s.n[dialing]), p.cfg.MaxPerAddr-openOf(&s.n)))
}

// openSparesLocked starts what nobody waits for. It is the last part of
// admitLocked, which comes to it when no waiter wants a slot.
func (p *Pool) openSparesLocked(todo *agenda) {
	for p.short.Len() > 0 && !p.closed {
		if openOf(&p.n) >= p.limitLocked() || int(p.n[dialing]) >= p.cfg.MaxDialing {
			return
		}
		s := p.short.Front().Value.(*site)
		a := &attempt{ctx: context.Background(), spare: true, warm: s.warming()}
		if a.warm != nil {
			a.warm.own++
			a.ctx = a.warm.ctx
		} else if !p.spareableLocked() {
			return // nor for the others: those of Warm come first
		}
		s.special.probe = false
		s.special.dials++
		p.startDialLocked(s, a, todo)
	}
}

// spareableLocked reports whether the pool may open connections for a reserve:
// half of the dials are left to those who wait, what could not be kept is not
// opened, and handles are plenty.
func (p *Pool) spareableLocked() bool {
	return int(p.n[dialing]) < p.cfg.MaxDialing-p.cfg.MaxDialing/2 &&
		int(p.n[idle]+p.n[dialing])+p.looked < p.cfg.MaxIdle &&
		p.pressure < handlesLow && p.starving == 0
}

// The reserve of an address (MinSpare):
//
//	none  -> kept    a loan
//	kept  -> none    evicted, CloseIdle, or unused for reserveMemory
//	kept  -> shaky   a connection was lost that was never lent and younger than a
//	                 sweep's period; or the dial of one failed, or the address did
//	shaky -> kept    a sweep finds it complete
//
// A reserve that is short is refilled at once, if the address is known to work.
// Where the last dial failed, and where connections die at once, one attempt per
// sweep has to do: there may be thousands of such addresses. Loans are no news
// about that, but for the first one of a connection (livedLocked): the dial that
// it proves gives the right to one attempt more.

// reserveMemory is for how long after its last loan an address has a reserve.
func (p *Pool) reserveMemory() time.Duration {
	if p.cfg.IdleTimeout > 0 {
		return 10 * min(p.cfg.IdleTimeout, century/10)
	}
	return 10 * defaultIdleTimeout
}

// lentLocked books, if there is a MinSpare, that a connection of s goes to a
// borrower or comes from one.
func (p *Pool) lentLocked(s *site, now clock.Instant) {
	if s.tracked() || p.closed {
		return
	}
	x := s.specialLocked()
	x.reserve, x.usedAt = true, now
}

// takenLocked books, if there is a MinSpare, that a borrower took c off the stack.
func (p *Pool) takenLocked(c *conn, now clock.Instant) {
	c.fromReserveLocked(p.reservedLocked(c.site, c.site.n[idle]+1, now))
	p.lentLocked(c.site, now)
}

// fromReserveLocked books, with and without a MinSpare, whether c, which is about to
// be lent, was one of a reserve: what an earlier loan was says nothing of this one.
func (c *conn) fromReserveLocked(yes bool) {
	if yes || c.more.Load() != nil {
		c.extra().reserve = yes
	}
}

// lookedAtLocked books, if there is a MinSpare, whether c is being looked at: then
// it counts as idle.
func (c *conn) lookedAtLocked(yes bool) {
	e := c.more.Load()
	switch {
	case yes && c.site.special != nil:
		if e = c.extra(); !e.looked {
			e.looked = true
			c.site.special.looked++
			c.site.pool.looked++
		}
	case !yes && e != nil && e.looked:
		e.looked = false
		c.site.special.looked--
		c.site.pool.looked--
	}
}

// reservedLocked reports whether the idle connections of s, if there are no more
// than so many, are its reserve, which IdleTimeout does not concern.
func (p *Pool) reservedLocked(s *site, n int32, now clock.Instant) bool {
	x := s.special
	return x.reserved() && int(n) <= p.cfg.MinSpare && p.clock.Age(x.usedAt, now) < p.reserveMemory()
}

// sweepReserveLocked is the sweep's part.
func (p *Pool) sweepReserveLocked(s *site, now clock.Instant) {
	x := s.special
	if int(s.n[borrowed]) > x.looked || s.queue.len > 0 { // a loan may take longer
		x.usedAt = now
	}
	if p.clock.Age(x.usedAt, now) >= p.reserveMemory() {
		x.reserve = false
		p.refreshLocked(s)
		p.forgetLocked(s)
		return
	}
	if x.shaky && !s.failing() && int(s.n[idle])+x.looked >= p.cfg.MinSpare {
		x.shaky = false
	}
	x.probe = s.failing() || x.shaky
	p.refreshLocked(s)
}

// reserveLostLocked books what the close of c means for what was opened before
// it was needed, before that is opened again.
// lost says so, if nobody had used it.
func (p *Pool) reserveLostLocked(c *conn, reason CloseReason, lost error, age time.Duration) {
	c.lookedAtLocked(false)
	x := c.site.special
	switch reason {
	case ClosedEvicted, ClosedOnRequest, ClosedLowHandles:
		x.reserve = false // it was to make room, or to save handles
	}
	if lost == nil {
		return
	}
	if age < p.sweepPeriod() {
		x.shaky = true
	}
	p.warmLostLocked(c, lost)
}
