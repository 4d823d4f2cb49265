package connpool

import (
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Connections that the books close for other reasons than to make room.

// armSweepLocked orders the next sweep, unless one is due or running.
func (b *books) armSweepLocked(todo *agenda) {
	if !b.swept && !b.closed {
		b.swept = true
		todo.sweep(b.sweepPeriod())
	}
}

// sweepPeriod is SweepInterval. If SweepInterval switches the sweep off, the sweep runs
// every failureMemory, because old failures must be forgotten all the same.
func (r *rules) sweepPeriod() time.Duration {
	if r.sweepInterval > 0 {
		return r.sweepInterval
	}
	return failureMemory
}

// aged says whether a connection that has been idle for idleFor has expired: by
// IdleTimeout, by MaxLifetime, or by what its state said.
func (r *rules) aged(c *conn, idleFor time.Duration, now clock.Instant) CloseReason {
	switch {
	case r.idleTimeout > 0 && idleFor >= r.idleTimeout:
		return ClosedIdleTimeout
	case c.maxAge > 0 && r.clock.Age(c.born, now) >= c.maxAge:
		return c.whyTooOld()
	}
	return ClosedUnknown
}

// sweepBatch is what a sweep found in one critical section.
type sweepBatch struct {
	seen []idleRef
	todo agenda // closes the expired connections
}

// listIdleLocked sorts the connections that a sweep met: it evicts the idle ones that have
// expired and lists the other idle ones.
func (b *books) listIdleLocked(met []*conn, now clock.Instant) (found sweepBatch) {
	for _, c := range met {
		if c.phase != phaseIdle {
			continue
		}
		idleFor := b.clock.Age(c.since, now)
		if b.reservedLocked(c.site, c.site.n[phaseIdle], now) {
			idleFor = 0
		}
		if reason := b.aged(c, idleFor, now); reason != ClosedUnknown {
			b.evictLocked(c, reason, nil, &found.todo)
		} else {
			found.seen = append(found.seen, idleRef{c, c.generation()})
		}
	}
	return found
}

// markStolenLocked records that the descriptor of c belongs to another socket, and
// reports whether the pool did not know that yet. An idle connection is quarantined now,
// any other one when its owner is done with it.
func (b *books) markStolenLocked(c *conn, todo *agenda) bool {
	if !c.setFlag(flagStolen) {
		return false
	}
	if c.phase == phaseIdle {
		b.evictLocked(c, ClosedQuarantined, errStolen, todo)
	}
	return true
}

// noteFreedLocked wakes the dials that wait for a file handle: one may be free.
func (b *books) noteFreedLocked() {
	if b.starving > 0 {
		close(b.freed)
		b.freed = make(chan struct{})
	}
}

// dropSurplusLocked closes the idle connections of s beyond the limits of an address, the
// least recently used first.
func (b *books) dropSurplusLocked(s *site, todo *agenda) {
	idle := int(s.n[phaseIdle])
	here := b.limitsAt(s)
	surplus := min(idle, max(idle-here.MaxIdle, s.n.kept()-here.MaxOpen))
	if surplus <= 0 {
		return
	}
	stack := make([]*conn, 0, idle)
	for c := s.top; c != nil; c = c.down {
		if c.phase == phaseIdle { // one that is being checked keeps its place
			stack = append(stack, c)
		}
	}
	for i := range surplus {
		b.evictLocked(stack[idle-1-i], ClosedSurplus, nil, todo)
	}
}

// dropIdleLocked closes all idle connections of s.
func (b *books) dropIdleLocked(s *site, reason CloseReason, todo *agenda) {
	for c := s.topLocked(); c != nil; c = s.topLocked() {
		b.evictLocked(c, reason, nil, todo)
	}
}

// retirement is why one connection is retired, beside others of its address that are not.
type retirement struct {
	reason CloseReason
	err    error // for CloseInfo.Err
}

// retireLocked makes c unfit to be lent again: it is closed now if it is idle, and else when its
// owner gives it back.
func (b *books) retireLocked(c *conn, why *retirement, todo *agenda) {
	switch c.phase {
	case phaseIdle:
		b.evictLocked(c, why.reason, why.err, todo)
	case phaseBorrowed:
		if c.epoch == c.site.epoch {
			c.ensureCold().retired = why
			c.epoch--
		}
	}
}

// retiredForLocked says why c, whose epoch is not that of its site, is closed.
func (c *conn) retiredForLocked() CloseReason {
	if e := c.cold.Load(); e != nil && e.retired != nil {
		return e.retired.reason
	}
	return ClosedRetired
}

// whyRetiredLocked is the error of a close for this reason.
func (c *conn) whyRetiredLocked(reason CloseReason) error {
	if e := c.cold.Load(); e != nil && e.retired != nil && e.retired.reason == reason {
		return e.retired.err
	}
	return nil
}

// shutSiteLocked is the part of Close for one address: the idle connections are closed, and
// the waiters get ErrClosed.
func (b *books) shutSiteLocked(s *site, todo *agenda) {
	b.dropIdleLocked(s, ClosedWithPool, todo)
	b.stopRetryLocked(s)
	s.backoff = nil
	for s.queue.head != nil {
		b.deliverLocked(s, nil, false, ErrClosed)
	}
	b.refreshLocked(s)
	b.dropIfEmptyLocked(s)
}

// noteLeftLocked wakes the callers that wait in awaitLeft.
func (b *books) noteLeftLocked() {
	if b.closed {
		close(b.left)
		b.left = make(chan struct{})
	}
}
