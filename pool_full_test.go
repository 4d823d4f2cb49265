package connpool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

func TestFailRefusesAtOnce(t *testing.T) {
	for limit, cfg := range map[string]Config{
		"MaxPerAddr": {WhenFull: FullFail, MaxPerAddr: 2}, "MaxOpen": {WhenFull: FullFail, MaxOpen: 2},
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, cfg)
			n.Host("a").SetLatency(time.Millisecond)
			held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
			synctest.Wait() // both connections are being dialed, and With waits for the dials
			start := time.Now()
			pe := n.fail(bg, at("a"))
			require.ErrorIs(t, pe, ErrExhausted)
			require.Equal(t, KindResource, pe.Kind)
			require.Equal(t, limit, pe.LimitName)
			require.Equal(t, 2, pe.Limit)
			require.Zero(t, time.Since(start))
			held[0].conn()
			held[1].conn()
			require.ErrorIs(t, n.fail(bg, at("a")), ErrExhausted)
			require.EqualValues(t, 2, n.p.Stats().Exhausted)
			n.gauges(2, 0, 0)
			n.check()
			require.NoError(t, held[0].giveBack())
			n.use(at("a"))
			if limit == "MaxOpen" {
				require.Equal(t, "b#1", n.use(at("b")), "an idle connection of another address makes room")
			}
			n.check()
		})
	}
}

// Under FullFail nobody waits in a queue for longer than a close or a dial takes: the
// borrowers ahead take the room that seems to be free.
func TestFailCountsThoseWhoAreAhead(t *testing.T) {
	bubble(t, func(t *testing.T) { // the only slot is being freed
		n := newTestnet(t)
		n.open(Config{WhenFull: FullFail, MaxPerAddr: 1, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			return &strange{Conn: c, close: func() error { time.Sleep(time.Second); return c.Close() }}
		})})
		n.p.With(bg, at("a"), discard)
		require.Equal(t, 1, n.p.Stats().Closing)
		first := n.borrow(bg, at("a"))
		synctest.Wait()
		second := n.borrow(bg, at("a"))
		synctest.Wait()
		require.True(t, first.waits(), "there is room for one in a second")
		require.True(t, second.ended(), "but not for two")
		require.ErrorIs(t, second.err, ErrExhausted)
		first.conn()
		n.check()
	})
	bubble(t, func(t *testing.T) { // MaxDialing is the limit that counts
		n := open(t, Config{WhenFull: FullFail, MaxPerAddr: 2, MaxDialing: 1})
		n.Host("a").SetLatency(time.Second)
		bs := make([]*scripted, 3)
		for i := range bs {
			bs[i] = n.borrow(bg, at("a"))
			synctest.Wait()
		}
		require.True(t, bs[0].waits())
		require.True(t, bs[1].waits())
		require.True(t, bs[2].ended())
		require.ErrorIs(t, bs[2].err, ErrExhausted)
	})
}

func TestOverflowOpensMoreAndClosesTheSurplusOnReturn(t *testing.T) {
	for name, cfg := range map[string]Config{
		"MaxPerAddr": {WhenFull: FullOverflow, MaxPerAddr: 2}, "MaxOpen": {WhenFull: FullOverflow, MaxOpen: 2},
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, cfg)
			var held []*scripted
			for range 5 {
				b := n.borrow(bg, at("a"))
				b.conn()
				held = append(held, b)
			}
			n.gauges(5, 0, 0)
			for _, b := range held {
				require.NoError(t, b.giveBack())
				synctest.Wait()
				n.check()
			}
			n.gauges(0, 2, 0)
			n.closed(reasons{ClosedSurplus: 3})
			require.Len(t, n.Host("a").Conns(), 2, name)
			n.use(at("a"))
			n.use(at("b"))
			n.check()
			synctest.Wait()
			if name == "MaxOpen" {
				require.Equal(t, 2, n.p.Stats().Open, "an idle connection makes room before the limit is exceeded")
			}
		})
	}
}

// A connection that is being closed does not count as surplus a second time.
func TestOverflowKeepsWhatTheLimitAllowsThoughClosesTakeTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{WhenFull: FullOverflow, MaxPerAddr: 2, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			return &strange{Conn: c, close: func() error { time.Sleep(time.Second); return c.Close() }}
		})})
		n.idle(at("a"), 5)
		time.Sleep(2 * time.Second)
		n.gauges(0, 2, 0)
		n.closed(reasons{ClosedSurplus: 3})
	})
}

// APR-05
func TestConnectionsFollowLoansNotGoroutines(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		var inside, peak atomic.Int64
		var all tasks.Group
		for range 1000 {
			all.Go(func() {
				for i := range 10 {
					time.Sleep(rand.N(100 * time.Millisecond))
					if i%5 != 0 {
						continue
					}
					n.p.With(bg, at("a"), func(Conn) error {
						for now := inside.Add(1); ; {
							if old := peak.Load(); now <= old || peak.CompareAndSwap(old, now) {
								break
							}
						}
						time.Sleep(time.Millisecond)
						inside.Add(-1)
						return nil
					})
				}
			})
		}
		all.Wait()
		st := n.p.Stats()
		require.LessOrEqual(t, st.PeakOpen, int(peak.Load())+5)
		require.Less(t, st.PeakOpen, 200)
		require.EqualValues(t, 2000, st.Loans)
		n.check()
	})
}

// APR-X12, PLT-12: dials have random delays and failures, loans random ends; the server
// counts the connections.
func TestStressTheLimitIsNeverExceeded(t *testing.T) {
	ops := short.Of(20_000, 5_000)
	if stress() > 1 {
		ops = 1_000_000
	}
	bubble(t, func(t *testing.T) {
		const perAddr, inAll, workers = 3, 8, 40
		hosts := []string{"a", "b", "c", "d", "e"}
		n := newTestnet(t)
		n.open(Config{MaxOpen: inAll, MaxPerAddr: perAddr, MaxDialing: 4, Dialers: map[Transport]DialFunc{
			memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
				time.Sleep(rand.N(3 * time.Millisecond))
				if rand.N(20) == 0 {
					return nil, errBoom
				}
				return n.dial(ctx, addr)
			}}})
		var left atomic.Int64
		left.Store(int64(ops))
		var all tasks.Group
		for range workers {
			all.Go(func() {
				for left.Add(-1) >= 0 {
					ctx, cancel := bg, context.CancelFunc(func() {})
					if rand.N(4) == 0 {
						ctx, cancel = context.WithTimeout(bg, rand.N(5*time.Millisecond))
					}
					n.p.With(ctx, at(hosts[rand.N(len(hosts))]), func(c Conn) error {
						if st := n.p.Stats(); st.Open > inAll {
							t.Errorf("%d open of %d", st.Open, inAll)
						}
						time.Sleep(rand.N(time.Millisecond))
						switch rand.N(8) {
						case 0:
							return errBoom
						case 1:
							c.Close()
						}
						return nil
					})
					cancel()
				}
			})
		}
		for left.Load() > 0 {
			time.Sleep(10 * time.Millisecond)
			n.check()
		}
		all.Wait()
		n.check()
		require.LessOrEqual(t, n.p.Stats().PeakOpen, inAll)
		require.LessOrEqual(t, n.peakDialing.Load(), int64(4))
		for _, host := range hosts {
			require.LessOrEqual(t, n.Host(host).Peak(), perAddr)
		}
	})
}

// ORA-70
func TestAJumpInLoadIsNoStormOfDials(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxDialing: 8, Setup: func(context.Context, Addr, net.Conn) (any, error) {
			now := n.dialing.Add(1) // the handshake counts as dialing too
			defer n.dialing.Add(-1)
			time.Sleep(20 * time.Millisecond)
			if now > 8 {
				t.Errorf("%d hand-shakes at a time", now)
			}
			return nil, nil
		}})
		n.Host("a").SetLatency(30 * time.Millisecond)
		n.Host("b").SetLatency(30 * time.Millisecond)
		var served atomic.Int64
		var all tasks.Group
		for i := range 500 {
			all.Go(func() {
				addr := at([]string{"a", "b"}[i%2])
				if n.p.With(bg, addr, func(Conn) error { time.Sleep(10 * time.Millisecond); return nil }) == nil {
					served.Add(1)
				}
			})
		}
		for range 20 {
			time.Sleep(5 * time.Millisecond)
			require.LessOrEqual(t, n.p.Stats().Dialing, 8)
			n.check()
		}
		all.Wait()
		require.EqualValues(t, 500, served.Load())
		require.Greater(t, n.peakDialing.Load(), int64(4), "they do run side by side")
	})
}

func TestMaxDialingPerAddrLeavesRoomForOthers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialing: 4}) // so 2 for each address
		n.Host("hole").BlackHole(true)
		for range 10 {
			n.borrow(bg, at("hole"))
		}
		synctest.Wait()
		require.Equal(t, 2, n.p.Stats().Dialing)
		require.Equal(t, "a#1", n.use(at("a")))
		n.check()
	})
}

// BETA-X11, APR-X11
func TestAnAddressThatSwallowsPacketsDelaysNobodyElse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 40, Setup: func(_ context.Context, a Addr, nc net.Conn) (any, error) {
			if a.Host == "slow" { // it greets after a minute
				nc.Read(make([]byte, 1))
			}
			return nil, nil
		}})
		n.use(at("a"))
		n.use(at("hole"))
		n.Host("hole").BlackHole(true)
		ctx, cancel := context.WithTimeout(bg, 5*time.Second)
		defer cancel()
		lent := n.borrow(bg, at("hole"))
		lent.conn()
		waiter := n.borrow(ctx, at("hole"))
		for range 10 {
			synctest.Wait()
			n.borrow(ctx, at("hole"))
			n.borrow(ctx, at("slow"))
		}
		synctest.Wait()
		start := time.Now()
		for range 100 {
			require.Equal(t, "a#1", n.use(at("a")))
			require.Equal(t, "b#1", n.use(at("b")))
		}
		require.NoError(t, lent.giveBack())
		require.Equal(t, "hole#1", who(waiter.conn()), "what is open goes from hand to hand")
		require.Zero(t, time.Since(start))
		n.check()
	})
}

// The loan of one connection never waits for the loan of another, whatever its borrower
// does; and neither do the pool's own checks.
func TestABlockedBorrowerBlocksNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		stuck := n.borrow(bg, at("a"))
		c := stuck.conn()
		stuck.end <- func(c Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		}
		synctest.Wait()
		require.Equal(t, "a#2", n.use(at("a")))
		n.gauges(1, 1, 0)
		for range n.p.Addrs() {
		}
		_, ok := n.p.EvictLRU()
		require.True(t, ok)
		n.check()
		n.peer(c).Close()
		require.Error(t, stuck.result())
	})
}

func TestOverflowAndFailAreOnlyAboutLimits(t *testing.T) {
	for _, policy := range []FullPolicy{FullWait, FullFail, FullOverflow} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{WhenFull: policy, MaxPerAddr: 5, MaxDialing: 1})
			n.Host("a").SetLatency(time.Second)
			start := time.Now()
			bs := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
			for _, b := range bs {
				b.conn()
			}
			require.Equal(t, 3*time.Second, time.Since(start), fmt.Sprint(policy, ": one dial after the other"))
			n.check()
		})
	}
	require.Equal(t, "wait fail overflow connpool.FullPolicy(3)", fmt.Sprint(FullWait, FullFail, FullOverflow, FullPolicy(3)))
	require.False(t, errors.Is(ErrExhausted, ErrNoneRemovable))
}
