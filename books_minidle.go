package connpool

import (
	"context"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// This file decides on the dials that Warm and MinIdlePerAddr ask for. The comment above
// reserveMemory says when an address has a reserve.

// refreshPrefillLocked recomputes how many dials s wants beside those for its waiters. It
// is a part of refreshLocked.
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
	case asked: // a Warm goes before the reserves
		x.inDeficit = b.deficit.PushFront(s)
	default:
		x.inDeficit = b.deficit.PushBack(s)
	}
}

// missingLocked is how many dials for which nobody waits the limits of s let start now.
//
// An example: MinIdlePerAddr is 3, and s has a reserve, one idle connection and one dial
// under way: one dial is missing. If a call of Warm asks for 5 connections while two are
// lent, the count of open connections and dials is 4, so one dial is missing for it too;
// the larger of both numbers counts.
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
		short := b.limitsAt(s).MinIdle - int(s.n[phaseIdle]+s.n[phaseDialing]) - x.checking
		if s.failing() {
			short = min(short, 1)
		}
		want = max(want, short)
	}
	if s.backingOff() {
		want = min(want, 1)
	}
	return max(0, min(want, b.limitsAt(s).MaxDialing-int(s.n[phaseDialing]), b.roomAtLocked(s)))
}

// openMissingLocked starts dials for which nobody waits. It is the last part of
// admitLocked: no waiter wants a slot then.
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
			return // nor for the other sites: those with a Warm are at the front of deficit
		}
		s.prefill.retryOnce = false
		s.prefill.dials++
		b.startDialLocked(s, a, todo)
	}
}

// spareableLocked reports whether the pool may open connections for a reserve: at least
// half of MaxDialing is left to dials for waiters, the connection could be kept under
// MaxIdle, and file handles are plenty.
func (b *books) spareableLocked() bool {
	return int(b.n[phaseDialing]) < b.limits.MaxDialing-b.limits.MaxDialing/2 &&
		int(b.n[phaseIdle]+b.n[phaseDialing])+b.checking < b.limits.MaxIdle &&
		b.pressure < handlesLow && b.starving == 0
}

// The reserve of an address (its MinIdlePerAddr idle connections):
//
//	none     -> kept      a loan
//	kept     -> none      a connection was evicted, or closed by CloseIdle or for want
//	                      of file handles; or no loan for reserveMemory; or SetLimits
//	                      or Close ended it
//	kept     -> unstable  a connection was lost that was never lent and younger than
//	                      a sweep's period; or a dial for the reserve failed, or was
//	                      broken off, unanswered, for another address; or the
//	                      failures of the address were forgotten
//	unstable -> kept      a sweep finds the reserve complete
//
// The pool refills an incomplete reserve at once if the address is known to work. If the
// last dial failed, or connections die soon after their dial, the pool makes one attempt
// per sweep: there may be thousands of such addresses. Loans do not change that, except
// for the first loan of a connection (noteLivedLocked): that loan proves that the dial
// was good, and allows one more attempt.

// reserveMemory is how long after its last loan an address keeps its reserve.
func (r *rules) reserveMemory() time.Duration {
	if r.idleTimeout > 0 {
		return 10 * min(r.idleTimeout, century/10)
	}
	return 10 * defaultIdleTimeout
}

// noteLentLocked records, if MinIdlePerAddr is set, that a borrower gets a connection of
// s or has given one back.
func (b *books) noteLentLocked(s *site, now clock.Instant) {
	if s.unpooled() || b.closed {
		return
	}
	x := s.prefillLocked()
	x.reserve, x.usedAt = true, now
}

// noteTakenLocked records, if MinIdlePerAddr is set, that a borrower took c off the idle
// stack.
func (b *books) noteTakenLocked(c *conn, now clock.Instant) {
	c.fromReserveLocked(b.reservedLocked(c.site, c.site.n[phaseIdle]+1, now))
	b.noteLentLocked(c.site, now)
}

// fromReserveLocked records, with and without a MinIdlePerAddr, whether c, which is about
// to be lent, was one of a reserve. The record of an earlier loan must not stay.
func (c *conn) fromReserveLocked(yes bool) {
	if yes || c.cold.Load() != nil {
		c.ensureCold().fromReserve = yes
	}
}

// setCheckingLocked records, if MinIdlePerAddr is set, whether c is being checked. A
// connection being checked counts as idle.
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

// reservedLocked reports whether the idle connections of s, n in number, are its reserve.
// IdleTimeout does not apply to a reserve.
func (b *books) reservedLocked(s *site, n int32, now clock.Instant) bool {
	x := s.prefill
	return x.reserved() && int(n) <= b.limitsAt(s).MinIdle && b.clock.Age(x.usedAt, now) < b.reserveMemory()
}

// sweepReserveLocked is the part of a sweep for an address with a reserve: it drops the
// reserve after reserveMemory, and allows one attempt to refill an unstable one.
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
	if x.unstable && !s.failing() && int(s.n[phaseIdle])+x.checking >= b.limitsAt(s).MinIdle {
		x.unstable = false
	}
	x.retryOnce = s.failing() || x.unstable
	b.refreshLocked(s)
}

// noteReserveLostLocked records the close of c for the Warm and the reserve of its
// address, before the reserve is refilled. lost is how the connection was lost if nobody
// had used it; nil otherwise.
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
