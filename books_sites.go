package connpool

import (
	"hash/maphash"
	"iter"
)

// site is the state of one address. A site exists while there is a connection, a
// dial, a waiter, a reserve, a call of Warm, or a recent failure. Its fields need Pool.mu.
type site struct {
	env       *env  // for functions outside the books: no method of books uses it
	addr      Addr  // canonical
	top       *conn // top of the idle stack: the idle connection given back last
	n         tally
	want      int32    // dials for waiters that this site's own limits would let start
	waiting   int32    // how many waiters of the queue Stats.Waiting has counted
	heapIndex int32    // index in books.ready or readyOwn; -1 if the site is in neither
	epoch     uint32   // raised by Retire; a connection of an older epoch is not lent again
	family    family   // address family that DialContext asked for; familyPooled for any other site; never changes
	absolute  bool     // for DialContext: the host had a final dot
	overflow  uint8    // for DialContext: how many connections may be open beyond MaxOpen for it, see DialOverflow
	rank      int8     // as of the last refreshLocked, see books_silence.go
	queue     *queue   // never nil, see noQueue
	dial      *attempt // the youngest dial under way that waiters count on
	backoff   *backoff // nil after a dial that succeeded
	prefill   *prefill // nil unless Warm, MinIdlePerAddr, LimitsFor or DialContext is used

	loans, dials, dialErrors uint64
}

// tally counts connections by phase.
type tally [numPhases]int32

// open is the number of connections that have a slot.
func (n *tally) open() int {
	return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed] + n[phaseClosing])
}

// kept is the number of these connections without those being closed.
func (n *tally) kept() int { return int(n[phaseDialing] + n[phaseIdle] + n[phaseBorrowed]) }

// family is the family of addresses that DialContext was asked for.
type family uint8

const (
	familyPooled family = iota // the site is not of DialContext
	familyAny                  // "tcp" or "unix"
	family4                    // "tcp4"
	family6                    // "tcp6"
)

func familyOf(network string) family {
	switch network {
	case "tcp4":
		return family4
	case "tcp6":
		return family6
	}
	return familyAny
}

// unpooled reports whether s is the site of a connection of DialContext.
func (s *site) unpooled() bool { return s.family != familyPooled }

// siteTable finds the state of an address. The hash of the address is computed once per
// borrow, before the borrower takes Pool.mu. The hash only selects a candidate; ==
// decides. All methods but hash need Pool.mu.
type siteTable struct {
	seed maphash.Seed // never changes: a hash may be computed long before it is used under the lock
	by   map[uint64]*site
	rest map[Addr]*site // the sites whose hash another site has too; nil while there is none
	last *site          // the site that was found last: most pools talk to few addresses
	hot  uint64         // the hash of last
}

func newSiteTable() siteTable {
	return siteTable{seed: maphash.MakeSeed(), by: make(map[uint64]*site)}
}

// hash covers the fields in which addresses usually differ.
func (t *siteTable) hash(a *Addr) uint64 {
	const odd = 0x9e3779b97f4a7c15
	h := maphash.String(t.seed, a.Host)
	h = (h ^ uint64(a.Port) ^ uint64(len(a.Transport))<<16 ^ uint64(a.QoS.DSCP)<<24) * odd
	if a.Scope != "" {
		h = (h ^ maphash.String(t.seed, a.Scope)) * odd
	}
	if a.ServerName != "" {
		h = (h ^ maphash.String(t.seed, a.ServerName)) * odd
	}
	return h
}

// get is the site of a, whose hash is h; nil if there is none.
func (t *siteTable) get(h uint64, a *Addr) *site {
	s := t.last
	if s == nil || t.hot != h {
		s = t.by[h]
	}
	if s == nil || s.addr != *a {
		if t.rest == nil {
			return nil
		}
		return t.rest[*a]
	}
	t.last, t.hot = s, h
	return s
}

func (t *siteTable) find(a Addr) *site { return t.get(t.hash(&a), &a) }

func (t *siteTable) add(s *site) {
	h := t.hash(&s.addr)
	switch {
	case t.by[h] == nil:
		t.by[h] = s
	case t.rest == nil:
		t.rest = map[Addr]*site{s.addr: s}
	default:
		t.rest[s.addr] = s
	}
}

// remove takes s out of the table, if s is in it.
func (t *siteTable) remove(s *site) {
	if h := t.hash(&s.addr); t.by[h] == s {
		delete(t.by, h)
	} else if t.rest[s.addr] == s {
		delete(t.rest, s.addr)
	}
	if t.last == s {
		t.last = nil
	}
}

// renew gives back the memory of an empty table. Go's maps never shrink, so ten thousand
// addresses that were visited once would leave megabytes behind.
func (t *siteTable) renew()   { t.by, t.rest, t.last = make(map[uint64]*site), nil, nil }
func (t *siteTable) len() int { return len(t.by) + len(t.rest) }

// all ranges over the sites in no particular order. The loop body may remove the site that
// it got. When the body is done with that site, it may unlock Pool.mu and lock it again,
// see eachLocked.
func (t *siteTable) all() iter.Seq[*site] {
	return func(yield func(*site) bool) {
		for _, s := range t.by {
			if !yield(s) {
				return
			}
		}
		for _, s := range t.rest {
			if !yield(s) {
				return
			}
		}
	}
}
