package connpool

import (
	"hash/maphash"
	"iter"
)

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
func (t *siteTable) renew() { t.by, t.rest, t.last = make(map[uint64]*site), nil, nil }

func (t *siteTable) len() int { return len(t.by) + len(t.rest) }

// all ranges over the sites in no particular order. The loop body may remove the site that
// it got. When the body is done with that site, it may unlock Pool.mu and lock it again,
// see eachSiteLocked.
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
