package connpool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// TDBC-09
func TestAnIdleConnectionIsClosedAfterTwoMinutes(t *testing.T) {
	for _, tc := range []struct {
		cfg         Config
		after, late time.Duration
	}{
		{Config{}, 2 * time.Minute, 20 * time.Second},
		{Config{IdleTimeout: 10 * time.Second, SweepInterval: time.Second}, 10 * time.Second, time.Second},
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, tc.cfg)
			time.Sleep(time.Second / 2)
			n.use(at("a"))
			time.Sleep(tc.after - 1)
			synctest.Wait()
			require.Len(t, n.Host("a").Conns(), 1)
			time.Sleep(1 + tc.late)
			synctest.Wait()
			require.Empty(t, n.Host("a").Conns())
			n.gauges(0, 0, 0)
			n.closed(reasons{ClosedIdleTimeout: 1})
			n.check()
		})
	}
}

// APR-X04
func TestAnExpiredConnectionIsNotLentThoughNoSweepSawIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: time.Minute, SweepInterval: -1})
		n.idle(at("a"), 5)
		time.Sleep(time.Minute - 1)
		require.NotEqual(t, "a#6", n.use(at("a")))
		time.Sleep(time.Minute)
		synctest.Wait()
		n.gauges(0, 5, 0)
		require.Equal(t, "a#6", n.use(at("a")))
		synctest.Wait()
		n.gauges(0, 1, 0)
		n.closed(reasons{ClosedIdleTimeout: 5})
		n.check()
	})
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: -1})
		n.use(at("a"))
		time.Sleep(100*time.Hour + time.Second) // not at the moment of a sweep, which may have it
		require.Equal(t, "a#1", n.use(at("a")))
	})
}

// TDBC-08
func TestWhatASpikeLeftOverExpiresDespiteTraffic(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 20)
		n.gauges(0, 20, 0)
		// Between the sweeps, never in the moment of one: a sweep takes a
		// connection without a descriptor while it looks at it, and a use in
		// that moment dials one more.
		time.Sleep(50 * time.Millisecond)
		for range 10 * 60 * 3 {
			time.Sleep(100 * time.Millisecond)
			n.use(at("a"))
		}
		n.gauges(0, 1, 0)
		n.check()
	})
}

// TDBC-10
func TestThePoolFollowsTheLoadUpAndDown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialing: -1})
		for range 2 {
			before := n.p.Stats().Dials
			n.idle(at("a"), 50)
			n.gauges(0, 50, 0)
			require.EqualValues(t, 50, n.p.Stats().Dials-before)
			time.Sleep(3 * time.Minute)
			synctest.Wait()
			n.gauges(0, 0, 0)
			require.Zero(t, n.p.Stats().Addrs)
			require.Nil(t, n.p.sweeper, "with nothing to sweep no timer runs")
			n.check()
		}
	})
}

// TDBC-14
func TestTheSweepRemovesTheDeadWithoutABorrower(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 5)
		conns := n.Host("a").Conns()
		conns[0].Close()
		conns[1].Reset()
		conns[2].CloseWrite()
		conns[3].Write([]byte("unasked"))
		n.gauges(0, 5, 0)
		time.Sleep(defaultSweepInterval)
		synctest.Wait()
		n.gauges(0, 1, 0)
		n.closed(reasons{ClosedStale: 4})
		n.check()
		require.Equal(t, "a#5", n.use(at("a")))
		conns[4].Reset()
		time.Sleep(defaultSweepInterval)
		synctest.Wait()
		n.gauges(0, 0, 0)
	})
}

// TDBC-X05
func TestASweepNeverMakesThePoolLookEmpty(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var running, peak, checks atomic.Int64
		n := open(t, Config{CheckAfterIdle: time.Hour, Check: func(context.Context, Conn) error {
			checks.Add(1)
			if now := running.Add(1); now > peak.Load() {
				peak.Store(now)
			}
			time.Sleep(time.Second)
			running.Add(-1)
			return nil
		}})
		for _, host := range []string{"a", "b", "c"} {
			n.idle(at(host), 3)
		}
		time.Sleep(defaultSweepInterval + time.Second/2)
		require.EqualValues(t, 3, running.Load(), "one per address")
		n.gauges(3, 6, 0)
		for range 10 {
			for _, host := range []string{"a", "b", "c"} {
				n.use(at(host))
			}
		}
		require.EqualValues(t, 9, n.p.Stats().Dials, "they were served by what is idle")
		n.check()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		n.gauges(0, 9, 0)
		require.EqualValues(t, 3, peak.Load())
		n.check()
	})
}

// What a sweep looked at keeps its place: the order of the idle stack and of
// eviction is that of loans.
func TestASweepChangesNoOrder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{SweepInterval: time.Second, Check: func(context.Context, Conn) error { time.Sleep(100 * time.Millisecond); return nil }})
		var held []*scripted
		for range 4 {
			b := n.borrow(bg, at("a"))
			b.conn()
			held = append(held, b)
		}
		for _, i := range []int{2, 0, 3, 1} {
			require.NoError(t, held[i].giveBack())
			time.Sleep(time.Millisecond)
		}
		time.Sleep(2700 * time.Millisecond) // two sweeps, from 1.0 to 1.4 and from 2.0 to 2.4 s
		n.check()
		b := n.borrow(bg, at("a"))
		require.Equal(t, held[1].name, who(b.conn()), "the last one given back")
		require.NoError(t, b.giveBack())
		for _, i := range []int{2, 0, 3, 1} {
			gone := len(n.Host("a").Conns())
			_, ok := n.p.EvictLRU()
			require.True(t, ok)
			require.Len(t, n.Host("a").Conns(), gone-1)
			for _, c := range n.Host("a").Conns() {
				require.NotEqual(t, held[i].name, c.RemoteAddr().String())
			}
			n.check()
		}
	})
}

// APR-X14
func TestIdleConnectionsExpireOneByOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: 10 * time.Second, SweepInterval: time.Second})
		var held []*scripted
		for range 5 {
			b := n.borrow(bg, at("a"))
			b.conn()
			held = append(held, b)
		}
		time.Sleep(time.Second / 2)
		for _, b := range held {
			require.NoError(t, b.giveBack())
			time.Sleep(2 * time.Second)
		}
		for left := 5; left > 0; left-- { // the first was given back 10 s ago
			time.Sleep(time.Second)
			synctest.Wait()
			require.Len(t, n.Host("a").Conns(), left-1)
			for i, b := range held {
				for _, c := range n.Host("a").Conns() {
					require.False(t, i <= 5-left && c.RemoteAddr().String() == b.name, "the youngest went first")
				}
			}
			time.Sleep(time.Second)
		}
		n.check()
	})
}

// APR-X14: those that a sweep finds expired all at once go oldest first, too.
func TestASweepBeginsWithTheOldest(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer srv.Close()
	var order []uint64
	p, err := New(Config{IdleTimeout: time.Minute, Trace: &Trace{Closed: func(i CloseInfo) {
		order = append(order, i.ID)
	}}})
	require.NoError(t, err)
	defer p.Close()
	var offset atomic.Int64
	p.clock.Read = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	addrs := []Addr{
		{Transport: TCP, Host: srv.Host(), Port: srv.Port(), Scope: "1"},
		{Transport: TCP, Host: srv.Host(), Port: srv.Port(), Scope: "2"},
		{Transport: TCP, Host: srv.Host(), Port: srv.Port(), Scope: "3"},
	}
	var nest func(depth int) error
	nest = func(depth int) error { // given back innermost first, so that the last dialed is the oldest idle one
		if depth == 6 {
			return nil
		}
		return p.With(bg, addrs[depth%3], func(Conn) error {
			defer func() { offset.Add(int64(time.Millisecond)) }()
			return nest(depth + 1)
		})
	}
	require.NoError(t, nest(0))
	offset.Add(int64(time.Hour))
	sweepAll(p)
	p.check(t)
	require.Equal(t, []uint64{6, 5, 4, 3, 2, 1}, order)
}

func TestLifetimeJitterIsDrawnOncePerConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxLifetime: time.Hour, IdleTimeout: -1, MaxDialing: -1})
		const k = 200
		n.idle(at("a"), k)
		lives := make(map[uint64]time.Duration)
		whole := 0
		spread := make(map[time.Duration]bool)
		for _, c := range n.p.every() {
			lives[c.id] = c.maxAge
			require.LessOrEqual(t, c.maxAge, time.Hour)
			require.GreaterOrEqual(t, c.maxAge, 54*time.Minute)
			spread[c.maxAge] = true
			if c.maxAge%time.Second == 0 {
				whole++
			}
		}
		require.Len(t, lives, k)
		require.Greater(t, len(spread), k-5, "what was opened together does not expire together")
		require.LessOrEqual(t, whole, 2, "drawn in nanoseconds, not in seconds")
		for range 20 {
			n.idle(at("a"), k/2)
			time.Sleep(time.Minute)
		}
		for _, c := range n.p.every() {
			require.Equal(t, lives[c.id], c.maxAge)
		}
		require.EqualValues(t, k, n.p.Stats().Dials)
		time.Sleep(33 * time.Minute) // 53: none is due
		synctest.Wait()
		n.gauges(0, k, 0)
		time.Sleep(4 * time.Minute) // 57: about half
		idle := n.p.Stats().Idle
		require.Greater(t, idle, k/4)
		require.Less(t, idle, k*3/4)
		time.Sleep(4 * time.Minute) // 61: all
		synctest.Wait()
		n.gauges(0, 0, 0)
		n.closed(reasons{ClosedLifetime: k})
		n.check()
	})
}

// A laptop that was closed for an hour: the monotonic clock stood still.
func TestAJumpOfTheWallClockAloneAgesConnections(t *testing.T) {
	n := open(t, Config{IdleTimeout: time.Minute})
	var jump atomic.Int64
	n.p.clock.Read = func() time.Time { return onTheWall(time.Now(), time.Duration(jump.Load())) }
	now := time.Now()
	slept := onTheWall(now, time.Hour)
	require.Zero(t, slept.Sub(now), "the monotonic clock stands still")
	require.Equal(t, time.Hour, slept.Round(0).Sub(now.Round(0)))

	require.Equal(t, "a#1", n.use(at("a")))
	jump.Store(int64(50 * time.Second))
	n.p.clock.Exactly()
	require.Equal(t, "a#1", n.use(at("a")))
	jump.Add(int64(time.Hour))
	n.p.clock.Exactly()
	require.Equal(t, "a#2", n.use(at("a")))
	jump.Add(int64(time.Hour))
	sweepAll(n.p)
	n.gauges(0, 0, 0)
	require.Equal(t, "a#3", n.use(at("a")))
	jump.Add(-int64(24 * time.Hour)) // set back, it makes nothing older and nothing immortal
	n.p.clock.Exactly()
	require.Equal(t, "a#3", n.use(at("a")))
	n.check()
}

// onTheWall is t with d added to its wall clock and not to its monotonic clock,
// for which package time has no function. (The wall clock's seconds begin at
// bit 30 of the first word, as long as there is a monotonic reading.)
func onTheWall(t time.Time, d time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t))
	*wall += uint64(int64(d/time.Second) << 30)
	return t
}

// PLT-03
func TestTenThousandAddressesVisitedOnceLeaveNothing(t *testing.T) {
	visits := short.Of(10_000, 2_000)
	if raceEnabled {
		visits = 1000 // a goroutine costs the race detector much memory, and these close all at once
	}
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: -1, Dialers: map[Transport]DialFunc{memory: func(_ context.Context, addr Addr) (net.Conn, error) {
			return n.Mem.Dial(bg, addr.Host[len(addr.Host)-2:]) // to few hosts, whose own books stay small
		}}})
		// The runtime never gives goroutines back, and as many run when all the
		// connections are closed at once.
		gate := make(chan struct{})
		for range visits {
			go func() { <-gate }()
		}
		synctest.Wait()
		close(gate)
		synctest.Wait()
		goroutines := inBubbles()
		start := heap()
		for round := range 2 {
			for i := range visits {
				require.NoError(t, n.p.With(bg, at(fmt.Sprintf("%d-%05d", round, i)), func(Conn) error { return nil }))
			}
			st := n.p.Stats()
			require.Equal(t, visits, st.Addrs)
			require.Equal(t, visits, st.Idle)
			time.Sleep(3 * time.Minute)
			synctest.Wait()
			n.gauges(0, 0, 0)
			require.Zero(t, n.p.Stats().Addrs)
			require.Zero(t, n.p.recency.len)
			require.Equal(t, goroutines, inBubbles())
			for i := range 100 {
				require.Empty(t, n.Host(fmt.Sprintf("%02d", i)).Conns())
			}
			n.check()
			// Six rounds end at 1.07 MB, of the network and the runtime; a site alone has 224 bytes.
			require.Less(t, heap()-start, int64(3<<19), "bytes kept, round %d", round)
		}
	})
}

// inBubbles counts the goroutines of bubbles. (runtime.NumGoroutine counts that
// of the finalizers, too, whenever it happens to run.)
func inBubbles() int {
	b := make([]byte, 1<<20)
	return strings.Count(string(b[:runtime.Stack(b, true)]), "synctest bubble")
}

// A sweep under way when the pool closes ends with it and keeps nothing.
func TestCloseWaitsForASweep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{SweepInterval: time.Second, Check: func(ctx context.Context, c Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		}})
		n.idle(at("a"), 3)
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		n.gauges(1, 2, 0)
		start := time.Now()
		require.NoError(t, n.p.Close())
		require.Zero(t, time.Since(start), "its hook is interrupted")
		require.Empty(t, n.Host("a").Conns())
		n.check()
	})
}

// Loans, sweeps and expiry at the same moments.
func TestStressSweepsUnderTraffic(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{
			MaxPerAddr: 4, IdleTimeout: 20 * time.Millisecond, SweepInterval: time.Millisecond, CheckAfterIdle: 3 * time.Millisecond,
			Check: func(context.Context, Conn) error {
				time.Sleep(rand.N(time.Millisecond))
				if rand.N(20) == 0 {
					return errHook
				}
				return nil
			},
		})
		var all tasks.Group
		for range 8 {
			all.Go(func() {
				for range 300 {
					err := n.p.With(bg, at([]string{"a", "b", "c"}[rand.N(3)]), func(c Conn) error {
						time.Sleep(rand.N(time.Millisecond))
						if rand.N(10) == 0 {
							n.peer(c).Reset()
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
					time.Sleep(rand.N(4 * time.Millisecond))
				}
			})
		}
		for range 100 {
			time.Sleep(5 * time.Millisecond)
			n.check()
		}
		all.Wait()
		st := n.p.Stats()
		require.NotZero(t, st.Closed[ClosedStale])
		require.NotZero(t, st.Closed[ClosedCheckFailed])
		require.EqualValues(t, 2400, st.Loans)
		n.check()
	})
}
