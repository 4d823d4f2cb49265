package connpool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// TRY-52: whatever is held, and for however long, a search for a victim meets it once.
func TestAnEvictionPassesWhatIsHeldOnce(t *testing.T) {
	var rec recency
	rec.init()
	s := new(site)
	add := func(ph phase) *conn {
		c := &conn{site: s, phase: ph}
		rec.add(c)
		return c
	}
	for range 1000 {
		add(phaseBorrowed)
	}
	for range 100 {
		c := add(phaseIdle)
		require.Same(t, c, rec.oldestIdle(1))
		require.Same(t, c, rec.lent.younger, "the next search begins with it")
		require.True(t, rec.remove(c))
	}
	require.Len(t, rec.all(), 1000)
	// One that comes back is met again, and in its order.
	held := rec.all()
	for _, i := range []int{7, 3, 999} {
		held[i].phase = phaseIdle
		rec.touch(held[i])
	}
	for _, i := range []int{7, 3, 999} {
		require.Same(t, held[i], rec.oldestIdle(3))
		rec.remove(held[i])
	}
	require.Nil(t, rec.oldestIdle(0))
	require.Nil(t, rec.oldestIdle(1), "a count that is wrong ends at the young end")
}

// TRY-52: what a search puts aside while it is being looked at is a victim again when
// the look is over.
func TestAnEvictionFindsWhatWasLookedAtMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T) {
		looking := make(chan struct{})
		n := open(t, Config{MaxOpen: 2, SweepInterval: -1, CheckAfterIdle: -1, Check: func(context.Context, Conn) error { <-looking; return nil }})
		n.use(at("a"))
		time.Sleep(time.Second)
		n.use(at("b"))
		c := n.p.every()[0]
		require.Equal(t, "a", c.site.addr.Host)
		go idleRef{c, c.generation()}.examine(true)
		synctest.Wait()
		addr, ok := n.p.EvictLRU() // passes it
		require.Equal(t, [2]any{at("b"), true}, [2]any{addr, ok})
		require.GreaterOrEqual(t, c.round, uint8(setAside))
		close(looking)
		synctest.Wait()
		n.gauges(0, 1, 0)
		addr, ok = n.p.EvictLRU()
		require.Equal(t, [2]any{at("a"), true}, [2]any{addr, ok})
	})
}

// TRY-52: a look does not search for the place that it had.
func TestALookEndsWhereItBegan(t *testing.T) {
	bubble(t, func(t *testing.T) {
		looking := make(chan struct{})
		n := open(t, Config{IdleTimeout: -1, SweepInterval: -1, CheckAfterIdle: time.Hour, Check: func(context.Context, Conn) error { <-looking; return nil }})
		var all []*scripted
		for range 5 {
			b := n.borrow(bg, at("a"))
			b.conn()
			all = append(all, b)
		}
		for _, b := range all {
			time.Sleep(time.Second)
			require.NoError(t, b.giveBack())
		}
		stack := func() (ids []uint64) {
			n.p.mu.Lock()
			defer n.p.mu.Unlock()
			for c := n.p.sites.find(at("a")).top; c != nil; c = c.down {
				ids = append(ids, c.id)
			}
			return ids
		}
		before := stack()
		for _, c := range n.p.every() {
			go idleRef{c, c.generation()}.examine(true)
			synctest.Wait()
			require.True(t, c.linked())
			require.Equal(t, before, stack())
			n.check()
			looking <- struct{}{}
			synctest.Wait()
			require.Equal(t, before, stack())
			n.check()
		}
		// A borrower takes the one below.
		top := n.p.every()[4]
		go idleRef{top, top.generation()}.examine(true)
		synctest.Wait()
		b := n.borrow(bg, at("a"))
		require.Equal(t, before[1], b.conn().Info().ID)
		n.check()
		require.False(t, top.linked())
		looking <- struct{}{}
		synctest.Wait()
		require.Equal(t, append([]uint64{before[0]}, before[2:]...), stack())
		require.NoError(t, b.giveBack())
		n.check()
		// All that is there is being looked at: a borrower dials.
		for _, c := range n.p.every() {
			go idleRef{c, c.generation()}.examine(true)
		}
		synctest.Wait()
		n.use(at("a"))
		n.p.CloseIdle()
		require.EqualValues(t, 6, n.p.Stats().Dials)
		close(looking)
		synctest.Wait()
		n.gauges(0, 5, 0)
		n.check()
	})
}

// TRY-52: looks, loans, evictions and closes in any order leave the stacks in order.
func TestLooksAtRandomLeaveTheStacksInOrder(t *testing.T) {
	for seed := range short.Of[uint64](30, 10) {
		bubble(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 6))
			var checks atomic.Uint64 // r is the test's alone
			n := open(t, Config{MaxOpen: 12, IdleTimeout: -1, SweepInterval: -1, CheckAfterIdle: time.Hour,
				Check: func(context.Context, Conn) error {
					k := checks.Add(1) * (seed + 7)
					time.Sleep(time.Duration(k%5) * time.Second)
					if k%8 == 0 {
						return errBoom
					}
					return nil
				}})
			var out []*scripted
			for range 300 {
				switch r.IntN(6) {
				case 0, 1:
					if len(out) < 6 {
						b := n.borrow(bg, at(fmt.Sprint(r.IntN(2))))
						b.conn()
						out = append(out, b)
					}
				case 2:
					if len(out) > 0 {
						require.NoError(t, out[0].giveBack())
						out = out[1:]
					}
				case 3, 4:
					for _, c := range n.p.every() {
						if r.IntN(3) == 0 {
							go idleRef{c, c.generation()}.examine(true)
						}
					}
					synctest.Wait()
				case 5:
					n.p.EvictLRU()
					time.Sleep(time.Second)
				}
				n.check()
			}
			for _, b := range out {
				require.NoError(t, b.giveBack())
			}
			time.Sleep(time.Minute)
			n.check()
		})
	}
}

// TRY-52: a sweep, or Addrs, over all addresses lets others pass in between.
func TestNobodyWaitsForAllAddresses(t *testing.T) {
	p, err := New(Config{MaxOpen: -1, SweepInterval: -1, Dialers: map[Transport]DialFunc{memory: func(context.Context, Addr) (net.Conn, error) { return nil, errBoom }}})
	require.NoError(t, err)
	const k = 100 * atOnce
	for i := range k {
		require.ErrorIs(t, p.With(bg, at(fmt.Sprint(i)), func(Conn) error { return nil }), errBoom)
	}
	visited, passed := 0, make(chan int, 1)
	p.mu.Lock()
	go func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		passed <- visited
	}()
	eachLocked(p, p.sites.all(), new(agenda), func(s *site) {
		if visited++; visited%atOnce == 0 {
			<-time.After(50 * time.Microsecond)
		}
		if visited%2 == 0 { // what is forgotten meanwhile does not disturb
			s.backoff = nil
			p.dropIfEmptyLocked(s)
		}
	})
	require.Equal(t, k, visited)
	p.mu.Unlock()
	require.Less(t, <-passed, k)
	require.Equal(t, k/2, p.Stats().Addrs)
	n := 0
	for range p.Addrs() {
		n++
	}
	require.Equal(t, k/2, n)
	p.sweep()
	require.NoError(t, p.Close())
}
