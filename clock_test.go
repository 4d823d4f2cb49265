package connpool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func newClock() *clock { return &clock{read: time.Now} }

func (k *clock) ticks() bool { return k.latest.Load() != 0 }

func TestTheCoarseClockLagsByATickAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.exactly(), time.Now()
		for i := range 2000 {
			time.Sleep(time.Duration(i%7) * time.Millisecond)
			lag := time.Since(start) - k.now().sub(begin)
			require.GreaterOrEqual(t, lag, time.Duration(0))
			require.LessOrEqual(t, lag, tick)
			require.Equal(t, time.Since(start), k.exactly().sub(begin))
			require.Equal(t, time.Since(start), k.now().sub(begin), "what was read exactly is known")
		}
		require.True(t, k.ticks())
		time.Sleep(2*tick + 1) // lets it come to rest
		synctest.Wait()
		require.False(t, k.ticks())
	})
}

func TestAClockThatIsSeldomAskedIsExactAndDoesNotTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.exactly(), time.Now()
		for range 100 {
			time.Sleep(tick)
			require.Equal(t, time.Since(start), k.now().sub(begin))
			require.False(t, k.ticks())
		}
		k.now()
		require.True(t, k.ticks(), "asked twice within a tick")
	})
}

func TestAClockThatMustBeExactNeverTicks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		k.exact = true
		begin, start := k.exactly(), time.Now()
		for range 100 {
			time.Sleep(time.Microsecond)
			require.Equal(t, time.Since(start), k.now().sub(begin))
			require.False(t, k.ticks())
		}
	})
}

// Who sets short times, or watches, is told exact ones.
func TestTheClockIsExactWhereALagCouldBeFelt(t *testing.T) {
	nop := func(context.Context, Conn) error { return nil }
	for _, c := range []struct {
		set   func(*Config)
		exact bool
	}{
		{func(*Config) {}, false},
		{func(c *Config) { c.IdleTimeout = time.Second }, false},
		{func(c *Config) { c.IdleTimeout = 999 * time.Millisecond }, true},
		{func(c *Config) { c.IdleTimeout = -1 }, false},
		{func(c *Config) { c.Trace = &Trace{} }, true},
		{func(c *Config) { c.Check, c.TrustIdle = nop, 10*time.Millisecond }, true},
		{func(c *Config) { c.Check, c.TrustIdle = nop, time.Minute }, false},
	} {
		var cfg Config
		c.set(&cfg)
		p, err := New(cfg)
		require.NoError(t, err)
		require.Equal(t, c.exact, p.clock.exact, "%+v", cfg)
		require.NoError(t, p.Close())
	}
}

// The monotonic clock stands still while a laptop sleeps, and the wall clock may
// be set back: the pool's clock takes the longer way, and never goes back.
func TestTheClockTakesTheLongerOfBothWays(t *testing.T) {
	now := time.Now()
	k := newClock()
	k.read = func() time.Time { return now }
	begin := k.exactly()
	step := func(monotonic, wall time.Duration) time.Duration {
		before := k.exactly()
		now = onTheWall(now.Add(monotonic), wall-monotonic)
		return k.exactly().sub(before)
	}
	require.Equal(t, time.Second, step(time.Second, time.Second))
	require.Equal(t, time.Hour, step(time.Second, time.Hour))
	require.Equal(t, time.Second, step(time.Second, -time.Hour))
	require.Zero(t, step(0, -time.Hour))
	require.Equal(t, time.Hour+2*time.Second, k.exactly().sub(begin))
}
