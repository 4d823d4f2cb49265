package connpool

import (
	"context"
	"math"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// pass is a state that is good until a time.
type pass struct{ until time.Time }

func (k pass) Expires() time.Time { return k.until }

// lasting is a Setup whose states are good for d.
func lasting(d time.Duration) func(context.Context, Addr, net.Conn) (any, error) {
	return func(context.Context, Addr, net.Conn) (any, error) { return pass{time.Now().Add(d)}, nil }
}

// ADO-11
func TestAConnectionIsNotLentAfterItsStateHasExpired(t *testing.T) {
	const d = 100 * time.Second
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: -1, SweepInterval: -1, Setup: lasting(d)})
		require.Equal(t, "a#1", n.use(at("a")))
		time.Sleep(d*9/10 - time.Second)
		require.Equal(t, "a#1", n.use(at("a")), "a tenth is the most that is subtracted")
		time.Sleep(d/10 + time.Second)
		require.Equal(t, "a#2", n.use(at("a")))
		n.closed(reasons{ClosedExpired: 1})
	})
	bubble(t, func(t *testing.T) { // nobody comes
		n := open(t, Config{IdleTimeout: -1, Setup: lasting(d)})
		n.use(at("a"))
		time.Sleep(d + defaultSweepInterval)
		n.closed(reasons{ClosedExpired: 1})
	})
	bubble(t, func(t *testing.T) { // a loan is never cut
		n := open(t, Config{IdleTimeout: -1, Setup: lasting(d)})
		n.Host("a").Serve(echoLines)
		b := n.borrow(bg, at("a"))
		b.conn()
		time.Sleep(2 * d)
		_, err := askLine(b.conn(), "still mine")
		require.NoError(t, err)
		require.NoError(t, b.giveBack())
		n.closed(reasons{ClosedExpired: 1})
	})
	bubble(t, func(t *testing.T) { // a reserve expires, and is filled again
		n := open(t, Config{MinIdlePerAddr: 2, Setup: lasting(d)})
		n.use(at("a"))
		time.Sleep(3 * d)
		synctest.Wait()
		require.Equal(t, 2, n.p.Stats().Idle)
		require.GreaterOrEqual(t, n.p.Stats().Closed[ClosedExpired], uint64(4))
	})
}

// ADO-11: whichever comes first, MaxLifetime or Expires, and the reason says which.
func TestExpiresAndMaxLifetimeEachHaveTheirReason(t *testing.T) {
	for _, tc := range []struct {
		expires, lifetime time.Duration
		want              CloseReason
	}{
		{time.Minute, time.Hour, ClosedExpired},
		{time.Hour, time.Minute, ClosedLifetime},
		{math.MaxInt64, time.Minute, ClosedLifetime},
		{time.Minute, -1, ClosedExpired},
	} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{IdleTimeout: -1, MaxLifetime: tc.lifetime, Setup: lasting(tc.expires)})
			n.use(at("a"))
			time.Sleep(2 * time.Minute)
			n.closed(reasons{tc.want: 1})
		})
	}
	bubble(t, func(t *testing.T) { // the zero time is no end
		n := open(t, Config{IdleTimeout: -1, Setup: func(context.Context, Addr, net.Conn) (any, error) { return pass{}, nil }})
		n.use(at("a"))
		time.Sleep(time.Hour)
		n.gauges(0, 1, 0)
	})
}

// ADO-11: a state that has expired already would be dialled for again and again.
func TestAStateThatHasExpiredAlreadyFailsTheDial(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Setup: lasting(-time.Minute)})
		e := n.fail(bg, at("a"))
		require.Equal(t, StageSetup, e.Stage)
		require.Equal(t, KindInternal, e.Kind)
		require.ErrorContains(t, e, "Expires of the state is 1m0s ago: Config.Setup must make a state that lasts")
		n.closed(reasons{ClosedSetupFailed: 1})
		require.Equal(t, 1, n.Host("a").Accepts())
	})
}

// ADO-11: internal/suite/contract has the test of a thousand from outside.
func TestConnectionsExpireApart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: -1, Setup: lasting(time.Hour)})
		n.idle(at("a"), 20)
		ages := map[time.Duration]bool{}
		for _, c := range n.p.every() {
			require.LessOrEqual(t, c.maxAge, time.Hour)
			require.GreaterOrEqual(t, c.maxAge, 54*time.Minute-time.Second)
			ages[c.maxAge] = true
		}
		require.Len(t, ages, 20)
	})
}

// oddPass does something else in its Expires.
type oddPass struct{ do func() }

func (k oddPass) Expires() time.Time {
	k.do()
	return time.Time{}
}

// ADO-11
func TestWhatExpiresDoesFailsTheDialOnly(t *testing.T) {
	thaw := make(chan struct{})
	for name, tc := range map[string]struct {
		do   func()
		text string
	}{
		"panics":             {func() { panic("no time here") }, "Expires of the state panicked: no time here"},
		"ends its goroutine": {runtime.Goexit, "Expires of the state ended its goroutine (runtime.Goexit)"},
		"does not return":    {func() { <-thaw }, "Config.Setup: it ignores its ctx"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				thaw = make(chan struct{})
				defer close(thaw)
				var good atomic.Bool
				n := open(t, Config{MaxOpen: 1, Setup: func(context.Context, Addr, net.Conn) (any, error) {
					if good.Load() {
						return pass{}, nil
					}
					return oddPass{tc.do}, nil
				}})
				require.ErrorContains(t, n.fail(bg, at("a")), tc.text)
				good.Store(true)
				n.use(at("a"))
				n.check()
			})
		})
	}
}
