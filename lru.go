package connpool

import (
	"math"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// recency orders all open connections of all addresses by their last use.
//
// A connection is in it from the end of its dial until it leaves the pool, also
// while it is lent: to take it out and put it in again would allocate at every
// loan. Being in use counts as "used now", so a lent connection that has sunk
// to the old end is no victim; the search lifts it to the young end and goes
// on. It can sink again only after everything that was idle above it has been
// used or evicted, so the search costs O(1) per eviction in the long run, and
// the order among the idle ones is exactly that of their last give-back.
//
// All methods need Pool.mu.
type recency struct {
	lru *simplelru.LRU[*conn, struct{}]
}

func newRecency() recency {
	// The list must never evict by itself: only its owner closes a connection.
	lru, err := simplelru.NewLRU[*conn, struct{}](math.MaxInt, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return recency{lru}
}

func (r recency) add(c *conn)         { r.lru.Add(c, struct{}{}) }
func (r recency) touch(c *conn)       { r.lru.Get(c) }
func (r recency) remove(c *conn) bool { return r.lru.Remove(c) }

// oldestIdle is the least recently used of the n idle connections.
func (r recency) oldestIdle(n int) *conn {
	for n > 0 {
		c, _, _ := r.lru.GetOldest()
		if c.phase == idle {
			return c
		}
		r.touch(c)
	}
	return nil
}

// all lists every connection, least recently used first.
func (r recency) all() []*conn { return r.lru.Keys() }
