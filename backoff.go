package connpool

import (
	"math/rand/v2"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Back-off: after backoffAfter failures in a row an address gets one dial at a
// time, and only after a pause that doubles from backoffMin to backoffMax, with
// up to half of it taken away at random. While connections of the address are
// in use, waiters wait for those; when there are none, all but one get the last
// dial's error at once.
const (
	backoffAfter = 3
	backoffMin   = 50 * time.Millisecond
	backoffMax   = time.Second

	// hollowMax takes the place of backoffMax where the peer accepts and
	// hangs up: that costs both sides more than a refusal does.
	hollowMax = 8 * time.Second

	// failureMemory is how long the failures of an address are remembered
	// when nobody asks for it.
	failureMemory = time.Minute
)

// trouble is what an address remembers of dials that failed, and of connections
// that were hollow.
type trouble struct {
	failures int           // in a row
	hollow   bool          // connections were among them: a dial that ends well is no news
	accepts  bool          // ... and the last of them was one
	since    uint64        // connections with a greater ID were dialled after the first of them
	failedAt clock.Instant // the last of them
	lastErr  error         // its error
	retry    *time.Timer   // running while the next probe is not due
	paused   int           // failures when retry was started
}

func (s *site) failing() bool    { return s.trouble != nil && s.trouble.failures > 0 }
func (s *site) backingOff() bool { return s.trouble != nil && s.trouble.failures >= backoffAfter }
func (s *site) retrying() bool   { return s.trouble != nil && s.trouble.retry != nil }
func (s *site) lastErr() error {
	if s.trouble == nil {
		return nil
	}
	return s.trouble.lastErr
}

// failureLocked books a failure that speaks against s: of the connection with
// this ID, or of a dial that ended after that connection's.
func (p *Pool) failureLocked(s *site, why error, now clock.Instant, id uint64, hollow bool) {
	if s.trouble == nil {
		s.trouble = new(trouble)
	}
	t := s.trouble
	if t.failures == 0 || id < t.since {
		t.since = id
	}
	t.lastErr = why
	t.failures++
	t.hollow, t.accepts = t.hollow || hollow, hollow
	t.failedAt = now
}

// pauseLocked begins the pause before the next dial, if s is backing off.
func (p *Pool) pauseLocked(s *site) {
	if !s.backingOff() {
		return
	}
	p.giveUpLocked(s)
	if s.trouble.retry != nil || p.closed {
		return
	}
	pause := s.trouble.pause()
	pause -= rand.N(pause / 2)
	s.trouble.paused = s.trouble.failures
	s.trouble.retry = time.AfterFunc(pause, func() { p.retry(s) })
}

// pause is how long the pause lasts before the random part is taken away.
func (t *trouble) pause() time.Duration {
	longest := backoffMax
	if t.accepts {
		longest = hollowMax
	}
	return min(longest, backoffMin<<min(t.failures-backoffAfter, 16))
}

// reachedLocked books that a dial to s has ended well. That is the end of all
// trouble, unless connections have been hollow: then one has to live first, and
// the next dial keeps its pause.
func (p *Pool) reachedLocked(s *site) {
	if s.trouble != nil && s.trouble.hollow {
		p.pauseLocked(s)
		return
	}
	p.stopRetryLocked(s)
	s.trouble = nil
}

// giveUpLocked ends the wait of borrowers that have nothing to wait for: their
// address is backing off, and none of its connections is in use.
func (p *Pool) giveUpLocked(s *site) {
	if !s.backingOff() || s.n[borrowed] > 0 {
		return
	}
	for s.queue.len > max(1, s.queue.dials) {
		w := s.queue.tail
		p.waitedLocked(w, true)
		s.queue.remove(w)
		w.serve(nil, false, &dialError{stage: StageBackoff, err: s.lastErr()})
	}
}

// retry lets the probe of an address that is backing off go ahead.
func (p *Pool) retry(s *site) {
	var todo agenda
	p.mu.Lock()
	if t := s.trouble; t != nil && t.retry != nil {
		t.retry = nil
		// The pause began with the third connection that was hollow. If the
		// rest of a burst was, too, it has to be longer.
		now := p.clock.Exactly()
		if rest := min(2*backoffMax, t.pause()) - now.Sub(t.failedAt); t.accepts && t.failures > t.paused && rest > 0 && !p.closed {
			t.paused = t.failures
			t.retry = time.AfterFunc(rest, func() { p.retry(s) })
		}
	}
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.mu.Unlock()
	todo.run(p)
}

func (p *Pool) stopRetryLocked(s *site) {
	if s.retrying() {
		s.trouble.retry.Stop()
		s.trouble.retry = nil
	}
}
