package connpool

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// ADO-07: a client without a ctx, and with a time-out of 500 ms as gomemcache has it, waits
// no longer than that for a server that refuses, that does not answer, or that hangs up.
func TestNoCallWithoutCtxWaitsLongerThanWaitTimeout(t *testing.T) {
	const bound = 500 * time.Millisecond
	for name, fails := range map[string]func(*testnet){
		"refuses":         func(n *testnet) { n.Host("a").Down() },
		"refuses late":    func(n *testnet) { n.Host("a").Down(); n.Host("a").SetLatency(300 * time.Millisecond) },
		"does not answer": func(n *testnet) { n.Host("a").BlackHole(true) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{WaitTimeout: bound})
				fails(n)
				var longest time.Duration
				var mu sync.Mutex // guards longest
				var all sync.WaitGroup
				for range 8 {
					all.Add(1)
					go func() {
						defer all.Done()
						for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(70 * time.Millisecond) {
							start := time.Now()
							pe := n.fail(bg, at("a"))
							took := time.Since(start)
							require.Contains(t, []Kind{KindTimeout, KindRefused}, pe.Kind)
							mu.Lock()
							longest = max(longest, took)
							mu.Unlock()
						}
					}()
				}
				all.Wait()
				require.Equal(t, bound, longest, "the bound is reached, and kept")
				n.gauges(0, 0, 0)
				n.Host("a").BlackHole(false)
			})
		})
	}
}

// ADO-07
func TestTheErrorOfWaitTimeoutIsATimeoutAndSaysWhatWasWaitedFor(t *testing.T) {
	const bound = 2 * time.Second
	for name, c := range map[string]struct {
		cfg  Config
		make func(*testnet)
		says []string
	}{
		"full": {Config{MaxPerAddr: 1}, func(n *testnet) { n.borrow(bg, at("a")).conn() },
			[]string{"1 of 1", "the longest loan has lasted 2s"}},
		"back-off": {Config{MaxBackoff: time.Hour}, func(n *testnet) {
			n.Host("a").Down()
			for range 11 { // the pause after the last is 6.4 s at least
				time.Sleep(30 * time.Second)
				n.fail(bg, at("a"))
			}
		}, []string{"the next dial is not due after"}},
		"dial": {Config{}, func(n *testnet) { n.Host("a").BlackHole(true) },
			[]string{"a dial has been under way for 2s (dial)"}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				c.cfg.WaitTimeout = bound
				n := open(t, c.cfg)
				c.make(n)
				ctx, cancel := context.WithTimeout(bg, time.Hour)
				defer cancel()
				start := time.Now()
				pe := n.fail(ctx, at("a"))
				require.Equal(t, bound, time.Since(start))
				require.Equal(t, bound, pe.Waited)
				require.Equal(t, [...]any{StageWait, KindTimeout}, [...]any{pe.Stage, pe.Kind})
				require.ErrorIs(t, pe, context.DeadlineExceeded)
				var ne net.Error
				require.True(t, errors.As(error(pe), &ne) && ne.Timeout())
				text := pe.Error()
				require.Contains(t, text, "no connection within Config.WaitTimeout, 2s")
				require.False(t, strings.Contains(text, "\n"), text)
				for _, part := range c.says {
					require.Contains(t, text, part)
				}
				if name == "back-off" {
					require.ErrorIs(t, pe, syscall.ECONNREFUSED)
				}
				n.Host("a").BlackHole(false)
			})
		})
	}
}

// ADO-07: whichever of ctx and WaitTimeout ends first ends the wait. What came in time is
// lent, and what comes later serves the next.
func TestWaitTimeoutEndsAWaitAndNothingElse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, WaitTimeout: time.Second})
		n.Host("a").SetLatency(1500 * time.Millisecond)
		require.ErrorContains(t, n.fail(bg, at("a")), "Config.WaitTimeout")
		n.gauges(0, 0, 0)
		time.Sleep(500 * time.Millisecond)
		n.gauges(0, 1, 0) // its dial went on

		holder := n.borrow(bg, at("a"))
		holder.conn()
		inTime := n.queue(1, at("a"))[0]
		time.Sleep(time.Second - 1)
		require.NoError(t, holder.giveBack())
		time.Sleep(time.Hour) // a loan has no bound
		require.True(t, inTime.holds())

		ctx, cancel := context.WithTimeout(bg, time.Second/2)
		defer cancel()
		start := time.Now()
		pe := n.fail(ctx, at("a"))
		require.Equal(t, time.Second/2, time.Since(start))
		require.NotContains(t, pe.Error(), "WaitTimeout")
		start = time.Now()
		_, err := n.p.Lease(bg, at("a"))
		require.ErrorContains(t, err, "Config.WaitTimeout")
		require.Equal(t, time.Second, time.Since(start))
		require.EqualValues(t, 3, n.p.Stats().WaitsFailed)
		require.NoError(t, inTime.giveBack())
	})
}

// A borrower that queues again, because its connection was found dead, has waited already.
func TestWaitTimeoutCountsFromTheFirstWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, WaitTimeout: time.Second})
		n.Host("a").Serve(echoLines)
		holder := n.borrow(bg, at("a"))
		c := holder.conn()
		start := time.Now()
		waiter := n.queue(1, at("a"))[0]
		time.Sleep(900 * time.Millisecond)
		n.Host("a").BlackHole(true) // for the dial that replaces the connection
		server := n.peer(c)
		require.NoError(t, holder.finish(func(Conn) error { server.Close(); return nil }))
		require.ErrorContains(t, waiter.result(), "Config.WaitTimeout")
		require.Equal(t, time.Second, time.Since(start))
		n.Host("a").BlackHole(false)
	})
}

// ADO-07
func TestMaxBackoffIsTheLongestPause(t *testing.T) {
	for _, most := range []time.Duration{10 * time.Millisecond, 3 * time.Second} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxBackoff: most})
			n.Host("a").Down()
			var longest time.Duration
			for range 40 {
				start := time.Now()
				n.fail(bg, at("a"))
				longest = max(longest, time.Since(start))
			}
			require.LessOrEqual(t, longest, most)
			require.GreaterOrEqual(t, longest, most/2)
		})
	}
}

// ADO-07: without back-off each borrower has a dial of its own, at once.
func TestANegativeMaxBackoffSwitchesBackOffOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxBackoff: -1})
		n.Host("a").Down()
		start := time.Now()
		for i := range 4 * backoffAfter {
			pe := n.fail(bg, at("a"))
			require.Equal(t, StageDial, pe.Stage, "call %d", i)
			require.ErrorIs(t, pe, syscall.ECONNREFUSED)
		}
		require.Zero(t, time.Since(start))
		st := n.p.Stats()
		require.EqualValues(t, 4*backoffAfter, st.Dials)
		for _, s := range n.p.Addrs() {
			require.False(t, s.BackingOff)
			require.ErrorIs(t, s.LastErr, syscall.ECONNREFUSED)
		}
	})
}

// ADO-07: who waits for a slot, or for a connection to come back, is told from who waits
// for a dial.
func TestStatsTellWaitingForASlotFromWaitingForADial(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").SetLatency(time.Second)
		first := n.borrow(bg, at("a"))
		first.conn()
		st := n.p.Stats()
		require.Equal(t, [...]any{uint64(1), uint64(0)}, [...]any{st.Waits, st.SlotWaits})
		require.Equal(t, [...]time.Duration{time.Second, 0}, [...]time.Duration{st.WaitDuration, st.SlotWaitDuration})

		second := n.queue(1, at("a"))[0]
		time.Sleep(3 * time.Second)
		require.NoError(t, first.giveBack())
		second.conn()
		synctest.Wait()
		st = n.p.Stats()
		require.Equal(t, [...]any{uint64(2), uint64(1)}, [...]any{st.Waits, st.SlotWaits})
		require.Equal(t, [...]time.Duration{4 * time.Second, 3 * time.Second}, [...]time.Duration{st.WaitDuration, st.SlotWaitDuration})
		require.NoError(t, second.giveBack())
	})
}
