package connpool

// recency orders all open connections of all addresses by their last use, in a
// ring through the connections themselves: a loan moves its connection in no
// time, and each costs two pointers.
//
// A connection is in it from the end of its dial until it leaves the pool, also
// while it is lent. Being in use counts as "used now", so a lent connection
// that has sunk to the old end is no victim; the search lifts it to the young
// end and goes on. It can sink again only after everything that was idle above
// it has been used or evicted, so the search costs O(1) per eviction in the
// long run, and the order among the idle ones is exactly that of their last
// give-back.
//
// All methods need Pool.mu.
type recency struct {
	ends conn // no connection: the youngest is its older, the oldest its younger
	len  int

	round uint8 // the current, or last, walk
}

func (r *recency) init() { r.ends.younger, r.ends.older = &r.ends, &r.ends }

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
	for c := r.ends.younger; n > 0; {
		next := c.younger
		switch {
		case c.phase == idle:
			return c
		case c.site != nil: // else the mark of a walk, or the ends
			r.touch(c)
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

// walk is how a sweep meets all connections that there were when it began, n at
// a time and the oldest first: it lists the next ones, and leaves mark (no
// connection, and in no ring before the first call) where the next call goes on.
// What is used meanwhile moves to the young end, where each is met once. When
// there is nothing left, mark is taken out.
func (r *recency) walk(mark *conn, n int) []*conn {
	c := r.ends.younger
	if mark.younger == nil {
		r.round++
	} else {
		c = mark.younger
		r.cut(mark)
	}
	var met []*conn
	for ; c != &r.ends && len(met) < n; c = c.younger {
		if c.site != nil && c.round != r.round {
			c.round = r.round
			met = append(met, c)
		}
	}
	if len(met) > 0 {
		r.insert(mark, c)
	}
	return met
}
