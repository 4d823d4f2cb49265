package connpool

import (
	"iter"
	"math"
)

// Stats returns a snapshot. It may be called at any time, also on a closed pool. It
// allocates a map.
func (p *Pool) Stats() Stats {
	if p.stop == nil {
		return Stats{Closed: make(map[CloseReason]uint64)}
	}
	if p.debug {
		p.audit(0)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.counts
	st.Open, st.Dialing, st.Idle, st.InUse, st.Closing = p.n.open(), int(p.n[phaseDialing]), int(p.n[phaseIdle]), int(p.n[phaseBorrowed]), int(p.n[phaseClosing])
	st.Closed = make(map[CloseReason]uint64)
	for r, n := range p.closedBy {
		if n > 0 {
			st.Closed[CloseReason(r)] = n
		}
	}
	if st.Limit = p.limitLocked(); st.Limit == math.MaxInt {
		st.Limit = 0
	}
	st.Addrs = p.sites.len()
	st.AbandonedCalls = p.report.abandoned.Load()
	return st
}

// Addrs ranges over the addresses that the pool knows, in no particular order. The
// snapshot is taken when the loop begins, of some addresses at a time, so that it does
// not hold up the pool: the numbers of one address belong to one moment, but the sum over
// all may not. The body runs with no lock held and may use the pool.
func (p *Pool) Addrs() iter.Seq2[Addr, AddrStats] {
	return func(yield func(Addr, AddrStats) bool) {
		type row struct {
			addr  Addr
			stats AddrStats
		}
		var all [][]row // one slice could not grow while the lock is held for a short time only
		p.mu.Lock()
		eachLocked(p, p.sites.all(), new(agenda), func(s *site) {
			last := len(all) - 1
			if last < 0 || len(all[last]) == atOnce {
				all = append(all, make([]row, 0, atOnce))
				last++
			}
			all[last] = append(all[last], row{s.addr, AddrStats{
				Open: s.n.open(), Dialing: int(s.n[phaseDialing]), Idle: int(s.n[phaseIdle]), InUse: int(s.n[phaseBorrowed]), Closing: int(s.n[phaseClosing]),
				Waiting: s.queue.len, Loans: s.loans, Dials: s.dials, DialErrors: s.dialErrors,
				BackingOff: s.backingOff(), LastErr: inStats(s.lastErr()),
			}})
		})
		p.mu.Unlock()
		for _, rows := range all {
			for i := range rows {
				if !yield(rows[i].addr, rows[i].stats) {
					return
				}
			}
		}
	}
}
