package connpool

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// Limits of one address in the random histories: half of the pools have a LimitsFor. Its
// answers are drawn by address, change when the limits of the pool do, and are sometimes
// none: an error, a panic, a contradiction.

// ownLimitsOf is what a world knows of the limits of its addresses. world.mu guards it,
// because LimitsFor runs on goroutines of its own.
type ownLimitsOf struct {
	answers    map[Addr]AddrLimits // what LimitsFor gives now
	failing    map[Addr]int        // how LimitsFor fails; 0: it does not
	inForce    map[Addr]AddrLimits // what LimitsFor has given the pool last
	mostBefore map[Addr]int        // the limits on connections before the step
	fresh      map[Addr]bool       // it has given that since the last SetLimits

	asked, failedAsks, higher, lower int
}

// modelOwn adds up what happened in all worlds.
var modelOwn ownLimitsOf

func (o *ownLimitsOf) sufficed(t *testing.T, steps int) {
	t.Logf("LimitsFor was asked %d times, %d in vain; %d borrows beyond MaxPerAddr, %d refused below it", o.asked, o.failedAsks, o.higher, o.lower)
	require.Greater(t, o.asked, steps/100)
	require.Greater(t, o.failedAsks, steps/2000)
	require.Greater(t, o.higher, steps/2000, "steps after which an address had more than MaxPerAddr")
	require.Greater(t, o.lower, steps/2000, "steps after which an address had all of its own limit, and that is below MaxPerAddr")
}

func (w *world) addOwnLimits() {
	modelOwn.asked += w.asked
	modelOwn.failedAsks += w.failedAsks
	modelOwn.higher += w.higher
	modelOwn.lower += w.lower
	w.asked, w.failedAsks, w.higher, w.lower = 0, 0, 0, 0
}

// ownShape is the part of a random shape that concerns this file.
func (w *world) ownShape(cfg *Config, of func(...int) int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answers, w.failing, w.inForce = make(map[Addr]AddrLimits), make(map[Addr]int), make(map[Addr]AddrLimits)
	w.fresh = make(map[Addr]bool)
	if of(0, 1) == 0 {
		return
	}
	cfg.LimitsFor = w.limitsFor
	for _, a := range w.addrs {
		w.answers[a] = w.drawLimits(cfg.WhenFull)
	}
}

// drawLimits is what LimitsFor will give for an address: seldom what contradicts itself.
func (w *world) drawLimits(full FullPolicy) AddrLimits {
	of := func(choices ...int) int { return choices[w.pick(len(choices))] }
	l := AddrLimits{
		MaxOpen: of(0, 1, 2, 4, 6, -1), MaxIdle: of(0, 0, 0, 1, 2, -1), MinIdle: of(0, 0, 1, 2, -1),
		MaxDialing: of(0, 0, 1, -1), MaxWaiters: of(0, 0, 0, 1, -1),
	}
	if l.senseless(full, 1<<20) != nil && w.pick(32) > 0 {
		l.MaxIdle, l.MinIdle, l.MaxWaiters = 0, 0, 0
	}
	return l
}

var errNoLimits = errors.New("no limits")

// limitsFor is the LimitsFor of such a pool.
func (w *world) limitsFor(a Addr) (AddrLimits, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked++
	l, how := w.answers[a], w.failing[a]
	if how == 0 && l.senseless(w.cfg.WhenFull, 1<<20) != nil {
		how = -1
	}
	if how != 0 {
		if w.failedAsks++; w.failedAsks%3 == 0 { // it fails no more
			w.answers[a], w.failing[a] = AddrLimits{}, 0
		}
	}
	switch how {
	case 0:
		w.inForce[a], w.fresh[a] = l, true
	case 1:
		return AddrLimits{}, errNoLimits
	case 2:
		panic(errNoLimits)
	}
	return l, nil
}

// changeOwnLimits changes what LimitsFor gives, before a SetLimits. done is told how that
// ended.
func (w *world) changeOwnLimits() (done func(error)) {
	if w.cfg.LimitsFor == nil {
		return func(error) {}
	}
	a, l, how := w.addrs[w.pick(len(w.addrs))], w.drawLimits(w.cfg.WhenFull), []int{0, 0, 0, 0, 0, 0, 1, 2}[w.pick(8)]
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answers[a], w.failing[a] = l, how
	before := w.fresh
	w.fresh = make(map[Addr]bool)
	return func(err error) {
		if err != nil { // it has changed nothing
			w.mu.Lock()
			defer w.mu.Unlock()
			w.fresh = before
			return
		}
		w.ownLimitsHold()
	}
}

// mostOpen is the limit on connections to a; 0 or negative: none. perAddr is that of the pool.
// In a step in which the answer for a changes, the earlier one allows as much as the new one:
// SetLimits asks when the new limits of the pool are in force.
func (w *world) mostOpen(a Addr, perAddr int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	own := w.inForce[a].MaxOpen
	if own == 0 || a.Transport == TCP { // TCP is DialContext
		own = perAddr
	}
	if own <= 0 {
		return 0
	}
	return max(own, w.mostBefore[a])
}

// ownLimitsBefore notes, before each step, the limits on connections that hold.
func (w *world) ownLimitsBefore() {
	w.mostBefore = make(map[Addr]int)
	if w.cfg.LimitsFor == nil {
		return
	}
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	for s := range w.pool.sites.all() {
		w.mostBefore[s.addr] = w.pool.limitsAt(s).MaxOpen
	}
}

// ownLimitsHold is called after a SetLimits that has asked LimitsFor: no address may have
// more idle connections than it allows now.
func (w *world) ownLimitsHold() {
	l, err := w.pool.Limits().resolved("Limits", w.cfg.WhenFull)
	if err != nil {
		w.failed("Limits gives what makes no sense: %v", err)
	}
	for a, s := range w.pool.Addrs() {
		w.mu.Lock()
		here := w.inForce[a].within(l.perAddr())
		w.mu.Unlock()
		if s.Idle > here.MaxIdle {
			w.failed("%d idle for %v after SetLimits, %d allowed", s.Idle, a, here.MaxIdle)
		}
		if s.Idle > 0 && s.Idle+s.InUse+s.Dialing > here.MaxOpen {
			w.failed("%d idle, %d in use for %v after SetLimits, %d allowed", s.Idle, s.InUse, a, here.MaxOpen)
		}
	}
}

// ownLimitsAfter compares, after each step, the limits that the books obey with those that
// LimitsFor gave last.
func (w *world) ownLimitsAfter() error {
	if w.cfg.LimitsFor == nil {
		return nil
	}
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	for s := range w.pool.sites.all() {
		here := *w.pool.limitsAt(s)
		want := w.inForce[s.addr].within(w.pool.limits.perAddr())
		if !w.fresh[s.addr] {
			want = want.atMost(here)
		}
		if here != want {
			return fmt.Errorf("the limits of %v are %+v, those that LimitsFor gave %+v", s.addr, here, want)
		}
		most := w.pool.limits.MaxPerAddr
		switch open := s.n.open(); {
		case w.cfg.WhenFull == FullOverflow:
		case open > most && !w.pool.lowered:
			w.higher++
		case open == here.MaxOpen && here.MaxOpen < most:
			w.lower++
		}
	}
	return nil
}
