package connpool

import "github.com/seed-ecb488c9/connpool/internal/clock"

// The text and numbers of the error of a borrow that failed, or of a wait in vain.

// failedLocked is the error of a borrow that failed, with the numbers of the books as they
// are now. The caller calls classify after the unlock.
func (b *books) failedLocked(addr Addr, stage Stage, err error, start clock.Instant) *Error {
	s := b.sites.find(addr)
	if s == nil {
		s = &site{addr: addr, queue: &noQueue} // the pool has dropped the address: nothing is open for it
	}
	return b.failedAtLocked(s, stage, err, start)
}

// failedAtLocked is failedLocked for a site that the caller has. Waited counts from start;
// 0 means that the borrow did not wait.
func (b *books) failedAtLocked(s *site, stage Stage, err error, start clock.Instant) *Error {
	e := &Error{Addr: s.addr, Stage: stage, Err: err, elsewhere: b.n[phaseIdle]+b.n[phaseBorrowed] == 0}
	if start != 0 {
		e.Waited = b.clock.Exactly().Sub(start)
	}
	e.Open, e.InUse, e.Idle, e.Waiting = s.n.open(), int(s.n[phaseBorrowed]), int(s.n[phaseIdle]), s.queue.len
	if stage != StageWait || b.closed {
		return e
	}
	if vain, ok := err.(*inVain); ok {
		b.blameLocked(e, s, vain.full)
	} else {
		b.blameLocked(e, s, b.fullLocked(s, 0, 0))
	}
	if e.LimitName == "MaxOpen" {
		e.Open, e.InUse, e.Idle = b.n.open(), int(b.n[phaseBorrowed]), int(b.n[phaseIdle])
	}
	return e
}

// blockerLocked names the limit that keeps w, which is in the queue of s, from a
// connection: a limit that forbids a dial to s, or, if w has no dial, a limit on the dials
// under way. "" means that no limit does: w waits for a dial or for the end of a pause.
// For a Warm, w is nil; it gets only limits that forbid a dial.
func (b *books) blockerLocked(s *site, w *waiter) string {
	full, bare := b.fullLocked(s, 0, 0), s.queue.nextToDial
	switch {
	case full != "" || s.retrying():
		return full
	case w == nil || bare == nil || w.seq < bare.seq: // w has a dial
		return ""
	case int(s.n[phaseDialing]) >= b.limitsAt(s).MaxDialing:
		return "MaxDialingPerAddr"
	case int(b.n[phaseDialing]) >= b.limits.MaxDialing:
		return "MaxDialing"
	}
	return ""
}

// warmBlockerLocked names the limit that keeps a Warm from a connection to s. A Warm may
// not evict, so idle connections are in its way too.
func (b *books) warmBlockerLocked(s *site) string {
	switch full := b.blockerLocked(s, nil); {
	case full != "":
		return full
	case b.roomLocked() <= 0:
		return "MaxOpen"
	case int(b.n[phaseIdle]) >= b.limits.MaxIdle:
		return "MaxIdle"
	}
	return ""
}

// whyLocked says what w, which is in the queue of s and gives up, has waited for. For a
// Warm, w is nil.
func (b *books) whyLocked(s *site, w *waiter) *inVain {
	e := new(inVain)
	now := b.clock.Exactly()
	if s.backoff != nil && s.backoff.lastErr != nil {
		e.last, e.failures, e.pause = s.backoff.lastErr, s.backoff.failures, s.retrying()
	}
	for a := s.dial; a != nil; a = a.older {
		if a.since != 0 {
			e.stage, e.since = Stage(a.reached.Load()), now.Sub(a.since)
		}
	}
	e.full = b.blockerLocked(s, w)
	if !e.pause && e.full != "MaxPerAddr" && e.full != "MaxOpen" {
		return e // no loan is in its way
	}
	e.here = s.n[phaseBorrowed] > 0
	// The longest loans are at the old end of the ring.
	n := 0
	for c := b.recency.ends.younger; c != &b.recency.ends && n < farEnough; c = c.younger {
		if n++; c.site != nil && c.phase == phaseBorrowed && e.counts(c.site.addr, s.addr) {
			e.held = max(e.held, now.Sub(c.since))
		}
	}
	return e
}
