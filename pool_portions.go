package connpool

import (
	"iter"
	"runtime"
)

// Work on all connections or addresses, in portions. There may be a hundred thousand of them,
// and borrowers must not wait until all are visited. So whoever visits them lets others take
// the lock after every portion. What holds for one connection or address holds at any moment;
// what holds for all of them together holds when the work is done.

// atOnce is how many connections or addresses are visited while the lock is held.
const atOnce = 64

// eachLocked calls visit for each value of all, with the lock held, in portions. all ranges
// over a map that the lock guards. A value that is removed meanwhile is not visited any more,
// and a new one may be visited or not.
func eachLocked[T any](p *Pool, all iter.Seq[T], todo *agenda, visit func(T)) {
	n := 0
	for v := range all {
		visit(v)
		if n++; n%atOnce == 0 {
			p.yieldLocked(todo)
		}
	}
}

// yieldLocked ends a portion: it unlocks, does what is on the agenda, and locks again. In debug
// mode it does nothing, because an audit of somebody else must not meet work that is half done.
func (p *Pool) yieldLocked(todo *agenda) {
	if p.debug {
		return
	}
	p.mu.Unlock()
	todo.run(p)
	*todo = agenda{}
	for range 16 { // a mutex prefers the goroutine that runs to those that were woken, which need some microseconds
		runtime.Gosched()
	}
	p.mu.Lock()
}

// evictAllLocked evicts the least recently used idle connection as long as more returns true
// for it, in portions. more decides when to end: connections may come back meanwhile.
func (p *Pool) evictAllLocked(reason CloseReason, todo *agenda, more func(*conn) bool) {
	for n := 1; ; n++ {
		c := p.recency.oldestIdle(int(p.n[phaseIdle]))
		if c == nil || !more(c) {
			return
		}
		p.evictLocked(c, reason, nil, todo)
		if n%atOnce == 0 {
			p.yieldLocked(todo)
		}
	}
}

// addrsLocked is the addresses of the sites that match, in portions: one slice could not grow
// while the lock is held for a short time only.
func (p *Pool) addrsLocked(match func(*site) bool) (portions [][]Addr) {
	eachLocked(p, p.sites.all(), new(agenda), func(s *site) {
		if !match(s) {
			return
		}
		last := len(portions) - 1
		if last < 0 || len(portions[last]) == atOnce {
			portions = append(portions, make([]Addr, 0, atOnce))
			last++
		}
		portions[last] = append(portions[last], s.addr)
	})
	return portions
}
