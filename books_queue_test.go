package connpool

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
)

// naiveQueue is what queue promises, in the plainest form: waiters by age, and
// the first dials of them have a dial.
type naiveQueue struct {
	waiting []*waiter
	dials   int
}

func (q *naiveQueue) push(w *waiter) {
	q.waiting = append(q.waiting, w)
	slices.SortFunc(q.waiting, func(a, b *waiter) int { return int(int64(a.seq) - int64(b.seq)) })
}

func (q *naiveQueue) bare() *waiter {
	if q.dials < len(q.waiting) {
		return q.waiting[q.dials]
	}
	return nil
}

func requireSameQueue(t *testing.T, want *naiveQueue, q *queue) {
	t.Helper()
	var forward, backward []*waiter
	for w := q.head; w != nil; w = w.next {
		require.True(t, w.queued)
		forward = append(forward, w)
	}
	for w := q.tail; w != nil; w = w.prev {
		backward = append(backward, w)
	}
	slices.Reverse(backward)
	require.Equal(t, len(want.waiting), q.len)
	require.True(t, slices.Equal(want.waiting, forward))
	require.True(t, slices.Equal(want.waiting, backward))
	require.Equal(t, want.dials, q.dials)
	require.True(t, want.bare() == q.nextToDial, "who has no dial")
}

func TestQueueAgreesWithTheNaiveOne(t *testing.T) {
	for seed := range short.Of[uint64](50, 20) {
		r := rand.New(rand.NewPCG(seed, 0))
		var q queue
		var want naiveQueue
		var left []*waiter // those that may queue again, with their old place
		seq := uint64(0)
		for range 300 {
			switch r.IntN(7) {
			case 0, 1: // a newcomer
				seq++
				w := &waiter{seq: seq, ready: make(chan struct{}, 1)}
				q.push(w)
				want.push(w)
			case 2: // one comes again
				if len(left) > 0 {
					i := r.IntN(len(left))
					w := left[i]
					left = slices.Delete(left, i, i+1)
					q.push(w)
					want.push(w)
				}
			case 3: // one gives up
				if n := len(want.waiting); n > 0 {
					i := r.IntN(n)
					w := want.waiting[i]
					want.waiting = slices.Delete(want.waiting, i, i+1)
					q.remove(w)
					require.False(t, w.queued)
					left = append(left, w)
				}
			case 4: // the oldest is served
				if len(want.waiting) > 0 {
					w := want.waiting[0]
					want.waiting = want.waiting[1:]
					c := &conn{id: seq}
					q.deliver(c, r.IntN(2) == 0, nil)
					<-w.ready
					require.Same(t, c, w.c)
					require.False(t, w.queued)
					left = append(left, w)
				}
			case 5:
				q.dialStarted()
				want.dials++
			case 6:
				if want.dials > 0 {
					q.dialEnded()
					want.dials--
				}
			}
			requireSameQueue(t, &want, &q)
		}
	}
}

// Serving is never slowed down or stopped by who is served.
func TestDeliveryNeverBlocks(t *testing.T) {
	var q queue
	for seq := range uint64(3) {
		q.push(&waiter{seq: seq + 1, ready: make(chan struct{}, 1)}) // nobody ever receives
	}
	for range 3 {
		q.deliver(nil, false, errBoom)
	}
	requireSameQueue(t, &naiveQueue{}, &q)
}

func TestSiteHeapAgreesWithTheNaiveOne(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 1))
		sites := make([]*site, 8)
		for i := range sites {
			sites[i] = &site{queue: new(queue), heapIndex: -1}
		}
		var h siteHeap
		wants := make(map[*site]bool)
		taken := make(map[uint64]bool)
		for range 300 {
			s := sites[r.IntN(len(sites))]
			if r.IntN(3) == 0 {
				delete(wants, s)
				h.set(s, false)
			} else {
				seq := r.Uint64N(1 << 20)
				if taken[seq] {
					continue // no two waiters are of one age
				}
				taken[seq] = true
				s.queue.nextToDial = &waiter{seq: seq}
				wants[s] = true
				h.set(s, true)
			}
			require.Len(t, h, len(wants))
			var oldest *site
			for _, s := range sites {
				require.Equal(t, wants[s], s.heapIndex >= 0)
				if wants[s] {
					require.Same(t, s, h[s.heapIndex])
					if oldest == nil || s.queue.nextToDial.seq < oldest.queue.nextToDial.seq {
						oldest = s
					}
				}
			}
			if oldest != nil {
				require.Same(t, oldest, h[0], "the oldest waiter's site is not first")
			}
		}
	}
}
