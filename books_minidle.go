package connpool

import (
	"context"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// This file opens the connections that Warm and MinSpare ask for. When an address has
// a reserve is told above reserveMemory.

// refreshSpareLocked brings up to date what s wants beside what its waiters
// want. It is a part of refreshLocked.
func (b *books) refreshSpareLocked(s *site) {
	b.noteUnneededLocked(s)
	b.endWarmingsLocked(s)
	x := s.special
	if b.closed {
		x.reserve = false
	}
	x.spare = b.spareLocked(s)
	asked := s.warming() != nil
	if x.inShort != nil && (x.spare == 0 || x.asked != asked) {
		b.short.Remove(x.inShort)
		x.inShort = nil
	}
	switch x.asked = asked; {
	case x.spare == 0 || x.inShort != nil:
	case asked: // goes before those for which nobody asked
		x.inShort = b.short.PushFront(s)
	default:
		x.inShort = b.short.PushBack(s)
	}
}

// spareLocked counts the dials that s's own limits would let start for no waiter.
func (b *books) spareLocked(s *site) int {
	x := s.special
	if b.closed || s.queue.bare != nil || s.retrying() || s.backingOff() && s.n[dialing] > 0 {
		return 0
	}
	want := 0
	for _, w := range x.warm {
		if w.err == nil {
			want = max(want, w.n-s.live())
		}
	}
	if x.reserve && s.queue.len == 0 && (!x.shaky && !s.failing() || x.probe) {
		short := b.limits.MinSpare - int(s.n[idle]+s.n[dialing]) - x.looked
		if s.failing() {
			short = min(short, 1)
		}
		want = max(want, short)
	}
	if s.backingOff() {
		want = min(want, 1)
	}
	return max(0, min(want, b.limits.MaxDialingPerAddr-int(s.n[dialing]), b.roomAtLocked(s)))
}

// openSparesLocked starts what nobody waits for. It is the last part of
// admitLocked, which comes to it when no waiter wants a slot.
func (b *books) openSparesLocked(todo *agenda) {
	for b.short.Len() > 0 && !b.closed {
		if b.roomLocked() <= 0 || int(b.n[dialing]) >= b.limits.MaxDialing {
			return
		}
		s := b.short.Front().Value.(*site)
		a := &attempt{ctx: context.Background(), spare: true, warm: s.warming()}
		if a.warm != nil {
			a.warm.own++
			a.ctx = a.warm.ctx
		} else if !b.spareableLocked() {
			return // nor for the others: those of Warm come first
		}
		s.special.probe = false
		s.special.dials++
		b.startDialLocked(s, a, todo)
	}
}

// spareableLocked reports whether the pool may open connections for a reserve:
// half of the dials are left to those who wait, what could not be kept is not
// opened, and handles are plenty.
func (b *books) spareableLocked() bool {
	return int(b.n[dialing]) < b.limits.MaxDialing-b.limits.MaxDialing/2 &&
		int(b.n[idle]+b.n[dialing])+b.looked < b.limits.MaxIdle &&
		b.pressure < handlesLow && b.starving == 0
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
func (r *rules) reserveMemory() time.Duration {
	if r.idleTimeout > 0 {
		return 10 * min(r.idleTimeout, century/10)
	}
	return 10 * defaultIdleTimeout
}

// lentLocked books, if there is a MinSpare, that a connection of s goes to a
// borrower or comes from one.
func (b *books) lentLocked(s *site, now clock.Instant) {
	if s.tracked() || b.closed {
		return
	}
	x := s.specialLocked()
	x.reserve, x.usedAt = true, now
}

// takenLocked books, if there is a MinSpare, that a borrower took c off the stack.
func (b *books) takenLocked(c *conn, now clock.Instant) {
	c.fromReserveLocked(b.reservedLocked(c.site, c.site.n[idle]+1, now))
	b.lentLocked(c.site, now)
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
func (b *books) lookedAtLocked(c *conn, yes bool) {
	e := c.more.Load()
	switch {
	case yes && c.site.special != nil:
		if e = c.extra(); !e.looked {
			e.looked = true
			c.site.special.looked++
			b.looked++
		}
	case !yes && e != nil && e.looked:
		e.looked = false
		c.site.special.looked--
		b.looked--
	}
}

// reservedLocked reports whether the idle connections of s, if there are no more
// than so many, are its reserve, which IdleTimeout does not concern.
func (b *books) reservedLocked(s *site, n int32, now clock.Instant) bool {
	x := s.special
	return x.reserved() && int(n) <= b.limits.MinSpare && b.clock.Age(x.usedAt, now) < b.reserveMemory()
}

// sweepReserveLocked is the sweep's part.
func (b *books) sweepReserveLocked(s *site, now clock.Instant) {
	x := s.special
	if int(s.n[borrowed]) > x.looked || s.queue.len > 0 { // a loan may take longer
		x.usedAt = now
	}
	if b.clock.Age(x.usedAt, now) >= b.reserveMemory() {
		x.reserve = false
		b.refreshLocked(s)
		b.forgetLocked(s)
		return
	}
	if x.shaky && !s.failing() && int(s.n[idle])+x.looked >= b.limits.MinSpare {
		x.shaky = false
	}
	x.probe = s.failing() || x.shaky
	b.refreshLocked(s)
}

// reserveLostLocked books what the close of c means for what was opened before
// it was needed, before that is opened again.
// lost says so, if nobody had used it.
func (b *books) reserveLostLocked(c *conn, reason CloseReason, lost error, age time.Duration) {
	b.lookedAtLocked(c, false)
	x := c.site.special
	switch reason {
	case ClosedEvicted, ClosedOnRequest, ClosedLowHandles:
		x.reserve = false // it was to make room, or to save handles
	}
	if lost == nil {
		return
	}
	if age < b.sweepPeriod() {
		x.shaky = true
	}
	b.warmLostLocked(c, lost)
}
