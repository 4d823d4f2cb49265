package connpool

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// How dials end in the books: dials that failed, and dials that nobody needs any more.
//
// An example of a surplus: a burst of five borrowers starts five dials. Then three loans
// end and serve three of the waiters. Five dials are under way for two waiters, so the
// surplus is 3. After surplusPatience the pool breaks off as many of the youngest dials as
// there are in surplus at that time. If all five waiters had been served, the surplus
// would be 4: one dial goes on for the next borrower.

// attempt is one dial under way. What it does is in pool_dial.go.
type attempt struct {
	c   *conn
	ctx context.Context // ctx of the borrower for whom the dial was started: the dial uses its values

	waiter *waiter // the waiter for whom the dial was started; nil if nobody waited

	// Pool.mu guards these.
	newer, older *attempt           // neighbors in the site's list of dials that waiters count on
	surplus      bool               // the dial is no longer in that list: the pool breaks it off
	displaced    bool               // the pool breaks it off for another address
	quiet        bool               // the dial has been without an answer for `silence`, see books_silence.go
	brokenOff    bool               // when the dial ended, the pool was the cause, whatever its error says
	prefill      bool               // the dial was started for no waiter, and is never surplus
	warm         *warming           // the call of Warm for which the dial was started; nil if there is none
	giveUp       context.CancelFunc // breaks the dial off; nil before the dial runs and after its end

	since clock.Instant // when the dial began; 0 before

	reached atomic.Uint32 // a copy of stage that other goroutines may read

	where string // the foreign code that runs now
	ours  bool   // the pool itself dials the socket
	stage Stage
	err   error
	ended bool // open has returned (rather than panicked)
	state any  // what Setup returned

	cert  *clientCert   // what the handshake has presented, and how long it lasts, with Config.TLSExpiry
	lasts time.Duration // how long the certificates of the connection last; 0: it has none

	mu      sync.Mutex // guards the fields below; no I/O and no other lock under it
	socket  net.Conn   // what was dialed and c has not adopted: whoever records a failure closes it
	adopted bool       // c has its socket, and Setup may use c
	taken   bool       // somebody has recorded the outcome of the dial, or is recording it
}

// surplusPatience is how long a dial that no waiter needs any more goes on: most dials end
// sooner, and the next borrowers may want their connections.
const surplusPatience = 25 * time.Millisecond

// doubtDialsLocked starts surplusPatience, unless it is running. After a burst, returned
// connections may have served waiters whose dials are still under way. Dials that nobody
// needs after surplusPatience are broken off, except for one.
func (b *books) doubtDialsLocked(s *site, todo *agenda) {
	if !s.queue.doubted {
		s.queue.doubted = true
		todo.doubt(s)
	}
}

// dropDialsLocked breaks off the youngest dials to s that no waiter needs. It does nothing
// if q, the queue for which doubtDialsLocked started the timer, is no longer the queue of
// s.
func (b *books) dropDialsLocked(s *site, q *queue, todo *agenda) {
	q.doubted = false
	for q == s.queue && s.surplus() > 0 {
		a := s.dial // the youngest dial
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

// dropLocked removes a from the site's list of dials that waiters count on.
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

// noteDialFailedLocked records a dial that failed, for the site and for the waiter.
//
// Only the waiter for whom the dial was started gets the error, and only if it still
// waits. A dial that the pool broke off (brokenOff) is no failure of the address, and
// neither is a failure for want of something local (dialError.local). A dial whose Setup
// failed has a socket: the caller closes it, and the slot is free after the close.
func (b *books) noteDialFailedLocked(a *attempt, failure *dialError, now clock.Instant, todo *agenda) {
	c, s := a.c, a.c.site
	if failure.stage == StageSetup {
		b.moveLocked(c, phaseClosing) // the slot is free when the socket is closed
	} else {
		b.moveLocked(c, phaseNone)
		b.counts.DialErrors++
		if !failure.noHandle { // such a dial had no handle to give back
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
