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
type backoff struct {
	failures int           // in a row
	hollow   bool          // connections were among them: a dial that ends well is no news
	accepts  bool          // ... and the last of them was one
	since    uint64        // connections with a greater ID were dialled after the first of them
	failedAt clock.Instant // the last of them
	lastErr  error         // its error
	pause    *pause        // running while the next probe is not due
	paused   int           // failures when it began
}

// pause is one pause before the probe of an address that is backing off. It runs
// as long as it is that of its site's trouble. Each pause is an object of its own,
// so a timer that fires late, or that is about to be started, finds out whether
// the pause it belongs to is still the one that runs.
type pause struct {
	timer *time.Timer // ends it; nil until the agenda that began it has run
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

// noteFailureLocked books a failure that speaks against s: of the connection with
// this ID, or of a dial that ended after that connection's.
func (b *books) noteFailureLocked(s *site, why error, now clock.Instant, id uint64, hollow bool) {
	if s.backoff == nil {
		s.backoff = new(backoff)
	}
	t := s.backoff
	if t.failures == 0 || id < t.since {
		t.since = id
	}
	t.lastErr = why
	t.failures++
	t.hollow, t.accepts = t.hollow || hollow, hollow
	t.failedAt = now
}

// pauseLocked begins the pause before the next dial, if s is backing off.
func (b *books) pauseLocked(s *site, todo *agenda) {
	if !s.backingOff() {
		return
	}
	b.giveUpLocked(s)
	if s.backoff.pause != nil || b.closed {
		return
	}
	after := s.backoff.patience()
	b.beginPauseLocked(s, after-rand.N(after/2), todo)
}

func (b *books) beginPauseLocked(s *site, after time.Duration, todo *agenda) {
	s.backoff.pause = new(pause)
	s.backoff.paused = s.backoff.failures
	todo.retry(s, s.backoff.pause, after)
}

// patience is how long the pause lasts before the random part is taken away.
func (t *backoff) patience() time.Duration {
	longest := backoffMax
	if t.accepts {
		longest = hollowMax
	}
	return min(longest, backoffMin<<min(t.failures-backoffAfter, 16))
}

// noteReachedLocked books that a dial to s has ended well. That is the end of all
// trouble, unless connections have been hollow: then one has to live first, and
// the next dial keeps its pause.
func (b *books) noteReachedLocked(s *site, todo *agenda) {
	if s.backoff != nil && s.backoff.hollow {
		b.pauseLocked(s, todo)
		return
	}
	b.stopRetryLocked(s)
	s.backoff = nil
}

// giveUpLocked ends the wait of borrowers that have nothing to wait for: their
// address is backing off, and none of its connections is in use.
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

// pauseOverLocked ends a pause, unless it was ended before its timer fired.
func (b *books) pauseOverLocked(s *site, over *pause, todo *agenda) {
	t := s.backoff
	if t == nil || t.pause != over {
		return
	}
	t.pause = nil
	// The pause began with the third connection that was hollow. If the
	// rest of a burst was, too, it has to be longer.
	now := b.clock.Exactly()
	if rest := min(2*backoffMax, t.patience()) - now.Sub(t.failedAt); t.accepts && t.failures > t.paused && rest > 0 && !b.closed {
		b.beginPauseLocked(s, rest, todo)
	}
}

func (b *books) stopRetryLocked(s *site) {
	if !s.retrying() {
		return
	}
	if timer := s.backoff.pause.timer; timer != nil {
		timer.Stop()
	}
	s.backoff.pause = nil
}

// noteLivedLocked reports whether that is news, after which admitLocked is due. A
// connection that is older than all failures which are remembered is none.
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
