package connpool

// recency orders all open connections of all addresses by their last use, in a ring through
// the connections themselves. So a loan moves its connection in constant time, and the ring
// costs each connection two pointers.
//
// A connection is in the ring from the end of its dial until it leaves the pool, also while
// it is lent. A lent connection cannot be evicted. Most lent connections are at the young
// end, where no search comes. A lent connection that has reached the old end all the same is
// put aside by the first search that meets it, behind a mark at which searches begin:
//
//	ends - put aside, in no order - lent - by last use, oldest first - ends
//
// A connection that was put aside goes to the young end when it is given back, as every
// connection does. So at most one search meets a loan, however many loans there are and
// however long they last. The order among the idle connections is exactly the order in which
// they were last given back. There is one exception: an idle connection that is being checked
// when a search meets it counts as used then.
//
// The ring is also the registry of all open connections, for callers that list all of them
// (all) or some at a time (walk). A registry of its own would cost each connection two more
// pointers, and a lowered MaxIdle, Shutdown's error and the sweep want this very order.
//
// All methods need Pool.mu.
type recency struct {
	ends conn // no connection: its older neighbor is the youngest connection, its younger one the oldest
	lent conn // no connection: the mark between the connections put aside and the others
	len  int

	round uint8 // number of the current, or last, walk; less than setAside
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

// insert puts c next to young, on its older side.
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

// back puts c, which nobody owns any more, where a search will find it.
func (r *recency) back(c *conn) {
	if c.round >= setAside {
		r.touch(c)
	}
}

// remove takes c out of the ring and reports whether c was in it.
func (r *recency) remove(c *conn) bool {
	if c.younger == nil {
		return false
	}
	r.cut(c)
	r.len--
	return true
}

// oldestIdle is the least recently used idle connection. n is how many connections are idle:
// 0 means that there is none to look for, and oldestIdle returns nil.
func (r *recency) oldestIdle(n int) *conn {
	for c := r.lent.younger; n > 0 && c != &r.ends; {
		next := c.younger
		switch {
		case c.phase == phaseIdle:
			return c
		case c.site != nil: // not the mark of a walk
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

// walk lists the connections that were there when the walk began, n at a time, for a sweep.
// Each call lists the next ones: those put aside first, then the oldest. It leaves mark where
// the next call goes on. mark is no connection, and is in no ring before the first call. A
// connection that is used meanwhile moves to the young end, where the walk meets it once. A
// connection that a search puts aside meanwhile is lent, and the walk does not meet it while it
// stays lent. When nothing is left, walk takes mark out.
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
