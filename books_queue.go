package connpool

import (
	"container/heap"
	"context"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// waiter is a borrower in the queue of an address. A waiter leaves the queue in one of two
// ways, under Pool.mu: the pool serves it a connection or an error (serve), or it gives up
// (leaveQueue), because its ctx is done, or because foreign code panicked or ended its
// goroutine. A waiter that gave up is never served, and serving a waiter never blocks.
type waiter struct {
	seq   uint64          // order of arrival in the whole pool; kept when a borrower queues again
	ctx   context.Context // the borrower's ctx: a dial made for this waiter uses its values
	since clock.Instant

	site *site // the waiter is in the queue of this site
	met  int   // waiters in that queue when this one joined, itself included

	prev, next *waiter
	queued     bool
	forSlot    bool // no dial counted for the waiter when it joined the queue
	stalled    bool // the waiter may use the overflow of its site, see DialOverflow

	// What the waiter was served; written before ready is signaled.
	c     *conn
	fresh bool // c comes straight from its dial
	err   error
	ready chan struct{} // capacity 1

	why *inVain // if the waiter gave up: what it had waited for
}

// queue holds the waiters of one address, oldest first. The queue counts the dials under
// way: they count for the first `dials` waiters. A dial has no owner. It serves the waiter
// that is the oldest when the dial ends. So when a returned connection serves a waiter
// with a dial, that dial counts for the next waiter without further work.
//
// Invariant: nextToDial is the waiter at index dials; nil if there are not more waiters
// than dials. The caller of a method holds Pool.mu.
//
// An example: five borrowers wait, w1 (the oldest) to w5, and three dials are under
// way. The dials count for w1, w2 and w3; nextToDial is w4, and the address wants two more
// dials.
//
//   - A connection is given back: w1 gets the connection. The three dials count for
//     w2, w3 and w4 from now on; nextToDial is w5.
//   - Or a dial succeeds: w1 gets its connection, whichever waiter the dial was started
//     for. The two other dials count for w2 and w3; nextToDial is w4 as before.
//   - Or the dial that was started for w2 fails: w2 gets the error. The two other
//     dials count for w1 and w3; nextToDial is w4 as before.
//   - Or w1 gives up: the queue is then the same as if w1 had been served a returned
//     connection.
//
// If returned connections serve all five, nobody needs the three dials. One of them may
// go on, for the next borrower; surplus is 2.
type queue struct {
	head, tail *waiter
	len        int
	dials      int     // dials under way, without those being broken off
	nextToDial *waiter // the oldest waiter without a dial
	doubted    bool    // a timer will check the surplus, see books.doubtDialsLocked

	// See books_silence.go.
	answered bool // a dial has succeeded
	answers  int  // how many dials have succeeded
	silent   bool // a dial has been without an answer for `silence`, and no dial of the address has succeeded since
	first    bool // the address is not known to answer (site.known) and no dial is under way; as of the last refreshLocked
}

// noQueue is the queue of every address that has neither waiters nor dials. Nobody writes
// to noQueue; see site.queueLocked.
var noQueue queue

// push inserts w by its seq: at the end, except for a borrower that queues again.
func (q *queue) push(w *waiter) {
	after := q.tail
	for after != nil && after.seq > w.seq {
		after = after.prev
	}
	w.prev = after
	if after == nil {
		w.next, q.head = q.head, w
	} else {
		w.next, after.next = after.next, w
	}
	if w.next == nil {
		q.tail = w
	} else {
		w.next.prev = w
	}
	w.queued = true
	q.len++
	switch {
	case q.nextToDial == nil:
		if q.len > q.dials {
			q.nextToDial = q.tail
		}
	case w.seq < q.nextToDial.seq:
		q.nextToDial = q.nextToDial.prev
	}
}

// remove takes w out of the queue. If w had a dial, that dial counts for the next waiter.
func (q *queue) remove(w *waiter) {
	if q.nextToDial != nil && w.seq <= q.nextToDial.seq {
		q.nextToDial = q.nextToDial.next
	}
	if w.prev == nil {
		q.head = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		q.tail = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.prev, w.next, w.queued = nil, nil, false
	q.len--
}

// surplus is the number of dials beyond those that the waiters need. One extra dial is no
// surplus: the next borrower will use it.
func (q *queue) surplus() int { return q.dials - max(1, q.len) }

// surplus is the surplus of the queue without the dials for which nobody waits (Warm,
// MinIdlePerAddr).
func (s *site) surplus() int {
	n := s.queue.surplus()
	if s.prefill != nil {
		n -= s.prefill.dials
	}
	return n
}

// dialStarted counts one more dial: it counts for nextToDial, if there is one.
func (q *queue) dialStarted() {
	q.dials++
	if q.nextToDial != nil {
		q.nextToDial = q.nextToDial.next
	}
}

// dialEnded counts one dial less: the youngest waiter with a dial has none then.
func (q *queue) dialEnded() {
	q.dials--
	switch {
	case q.nextToDial != nil:
		q.nextToDial = q.nextToDial.prev
	case q.len > q.dials:
		q.nextToDial = q.tail
	}
}

// deliver serves the oldest waiter of the queue a connection or an error.
func (q *queue) deliver(c *conn, fresh bool, err error) {
	w := q.head
	q.remove(w)
	w.serve(c, fresh, err)
}

// serve serves a waiter that was just taken out of its queue.
func (w *waiter) serve(c *conn, fresh bool, err error) {
	w.c, w.fresh, w.err = c, fresh, err
	w.ready <- struct{}{}
}

// deliverLocked serves the oldest waiter of s, and records the end of its wait.
func (b *books) deliverLocked(s *site, c *conn, fresh bool, err error) {
	b.noteWaitedLocked(s.queue.head, err != nil)
	s.queue.deliver(c, fresh, err)
}

// noteWaitedLocked records the end of a wait.
func (b *books) noteWaitedLocked(w *waiter, failed bool) {
	waited := b.clock.Exactly().Sub(w.since)
	b.counts.WaitDuration += waited
	if w.forSlot {
		b.counts.SlotWaitDuration += waited
	}
	if failed {
		b.counts.WaitsFailed++
	}
}

// request is a borrow under way. A request stays on the borrower's stack, and so does the
// address. A ctx in the request, which goes into the waiter, would move both to the heap; so
// would an answer of LimitsFor, which goes into the site.
type request struct {
	addr  *Addr
	hash  uint64        // hash of addr
	known bool          // addr is canonical
	start clock.Instant // when the wait began; 0 for a borrow that need not wait
	seq   uint64        // the borrower's place in the queue; 0 until it has one

	version uint64 // limitsVersion when the borrower last had to ask LimitsFor, see books_limits.go
	asked   int    // how often LimitsFor was asked
}

// claim is what a borrower got in its critical section: a connection, which the borrower
// owns now; or a place in the queue; or an error, which still has to be classified. It is
// none of these if the pool is closed, or if the address is not known and has to be checked
// first, or if the borrower must ask LimitsFor first.
type claim struct {
	c       *conn
	w       *waiter
	refused *Error
	closed  bool
	ask     bool
}

// claimLocked gives a borrower an idle connection of s or a place in the queue of s, or
// refuses the borrower. s is nil if the address is not known.
func (b *books) claimLocked(ctx context.Context, s *site, r *request, now clock.Instant, todo *agenda) claim {
	if b.closed || s == nil {
		return claim{closed: b.closed}
	}
	c := s.topLocked()
	if c == nil {
		return b.enqueueLocked(ctx, s, r, todo)
	}
	b.takeLocked(c)
	c.lendAtLocked(now)
	if b.limitsAt(s).MinIdle > 0 {
		b.noteTakenLocked(c, now)
		b.refreshLocked(s)
		b.admitLocked(todo)
	} else {
		c.fromReserveLocked(false)
		if b.deficit.Len() > 0 {
			b.admitLocked(todo) // under MaxIdle there is room for a reserve of another address
		}
	}
	return claim{c: c}
}

// enqueueLocked puts a borrower into the queue of s and starts the dials that may start,
// or refuses the borrower.
func (b *books) enqueueLocked(ctx context.Context, s *site, r *request, todo *agenda) claim {
	again := r.seq != 0
	now := b.clock.Exactly()
	if r.start == 0 {
		r.start = now
	}
	if s.backingOff() && s.queue.len > 0 && s.n[phaseBorrowed] == 0 && !again {
		// No connection will be given back, and another borrower is already there for
		// the next dial.
		return claim{refused: b.failedAtLocked(s, StageBackoff, s.lastErr(), r.start)}
	}
	seq := r.seq
	if !again {
		b.lastSeq++
		seq = b.lastSeq
	}
	w := &waiter{site: s, seq: seq, ctx: ctx, since: now, ready: make(chan struct{}, 1), stalled: b.whenFull == FullFail}
	s.queueLocked().push(w)
	b.refreshLocked(s)
	b.admitLocked(todo)
	if bare := s.queue.nextToDial; !again && bare != nil && w.seq >= bare.seq { // w has no dial
		here := s.queue.len - s.queue.dials // waiters without a dial, w included
		full := b.whenFull == FullFail && b.fullLocked(s, here-1, b.want-int(s.want)+here-1) != ""
		crowded := here > b.limitsAt(s).MaxWaiters
		if full || crowded {
			s.queue.remove(w)
			b.refreshLocked(s)
			err := b.failedAtLocked(s, StageWait, ErrExhausted, r.start)
			if !full {
				b.blameLocked(err, s, "MaxWaiters")
			}
			b.dropIfEmptyLocked(s)
			b.counts.Exhausted++
			return claim{refused: err}
		}
	}
	w.forSlot = s.queue.nextToDial != nil && w.seq >= s.queue.nextToDial.seq
	if !again {
		b.counts.Waits++
		if w.forSlot {
			b.counts.SlotWaits++
		}
	}
	w.met = s.queue.len
	return claim{w: w}
}

// queueLocked is the queue of s for writing.
func (s *site) queueLocked() *queue {
	if s.queue == &noQueue {
		s.queue = new(queue)
	}
	return s.queue
}

// siteHeap orders the sites that could use a slot, so that a free slot goes to the oldest
// waiter of the pool that could use it. Sites whose dials have not been answered come
// later (site.rank).
type siteHeap []*site

func (h siteHeap) Len() int           { return len(h) }
func (h siteHeap) Less(i, j int) bool { return h[i].before(h[j]) }
func (h siteHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIndex, h[j].heapIndex = int32(i), int32(j)
}
func (h *siteHeap) Push(x any) {
	s := x.(*site)
	s.heapIndex = int32(len(*h))
	*h = append(*h, s)
}
func (h *siteHeap) Pop() any {
	old := *h
	s := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	s.heapIndex = -1
	return s
}

// before reports whether s gets a slot before o. Both want one.
func (s *site) before(o *site) bool {
	if s.rank != o.rank {
		return s.rank < o.rank
	}
	return s.queue.nextToDial.seq < o.queue.nextToDial.seq
}

// set moves s to its place in the heap, or takes s out if it wants no dial.
func (h *siteHeap) set(s *site, wants bool) {
	switch {
	case wants && s.heapIndex < 0:
		heap.Push(h, s)
	case wants:
		heap.Fix(h, int(s.heapIndex))
	case s.heapIndex >= 0:
		heap.Remove(h, int(s.heapIndex))
	}
}

// stalledLocked is the site of the oldest waiter that may use the overflow of its site;
// nil if there is none.
func (b *books) stalledLocked() *site {
	var oldest *site
	if b.overflows == 0 {
		return nil
	}
	for _, s := range b.readyOwn {
		w := s.queue.nextToDial
		if w.stalled && -b.roomLocked() < int(s.overflow) && (oldest == nil || w.seq < oldest.queue.nextToDial.seq) {
			oldest = s
		}
	}
	return oldest
}
