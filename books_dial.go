package connpool

import (
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// What becomes of dials in the books: those that failed, and those that nobody needs.

// surplusPatience is how long a dial that no waiter needs any more goes on all
// the same: most end sooner, and the next borrowers may want them.
const surplusPatience = 25 * time.Millisecond

// doubtDialsLocked begins the look at surplus dials. After a burst, returned
// connections may have served waiters whose dials are still under way. Dials that
// nobody needs after surplusPatience are broken off, all but one.
func (b *books) doubtDialsLocked(s *site, todo *agenda) {
	if !s.queue.doubted {
		s.queue.doubted = true
		todo.doubt(s)
	}
}

// dropDialsLocked breaks off the youngest dials to s that no waiter needs, unless q,
// the queue that was doubted, is that of s no more.
func (b *books) dropDialsLocked(s *site, q *queue, todo *agenda) {
	q.doubted = false
	for q == s.queue && s.surplus() > 0 {
		a := s.dial // the youngest
		for a.prefill {
			a = a.older
		}
		s.dropLocked(a)
		a.surplus = true
		q.dialEnded()
		if a.giveUp != nil {
			todo.cancels = append(todo.cancels, a.giveUp)
		}
		b.refreshLocked(s) // its rank is lower now
	}
}

// dropLocked takes a out of the list of the dials that waiters count on.
func (s *site) dropLocked(a *attempt) {
	if a.newer == nil {
		s.dial = a.older
	} else {
		a.newer.older = a.older
	}
	if a.older != nil {
		a.older.newer = a.newer
	}
	a.newer, a.older = nil, nil
}

func (b *books) noteDialFailedLocked(a *attempt, failure *dialError, now clock.Instant, todo *agenda) {
	c, s := a.c, a.c.site
	if failure.stage == StageSetup {
		b.moveLocked(c, phaseClosing) // the slot is free when the socket is closed
	} else {
		b.moveLocked(c, phaseNone)
		b.counts.DialErrors++
		if !failure.noHandle { // which had no handle to give back
			b.noteFreedLocked()
		}
	}
	s.dialErrors++
	if a.brokenOff {
		return
	}
	if !s.unpooled() && !failure.local {
		b.noteFailureLocked(s, failure.err, now, b.lastID, false)
	} else {
		if s.backoff == nil {
			s.backoff = new(backoff)
		}
		s.backoff.lastErr = failure.err
	}
	if a.prefill && s.prefill.reserve {
		s.prefill.unstable = true
	}
	if w := a.waiter; w != nil && w.queued {
		b.noteWaitedLocked(w, true)
		s.queue.remove(w)
		w.serve(nil, false, failure)
	}
	b.pauseLocked(s, todo)
}
