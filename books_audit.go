package connpool

import (
	"fmt"
	"math"
)

// contradictionLocked says in what the books contradict themselves: the invariants
// above type Pool, in the order they stand there. They hold at any moment at which
// nobody has the lock.
func (b *books) contradictionLocked() error {
	var n tally
	want, waiting, eager := 0, 0, 0
	lowered, looked := b.lowered, b.lookedAt()
	var sites []*site
	for s := range b.sites.all() {
		if found := b.sites.find(s.addr); found != s {
			return fmt.Errorf("7: looking up %v finds %p instead of %p", s.addr, found, s)
		}
		sites = append(sites, s)
	}
	for s := range b.unpooled {
		if s.n.open() > 1 || s.queue.len > 1 || s.n.open()+s.queue.len == 0 {
			return fmt.Errorf("%d connections and %d waiters in the books of one DialContext", s.n.open(), s.queue.len)
		}
		sites = append(sites, s)
	}
	all := 0
	for _, n := range looked {
		all += n
	}
	if b.wrongMove != "" {
		return fmt.Errorf("2: %s", b.wrongMove)
	}
	if b.checking != all {
		return fmt.Errorf("the pool counts %d that are being looked at, there are %d", b.checking, all)
	}
	for _, s := range sites {
		addr := s.addr
		if err := b.auditUnasked(s, looked[s]); err != nil {
			return err
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
			case operating(c.word.Load()), c.word.Load()&(flagLent|flagGone) != 0, c.word.Load()&(flagBroken|flagResident) == flagBroken:
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
		most := b.limitsAt(s).MaxOpen
		if b.whenFull != FullOverflow && s.n.open() > most && (!lowered || s.n[phaseIdle] > 0 && s.n.kept() > most) {
			return fmt.Errorf("3: %d of %d open for %v", s.n.open(), most, addr)
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
		case s.heapIndex >= 0 && (*b.readyOf(s))[s.heapIndex] != s:
			return fmt.Errorf("4: %v is not where the heap has it", addr)
		}
		switch _, listed := b.unheard[s]; {
		case listed != (s.rank > 1), int(s.rank) > max(1, q.dials), q.silent && q.dials == 0:
			return fmt.Errorf("%v has %d dials and the rank %d, silent: %v, on the list: %v", addr, q.dials, s.rank, q.silent, listed)
		}
		eager += s.eager()
		want += int(s.want)
		waiting += length
	}
	for ph := phaseDialing; ph < numPhases; ph++ {
		if n[ph] != b.n[ph] {
			return fmt.Errorf("3: the pool counts %d in phase %d, its sites %d", b.n[ph], ph, n[ph])
		}
	}
	limit, own, overflow := b.limitLocked(), 0, 0 // own are connections of DialContext's
	for s := range b.unpooled {
		own += s.n.open()
		overflow = max(overflow, int(s.overflow))
	}
	switch {
	case b.limits.MaxOpen > 0 && !lowered && own-limit > overflow:
		return fmt.Errorf("3: DialContext has %d connections of %d", own, limit)
	case own != len(b.unpooled)-len(b.readyOwn):
		return fmt.Errorf("4: DialContext has %d connections, %d in its books, and %d want to dial", own, len(b.unpooled), len(b.readyOwn))
	case b.whenFull != FullOverflow && b.limits.MaxOpen > 0 && b.n.open() > limit+overflow && (!lowered || b.n[phaseIdle] > 0 && b.n.kept() > limit):
		return fmt.Errorf("3: %d of %d open", b.n.open(), limit)
	case int(b.n[phaseDialing]) > b.limits.MaxDialing && !lowered:
		return fmt.Errorf("3: %d dials under way of %d", b.n[phaseDialing], b.limits.MaxDialing)
	case want != b.want || waiting != b.counts.Waiting:
		return fmt.Errorf("4: the pool wants %d dials and has %d waiting, its sites %d and %d", b.want, b.counts.Waiting, want, waiting)
	case eager != b.eager:
		return fmt.Errorf("%d wanted by addresses that answer, the pool counts %d", eager, b.eager)
	case b.displaced < 0 || b.displaced > int(b.n[phaseDialing]):
		return fmt.Errorf("%d dials are broken off for others, of %d", b.displaced, b.n[phaseDialing])
	case b.recency.len < int(b.n[phaseIdle]+b.n[phaseBorrowed]), b.recency.len > b.n.open()-int(b.n[phaseDialing]), len(b.recency.all()) != b.recency.len:
		return fmt.Errorf("6: recency counts %d, lists %d, of %d (%d closing)", b.recency.len, len(b.recency.all()), b.n.open()-int(b.n[phaseDialing]), b.n[phaseClosing])
	case b.limits.MaxIdle < math.MaxInt && int(b.n[phaseIdle]) > b.limits.MaxIdle:
		return fmt.Errorf("%d idle of %d", b.n[phaseIdle], b.limits.MaxIdle)
	case b.counts.Tracked < 0 || b.counts.Tracked > int(b.n[phaseBorrowed]) || b.counts.Tracked > len(b.unpooled):
		return fmt.Errorf("3: %d tracked, %d in use, %d in the books", b.counts.Tracked, b.n[phaseBorrowed], len(b.unpooled))
	case b.closed && (b.n[phaseIdle] > 0 || waiting > 0):
		return fmt.Errorf("closed with %d idle and %d waiting", b.n[phaseIdle], waiting)
	}
	// Nobody waits for something that could be given now.
	if b.want > 0 && !b.closed && int(b.n[phaseDialing]) < b.limits.MaxDialing && int(b.n[phaseClosing])+b.displaced == 0 {
		// The budget of handles may have grown since somebody looked whether more may
		// be opened.
		if b.n.open() < limit && (b.admitted == 0 || b.n.open() < b.admitted) {
			return fmt.Errorf("4: %d dials could start", b.want)
		}
		if b.n[phaseIdle] > 0 && b.eager > 0 {
			return fmt.Errorf("4: %d dials could start in the place of %d idle connections", b.want, b.n[phaseIdle])
		}
	}
	return b.auditDeficitLocked()
}

// lookedAt counts the connections that are being looked at.
func (b *books) lookedAt() map[*site]int {
	n := make(map[*site]int)
	for _, c := range b.recency.all() {
		if e := c.cold.Load(); e != nil && e.checking {
			n[c.site]++
		}
	}
	return n
}

// auditUnasked looks at what one site opened, or is to open, for nobody who waits.
func (b *books) auditUnasked(s *site, looked int) error {
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
		if b.asksLimits && !s.unpooled() {
			return fmt.Errorf("%v has no limits of its own", s.addr)
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
	case (x.dials > 0 && s.queue.dials > s.queue.len) != b.dialsForNobody(s):
		return fmt.Errorf("%v dials for nobody: %v", s.addr, !b.dialsForNobody(s))
	case x.reserve && (b.limitsAt(s).MinIdle == 0 || b.closed || s.unpooled()):
		return fmt.Errorf("%v keeps a reserve", s.addr)
	case x.limits != nil && b.relimiting == 0 && x.limits.inForce != b.limitsDue(x.limits):
		return fmt.Errorf("%v obeys %+v, but LimitsFor gave %+v", s.addr, x.limits.inForce, x.limits.given)
	case x.limits == nil && b.asksLimits && !s.unpooled(), x.limits != nil && s.unpooled():
		return fmt.Errorf("%v has limits of its own: %v", s.addr, x.limits != nil)
	case (x.missing > 0) != (x.inDeficit != nil):
		return fmt.Errorf("%v wants %d spare ones, in the list: %v", s.addr, x.missing, x.inDeficit != nil)
	case x.missing > 0 && s.queue.nextToDial != nil:
		return fmt.Errorf("%v wants %d spare ones before its waiters are served", s.addr, x.missing)
	}
	return nil
}

// limitsDue is what must be in force of own: what LimitsFor gave, or, if SetLimits was called
// since, nothing above that.
func (b *books) limitsDue(own *ownLimits) AddrLimits {
	due := own.given.within(b.perAddr)
	if own.version != b.limitsVersion {
		due = due.atMost(own.inForce)
	}
	return due
}

// auditDeficitLocked looks at the list of those that are short. It does not ask whether a
// dial for one of them could start: a reserve is filled by the next section that gives
// room away, and sections in between may have freed what it needs.
func (b *books) auditDeficitLocked() error {
	reserve := false
	for e := b.deficit.Front(); e != nil; e = e.Next() {
		s := e.Value.(*site)
		switch {
		case s.prefill.inDeficit != e:
			return fmt.Errorf("the list of those that are short is torn at %v", s.addr)
		case b.sites.find(s.addr) != s:
			return fmt.Errorf("%v is short, and forgotten", s.addr)
		case s.warming() != nil && reserve:
			return fmt.Errorf("%v asked for connections, and stands behind a reserve", s.addr)
		}
		reserve = reserve || s.warming() == nil
	}
	return nil
}

// dialsForNobody is what the pool knows of it.
func (b *books) dialsForNobody(s *site) bool {
	_, yes := b.unneeded[s]
	return yes
}
