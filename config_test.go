package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"io/fs"
	"math"
	"net"
	"reflect"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// APR-X01, APR-14
func TestSenselessCombinationsAreRefusedByBothNames(t *testing.T) {
	ping := func(context.Context, Conn) error { return nil }
	for _, tc := range []struct {
		cfg  Config
		a, b string
	}{
		{Config{MaxOpen: 4, MaxPerAddr: 5}, "MaxPerAddr", "MaxOpen"},
		{Config{MaxOpen: 4, MaxIdle: 5}, "MaxIdle", "MaxOpen"},
		{Config{MaxOpen: 4, MaxIdlePerAddr: 5}, "MaxIdlePerAddr", "MaxOpen"},
		{Config{MaxPerAddr: 4, MaxIdlePerAddr: 5}, "MaxIdlePerAddr", "MaxPerAddr"},
		{Config{MaxIdle: 4, MaxIdlePerAddr: 5}, "MaxIdlePerAddr", "MaxIdle"},
		{Config{MaxIdle: -1, MaxIdlePerAddr: 1}, "MaxIdlePerAddr", "MaxIdle"},
		{Config{MaxIdle: 1, MaxIdlePerAddr: -1}, "MaxIdlePerAddr", "MaxIdle"},
		{Config{MaxDialing: 4, MaxDialingPerAddr: 5}, "MaxDialingPerAddr", "MaxDialing"},
		{Config{MaxOpen: 1, MaxWaiters: 1, WhenFull: FullFail}, "MaxWaiters", "WhenFull"},
		{Config{WhenFull: FullOverflow}, "WhenFull", "MaxPerAddr"},
		{Config{WhenFull: FullOverflow, MaxPerAddr: -1, MaxOpen: -1}, "WhenFull", "MaxPerAddr"},
		{Config{CheckAfterIdle: time.Second}, "CheckAfterIdle", "Check"},
		{Config{CheckAfterIdle: -1}, "CheckAfterIdle", "Check"},
	} {
		p, err := New(tc.cfg)
		require.Error(t, err, "%s and %s", tc.a, tc.b)
		require.Nil(t, p)
		require.ErrorContains(t, err, "Config."+tc.a)
		require.ErrorContains(t, err, "Config."+tc.b)
	}
	for says, cfg := range map[string]Config{
		"WhenFull": {WhenFull: 3},
		`"TCP"`:    {Dialers: map[Transport]DialFunc{"TCP": func(context.Context, Addr) (net.Conn, error) { return nil, nil }}},
		`""`:       {Dialers: map[Transport]DialFunc{"": func(context.Context, Addr) (net.Conn, error) { return nil, nil }}},
		`["mem"]`:  {Dialers: map[Transport]DialFunc{memory: nil}},
	} {
		_, err := New(cfg)
		require.ErrorContains(t, err, says)
	}

	// What touches a bound is fine, and so is what no bound limits.
	for _, cfg := range []Config{
		{},
		{MaxOpen: 4, MaxPerAddr: 4, MaxIdle: 4, MaxIdlePerAddr: 4, MaxDialing: 4, MaxDialingPerAddr: 4, MaxWaiters: 1},
		{MaxOpen: -1, MaxPerAddr: 1 << 20, MaxIdle: 1 << 20, MaxIdlePerAddr: 1 << 20, MaxDialing: -1, MaxDialingPerAddr: 1 << 20},
		{MaxOpen: 4, MaxIdle: -1, MaxIdlePerAddr: -1},
		{WhenFull: FullOverflow, MaxOpen: 1}, {WhenFull: FullOverflow, MaxPerAddr: 1}, {WhenFull: FullFail},
		{CheckAfterIdle: -1, Check: ping}, {CheckAfterIdle: time.Hour, Check: ping},
		{IdleTimeout: time.Hour, MaxLifetime: time.Minute},
	} {
		p, err := New(cfg)
		require.NoError(t, err)
		require.NoError(t, p.Close())
	}
}

func TestZeroIsTheDefaultAndNegativeIsOff(t *testing.T) {
	ping := func(context.Context, Conn) error { return nil }
	const none = math.MaxInt
	for name, tc := range map[string]struct{ cfg, want Config }{
		"zero": {Config{}, Config{
			MaxOpen: 0, MaxPerAddr: none, MaxIdle: none, MaxIdlePerAddr: none, MaxDialing: 64, MaxDialingPerAddr: 32, MaxWaiters: none, MaxUses: none,
			IdleTimeout: 2 * time.Minute, DialTimeout: 10 * time.Second, SweepInterval: 20 * time.Second, CheckAfterIdle: 20 * time.Second, HookTimeout: 5 * time.Second,
		}},
		"negative": {Config{
			MaxOpen: -1, MaxPerAddr: -2, MaxIdle: -3, MaxIdlePerAddr: -4, MaxDialing: -5, MaxDialingPerAddr: -6, MaxWaiters: -7, MaxUses: -8, MinIdlePerAddr: -9,
			IdleTimeout: -1, MaxLifetime: -2, DialTimeout: -3, SweepInterval: -4, HookTimeout: -5, HoldWarn: -6, WaitTimeout: -7, MaxBackoff: -8,
		}, Config{
			MaxOpen: none, MaxPerAddr: none, MaxIdle: 0, MaxIdlePerAddr: 0, MaxDialing: none, MaxDialingPerAddr: none, MaxWaiters: none, MaxUses: none,
			CheckAfterIdle: 20 * time.Second, MaxBackoff: -8,
		}},
		"positive": {Config{
			MaxOpen: 20, MaxPerAddr: 10, MaxIdle: 9, MaxIdlePerAddr: 8, MaxDialing: 7, MaxDialingPerAddr: 6, MaxWaiters: 5, MaxUses: 4, MinIdlePerAddr: 3,
			IdleTimeout: 1, MaxLifetime: 2, DialTimeout: 3, SweepInterval: 4, HookTimeout: 5, HoldWarn: 6, WaitTimeout: 7, MaxBackoff: 8,
		}, Config{
			MaxOpen: 20, MaxPerAddr: 10, MaxIdle: 9, MaxIdlePerAddr: 8, MaxDialing: 7, MaxDialingPerAddr: 6, MaxWaiters: 5, MaxUses: 4, MinIdlePerAddr: 3,
			IdleTimeout: 1, MaxLifetime: 2, DialTimeout: 3, SweepInterval: 4, HookTimeout: 5, HoldWarn: 6, CheckAfterIdle: 4, WaitTimeout: 7, MaxBackoff: 8,
		}},
		"odd MaxDialing": {Config{MaxDialing: 1}, Config{
			MaxOpen: 0, MaxPerAddr: none, MaxIdle: none, MaxIdlePerAddr: none, MaxDialing: 1, MaxDialingPerAddr: 1, MaxWaiters: none, MaxUses: none,
			IdleTimeout: 2 * time.Minute, DialTimeout: 10 * time.Second, SweepInterval: 20 * time.Second, CheckAfterIdle: 20 * time.Second, HookTimeout: 5 * time.Second,
		}},
	} {
		got, err := tc.cfg.resolved()
		require.NoError(t, err, name)
		got.Dialers = nil
		require.Equal(t, tc.want, got, name)
	}
	got, err := Config{Check: ping, CheckAfterIdle: -1}.resolved()
	require.NoError(t, err)
	require.Zero(t, got.CheckAfterIdle)
	got, err = Config{MaxDialing: -1}.resolved()
	require.NoError(t, err)
	require.Greater(t, got.MaxDialingPerAddr, 1<<20, "no limit in all is none for one address")
}

// Each field of Config is in the table above, or is no number: a new limit
// must say what 0 and negative mean.
func TestEveryLimitOfConfigIsInTheTable(t *testing.T) {
	numbers := 0
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		switch f.Type.Kind() {
		case reflect.Int, reflect.Int64:
			numbers++
		}
	}
	require.Equal(t, 18, numbers)
}

func TestNewCopiesTheConfig(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		dialers := map[Transport]DialFunc{memory: n.dial}
		cfg := Config{Dialers: dialers, TLS: &tls.Config{NextProtos: []string{"a"}}, MaxPerAddr: 1}
		n.open(cfg)
		delete(dialers, memory)
		cfg.TLS.NextProtos = []string{"b"}
		cfg.MaxPerAddr = 2
		n.use(at("a"))
		require.Equal(t, []string{"a"}, n.p.cfg.TLS.NextProtos)
		require.Equal(t, 1, n.p.limits.MaxPerAddr)
	})
	var invalid error = &addrError{"Host", "is empty"}
	require.True(t, errors.Is(invalid, fs.ErrInvalid))
}

// TRY-37: a duration without a unit is refused by its name, whichever it is.
func TestADurationWithoutAUnitIsRefused(t *testing.T) {
	ping := func(context.Context, Conn) error { return nil }
	durations := 0
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		if f.Type != reflect.TypeFor[time.Duration]() {
			continue
		}
		durations++
		for n, taken := range map[time.Duration]bool{1: false, 30: false, 5000: false, 300_000: false, time.Millisecond - 1: false, time.Millisecond: true, time.Second: true, math.MaxInt64: true, -1: true, 0: true} {
			cfg := Config{Check: ping}
			reflect.ValueOf(&cfg).Elem().FieldByIndex(f.Index).SetInt(int64(n))
			p, err := New(cfg)
			if taken {
				require.NoError(t, err, "%s %v", f.Name, n)
				require.NoError(t, p.Close())
				continue
			}
			require.Equal(t, KindUsage, KindOf(err))
			require.ErrorContains(t, err, "Config."+f.Name+" is "+n.String()+", less than a millisecond", "%v", n)
		}
	}
	require.Equal(t, 9, durations)
}

// TRY-37: a reserve that no limit could ever hold is refused, by New and by
// SetLimits.
func TestAReserveAboveTheLimitsIsRefused(t *testing.T) {
	for name, l := range map[string]Limits{
		"a slip": {MinIdlePerAddr: 1 << 30}, "the largest": {MinIdlePerAddr: math.MaxInt}, "more than the ports": {MinIdlePerAddr: 1 << 16}, "without a limit": {MinIdlePerAddr: 1 << 30, MaxOpen: -1},
		"above MaxOpen": {MinIdlePerAddr: math.MaxInt, MaxOpen: 8}, "equal to MaxOpen": {MinIdlePerAddr: 8, MaxOpen: 8},
		"above MaxPerAddr": {MinIdlePerAddr: math.MaxInt, MaxPerAddr: 8}, "above MaxIdle": {MinIdlePerAddr: 9, MaxIdle: 8}, "above MaxIdlePerAddr": {MinIdlePerAddr: 9, MaxIdlePerAddr: 8},
	} {
		cfg := Config{}
		cfg.setLimits(l)
		_, err := New(cfg)
		require.ErrorContains(t, err, "MinIdlePerAddr", name)
		p, err := New(Config{})
		require.NoError(t, err)
		require.ErrorContains(t, p.SetLimits(l), "MinIdlePerAddr", name)
		require.Equal(t, Limits{}, p.Limits())
		require.NoError(t, p.Close())
	}
	for spare, taken := range map[int]bool{0: true, 47: true, 48: false, 1000: false} {
		err := Limits{MinIdlePerAddr: spare}.reachable("Config", 48)
		require.Equal(t, taken, err == nil, "%d: %v", spare, err)
		if !taken {
			require.ErrorContains(t, err, "has room for 48 connections in all")
		}
	}
}

// TRY-37: the name that TLS verifies is the address's.
func TestAServerNameOfTheConfigIsRefused(t *testing.T) {
	_, err := New(Config{TLS: &tls.Config{ServerName: "db.example"}})
	require.ErrorContains(t, err, "Addr.ServerName")
	for addr, want := range map[string]string{
		"tls://127.0.0.1:1": "localhost", "tls://[::1]:1": "localhost", "tls://127.0.0.1:1?server-name=db.example": "db.example",
		"tls://192.0.2.1:1": "192.0.2.1", "tls://db.example:1": "db.example",
	} {
		p, err := New(Config{TLS: &tls.Config{ServerName: "localhost"}})
		require.NoError(t, err, "the name of many addresses")
		cfg, err := (&attempt{c: &conn{site: p.newSite(MustParseAddr(addr))}}).tlsConfig()
		require.NoError(t, err)
		require.Equal(t, want, cfg.ServerName, addr)
		p.Close()
	}
	p, err := New(Config{TLSFor: func(a Addr) (*tls.Config, error) { return &tls.Config{ServerName: "db.example"}, nil }})
	require.NoError(t, err)
	defer p.Close()
	for addr, taken := range map[string]bool{"tls://db.example:1": true, "tls://DB.example.:1": true, "tls://10.0.0.1:1?server-name=db.example": true, "tls://other.example:1": false, "tls://db.example:1?server-name=x": false} {
		a, err := MustParseAddr(addr).canonical()
		require.NoError(t, err)
		_, err = (&attempt{c: &conn{site: p.newSite(a)}}).tlsConfig()
		require.Equal(t, taken, err == nil, "%s: %v", addr, err)
		if !taken {
			require.ErrorContains(t, err, "write it into Addr.ServerName")
			require.Equal(t, KindUsage, KindOf(err))
		}
	}
}

// TRY-37: a state under a wrong type is no nil pointer.
func TestAStateOfAnotherTypeSaysWhichTypesTheyAre(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Setup: func(_ context.Context, a Addr, nc net.Conn) (any, error) {
			if a == at("none") {
				return nil, nil
			}
			return bufio.NewReader(nc), nil
		}})
		var kept Conn
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			kept = c
			require.NotNil(t, State[*bufio.Reader](c))
			require.NotNil(t, State[io.Reader](c), "an interface that it has")
			require.NotNil(t, State[any](c))
			return nil
		}))
		require.Nil(t, State[*bufio.Writer](kept), "after the loan there is none")
		require.PanicsWithValue(t, "connpool: State[*bufio.Writer]: Config.Setup returned a *bufio.Reader", func() {
			n.p.With(bg, at("a"), func(c Conn) error {
				_, err := State[*bufio.Writer](c).WriteString("x")
				return err
			})
		})
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			require.PanicsWithValue(t, "connpool: State[io.Writer]: Config.Setup returned a *bufio.Reader", func() { State[io.Writer](c) })
			return nil
		}), "who recovers has the connection still")
		require.NoError(t, n.p.With(bg, at("none"), func(c Conn) error {
			require.Nil(t, State[*bufio.Reader](c))
			require.Zero(t, State[int](c))
			return nil
		}))
	})
}

// TRY-37
func TestAProfileThatTakesNoEntriesIsRefused(t *testing.T) {
	for _, p := range []*pprof.Profile{pprof.Lookup("heap"), pprof.Lookup("goroutine"), new(pprof.Profile)} {
		_, err := New(Config{Profile: p})
		require.ErrorIs(t, err, fs.ErrInvalid)
		require.ErrorContains(t, err, "pprof.NewProfile")
	}
}
