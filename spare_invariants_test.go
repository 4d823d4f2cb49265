package connpool

import (
	"fmt"
	"sync"
)

// What inconsistency demands of the connections that nobody waits for, and of
// pools whose limits were changed.

// movedLimits has the pools whose limits a test lowered. What is in use may exceed
// them there; what is idle never may.
var movedLimits sync.Map

func limitsChanged(p *Pool) bool {
	_, ok := movedLimits.Load(p)
	return ok
}

// setLimits is SetLimits, which from then on the invariants allow for.
func (p *Pool) setLimits(l Limits) error {
	movedLimits.Store(p, nil)
	return p.SetLimits(l)
}

// lookedAt counts the connections that are being looked at.
func (p *Pool) lookedAt() map[*site]int {
	n := make(map[*site]int)
	for _, c := range p.recency.all() {
		if e := c.more.Load(); e != nil && e.looked {
			n[c.site]++
		}
	}
	return n
}

// spareInconsistency looks at one site.
func (p *Pool) spareInconsistency(s *site, looked int) error {
	x, spare := s.special, 0
	for a := s.dial; a != nil; a = a.older {
		if a.spare {
			spare++
		}
	}
	if x == nil {
		if looked+spare > 0 {
			return fmt.Errorf("%v: %d are being looked at, %d opened for nobody, and no books of it", s.addr, looked, spare)
		}
		return nil
	}
	own := 0
	for _, w := range x.warm {
		own += w.own
		switch {
		case w.ended:
			return fmt.Errorf("%v keeps a Warm that has ended", s.addr)
		case s.here() >= w.n && s.n[closing] == 0:
			return fmt.Errorf("%v has the %d connections that a Warm still waits for", s.addr, w.n)
		case w.err != nil && w.own == 0:
			return fmt.Errorf("%v: a Warm that failed waits for nothing", s.addr)
		}
	}
	switch {
	case x.looked != looked:
		return fmt.Errorf("%v counts %d that are being looked at, there are %d", s.addr, x.looked, looked)
	case x.dials != spare || own > spare:
		return fmt.Errorf("%v counts %d dials for nobody, there are %d, of which %d are Warm's", s.addr, x.dials, spare, own)
	case (x.dials > 0 && s.queue.dials > s.queue.len) != p.dialsForNobody(s):
		return fmt.Errorf("%v dials for nobody: %v", s.addr, !p.dialsForNobody(s))
	case x.reserve && (p.limits.MinSpare == 0 || p.closed || s.tracked()):
		return fmt.Errorf("%v keeps a reserve", s.addr)
	case (x.spare > 0) != (x.inShort != nil):
		return fmt.Errorf("%v wants %d spare ones, in the list: %v", s.addr, x.spare, x.inShort != nil)
	case x.spare > 0 && s.queue.bare != nil:
		return fmt.Errorf("%v wants %d spare ones before its waiters are served", s.addr, x.spare)
	case s.n[closing] == 0 && x.spare != p.spareLocked(s):
		return fmt.Errorf("%v wants %d spare ones, and should want %d", s.addr, x.spare, p.spareLocked(s))
	}
	return nil
}

// shortInconsistency looks at the list of those that are short.
func (p *Pool) shortInconsistency() error {
	reserve := false
	for e := p.short.Front(); e != nil; e = e.Next() {
		s := e.Value.(*site)
		switch {
		case s.special.inShort != e:
			return fmt.Errorf("the list of those that are short is torn at %v", s.addr)
		case p.sites.find(s.addr) != s:
			return fmt.Errorf("%v is short, and forgotten", s.addr)
		case s.warming() != nil && reserve:
			return fmt.Errorf("%v asked for connections, and stands behind a reserve", s.addr)
		}
		reserve = reserve || s.warming() == nil
	}
	if p.short.Len() == 0 || p.closed || p.want > 0 || p.n.open() >= p.limitLocked() || int(p.n[dialing]) >= p.limits.MaxDialing {
		return nil
	}
	if p.short.Front().Value.(*site).warming() != nil || p.spareableLocked() {
		return fmt.Errorf("%d addresses are short, and dials could start", p.short.Len())
	}
	return nil
}

// dialsForNobody is what the pool knows of it.
func (p *Pool) dialsForNobody(s *site) bool {
	_, yes := p.unneeded[s]
	return yes
}
