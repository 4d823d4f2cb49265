package connpool

import (
	"maps"
	"net/netip"
	"slices"
)

// dnsAnswers is what DNS has answered for one name, in one family of addresses. It decides which
// addresses are gone.
//
// In calm times an address is gone if it is missing in two good answers in a row, and the second
// exchanges nothing for something else: one of the two contains the other. If the last exchange
// was one of a part, it takes three such answers.
//
//	A A B B             A is gone
//	AB A A              B is gone
//	ABC BCD BCD BCD     A is gone
//
// But some servers answer with a few of their addresses, others each time:
//
//	ABC BEG ADE CDF     nobody is gone
//
// Two of these answers rarely contain each other, and they show unrest: one exchanges addresses
// for others, or an address that was missing comes back. More than maxUnrest answers
// with unrest among the latest unrestMemory are no switch any more. Then an address is gone only
// if it is missing for much longer than any address was that came back. For 3 of 10 addresses
// at random the longest such gap is soon above 10 answers, and the chance that an address is
// missing for four times that and 16 more is less than one in a million.
type dnsAnswers struct {
	n      uint64                // good answers so far
	latest []netip.Addr          // the latest answer, sorted
	since  uint64                // n of the latest answer that exchanged addresses for others
	partly bool                  // it kept some of those before
	seen   map[netip.Addr]uint64 // for each address, n of the latest answer that had it, or of the time when it was dialled
	unrest [maxUnrest + 1]uint64 // n of the latest answers with unrest, the oldest first; 0: none
	gap    uint64                // the longest row of answers without an address that came back; 0 in calm times
}

const (
	missingAtLeast = 2    // good answers in a row without an address that is gone; one more if partly is set
	maxUnrest      = 2    // how many answers with unrest are calm all the same: a switch, and the switch back
	unrestMemory   = 128  // for how many answers unrest is remembered
	patientAnswers = 16   // in unrest, how many answers longer than gapFactor gaps an address must be missing
	gapFactor      = 4    // see patientAnswers
	longestGap     = 1000 // a longer gap counts as this
	maxSeen        = 4096 // how many addresses of a name are remembered
)

// dialled records that a dial, which looks the name up too, has got ip since the latest answer.
func (a *dnsAnswers) dialled(ip netip.Addr) { a.note(ip, a.n) }

// knows reports whether ip is remembered.
func (a *dnsAnswers) knows(ip netip.Addr) bool {
	_, known := a.seen[ip]
	return known
}

// note records that ip was seen now. until is the number of the latest answer before that.
func (a *dnsAnswers) note(ip netip.Addr, until uint64) {
	if a.seen == nil {
		a.seen = make(map[netip.Addr]uint64)
	}
	if last, known := a.seen[ip]; known && last < until { // it has come back
		a.gap = min(max(a.gap, until-last), longestGap)
		a.noteUnrest()
	}
	a.seen[ip] = a.n
}

// noteUnrest records that the latest answer came with unrest.
func (a *dnsAnswers) noteUnrest() {
	if a.unrest[maxUnrest] == a.n {
		return
	}
	copy(a.unrest[:], a.unrest[1:])
	a.unrest[maxUnrest] = a.n
}

// calm reports whether few of the latest answers came with unrest.
func (a *dnsAnswers) calm() bool {
	return a.unrest[0] == 0 || a.n-a.unrest[0] >= unrestMemory
}

// learn takes a good answer, which is sorted. It may be empty: the name has addresses of the
// other family only.
func (a *dnsAnswers) learn(answer []netip.Addr) {
	before := a.latest
	if a.n == 0 { // what was dialled is all that is known
		before = slices.SortedFunc(maps.Keys(a.seen), netip.Addr.Compare)
	}
	a.n++
	a.latest = answer
	if kept := inBoth(before, answer); kept < min(len(before), len(answer)) {
		a.since, a.partly = a.n, kept > 0
		a.noteUnrest()
	}
	for _, ip := range answer {
		a.note(ip, a.n-1)
	}
	if a.calm() {
		a.gap = 0
	}
	if len(a.seen) > maxSeen {
		for ip, last := range a.seen {
			if last != a.n {
				delete(a.seen, ip)
			}
		}
	}
}

// inBoth is how many addresses a and b, which are sorted, have in common.
func inBoth(a, b []netip.Addr) (n int) {
	for _, ip := range a {
		if _, found := slices.BinarySearchFunc(b, ip, netip.Addr.Compare); found {
			n++
		}
	}
	return n
}

// gone reports whether the name does not lead to ip any more.
func (a *dnsAnswers) gone(ip netip.Addr) bool {
	missing := a.n - a.seen[ip]
	if !a.calm() {
		return missing >= patientAnswers+gapFactor*a.gap
	}
	least := uint64(missingAtLeast)
	if a.partly {
		least++
	}
	return missing >= least && a.n-a.since+1 >= least
}
