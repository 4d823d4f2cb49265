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
		if e := c.cold.Load(); e != nil && e.checking {
			n[c.site]++
		}
	}
	return n
}

// spareInconsistency looks at one site.
func (p *Pool) spareInconsistency(s *site, looked int) error {
	x, spare := s.prefill, 0
	for a := s.dial; a != nil; a = a.older {
		if a.prefill {
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
		case s.openHere() >= w.n && s.n[phaseClosing] == 0:
			return fmt.Errorf("%v has the %d connections that a Warm still waits for", s.addr, w.n)
		case w.err != nil && w.own == 0:
			return fmt.Errorf("%v: a Warm that failed waits for nothing", s.addr)
		}
	}
	switch {
	case x.checking != looked:
		return fmt.Errorf("%v counts %d that are being looked at, there are %d", s.addr, x.checking, looked)
	case x.dials != spare || own > spare:
		return fmt.Errorf("%v counts %d dials for nobody, there are %d, of which %d are Warm's", s.addr, x.dials, spare, own)
	case (x.dials > 0 && s.queue.dials > s.queue.len) != p.dialsForNobody(s):
		return fmt.Errorf("%v dials for nobody: %v", s.addr, !p.dialsForNobody(s))
	case x.reserve && (p.limits.MinIdlePerAddr == 0 || p.closed || s.unpooled()):
		return fmt.Errorf("%v keeps a reserve", s.addr)
	case (x.missing > 0) != (x.inDeficit != nil):
		return fmt.Errorf("%v wants %d spare ones, in the list: %v", s.addr, x.missing, x.inDeficit != nil)
	case x.missing > 0 && s.queue.nextToDial != nil:
		return fmt.Errorf("%v wants %d spare ones before its waiters are served", s.addr, x.missing)
	case s.n[phaseClosing] == 0 && x.missing != p.missingLocked(s):
		return fmt.Errorf("%v wants %d spare ones, and should want %d", s.addr, x.missing, p.missingLocked(s))
	}
	return nil
}

// shortInconsistency looks at the list of those that are short.
func (p *Pool) shortInconsistency() error {
	reserve := false
	for e := p.deficit.Front(); e != nil; e = e.Next() {
		s := e.Value.(*site)
		switch {
		case s.prefill.inDeficit != e:
			return fmt.Errorf("the list of those that are short is torn at %v", s.addr)
		case p.sites.find(s.addr) != s:
			return fmt.Errorf("%v is short, and forgotten", s.addr)
		case s.warming() != nil && reserve:
			return fmt.Errorf("%v asked for connections, and stands behind a reserve", s.addr)
		}
		reserve = reserve || s.warming() == nil
	}
	if p.deficit.Len() == 0 || p.closed || p.want > 0 || p.n.open() >= p.limitLocked() || int(p.n[phaseDialing]) >= p.limits.MaxDialing {
		return nil
	}
	if p.deficit.Front().Value.(*site).warming() != nil || p.spareableLocked() {
		return fmt.Errorf("%d addresses are short, and dials could start", p.deficit.Len())
	}
	return nil
}

// dialsForNobody is what the pool knows of it.
func (p *Pool) dialsForNobody(s *site) bool {
	_, yes := p.unneeded[s]
	return yes
}
