package connpool

import (
	"time"
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

	// failureMemory is how long the failures of an address are remembered
	// when nobody asks for it.
	failureMemory = time.Minute
)

// trouble is what an address remembers of dials that failed.
type trouble struct {
	failures int         // in a row
	failedAt instant     // the last of them
	lastErr  error       // its error
	retry    *time.Timer // running while the next probe is not due
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
		w.serve(nil, false, &dialError{StageBackoff, s.lastErr()})
	}
}

// retry lets the probe of an address that is backing off go ahead.
func (p *Pool) retry(s *site) {
	var todo agenda
	p.mu.Lock()
	if s.trouble != nil {
		s.trouble.retry = nil
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
