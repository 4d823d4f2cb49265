package connpool

// recency orders all open connections of all addresses by their last use, in a
// ring through the connections themselves: a loan moves its connection in no
// time, and each costs two pointers.
//
// A connection is in it from the end of its dial until it leaves the pool, also
// while it is lent. A lent one is no victim, and most are at the young end, where
// no search comes. One that has sunk to the old end all the same is put aside by the
// search that meets it, behind a mark at which searches begin:
//
//	ends - put aside, in no order - lent - by last use, oldest first - ends
//
// From there it goes to the young end when it is given back, as each connection
// does. So a loan is met by one search at most, however many are held and for how
// long, and the order among the idle ones is exactly that of their last give-back (but
// one that was only looked at, and met by a search meanwhile, counts as used then).
//
// It is also the registry of all open connections, for whoever lists them (all) or meets
// them bit by bit (walk): a registry of its own would cost each connection two pointers
// more, and MaxIdle lowered, Shutdown's error and the sweep want this very order.
//
// All methods need Pool.mu.
type recency struct {
	ends conn // no connection: the youngest is its older, the oldest its younger
	lent conn // no connection: between those put aside and the others
	len  int

	round uint8 // the current, or last, walk; less than setAside
}

// setAside in conn.round says that the connection was put aside.
const setAside = 1 << 7

func (r *recency) init() {
	r.ends.younger, r.ends.older = &r.ends, &r.ends
	r.insert(&r.lent, &r.ends)
}

func (r *recency) add(c *conn) {
	r.insert(c, &r.ends)
	c.round = r.round
	r.len++
}

// insert puts c on the older side of young.
func (r *recency) insert(c, young *conn) {
	c.younger, c.older = young, young.older
	c.older.younger = c
	young.older = c
}

func (r *recency) cut(c *conn) {
	c.younger.older, c.older.younger = c.older, c.younger
	c.younger, c.older = nil, nil
}

// touch makes c the youngest.
func (r *recency) touch(c *conn) {
	if r.ends.older != c {
		r.cut(c)
		r.insert(c, &r.ends)
		c.round &^= setAside
	}
}

// back puts c, which nobody has any more, where a search will find it.
func (r *recency) back(c *conn) {
	if c.round >= setAside {
		r.touch(c)
	}
}

// remove reports whether c was there.
func (r *recency) remove(c *conn) bool {
	if c.younger == nil {
		return false
	}
	r.cut(c)
	r.len--
	return true
}

// oldestIdle is the least recently used of the n idle connections.
func (r *recency) oldestIdle(n int) *conn {
	for c := r.lent.younger; n > 0 && c != &r.ends; {
		next := c.younger
		switch {
		case c.phase == phaseIdle:
			return c
		case c.site != nil: // else the mark of a walk
			r.cut(c)
			r.insert(c, &r.lent)
			c.round |= setAside
		}
		c = next
	}
	return nil
}

// all lists every connection, least recently used first.
func (r *recency) all() []*conn {
	all := make([]*conn, 0, r.len)
	for c := r.ends.younger; c != &r.ends; c = c.younger {
		if c.site != nil {
			all = append(all, c)
		}
	}
	return all
}

// walk is how a sweep meets the connections that there were when it began, n at a time:
// it lists the next ones, those put aside first and then the oldest, and leaves mark (no
// connection, and in no ring before the first call) where the next call goes on. What
// is used meanwhile moves to the young end, where each is met once; what a search
// puts aside meanwhile is lent, and not met if it stays that. When there is nothing
// left, mark is taken out.
func (r *recency) walk(mark *conn, n int) []*conn {
	c := r.ends.younger
	if mark.younger == nil {
		r.round = (r.round + 1) % setAside
	} else {
		c = mark.younger
		r.cut(mark)
	}
	var met []*conn
	for ; c != &r.ends && len(met) < n; c = c.younger {
		if c.site != nil && c.round&^setAside != r.round {
			c.round = r.round | c.round&setAside
			met = append(met, c)
		}
	}
	if len(met) > 0 {
		r.insert(mark, c)
	}
	return met
}
