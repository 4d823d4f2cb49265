package connpool

import "github.com/seed-ecb488c9/connpool/internal/clock"

// What the books say of a borrow that failed, and of a wait that was in vain.

// failedLocked is the error of a borrow, with the books as they are. The caller
// calls classify after the unlock.
func (b *books) failedLocked(addr Addr, stage Stage, err error, start clock.Instant) *Error {
	s := b.sites.find(addr)
	if s == nil {
		s = &site{addr: addr, queue: &noQueue} // forgotten: nothing is open for it
	}
	return b.failedAtLocked(s, stage, err, start)
}

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
		e.LimitName = vain.full
	} else {
		e.LimitName = b.fullLocked(s, 0, 0)
	}
	switch e.LimitName {
	case "MaxPerAddr":
		e.Limit = b.limits.MaxPerAddr
	case "MaxDialingPerAddr":
		e.Limit = b.limits.MaxDialingPerAddr
	case "MaxDialing":
		e.Limit = b.limits.MaxDialing
	case "MaxOpen":
		e.Limit = b.limitLocked()
		e.Open, e.InUse, e.Idle = b.n.open(), int(b.n[phaseBorrowed]), int(b.n[phaseIdle])
	}
	return e
}

// whyLocked is what w, which is in the queue of s and gives up, has waited for; nil
// stands for a Warm.
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
	if e.full = b.fullLocked(s, 0, 0); e.full == "" && !e.pause {
		if bare := s.queue.nextToDial; bare != nil && w != nil && w.seq >= bare.seq { // no dial for it
			switch {
			case int(s.n[phaseDialing]) >= b.limits.MaxDialingPerAddr:
				e.full = "MaxDialingPerAddr"
			case int(b.n[phaseDialing]) >= b.limits.MaxDialing:
				e.full = "MaxDialing"
			}
		}
		return e
	}
	e.here = s.n[phaseBorrowed] > 0
	// What has been out for long has sunk to the old end.
	n := 0
	for c := b.recency.ends.younger; c != &b.recency.ends && n < farEnough; c = c.younger {
		if n++; c.site != nil && c.phase == phaseBorrowed && e.counts(c.site.addr, s.addr) {
			e.held = max(e.held, now.Sub(c.since))
		}
	}
	return e
}
