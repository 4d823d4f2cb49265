package connpool

import (
	"errors"
	"math"
)

// SetLimits replaces all the limits: to change one, change it in the result of
// [Pool.Limits] and pass that. SetLimits refuses contradicting limits as New does,
// and then changes nothing.
//
// If a limit is raised, waiting borrowers go on, oldest first. If a limit is lowered,
// SetLimits closes idle connections at once, the least recently used first, and never
// touches a loan: a connection in use beyond the limit is closed when it is given back,
// and until then no new one is opened. Dials under way go on, waiting borrowers keep
// their place, and a [Pool.Warm] that asks for more than the limit allows now ends with
// an error.
//
// SetLimits may be called at any time by many goroutines. In a pool of
// many connections or addresses, borrowers go on while SetLimits visits them.
func (p *Pool) SetLimits(l Limits) error {
	if p.stop == nil {
		return usage(Addr{}, ErrClosed)
	}
	now, err := l.resolved("Limits", p.cfg.WhenFull)
	if err != nil {
		return usage(Addr{}, err)
	}
	p.handles.refresh(p.sys)
	if err := l.reachable("Limits", int(p.handles.Load())); err != nil {
		return usage(Addr{}, err)
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return usage(Addr{}, ErrClosed)
	}
	was := p.limits
	p.lowered = p.lowered || now.MaxPerAddr < was.MaxPerAddr || now.MaxDialing < was.MaxDialing ||
		now.MaxOpen > 0 && (was.MaxOpen == 0 || now.MaxOpen < was.MaxOpen)
	p.given = l
	p.limits = now
	if now.MaxOpen == math.MaxInt {
		p.pressure = handlesPlenty // the budget of handles was given up with the limit
	}
	var todo agenda
	p.relimiting++
	eachLocked(p, p.sites.all(), &todo, func(s *site) { // puts nothing on todo: nobody is admitted meanwhile
		if p.limits.MinIdlePerAddr == 0 && s.prefill != nil {
			s.prefill.reserve, s.prefill.unstable, s.prefill.retryOnce = false, false, false
		}
		p.refuseWarmingsLocked(s)
		p.refreshLocked(s)
		p.dropIfEmptyLocked(s)
	})
	p.relimiting--
	eachLocked(p, p.sites.all(), &todo, func(s *site) {
		p.dropSurplusLocked(s, &todo)
	})
	p.evictAllLocked(ClosedSurplus, &todo, func(*conn) bool {
		return int(p.n[phaseIdle]) > p.limits.MaxIdle || p.n.kept() > p.limitLocked()
	})
	p.admitLocked(&todo)
	p.mu.Unlock()
	todo.run(p)
	return nil
}

// Limits returns the limits in use, as they were given.
func (p *Pool) Limits() Limits {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.given
}

var errNegative = errors.New("the number of connections is negative")
