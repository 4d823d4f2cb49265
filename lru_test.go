package connpool

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// BETA-33
func TestVictimsAgreeWithTheNaiveModel(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 2))
		var rec recency
		rec.init()
		s := &site{}
		var all []*conn                  // of the pool
		used := make(map[*conn]int)      // when each was last given back
		idleOnes := func() (n []*conn) { // least recently used first
			for _, c := range all {
				if c.phase == phaseIdle {
					n = append(n, c)
				}
			}
			slices.SortFunc(n, func(a, b *conn) int { return used[a] - used[b] })
			return n
		}
		drop := func(c *conn) {
			rec.remove(c)
			all = slices.DeleteFunc(all, func(o *conn) bool { return o == c })
		}
		for now := range 300 {
			switch r.IntN(6) {
			case 0: // a dial ends
				c := &conn{site: s, phase: phaseBorrowed}
				if r.IntN(2) == 0 {
					c.phase = phaseIdle
				}
				rec.add(c)
				used[c] = now
				all = append(all, c)
			case 1: // a loan begins
				if free := idleOnes(); len(free) > 0 {
					free[r.IntN(len(free))].phase = phaseBorrowed
				}
			case 2, 3: // a loan ends
				if len(all) > 0 {
					if c := all[r.IntN(len(all))]; c.phase == phaseBorrowed {
						if r.IntN(4) == 0 {
							drop(c)
							break
						}
						rec.touch(c)
						used[c] = now
						c.phase = phaseIdle
					}
				}
			case 4, 5: // room is needed
				free := idleOnes()
				victim := rec.oldestIdle(len(free))
				if len(free) == 0 {
					require.Nil(t, victim)
					break
				}
				require.Same(t, free[0], victim, "seed %d, step %d", seed, now)
				drop(victim)
			}
			require.Equal(t, len(all), rec.len)
			require.Len(t, rec.all(), len(all))
		}
	}
}

// A lent connection at the old end does not make each search longer.
func TestTheSearchForAVictimPassesALentConnectionOnce(t *testing.T) {
	var rec recency
	rec.init()
	const k = 1000
	conns := make([]*conn, 2*k)
	for i := range conns {
		conns[i] = &conn{site: new(site), phase: phaseIdle}
		if i < k {
			conns[i].phase = phaseBorrowed
		}
		rec.add(conns[i])
	}
	require.Same(t, conns[k], rec.oldestIdle(k))
	require.Same(t, conns[k], rec.lent.younger, "the lent ones are out of the way")
}

// BETA-33
func TestEvictLRUClosesTheLeastRecentlyUsed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for _, host := range []string{"1", "2", "3", "1"} {
			n.use(at(host))
			time.Sleep(time.Millisecond)
		}
		for _, want := range []string{"2", "3", "1"} {
			require.Len(t, n.Host(want).Conns(), 1)
			addr, ok := n.p.EvictLRU()
			require.True(t, ok)
			require.Equal(t, at(want), addr)
			require.Empty(t, n.Host(want).Conns(), "it returns when the socket is closed")
			n.check()
		}
		_, ok := n.p.EvictLRU()
		require.False(t, ok)
		n.closed(reasons{ClosedEvicted: 3})
	})
}

// BETA-31, BETA-32
func TestEvictionLooksAtAllAddressesAndSparesWhatIsInUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 3})
		oldest := n.borrow(bg, at("a"))
		oldest.conn()
		time.Sleep(time.Second)
		n.use(at("b"))
		time.Sleep(time.Second)
		n.use(at("c"))
		require.Equal(t, "d#1", n.use(at("d"))) // for which b, not a, makes room
		require.Len(t, n.Host("a").Conns(), 1)
		require.Empty(t, n.Host("b").Conns())
		for _, want := range []string{"c", "d"} {
			addr, ok := n.p.EvictLRU()
			require.True(t, ok)
			require.Equal(t, at(want), addr)
		}
		_, ok := n.p.EvictLRU()
		require.False(t, ok, "what is in use is never touched")
		require.True(t, oldest.holds())
		n.check()
		require.NoError(t, oldest.giveBack())
		addr, ok := n.p.EvictLRU()
		require.True(t, ok)
		require.Equal(t, at("a"), addr)
	})
}

// BETA-33: the same through the pool, with random histories: loans that nest,
// discards, evictions asked for and evictions by MaxOpen.
func TestEvictionAgreesWithTheNaiveModelThroughThePool(t *testing.T) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T) {
			const limit = 6
			r := rand.New(rand.NewPCG(seed, 3))
			n := open(t, Config{MaxOpen: limit, IdleTimeout: -1, SweepInterval: -1})
			var idleHosts []string // least recently used first
			var out []*scripted
			hosts := make(map[*scripted]string)
			take := func(host string) bool { // whether one of that host is idle, and the model lends it
				// The host's last one given back goes first.
				for i := len(idleHosts) - 1; i >= 0; i-- {
					if idleHosts[i] == host {
						idleHosts = slices.Delete(idleHosts, i, i+1)
						return true
					}
				}
				return false
			}
			for step := range 200 {
				time.Sleep(time.Millisecond)
				switch r.IntN(5) {
				case 0, 1:
					if len(out) == limit {
						continue
					}
					host := fmt.Sprint(r.IntN(8))
					if !take(host) && len(idleHosts)+len(out) == limit {
						idleHosts = idleHosts[1:]
					}
					b := n.borrow(bg, at(host))
					b.conn()
					hosts[b] = host
					out = append(out, b)
				case 2, 3:
					if len(out) == 0 {
						continue
					}
					i := r.IntN(len(out))
					b := out[i]
					out = slices.Delete(out, i, i+1)
					if r.IntN(5) == 0 {
						require.Equal(t, errBoom, b.finish(discard))
						synctest.Wait()
						break
					}
					require.NoError(t, b.giveBack())
					idleHosts = append(idleHosts, hosts[b])
				case 4:
					addr, ok := n.p.EvictLRU()
					require.Equal(t, len(idleHosts) > 0, ok)
					if ok {
						require.Equal(t, at(idleHosts[0]), addr, "seed %d, step %d", seed, step)
						idleHosts = idleHosts[1:]
					}
				}
				n.gauges(len(out), len(idleHosts), 0)
				perHost := make(map[string]int)
				for _, h := range idleHosts {
					perHost[h]++
				}
				for a, st := range n.p.Addrs() {
					require.Equal(t, perHost[a.Host], st.Idle, "seed %d, step %d, host %s", seed, step, a.Host)
				}
				n.check()
			}
		})
	}
}

// The sweep meets everything, a part at a time, whatever is used, opened, closed
// or looked for in between.
func TestAWalkMeetsEachConnectionThatStays(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 4))
		var rec recency
		rec.init()
		s := &site{}
		var all []*conn
		add := func() {
			c := &conn{site: s, phase: phaseBorrowed + phase(r.IntN(2))}
			if c.phase != phaseBorrowed {
				c.phase = phaseIdle
			}
			rec.add(c)
			all = append(all, c)
		}
		for range r.IntN(50) {
			add()
		}
		stays := slices.Clone(all)
		met := make(map[*conn]bool)
		var mark conn
		for {
			part := rec.walk(&mark, 1+r.IntN(5))
			for _, c := range part {
				require.False(t, met[c], "seed %d: it was met before", seed)
				met[c] = true
			}
			if len(part) == 0 {
				break
			}
			for range r.IntN(6) {
				switch r.IntN(4) {
				case 0:
					add()
				case 1, 2:
					rec.touch(all[r.IntN(len(all))])
				case 3:
					n := 0
					for _, c := range all {
						if c.phase == phaseIdle {
							n++
						}
					}
					c := rec.oldestIdle(n)
					require.Equal(t, n > 0, c != nil)
					if c != nil && r.IntN(2) == 0 {
						require.True(t, rec.remove(c))
						all = slices.DeleteFunc(all, func(o *conn) bool { return o == c })
						stays = slices.DeleteFunc(stays, func(o *conn) bool { return o == c })
						if len(all) == 0 {
							add()
						}
					}
				}
			}
		}
		for _, c := range stays {
			require.True(t, met[c] || c.round >= setAside, "seed %d", seed) // what was put aside meanwhile is lent
		}
		require.Nil(t, mark.younger, "the mark is out")
		require.Len(t, rec.all(), rec.len)
	}
}
