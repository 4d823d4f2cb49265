package connpool

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// change is SetLimits of what is in force, changed.
func (n *testnet) change(f func(*Limits)) {
	n.t.Helper()
	l := n.p.Limits()
	f(&l)
	require.NoError(n.t, n.p.SetLimits(l))
	n.p.check(n.t)
	synctest.Wait()
	n.p.check(n.t)
}

// ORA-16
func TestALoweredLimitClosesIdleConnectionsAtOnceAndNoLoan(t *testing.T) {
	for name, lower := range map[string]func(*Limits){
		"MaxOpen":        func(l *Limits) { l.MaxOpen = 3 },
		"MaxPerAddr":     func(l *Limits) { l.MaxPerAddr = 3 },
		"MaxIdle":        func(l *Limits) { l.MaxIdle = 1 },
		"MaxIdlePerAddr": func(l *Limits) { l.MaxIdlePerAddr = 1 },
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{})
			n.Host("a").Serve(echoLines)
			n.idle(at("a"), 8)
			time.Sleep(time.Second)
			held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
			held[0].conn()
			held[1].conn()
			n.change(lower)
			n.gauges(2, 1, 0)
			n.closed(reasons{ClosedSurplus: 5})
			require.Len(t, n.Host("a").Conns(), 3, name)
			for _, b := range held {
				_, err := askLine(b.conn(), "still mine")
				require.NoError(t, err)
				require.NoError(t, b.giveBack())
			}
			n.check()
			idle := map[string]int{"MaxOpen": 3, "MaxPerAddr": 3, "MaxIdle": 1, "MaxIdlePerAddr": 1}[name]
			n.gauges(0, idle, 0)
		})
	}
}

// ORA-16
func TestLoansBeyondALoweredLimitCloseWhenGivenBack(t *testing.T) {
	for name, lower := range map[string]func(*Limits){
		"MaxOpen":    func(l *Limits) { l.MaxOpen = 2 },
		"MaxPerAddr": func(l *Limits) { l.MaxPerAddr = 2 },
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxOpen: 6})
			var held []*scripted
			for range 5 {
				b := n.borrow(bg, at("a"))
				b.conn()
				held = append(held, b)
			}
			waiter := n.borrow(bg, at("a"))
			waiter.conn()
			held = append(held, waiter)
			n.change(lower)
			n.gauges(6, 0, 0)
			late := n.borrow(bg, at("a"))
			synctest.Wait()
			require.True(t, late.waits())
			for i, b := range held[:4] {
				require.NoError(t, b.giveBack())
				synctest.Wait()
				require.Equal(t, 5-i, n.p.Stats().Open, name)
				require.True(t, late.waits(), "nothing is opened, or handed on, beyond the limit")
				n.check()
			}
			require.NoError(t, held[4].giveBack())
			late.conn()
			n.closed(reasons{ClosedSurplus: 4})
			require.EqualValues(t, 6, n.p.Stats().Dials)
			require.NoError(t, held[5].giveBack())
			require.NoError(t, late.giveBack())
			n.gauges(0, 2, 0)
			n.check()
		})
	}
}

// ORA-16
func TestARaisedLimitWakesTheOldestWaiters(t *testing.T) {
	for name, raise := range map[string]func(l *Limits, by int){
		"MaxOpen":    func(l *Limits, by int) { l.MaxOpen += by },
		"MaxPerAddr": func(l *Limits, by int) { l.MaxPerAddr += by },
	} {
		bubble(t, func(t *testing.T) {
			cfg := Config{MaxOpen: 1}
			if name == "MaxPerAddr" {
				cfg = Config{MaxPerAddr: 1}
			}
			n := open(t, cfg)
			holder := n.borrow(bg, at("a"))
			holder.conn()
			waiters := n.queue(6, at("a"))
			n.change(func(l *Limits) { raise(l, 2) })
			synctest.Wait()
			for i, w := range waiters {
				require.Equal(t, i < 2, w.holds(), "%s, waiter %d", name, i)
			}
			n.check()
			n.change(func(l *Limits) { *l = Limits{MaxOpen: -1} })
			for _, w := range waiters {
				w.conn()
			}
			n.check()
			for _, w := range append(waiters, holder) {
				require.NoError(t, w.giveBack())
			}
		})
	}
	bubble(t, func(t *testing.T) { // over all addresses, and dials under way
		n := open(t, Config{MaxDialing: 1, MaxOpen: 20})
		for i := range 6 {
			n.Host(fmt.Sprint("h", i)).SetLatency(time.Second)
		}
		var waiters []*scripted
		for i := range 6 {
			waiters = append(waiters, n.queue(1, at(fmt.Sprint("h", i)))...)
		}
		n.change(func(l *Limits) { l.MaxDialing = 3 })
		require.Equal(t, 3, n.p.Stats().Dialing)
		time.Sleep(time.Second)
		synctest.Wait()
		for i, w := range waiters {
			require.Equal(t, i < 3, w.holds(), "waiter %d", i)
		}
		for _, w := range waiters {
			w.conn()
			require.NoError(t, w.giveBack())
		}
	})
}

func TestFewerDialsMayStartWhenTheirLimitIsLowered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialing: 4, MaxDialingPerAddr: 4})
		n.Host("a").SetLatency(time.Second)
		waiters := n.queue(8, at("a"))
		require.Equal(t, 4, n.p.Stats().Dialing)
		n.change(func(l *Limits) { l.MaxDialing, l.MaxDialingPerAddr = 1, 1 })
		require.Equal(t, 4, n.p.Stats().Dialing, "what is under way goes on")
		time.Sleep(time.Second)
		synctest.Wait()
		require.Equal(t, 1, n.p.Stats().Dialing)
		n.check()
		for _, w := range waiters {
			w.conn()
		}
		for _, w := range waiters {
			require.NoError(t, w.giveBack())
		}
	})
}

// Whoever waits keeps the place, and newcomers meet the new limit.
func TestALoweredMaxWaitersSendsNobodyAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiters := n.queue(3, at("a"))
		n.change(func(l *Limits) { l.MaxWaiters = 1 })
		n.gauges(1, 0, 3)
		pe := n.fail(bg, at("a"))
		require.ErrorIs(t, pe, ErrExhausted)
		require.Equal(t, [2]any{1, "MaxWaiters"}, [2]any{pe.Limit, pe.LimitName})
		require.NoError(t, holder.giveBack())
		for _, w := range waiters {
			w.conn()
			require.NoError(t, w.giveBack())
		}
	})
}

// The victims are the least recently used of all addresses.
func TestTheSurplusOfALoweredLimitIsWhatWasUsedLeastRecently(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for _, host := range []string{"a", "b", "c"} {
			n.idle(at(host), 2)
			time.Sleep(time.Second)
		}
		n.use(at("a"))
		n.change(func(l *Limits) { l.MaxIdle = 3 })
		require.Len(t, n.Host("a").Conns(), 1)
		require.Empty(t, n.Host("b").Conns())
		require.Len(t, n.Host("c").Conns(), 2)
		n.change(func(l *Limits) { l.MaxIdle, l.MaxIdlePerAddr = -1, -1 })
		n.gauges(0, 0, 0)
		require.Zero(t, n.p.Stats().Addrs)
	})
}

// ORA-16
func TestTheReserveFollowsItsLimit(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.use(at("a"))
		n.change(func(l *Limits) { l.MinIdlePerAddr = 3 })
		synctest.Wait()
		n.gauges(0, 1, 0)
		n.use(at("a")) // an address has its reserve with its next loan
		synctest.Wait()
		require.GreaterOrEqual(t, n.p.Stats().Idle, 3)
		n.check()
		n.change(func(l *Limits) { l.MinIdlePerAddr = 5 })
		synctest.Wait()
		require.GreaterOrEqual(t, n.p.Stats().Idle, 5)
		n.change(func(l *Limits) { l.MinIdlePerAddr = 1 })
		time.Sleep(3 * defaultIdleTimeout)
		synctest.Wait() // for the sweep of that moment
		n.gauges(0, 1, 0)
		n.change(func(l *Limits) { l.MinIdlePerAddr = 0 })
		time.Sleep(3 * defaultIdleTimeout)
		synctest.Wait()
		n.gauges(0, 0, 0)
		require.Zero(t, n.p.Stats().Addrs)
	})
}

// ORA-16
func TestLimitsAreCheckedAsConfigIs(t *testing.T) {
	p, err := New(Config{MaxOpen: 8, MinIdlePerAddr: 2})
	require.NoError(t, err)
	before := p.Limits()
	require.Equal(t, Limits{MaxOpen: 8, MinIdlePerAddr: 2}, before)
	for _, tc := range []struct {
		l    Limits
		a, b string
	}{
		{Limits{MaxOpen: 4, MaxPerAddr: 5}, "MaxPerAddr", "MaxOpen"},
		{Limits{MaxIdle: -1, MaxIdlePerAddr: 1}, "MaxIdle", "MaxIdlePerAddr"},
		{Limits{MinIdlePerAddr: 1, MaxIdle: -1}, "MinIdlePerAddr", "MaxIdle"},
		{Limits{MinIdlePerAddr: 1, MaxIdlePerAddr: -1}, "MinIdlePerAddr", "MaxIdlePerAddr"},
		{Limits{MinIdlePerAddr: 2, MaxIdle: 1}, "MinIdlePerAddr", "MaxIdle"},
		{Limits{MinIdlePerAddr: 2, MaxIdlePerAddr: 1}, "MinIdlePerAddr", "MaxIdlePerAddr"},
		{Limits{MinIdlePerAddr: 2, MaxPerAddr: 2}, "MinIdlePerAddr", "MaxPerAddr"},
		{Limits{MinIdlePerAddr: 2, MaxOpen: 2}, "MinIdlePerAddr", "MaxOpen"},
	} {
		err := p.SetLimits(tc.l)
		require.Equal(t, KindUsage, KindOf(err))
		require.ErrorContains(t, err, "Limits."+tc.a)
		require.ErrorContains(t, err, "Limits."+tc.b)
		require.Equal(t, before, p.Limits())
		cfg := Config{}
		cfg.setLimits(tc.l)
		_, err = New(cfg)
		require.ErrorContains(t, err, "Config."+tc.a)
		require.ErrorContains(t, err, "Config."+tc.b)
	}
	require.NoError(t, p.SetLimits(p.Limits()))
	require.NoError(t, p.SetLimits(Limits{MinIdlePerAddr: 2, MaxPerAddr: 3, MaxIdlePerAddr: 2, MaxOpen: 3}))
	require.NoError(t, p.SetLimits(Limits{}))
	require.Equal(t, math.MaxInt, p.limits.MaxIdle, "0 means here what it means there")
	require.NoError(t, p.SetLimits(Limits{MaxIdle: -1, MaxIdlePerAddr: -1, MaxOpen: -1}))
	require.Equal(t, 0, p.limits.MaxIdle)
	require.Equal(t, 0, p.Stats().Limit)
	require.NoError(t, p.Close())
	require.ErrorIs(t, p.SetLimits(Limits{}), ErrClosed)
	require.ErrorIs(t, new(Pool).SetLimits(Limits{}), ErrClosed)
	require.Zero(t, new(Pool).Limits())

	q, err := New(Config{WhenFull: FullOverflow, MaxOpen: 3})
	require.NoError(t, err)
	defer q.Close()
	err = q.SetLimits(Limits{})
	require.ErrorContains(t, err, "Config.WhenFull", "which cannot be changed")
}

// A limit that Config gets and Limits does not know could not be changed.
func TestLimitsHasEachLimitOfConfig(t *testing.T) {
	var l Limits
	fields := reflect.ValueOf(&l).Elem()
	for i := range fields.NumField() {
		fields.Field(i).SetInt(int64(100 + i))
	}
	var cfg Config
	cfg.setLimits(l)
	require.Equal(t, l, cfg.limits())
	c := reflect.ValueOf(cfg)
	for i := range c.NumField() {
		name := c.Type().Field(i).Name
		if c.Field(i).Kind() == reflect.Int && name != "MaxUses" {
			require.True(t, fields.FieldByName(name).IsValid(), name)
			require.Equal(t, fields.FieldByName(name).Int(), c.Field(i).Int(), name)
		}
	}
}

// With MaxOpen 0 the limit is that of the handles at the time.
func TestMaxOpenMayBeLeftToTheHandles(t *testing.T) {
	p, err := New(Config{MaxOpen: 3})
	require.NoError(t, err)
	defer p.Close()
	sys := realSystem
	sys.handleLimit = func() (int, bool) { return 100, true }
	p.sys = &sys
	require.Equal(t, 3, p.Stats().Limit)
	require.NoError(t, p.SetLimits(Limits{}))
	require.Equal(t, 100-reserveOf(100), p.Stats().Limit)
}

// ORA-16: limits move while everything else does.
func TestStressLimitsMoveUnderTraffic(t *testing.T) {
	s, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer s.Close()
	p, err := New(Config{MaxOpen: 4})
	require.NoError(t, err)
	addr := Addr{Transport: TCP, Host: s.Host(), Port: s.Port()}
	stop := make(chan struct{})
	var movers, workers tasks.Group
	for w := range 2 {
		movers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for {
				select {
				case <-stop:
					return
				default:
				}
				l := Limits{MaxOpen: 2 + rng.IntN(8), MaxDialing: 1 + rng.IntN(4), MaxIdle: rng.IntN(3) - 1, MaxPerAddr: rng.IntN(3)}
				l.MinIdlePerAddr = rng.IntN(2)
				p.SetLimits(l) // or not, if it makes no sense
				p.Limits()
			}
		})
	}
	for w := range 8 {
		workers.Go(func() {
			for i := range short.Of(200, 20) * stress() {
				ctx, cancel := context.WithTimeout(bg, bounded)
				err := p.With(ctx, scoped(addr, (w+i)%3), func(c Conn) error {
					_, err := ask(c, newToken())
					return err
				})
				if cancel(); err != nil {
					t.Error(err)
					return
				}
				if err := p.inconsistency(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	close(stop)
	movers.Wait()
	require.NoError(t, p.Close())
	p.check(t)
	require.Zero(t, p.Stats().Open)
}

func TestALoweredLimitOfAnAddressClosesTheLeastRecentlyUsed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 8})
		var out []*scripted
		for range 5 {
			b := n.borrow(bg, at("a"))
			b.conn()
			out = append(out, b)
		}
		for _, i := range []int{3, 0, 4, 1, 2} { // in the order in which they come back
			time.Sleep(time.Second)
			require.NoError(t, out[i].giveBack())
		}
		l := n.p.Limits()
		l.MaxIdlePerAddr = 2
		require.NoError(t, n.p.SetLimits(l))
		n.closed(reasons{ClosedSurplus: 3})
		n.check()
		require.Equal(t, out[2].name, n.use(at("a")))
		b := n.borrow(bg, at("a"))
		b.conn()
		require.Equal(t, out[1].name, n.use(at("a")))
		require.NoError(t, b.giveBack())
	})
}
