package connpool

import (
	"math/rand/v2"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Back-off: after backoffAfter failures in a row an address gets one dial at a time, and
// each dial only after a pause. The pause doubles from backoffMin to backoffMax, and a
// random part of up to half of it is taken away. While connections of the address are in
// use, waiters wait for those. When none is in use, one waiter stays to wait for the next
// dial, and the others get the error of the last dial at once.
//
// An example: the third dial in a row fails. The pause is 25 to 50 ms, then one dial
// starts. It fails too: the next pause is 50 to 100 ms, then 100 to 200 ms, and so on, up
// to 0.5 to 1 s. A dial that succeeds ends the back-off. Config.MaxBackoff takes the place
// of backoffMax and hollowMax, or switches the back-off off.
const (
	backoffAfter = 3
	backoffMin   = 50 * time.Millisecond
	backoffMax   = time.Second

	// hollowMax takes the place of backoffMax where the peer accepts and hangs up: such
	// a connection costs both sides more than a refused one.
	hollowMax = 8 * time.Second

	// failureMemory is how long the pool remembers the failures of an address for which
	// nobody waits.
	failureMemory = time.Minute
)

// backoff is the memory of an address for failures: dials that failed, and hollow
// connections (connections that the peer accepted and gave up before they were of use,
// see pool_lived.go).
type backoff struct {
	failures int           // failures in a row
	hollow   bool          // hollow connections were among the failures: a dial that succeeds does not end the back-off
	accepts  bool          // the last failure was a hollow connection
	since    uint64        // connections with a greater ID were dialed after the first failure
	failedAt clock.Instant // when the last failure happened
	lastErr  error         // the error of the last failure
	pause    *pause        // the pause before the next dial; nil if none is running
	paused   int           // the value of failures when the pause began
}

// pause is one pause before the next dial of an address that is backing off. The pause is
// running as long as backoff.pause of its site points to it. Each pause is an object of
// its own. So a timer that fires late, or a timer about to be started, can tell whether
// its pause is still the running one.
type pause struct {
	timer *time.Timer // the timer that ends the pause; nil until the agenda has started it
}

func (s *site) failing() bool    { return s.backoff != nil && s.backoff.failures > 0 }
func (s *site) backingOff() bool { return s.backoff != nil && s.backoff.failures >= backoffAfter }
func (s *site) retrying() bool   { return s.backoff != nil && s.backoff.pause != nil }
func (s *site) lastErr() error {
	if s.backoff == nil {
		return nil
	}
	return s.backoff.lastErr
}

// noteFailureLocked records a failure of s: a hollow connection with this ID, or a dial
// that failed. For a dial, id is the ID of the newest connection.
func (b *books) noteFailureLocked(s *site, why error, now clock.Instant, id uint64, hollow bool) {
	if s.backoff == nil {
		s.backoff = new(backoff)
	}
	t := s.backoff
	if t.failures == 0 || id < t.since {
		t.since = id
	}
	t.lastErr = why
	if b.maxBackoff >= 0 || t.failures < backoffAfter-1 { // without back-off the count stays below backoffAfter
		t.failures++
	}
	t.hollow, t.accepts = t.hollow || hollow, hollow
	t.failedAt = now
}

// pauseLocked begins the pause before the next dial if s is backing off.
func (b *books) pauseLocked(s *site, todo *agenda) {
	if !s.backingOff() {
		return
	}
	b.giveUpLocked(s)
	if s.backoff.pause != nil || b.closed {
		return
	}
	after := s.backoff.patience(b.maxBackoff)
	b.beginPauseLocked(s, after-rand.N(after/2), todo)
}

// beginPauseLocked begins a pause and orders its timer.
func (b *books) beginPauseLocked(s *site, after time.Duration, todo *agenda) {
	s.backoff.pause = new(pause)
	s.backoff.paused = s.backoff.failures
	todo.retry(s, s.backoff.pause, after)
}

// patience is the length of the pause before the random part is taken away. longest is
// Config.MaxBackoff; 0 stands for its defaults.
func (t *backoff) patience(longest time.Duration) time.Duration {
	switch {
	case longest > 0:
	case t.accepts:
		longest = hollowMax
	default:
		longest = backoffMax
	}
	return min(longest, backoffMin<<min(t.failures-backoffAfter, 16))
}

// noteReachedLocked records that a dial to s has succeeded. Success ends the back-off,
// unless there were hollow connections: then one connection has to live first
// (noteLivedLocked), and the next dial keeps its pause.
func (b *books) noteReachedLocked(s *site, todo *agenda) {
	if s.backoff != nil && s.backoff.hollow {
		b.pauseLocked(s, todo)
		return
	}
	b.stopRetryLocked(s)
	s.backoff = nil
}

// giveUpLocked ends the wait of borrowers that have nothing to wait for: their address is
// backing off, and none of its connections is in use. One waiter, or one for each dial
// under way, stays.
func (b *books) giveUpLocked(s *site) {
	if !s.backingOff() || s.n[phaseBorrowed] > 0 {
		return
	}
	for s.queue.len > max(1, s.queue.dials) {
		w := s.queue.tail
		b.noteWaitedLocked(w, true)
		s.queue.remove(w)
		w.serve(nil, false, &dialError{stage: StageBackoff, err: s.lastErr()})
	}
}

// pauseOverLocked ends a pause, unless the pause was ended before its timer fired.
func (b *books) pauseOverLocked(s *site, over *pause, todo *agenda) {
	t := s.backoff
	if t == nil || t.pause != over {
		return
	}
	t.pause = nil
	// The pause began with the third hollow connection. If more connections of the same
	// burst turned out hollow meanwhile, the pause has to be longer.
	now := b.clock.Exactly()
	if rest := min(2*backoffMax, t.patience(b.maxBackoff)) - now.Sub(t.failedAt); t.accepts && t.failures > t.paused && rest > 0 && !b.closed {
		b.beginPauseLocked(s, rest, todo)
	}
}

// stopRetryLocked ends a running pause before its time.
func (b *books) stopRetryLocked(s *site) {
	if !s.retrying() {
		return
	}
	if timer := s.backoff.pause.timer; timer != nil {
		timer.Stop()
	}
	s.backoff.pause = nil
}

// noteLivedLocked records that c has lived (see pool_lived.go), and reports whether something
// changed. If it did, the caller has to call admitLocked. Nothing changes if c is older
// than all remembered failures.
func (b *books) noteLivedLocked(c *conn, inLoan bool) (news bool) {
	c.word.Or(flagsLived)
	s := c.site
	if t := s.backoff; t != nil && c.id > t.since {
		b.stopRetryLocked(s)
		s.backoff = nil
		news = true
	}
	if x := s.prefill; x != nil && x.unstable && inLoan {
		x.retryOnce, news = true, true
	}
	if news {
		b.refreshLocked(s)
	}
	return news
}
