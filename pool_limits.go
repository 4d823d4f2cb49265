package connpool

import (
	"errors"
	"math"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
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
//
// With [Config.LimitsFor], SetLimits(p.Limits()) says that its answers have changed. When
// the new limits are in force, SetLimits asks LimitsFor for the addresses that have
// connections or waiters, and applies each answer in the same way. It does so for a
// second at most, and not after a call that did not return. An address for which LimitsFor
// was not asked, or has failed, keeps its last answer until its next borrower asks; until
// then none of its limits rises.
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
	p.setLimitsLocked(l, now)
	if now.MaxOpen == math.MaxInt {
		p.pressure = handlesPlenty // the budget of handles was given up with the limit
	}
	var todo agenda
	p.relimiting++
	eachLocked(p, p.sites.all(), &todo, func(s *site) { // puts nothing on todo: nobody is admitted meanwhile
		p.renewLimitsLocked(s)
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
	if p.cfg.LimitsFor != nil {
		p.askAgain()
	}
	return nil
}

// askLimits asks LimitsFor for the limits of r.addr. The caller does not hold the lock.
func (p *Pool) askLimits(r *request) (*ownLimits, error) {
	r.asked++
	return p.limitsFor(*r.addr, r.version)
}

// limitsFor is the answer of LimitsFor for addr. version is limitsVersion from before the
// call.
func (p *Pool) limitsFor(addr Addr, version uint64) (*ownLimits, error) {
	const where = "Config.LimitsFor"
	var given AddrLimits
	err := briefly(where, foreignPatience, func() (err error) {
		given, err = p.cfg.LimitsFor(addr)
		return err
	})
	if p.report.outlived(err, addr) {
		return nil, returned(err) // its text says where
	}
	if err != nil {
		return nil, &hookError{where, err}
	}
	if err := given.senseless(p.cfg.WhenFull, int(p.handles.Load())); err != nil {
		return nil, err
	}
	return &ownLimits{given: given, version: version}, nil
}

// askPatience is how long SetLimits asks LimitsFor, over all addresses.
const askPatience = time.Second

// askAgain is the part of SetLimits that asks LimitsFor for the addresses in use. If another
// SetLimits is asking, that one begins again, up to maxAsked times, and this one does
// nothing: a LimitsFor that calls SetLimits comes to an end.
func (p *Pool) askAgain() {
	p.mu.Lock()
	mine := !p.askingAgain
	p.askingAgain = true
	p.mu.Unlock()
	end := p.clock.Exactly() + clock.Instant(askPatience)
	for i := maxAsked - 1; mine && p.askAll(end, i > 0); i-- {
	}
}

// askAll asks LimitsFor for all addresses in use, in portions: without the lock, and under
// the lock the answers of a portion are taken over. It reports whether all must be asked
// again, because the limits have changed since; more says that this is possible.
func (p *Pool) askAll(end clock.Instant, more bool) (again bool) {
	p.mu.Lock()
	version := p.limitsVersion
	portions := p.addrsLocked(func(s *site) bool { return s.n.kept() > 0 || s.queue.len > 0 || s.prefill.keeps() })
	p.mu.Unlock()
	late, same := false, true
	for i := 0; i < len(portions) && !late && same; i++ {
		var answers map[Addr]*ownLimits
		answers, late = p.askPortion(portions[i], version, end)
		same = p.obeyAll(answers, version)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.askingAgain = more && !late && p.limitsVersion != version && !p.closed
	return p.askingAgain
}

// obeyAll makes the answers the limits of their addresses. It reports whether the limits of
// the pool are those of version still.
func (p *Pool) obeyAll(answers map[Addr]*ownLimits, version uint64) (same bool) {
	var todo agenda
	p.mu.Lock()
	same = p.limitsVersion == version && !p.closed
	for addr, own := range answers {
		if s := p.sites.find(addr); s != nil && same {
			p.obeyLocked(s, own, &todo)
			p.dropIfEmptyLocked(s)
		}
	}
	p.admitLocked(&todo)
	p.mu.Unlock()
	todo.run(p)
	return same
}

// askPortion asks LimitsFor for the limits of some addresses. late says that the time is
// over or that LimitsFor did not return.
func (p *Pool) askPortion(addrs []Addr, version uint64, end clock.Instant) (answers map[Addr]*ownLimits, late bool) {
	answers = make(map[Addr]*ownLimits, len(addrs))
	for _, addr := range addrs {
		if p.clock.Exactly() >= end {
			return answers, true
		}
		own, err := p.limitsFor(addr, version)
		switch {
		case isLate(err):
			return answers, true
		case err == nil:
			answers[addr] = own
		}
	}
	return answers, false
}

// Limits returns the limits in use, as they were given.
func (p *Pool) Limits() Limits {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.given
}

var errNegative = errors.New("the number of connections is negative")
