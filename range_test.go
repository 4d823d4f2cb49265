package connpool

import (
	"context"
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// TRY-49: "for ever" is written in many ways, and the largest duration is one of them.
func TestTheLongestDurationsAreForEver(t *testing.T) {
	const long = time.Duration(math.MaxInt64)
	// Each alone, and all at once.
	set := []func(*Config){
		func(c *Config) { c.DialTimeout = long },
		func(c *Config) { c.IdleTimeout = long },
		func(c *Config) { c.MaxLifetime = long },
		func(c *Config) { c.SweepInterval = long },
		func(c *Config) { c.HookTimeout = long },
		func(c *Config) { c.HoldWarn = long },
		func(c *Config) { c.CheckAfterIdle = long },
	}
	set = append(set, func(c *Config) {
		for _, f := range set[:7] {
			f(c)
		}
	})
	for i, set := range set {
		bubble(t, func(t *testing.T) {
			checks, held := 0, 0
			cfg := Config{MinIdlePerAddr: 2,
				Check: func(context.Context, Conn) error { checks++; return nil },
				Reset: func(context.Context, Conn) error { return nil },
				Trace: &Trace{HeldLong: func(HeldInfo) { held++ }},
			}
			set(&cfg)
			n := open(t, cfg)
			n.Host("a").SetLatency(time.Millisecond)
			require.Equal(t, "a#1", n.use(at("a")))
			time.Sleep(time.Second)
			require.GreaterOrEqual(t, n.p.Stats().Idle, 2)
			b := n.borrow(bg, at("a"))
			b.conn()
			time.Sleep(time.Second)
			require.GreaterOrEqual(t, n.p.Stats().Idle, 2)
			require.NoError(t, b.giveBack())
			// The reserve is refilled, as long as it is remembered, and one that did not
			// die young at once.
			time.Sleep(time.Minute)
			for _, c := range n.Host("a").Conns() {
				c.Reset()
			}
			time.Sleep(2 * time.Second)
			n.p.sweep()
			time.Sleep(2 * time.Second)
			st := n.p.Stats()
			if cfg.SweepInterval == 0 {
				require.GreaterOrEqual(t, st.Idle, 2, i)
			}
			require.Zero(t, st.DialErrors, i)
			require.Zero(t, st.AbandonedCalls, i)
			require.Zero(t, held, i)
			for reason := range st.Closed {
				require.Equal(t, ClosedStale, reason, i)
			}
			if cfg.CheckAfterIdle == long {
				require.LessOrEqual(t, checks, 15, "of the sweeps alone")
			}
			n.check()
		})
	}
}

// TRY-49: a duration that is added to another is no longer than a century before.
func TestNoDurationOfAConfigOverflows(t *testing.T) {
	var cfg Config
	fields := reflect.ValueOf(&cfg).Elem()
	names := 0
	for i := range fields.NumField() {
		if fields.Field(i).Type() == reflect.TypeFor[time.Duration]() {
			fields.Field(i).SetInt(math.MaxInt64)
			names++
		}
	}
	cfg.Check = func(context.Context, Conn) error { return nil }
	got, err := cfg.resolved()
	require.NoError(t, err)
	fields = reflect.ValueOf(got)
	for i := range fields.NumField() {
		if fields.Field(i).Type() == reflect.TypeFor[time.Duration]() {
			require.LessOrEqual(t, time.Duration(fields.Field(i).Int()), century, fields.Type().Field(i).Name)
			names--
		}
	}
	require.Zero(t, names)
	p := &Pool{env: env{cfg: got}}
	p.rules = rulesOf(&got, &p.clock, &p.handles)
	require.Positive(t, p.reserveMemory())
	require.Positive(t, p.cfg.DialTimeout+hookGrace)
}

// TRY-49: the pool waits for as long as a ctx says, however long that is.
func TestADeadlineAtTheEndOfTimeIsNone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		ctx, cancel := context.WithDeadline(bg, time.Now().Add(math.MaxInt64))
		defer cancel()
		n.Host("a").Serve(echoLines)
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
			require.NoError(t, c.SetDeadline(time.Now().Add(math.MaxInt64)))
			_, err := askLine(c, "x")
			return err
		}))
		n.gauges(0, 1, 0)
		require.NoError(t, n.p.Warm(ctx, at("a"), 1))
	})
}

// TRY-49: a borrower reads the clock before it has the lock. What another one did with
// the connection meanwhile, its Check included, is later than that, and nothing is
// trusted for it.
func TestCheckIsNotLeftOutForAClockThatWasReadBeforeTheLock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		checks := 0
		n := open(t, Config{CheckAfterIdle: -1, IdleTimeout: -1, SweepInterval: -1, Check: func(context.Context, Conn) error { checks++; return nil }})
		n.use(at("a"))
		c := n.p.every()[0]
		for _, behind := range []time.Duration{time.Nanosecond, time.Millisecond, time.Hour} {
			early := n.p.clock.Exactly()
			time.Sleep(behind)
			n.use(at("a"))
			before := checks
			n.p.mu.Lock()
			n.p.takeLocked(c)
			c.lendAtLocked(early) // as in borrow
			n.p.mu.Unlock()
			require.Zero(t, c.idleFor)
			reason, err := c.whyUnfit(bg)
			require.NoError(t, err)
			require.Equal(t, ClosedUnknown, reason)
			require.Equal(t, before+1, checks, "behind by %v", behind)
			// Not even a clock that is behind the answer of Check.
			c.checked = c.since + clock.Instant(time.Hour)
			_, err = c.whyUnfit(bg)
			require.NoError(t, err)
			require.Equal(t, before+2, checks, "behind by %v", behind)
			c.releaseFrom(fromCheck)
		}
	})
}

// TRY-49: the generation of a connection's loans has forty bits, and 0 is the guard's.
func TestTheLastGenerationIsFollowedByTheFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Serve(echoLines)
		n.use(at("a"))
		n.p.every()[0].word.Or(lastGen << genShift)
		for range 3 {
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				require.NotZero(t, c.gen)
				_, err := askLine(c, "x")
				return err
			}))
		}
		n.gauges(0, 1, 0)
	})
}
