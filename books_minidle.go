package connpool

import (
	"context"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// This file opens the connections that Warm and MinIdlePerAddr ask for. When an address has
// a reserve is told above reserveMemory.

// refreshPrefillLocked brings up to date what s wants beside what its waiters
// want. It is a part of refreshLocked.
func (b *books) refreshPrefillLocked(s *site) {
	b.noteUnneededLocked(s)
	b.endWarmingsLocked(s)
	x := s.prefill
	if b.closed {
		x.reserve = false
	}
	x.missing = b.missingLocked(s)
	asked := s.warming() != nil
	if x.inDeficit != nil && (x.missing == 0 || x.forWarm != asked) {
		b.deficit.Remove(x.inDeficit)
		x.inDeficit = nil
	}
	switch x.forWarm = asked; {
	case x.missing == 0 || x.inDeficit != nil:
	case asked: // goes before those for which nobody asked
		x.inDeficit = b.deficit.PushFront(s)
	default:
		x.inDeficit = b.deficit.PushBack(s)
	}
}

// missingLocked counts the dials that s's own limits would let start for no waiter.
func (b *books) missingLocked(s *site) int {
	x := s.prefill
	if b.closed || s.queue.nextToDial != nil || s.retrying() || s.backingOff() && s.n[phaseDialing] > 0 {
		return 0
	}
	want := 0
	for _, w := range x.warm {
		if w.err == nil {
			want = max(want, w.n-s.openOrDialing())
		}
	}
	if x.reserve && s.queue.len == 0 && (!x.unstable && !s.failing() || x.retryOnce) {
		short := b.limits.MinIdlePerAddr - int(s.n[phaseIdle]+s.n[phaseDialing]) - x.checking
		if s.failing() {
			short = min(short, 1)
		}
		want = max(want, short)
	}
	if s.backingOff() {
		want = min(want, 1)
	}
	return max(0, min(want, b.limits.MaxDialingPerAddr-int(s.n[phaseDialing]), b.roomAtLocked(s)))
}

// openMissingLocked starts what nobody waits for. It is the last part of
// admitLocked, which comes to it when no waiter wants a slot.
func (b *books) openMissingLocked(todo *agenda) {
	for b.deficit.Len() > 0 && !b.closed {
		if b.roomLocked() <= 0 || int(b.n[phaseDialing]) >= b.limits.MaxDialing {
			return
		}
		s := b.deficit.Front().Value.(*site)
		a := &attempt{ctx: context.Background(), prefill: true, warm: s.warming()}
		if a.warm != nil {
			a.warm.own++
			a.ctx = a.warm.ctx
		} else if !b.spareableLocked() {
			return // nor for the others: those of Warm come first
		}
		s.prefill.retryOnce = false
		s.prefill.dials++
		b.startDialLocked(s, a, todo)
	}
}

// spareableLocked reports whether the pool may open connections for a reserve:
// half of the dials are left to those who wait, what could not be kept is not
// opened, and handles are plenty.
func (b *books) spareableLocked() bool {
	return int(b.n[phaseDialing]) < b.limits.MaxDialing-b.limits.MaxDialing/2 &&
		int(b.n[phaseIdle]+b.n[phaseDialing])+b.checking < b.limits.MaxIdle &&
		b.pressure < handlesLow && b.starving == 0
}

// The reserve of an address (MinIdlePerAddr):
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
// about that, but for the first one of a connection (noteLivedLocked): the dial that
// it proves gives the right to one attempt more.

// reserveMemory is for how long after its last loan an address has a reserve.
func (r *rules) reserveMemory() time.Duration {
	if r.idleTimeout > 0 {
		return 10 * min(r.idleTimeout, century/10)
	}
	return 10 * defaultIdleTimeout
}

// noteLentLocked books, if there is a MinIdlePerAddr, that a connection of s goes to a
// borrower or comes from one.
func (b *books) noteLentLocked(s *site, now clock.Instant) {
	if s.unpooled() || b.closed {
		return
	}
	x := s.prefillLocked()
	x.reserve, x.usedAt = true, now
}

// noteTakenLocked books, if there is a MinIdlePerAddr, that a borrower took c off the stack.
func (b *books) noteTakenLocked(c *conn, now clock.Instant) {
	c.fromReserveLocked(b.reservedLocked(c.site, c.site.n[phaseIdle]+1, now))
	b.noteLentLocked(c.site, now)
}

// fromReserveLocked books, with and without a MinIdlePerAddr, whether c, which is about to
// be lent, was one of a reserve: what an earlier loan was says nothing of this one.
func (c *conn) fromReserveLocked(yes bool) {
	if yes || c.cold.Load() != nil {
		c.ensureCold().fromReserve = yes
	}
}

// setCheckingLocked books, if there is a MinIdlePerAddr, whether c is being looked at: then
// it counts as idle.
func (b *books) setCheckingLocked(c *conn, yes bool) {
	e := c.cold.Load()
	switch {
	case yes && c.site.prefill != nil:
		if e = c.ensureCold(); !e.checking {
			e.checking = true
			c.site.prefill.checking++
			b.checking++
		}
	case !yes && e != nil && e.checking:
		e.checking = false
		c.site.prefill.checking--
		b.checking--
	}
}

// reservedLocked reports whether the idle connections of s, if there are no more
// than so many, are its reserve, which IdleTimeout does not concern.
func (b *books) reservedLocked(s *site, n int32, now clock.Instant) bool {
	x := s.prefill
	return x.reserved() && int(n) <= b.limits.MinIdlePerAddr && b.clock.Age(x.usedAt, now) < b.reserveMemory()
}

// sweepReserveLocked is the sweep's part.
func (b *books) sweepReserveLocked(s *site, now clock.Instant) {
	x := s.prefill
	if int(s.n[phaseBorrowed]) > x.checking || s.queue.len > 0 { // a loan may take longer
		x.usedAt = now
	}
	if b.clock.Age(x.usedAt, now) >= b.reserveMemory() {
		x.reserve = false
		b.refreshLocked(s)
		b.dropIfEmptyLocked(s)
		return
	}
	if x.unstable && !s.failing() && int(s.n[phaseIdle])+x.checking >= b.limits.MinIdlePerAddr {
		x.unstable = false
	}
	x.retryOnce = s.failing() || x.unstable
	b.refreshLocked(s)
}

// noteReserveLostLocked books what the close of c means for what was opened before
// it was needed, before that is opened again.
// lost says so, if nobody had used it.
func (b *books) noteReserveLostLocked(c *conn, reason CloseReason, lost error, age time.Duration) {
	b.setCheckingLocked(c, false)
	x := c.site.prefill
	switch reason {
	case ClosedEvicted, ClosedOnRequest, ClosedLowHandles:
		x.reserve = false // it was to make room, or to save handles
	}
	if lost == nil {
		return
	}
	if age < b.sweepPeriod() {
		x.unstable = true
	}
	b.noteWarmLostLocked(c, lost)
}
