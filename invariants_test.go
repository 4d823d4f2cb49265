package connpool

import (
	"fmt"
	"math"
	"sync"
	"testing"
)

// check fails the test if the books contradict themselves: the invariants above
// type Pool, in the order they stand there. It may run at any moment; the
// stronger promises of a pool at rest are in checkAtRest.
func (p *Pool) check(t testing.TB) {
	t.Helper()
	if err := p.inconsistency(); err != nil {
		t.Fatal(err)
	}
}

func (p *Pool) inconsistency() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var n tally
	want, waiting, eager := 0, 0, 0
	lowered, looked := limitsChanged(p), p.lookedAt()
	var sites []*site
	for s := range p.sites.all() {
		if found := p.sites.find(s.addr); found != s {
			return fmt.Errorf("7: looking up %v finds %p instead of %p", s.addr, found, s)
		}
		sites = append(sites, s)
	}
	for s := range p.unpooled {
		if s.n.open() > 1 || s.queue.len > 1 || s.n.open()+s.queue.len == 0 {
			return fmt.Errorf("%d connections and %d waiters in the books of one DialContext", s.n.open(), s.queue.len)
		}
		sites = append(sites, s)
	}
	all := 0
	for _, n := range looked {
		all += n
	}
	if p.wrongMove != "" {
		return fmt.Errorf("2: %s", p.wrongMove)
	}
	if p.checking != all {
		return fmt.Errorf("the pool counts %d that are being looked at, there are %d", p.checking, all)
	}
	for _, s := range sites {
		addr := s.addr
		if err := p.spareInconsistency(s, looked[s]); err != nil {
			return err
		}
		if canon, err := addr.canonical(); err != nil || canon != addr {
			return fmt.Errorf("7: key %v is not canonical: %v", addr, err)
		}
		if s.n.open() == 0 && s.queue.len == 0 && !s.failing() && !s.prefill.keeps() {
			return fmt.Errorf("%v: empty books were kept", addr)
		}
		stack := 0
		var above *conn
		for c := s.top; c != nil; above, c = c, c.down {
			if c.phase == phaseBorrowed && c.site == s && c.up == above {
				continue // it is being looked at
			}
			stack++
			switch {
			case c.phase != phaseIdle || c.site != s:
				return fmt.Errorf("2: a connection in phase %d is on the idle stack of %v", c.phase, addr)
			case c.up != above:
				return fmt.Errorf("2: the idle stack of %v is torn", addr)
			case above != nil && c.since > above.unusedSince():
				return fmt.Errorf("2: the idle stack of %v is out of order", addr)
			case c.word.Load()&(flagLent|flagGone|flagBroken|inFlight) != 0:
				return fmt.Errorf("2: an idle connection of %v has the word %#x", addr, c.word.Load())
			case c.deadlineSet || c.loan.Load() != nil:
				return fmt.Errorf("8: an idle connection of %v remembers its last loan", addr)
			}
		}
		if stack != int(s.n[phaseIdle]) {
			return fmt.Errorf("3: %v counts %d idle, its stack has %d", addr, s.n[phaseIdle], stack)
		}
		for ph := phaseDialing; ph < numPhases; ph++ {
			if s.n[ph] < 0 {
				return fmt.Errorf("3: %v counts %d in phase %d", addr, s.n[ph], ph)
			}
			n[ph] += s.n[ph]
		}
		if p.cfg.WhenFull != FullOverflow && s.n.open() > p.limits.MaxPerAddr && (!lowered || s.n[phaseIdle] > 0 && s.n.kept() > p.limits.MaxPerAddr) {
			return fmt.Errorf("3: %d of %d open for %v", s.n.open(), p.limits.MaxPerAddr, addr)
		}
		q := s.queue
		dials := 0
		for a := s.dial; a != nil; a = a.older {
			if dials++; a.surplus || a.c.site != s || a.older != nil && a.older.newer != a {
				return fmt.Errorf("4: the dials of %v are torn", addr)
			}
		}
		if q.dials != dials || dials > int(s.n[phaseDialing]) {
			return fmt.Errorf("4: the queue of %v knows %d dials, its list has %d, the books %d", addr, q.dials, dials, s.n[phaseDialing])
		}
		if noQueue != (queue{}) {
			return fmt.Errorf("4: somebody wrote into the queue of all who have none: %+v", noQueue)
		}
		length, bare := 0, (*waiter)(nil)
		var prev *waiter
		for w := q.head; w != nil; prev, w = w, w.next {
			if w.prev != prev || !w.queued || prev != nil && prev.seq >= w.seq {
				return fmt.Errorf("4: the queue of %v is torn or out of order", addr)
			}
			if length == q.dials {
				bare = w
			}
			length++
		}
		switch {
		case length != q.len || q.tail != prev:
			return fmt.Errorf("4: the queue of %v counts %d, has %d", addr, q.len, length)
		case bare != q.nextToDial:
			return fmt.Errorf("4: the queue of %v is wrong about who has no dial", addr)
		case length > 0 && s.n[phaseIdle] > 0:
			return fmt.Errorf("4: %d wait for %v beside %d idle", length, addr, s.n[phaseIdle])
		case int(s.waiting) != length:
			return fmt.Errorf("4: %v reports %d waiting of %d", addr, s.waiting, length)
		case (s.want > 0) != (s.heapIndex >= 0):
			return fmt.Errorf("4: %v wants %d and is at %d in the heap", addr, s.want, s.heapIndex)
		case s.heapIndex >= 0 && (*p.readyOf(s))[s.heapIndex] != s:
			return fmt.Errorf("4: %v is not where the heap has it", addr)
		}
		switch _, listed := p.unheard[s]; {
		case listed != (s.rank > 1), int(s.rank) > max(1, q.dials), q.silent && q.dials == 0:
			return fmt.Errorf("%v has %d dials and the rank %d, silent: %v, on the list: %v", addr, q.dials, s.rank, q.silent, listed)
		}
		eager += s.eager()
		want += int(s.want)
		waiting += length
	}
	for ph := phaseDialing; ph < numPhases; ph++ {
		if n[ph] != p.n[ph] {
			return fmt.Errorf("3: the pool counts %d in phase %d, its sites %d", p.n[ph], ph, n[ph])
		}
	}
	limit, own := p.limitLocked(), 0 // connections of DialContext's
	for s := range p.unpooled {
		own += s.n.open()
	}
	switch {
	case p.limits.MaxOpen > 0 && !lowered && own-limit > p.overflow():
		return fmt.Errorf("3: DialContext has %d connections of %d", own, limit)
	case own != len(p.unpooled)-len(p.readyOwn):
		return fmt.Errorf("4: DialContext has %d connections, %d in its books, and %d want to dial", own, len(p.unpooled), len(p.readyOwn))
	case p.cfg.WhenFull != FullOverflow && p.limits.MaxOpen > 0 && p.n.open() > limit+p.overflow() && (!lowered || p.n[phaseIdle] > 0 && p.n.kept() > limit):
		return fmt.Errorf("3: %d of %d open", p.n.open(), limit)
	case int(p.n[phaseDialing]) > p.limits.MaxDialing && !lowered:
		return fmt.Errorf("3: %d dials under way of %d", p.n[phaseDialing], p.limits.MaxDialing)
	case want != p.want || waiting != p.counts.Waiting:
		return fmt.Errorf("4: the pool wants %d dials and has %d waiting, its sites %d and %d", p.want, p.counts.Waiting, want, waiting)
	case eager != p.eager:
		return fmt.Errorf("%d wanted by addresses that answer, the pool counts %d", eager, p.eager)
	case p.displaced < 0 || p.displaced > int(p.n[phaseDialing]):
		return fmt.Errorf("%d dials are broken off for others, of %d", p.displaced, p.n[phaseDialing])
	case p.recency.len < int(p.n[phaseIdle]+p.n[phaseBorrowed]), p.recency.len > p.n.open()-int(p.n[phaseDialing]), len(p.recency.all()) != p.recency.len:
		return fmt.Errorf("6: recency counts %d, lists %d, of %d (%d closing)", p.recency.len, len(p.recency.all()), p.n.open()-int(p.n[phaseDialing]), p.n[phaseClosing])
	case p.limits.MaxIdle < math.MaxInt && int(p.n[phaseIdle]) > p.limits.MaxIdle:
		return fmt.Errorf("%d idle of %d", p.n[phaseIdle], p.limits.MaxIdle)
	case p.counts.Tracked < 0 || p.counts.Tracked > int(p.n[phaseBorrowed]) || p.counts.Tracked > len(p.unpooled):
		return fmt.Errorf("3: %d tracked, %d in use, %d in the books", p.counts.Tracked, p.n[phaseBorrowed], len(p.unpooled))
	case p.closed && (p.n[phaseIdle] > 0 || waiting > 0):
		return fmt.Errorf("closed with %d idle and %d waiting", p.n[phaseIdle], waiting)
	}
	// Nobody waits for something that could be given now.
	if p.want > 0 && !p.closed && int(p.n[phaseDialing]) < p.limits.MaxDialing && int(p.n[phaseClosing])+p.displaced == 0 {
		if p.n.open() < limit {
			return fmt.Errorf("4: %d dials could start", p.want)
		}
		if p.n[phaseIdle] > 0 && p.eager > 0 {
			return fmt.Errorf("4: %d dials could start in the place of %d idle connections", p.want, p.n[phaseIdle])
		}
	}
	return p.shortInconsistency()
}

// overflowOf has the pools with a DialOverflow, and what that is.
var overflowOf sync.Map

func (p *Pool) overflow() int {
	n, _ := overflowOf.Load(p)
	k, _ := n.(int)
	return k
}

// every lists all connections, least recently used first.
func (p *Pool) every() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recency.all()
}
