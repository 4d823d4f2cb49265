package connpool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// ORA-45
func TestStatsAreExactAtEveryStageOfALoad(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 3, MaxPerAddr: 2, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			return &strange{Conn: c, close: sync.OnceValue(func() error { time.Sleep(time.Second); return c.Close() })}
		})})
		n.Host("a").SetLatency(time.Second)
		now := func(want Stats) {
			t.Helper()
			synctest.Wait()
			got := n.p.Stats()
			if len(want.Closed) == 0 {
				require.Empty(t, got.Closed)
				want.Closed = got.Closed
			}
			want.Limit = 3
			require.Equal(t, want, got)
			require.Equal(t, got.Open, got.Dialing+got.Idle+got.InUse+got.Closing)
			n.check()
		}
		now(Stats{})
		first := n.borrow(bg, at("a"))
		now(Stats{Open: 1, Dialing: 1, Waiting: 1, PeakOpen: 1, Addrs: 1, Dials: 1, Waits: 1})
		first.conn()
		now(Stats{Open: 1, InUse: 1, PeakOpen: 1, Addrs: 1, Dials: 1, Waits: 1, WaitDuration: time.Second})
		second := n.borrow(bg, at("a"))
		second.conn()
		third := n.borrow(bg, at("a"))
		now(Stats{Open: 2, InUse: 2, Waiting: 1, PeakOpen: 2, Addrs: 1, Dials: 2, Waits: 3, SlotWaits: 1, WaitDuration: 2 * time.Second})
		time.Sleep(time.Second)
		require.NoError(t, first.giveBack())
		third.conn()
		now(Stats{Open: 2, InUse: 2, PeakOpen: 2, Addrs: 1, Loans: 1, Dials: 2, Waits: 3, SlotWaits: 1, WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second})
		require.NoError(t, third.giveBack())
		now(Stats{Open: 2, InUse: 1, Idle: 1, PeakOpen: 2, Addrs: 1, Loans: 2, Reused: 1, Dials: 2, Waits: 3, SlotWaits: 1, WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second})
		require.Equal(t, errBoom, second.finish(discard))
		now(Stats{Open: 2, Idle: 1, Closing: 1, PeakOpen: 2, Addrs: 1, Loans: 3, Reused: 1, Dials: 2, Waits: 3, SlotWaits: 1, WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second})
		time.Sleep(time.Second)
		closed := reasons{ClosedFnError: 1}
		now(Stats{Open: 1, Idle: 1, PeakOpen: 2, Addrs: 1, Loans: 3, Reused: 1, Dials: 2, Waits: 3, SlotWaits: 1, WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second, Closed: closed})
		n.Host("b").FailNext(syscall.ECONNREFUSED)
		n.fail(bg, at("b"))
		now(Stats{Open: 1, Idle: 1, PeakOpen: 2, Addrs: 2, Loans: 3, Reused: 1, Dials: 3, DialErrors: 1, Waits: 4, SlotWaits: 1, WaitsFailed: 1,
			WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second, Closed: closed})
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			nc, err := c.Detach()
			require.NoError(t, err)
			return nc.Close()
		}))
		now(Stats{PeakOpen: 2, Addrs: 1, Loans: 4, Reused: 2, Dials: 3, DialErrors: 1, Detached: 1, Waits: 4, SlotWaits: 1, WaitsFailed: 1,
			WaitDuration: 3 * time.Second, SlotWaitDuration: time.Second, Closed: closed})
	})
}

// ORA-45: whoever looks, whenever, finds numbers that fit together.
func TestEverySnapshotIsConsistent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 5, MaxPerAddr: 3, IdleTimeout: 5 * time.Millisecond, SweepInterval: time.Millisecond})
		n.Host("a").SetLatency(100 * time.Microsecond)
		var all tasks.Group
		for w := range 8 {
			all.Go(func() {
				for i := range 100 {
					n.p.With(bg, at([]string{"a", "b", "c"}[(w+i)%3]), func(Conn) error {
						time.Sleep(time.Duration(i%5) * 300 * time.Microsecond)
						if i%7 == 0 {
							return errBoom
						}
						return nil
					})
				}
			})
		}
		for range 200 {
			time.Sleep(time.Duration(50+time.Now().Nanosecond()%100) * time.Microsecond)
			st := n.p.Stats()
			require.Equal(t, st.Open, st.Dialing+st.Idle+st.InUse+st.Closing)
			require.LessOrEqual(t, st.Open, st.PeakOpen)
			require.LessOrEqual(t, st.Reused, st.Loans)
			open := 0
			for _, s := range n.p.Addrs() {
				require.Equal(t, s.Open, s.Dialing+s.Idle+s.InUse+s.Closing)
				open += s.Open
			}
			require.LessOrEqual(t, open, 5)
		}
		all.Wait()
		require.EqualValues(t, 800, n.p.Stats().Loans)
		n.check()
	})
}

// ORA-10
func TestTimeInTheQueueIsCounted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.use(at("a"))
		before := n.p.Stats()
		var all tasks.Group
		for range 5 {
			all.Go(func() {
				n.p.With(bg, at("a"), func(Conn) error { time.Sleep(100 * time.Millisecond); return nil })
			})
		}
		all.Wait()
		st := n.p.Stats()
		require.EqualValues(t, 4, st.Waits-before.Waits)
		require.Equal(t, time.Second, st.WaitDuration-before.WaitDuration) // 100 + 200 + 300 + 400 ms
	})
	// A wait that was in vain at first is one wait, as long as it is.
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		c := holder.conn()
		before := n.p.Stats()
		waiter := n.queue(1, at("a"))[0]
		n.Host("a").SetLatency(2 * time.Second)
		time.Sleep(time.Second)
		n.peer(c).Write([]byte("unasked"))
		require.NoError(t, holder.giveBack())
		waiter.conn()
		st := n.p.Stats()
		require.EqualValues(t, 1, st.Waits-before.Waits)
		require.Equal(t, 3*time.Second, st.WaitDuration-before.WaitDuration)
	})
	// Who is refused has not queued.
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, WhenFull: FullFail})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		before := n.p.Stats().Waits
		n.fail(bg, at("a"))
		require.Equal(t, before, n.p.Stats().Waits)
		require.EqualValues(t, 1, n.p.Stats().Exhausted)
	})
}

// ORA-47
func TestStatsAreOneLineAndJSON(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 2})
		n.idle(at("a"), 2)
		require.Equal(t, errBoom, n.p.With(bg, at("a"), discard))
		b := n.borrow(bg, at("a"))
		b.conn()
		synctest.Wait()
		st := n.p.Stats()
		require.Equal(t, "connpool: 1 connections, 1 in use, 0 idle, 0 dialing, 0 closing, 0 waiting; 3 loans, 1 reused, 2 dials, 0 failed", st.String())
		require.NotContains(t, st.String(), "\n")

		v := expvar.Func(func() any { return n.p.Stats() })
		var back Stats
		var fields map[string]any
		require.NoError(t, json.Unmarshal([]byte(v.String()), &fields))
		require.EqualValues(t, 1, fields["InUse"])
		require.Equal(t, map[string]any{"fn-error": 1.0}, fields["Closed"])
		delete(fields, "Closed") // whose keys are names for people
		text, err := json.Marshal(fields)
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(text, &back))
		back.Closed = st.Closed
		require.Equal(t, st, back)
	})
}

func TestEveryNameOfACloseReasonIsItsOwn(t *testing.T) {
	seen := make(map[string]bool)
	for r := range numCloseReasons {
		require.NotEmpty(t, r.String())
		require.False(t, seen[r.String()], r.String())
		seen[r.String()] = true
		text, err := r.MarshalText()
		require.NoError(t, err)
		require.Equal(t, r.String(), string(text))
	}
	require.Equal(t, "connpool.CloseReason(200)", CloseReason(200).String())
}

func TestAddrsTellsEachAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 2})
		n.idle(at("a"), 2)
		held := n.borrow(bg, at("b"))
		held.conn()
		n.Host("b").BlackHole(true)
		n.borrow(bg, at("b"))
		n.borrow(bg, at("b"))
		n.Host("c").Down()
		for range backoffAfter {
			n.fail(bg, at("c"))
		}
		synctest.Wait()
		got := make(map[Addr]AddrStats)
		for a, s := range n.p.Addrs() {
			n.use(at("a")) // the body may use the pool
			got[a] = s
		}
		lastErr := got[at("c")].LastErr
		require.ErrorIs(t, lastErr, syscall.ECONNREFUSED)
		require.Equal(t, map[Addr]AddrStats{
			at("a"): {Open: 2, Idle: 2, Loans: 2, Dials: 2},
			at("b"): {Open: 2, InUse: 1, Dialing: 1, Waiting: 2, Dials: 2},
			at("c"): {Dials: 3, DialErrors: 3, BackingOff: true, LastErr: lastErr},
		}, got)
		for range n.p.Addrs() {
			break
		}
		n.check()
	})
}

// recorder is a Trace that writes down what it is told.
type recorder struct {
	mu     sync.Mutex
	events []string
}

func (r *recorder) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf(format, args...))
}

func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.events
	r.events = nil
	return e
}

func (r *recorder) trace() *Trace {
	return &Trace{
		GetConn: func(a Addr) { r.note("get %s", a.Host) },
		Wait:    func(i WaitInfo) { r.note("wait %s %d", i.Addr.Host, i.Waiting) },
		GotConn: func(i GotInfo) {
			r.note("got %s %d %v %d %v %v", i.Addr.Host, i.ID, i.Reused, i.Uses, i.IdleFor, i.Waited)
		},
		DialDone: func(i DialInfo) {
			what := "ok"
			if i.Err != nil {
				what = KindOf(i.Err).String()
			}
			r.note("dialed %s %d %v %s", i.Addr.Host, i.ID, i.Took, what)
		},
		PutConn: func(i PutInfo) { r.note("put %s %d %v", i.Addr.Host, i.ID, i.Held) },
		Closed: func(i CloseInfo) {
			r.note("closed %s %d %s %d %v %v", i.Addr.Host, i.ID, i.Reason, i.Uses, i.Age, i.Err)
		},
	}
}

func TestTraceTellsTheStoryOfEachUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var pools, own recorder
		n := open(t, Config{Trace: pools.trace(), MaxPerAddr: 1})
		n.Host("a").SetLatency(time.Second)
		ctx := WithTrace(bg, own.trace())
		hold := func(Conn) error { time.Sleep(2 * time.Second); return nil }
		require.NoError(t, n.p.With(ctx, at("a"), hold))
		time.Sleep(5 * time.Second)
		require.NoError(t, n.p.With(ctx, at("a"), hold))
		require.Equal(t, errBoom, n.p.With(ctx, at("a"), discard))
		synctest.Wait()
		want := []string{
			"get a", "wait a 1", "dialed a 1 1s ok", "got a 1 false 1 0s 1s", "put a 1 2s",
			"get a", "got a 1 true 2 5s 0s", "put a 1 2s",
			"get a", "got a 1 true 3 0s 0s",
			"closed a 1 fn-error 3 9s boom",
		}
		require.ElementsMatch(t, want, pools.take()) // the dial ends on a goroutine of its own
		require.ElementsMatch(t, want, own.take())

		n.Host("a").Down()
		n.fail(ctx, at("a"))
		synctest.Wait()
		want = []string{"get a", "wait a 1", "dialed a 0 1s refused"}
		require.ElementsMatch(t, want, pools.take())
		require.ElementsMatch(t, want, own.take())
		n.Host("a").Up()

		// A dial tells the one it was started for, though another gets it.
		short, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		n.fail(short, at("a"))
		n.use(at("a"))
		synctest.Wait()
		require.ElementsMatch(t, []string{"get a", "wait a 1", "dialed a 2 1s ok"}, own.take())
		require.ElementsMatch(t, []string{"get a", "wait a 1", "get a", "wait a 1", "dialed a 2 1s ok",
			"got a 2 false 1 0s 999ms", "put a 2 0s"}, pools.take())
	})
}

func TestTracesAddUpThePoolsFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var order []string
		mark := func(who string) *Trace {
			return &Trace{GotConn: func(GotInfo) { order = append(order, who) }}
		}
		n := open(t, Config{Trace: mark("pool")})
		ctx := WithTrace(WithTrace(WithTrace(bg, mark("outer")), nil), mark("inner"))
		ctx = WithTrace(ctx, &Trace{PutConn: func(PutInfo) { order = append(order, "put") }})
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
		require.Equal(t, []string{"pool", "outer", "inner", "put"}, order)
		require.Equal(t, bg, WithTrace(bg, nil))
		n.use(at("a"))
		require.Equal(t, []string{"pool", "outer", "inner", "put", "pool"}, order)
	})
}

// Every close has one reason, and is told and counted once, whatever made it.
func TestEveryCloseIsToldOnceWithTheReasonThatStatsCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		told := make(map[CloseReason]uint64)
		ids := make(map[uint64]bool)
		var mu sync.Mutex
		var failSetup, failReset, failCheck atomic.Bool
		is := func(b *atomic.Bool) error {
			if b.CompareAndSwap(true, false) {
				return errHook
			}
			return nil
		}
		n := open(t, Config{
			MaxOpen: 4, MaxIdle: 2, MaxUses: 50, MaxLifetime: time.Hour, IdleTimeout: 50 * time.Minute, CheckAfterIdle: time.Minute, SweepInterval: -1,
			Setup: func(_ context.Context, a Addr, _ net.Conn) (any, error) {
				if a == at("expiring") {
					return pass{time.Now().Add(time.Minute)}, nil
				}
				return nil, is(&failSetup)
			},
			Reset: func(context.Context, Conn) error { return is(&failReset) },
			Check: func(context.Context, Conn) error { return is(&failCheck) },
			Trace: &Trace{Closed: func(i CloseInfo) {
				mu.Lock()
				defer mu.Unlock()
				told[i.Reason]++
				require.Equal(t, memory, i.Addr.Transport)
				if i.ID != 0 {
					require.False(t, ids[i.ID], "connection %d was closed twice", i.ID)
					ids[i.ID] = true
				}
			}},
		})
		with := func(how func(Conn) error) {
			b := n.borrow(bg, at("a"))
			b.conn()
			b.finish(how)
			synctest.Wait()
		}
		ok := func(Conn) error { return nil }
		with(discard)
		with(func(Conn) error { panic("x") })
		with(func(Conn) error { runtime.Goexit(); return nil })
		with(Conn.Close)
		with(Conn.CloseWrite)
		with(func(c Conn) error { go c.Read(make([]byte, 1)); synctest.Wait(); return nil })
		with(func(c Conn) error { c.SetDeadline(time.Unix(1, 0)); c.Read(make([]byte, 1)); return nil })
		with(func(c Conn) error { n.peer(c).Reset(); c.Read(make([]byte, 1)); return nil })
		ctx, cancel := context.WithCancel(bg)
		n.p.With(ctx, at("a"), func(Conn) error { cancel(); return nil })
		l, err := n.p.Lease(bg, at("a"))
		require.NoError(t, err)
		forget(l)
		failSetup.Store(true)
		n.fail(bg, at("a"))
		failReset.Store(true)
		with(ok)
		with(ok)
		failCheck.Store(true)
		time.Sleep(2 * time.Minute)
		with(ok)
		n.Host("a").Conns()[0].Reset()
		with(ok)
		time.Sleep(50 * time.Minute)
		with(ok)
		with(func(Conn) error { time.Sleep(time.Hour); return nil })
		for range 50 {
			with(ok)
		}
		n.use(at("expiring"))
		time.Sleep(time.Minute)
		n.use(at("expiring"))
		n.idle(at("a"), 3)
		n.p.EvictLRU()
		n.p.Retire(at("a"))
		n.use(at("b"))
		n.p.CloseIdle()
		n.use(at("b"))
		require.NoError(t, n.p.Close())
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Equal(t, n.p.Stats().Closed, told)
		var missing []string
		for r := ClosedUnknown + 1; r < numCloseReasons; r++ {
			if told[r] == 0 {
				missing = append(missing, r.String())
			}
		}
		require.Equal(t, []string{"dirty", "push-failed", "low-handles", "marked-dead", "quarantined", "moved"}, missing, "(what takes descriptors to happen)")
	})
}

func TestWhatAnOperatorShouldKnowIsLogged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex
		var out bytes.Buffer
		h := slog.NewTextHandler(syncedWriter{&mu, &out}, &slog.HandlerOptions{
			Level: slog.LevelDebug,
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey || a.Key == "stack" {
					return slog.Attr{}
				}
				return a
			},
		})
		never := make(chan struct{})
		defer close(never)
		hang := false
		n := newTestnet(t)
		n.open(Config{Logger: slog.New(h), HookTimeout: time.Second,
			Trace: &Trace{Wait: func(i WaitInfo) {
				if i.Addr.Host == "t" {
					panic("trace")
				}
			}},
			Reset: func(context.Context, Conn) error {
				if hang {
					<-never
				}
				return nil
			}})
		lines := func() []string {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			defer out.Reset()
			l := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			slices.Sort(l)
			return l
		}
		n.Host("down").Down()
		n.fail(bg, at("down"))
		require.Equal(t, []string{`level=WARN msg="connpool: dial failed" addr=mem://down stage=dial` +
			` err="dial mem down: connect: connection refused"`}, lines())
		n.use(at("a"))
		n.Host("a").Conns()[0].Close()
		n.use(at("a"))
		require.Equal(t, []string{`level=INFO msg="connpool: connection closed" addr=mem://a id=1 reason=stale uses=1 err=EOF`}, lines())
		n.p.With(bg, at("a"), discard)
		require.Equal(t, []string{`level=DEBUG msg="connpool: connection closed" addr=mem://a id=2 reason=fn-error uses=2 err=boom`}, lines())
		hang = true
		n.use(at("a"))
		require.Equal(t, []string{
			`level=ERROR msg="connpool: Config.Reset did not end in time; the pool goes on without it" addr=mem://a`,
			`level=WARN msg="connpool: connection closed" addr=mem://a id=3 reason=reset-failed uses=1 err="Config.Reset: context deadline exceeded"`,
		}, lines())
		hang = false
		n.use(at("t"))
		require.Equal(t, []string{`level=ERROR msg="connpool: Trace.Wait panicked: trace"`}, lines())
		n.check()
	})
}

type syncedWriter struct {
	mu  *sync.Mutex
	out *bytes.Buffer
}

func (w syncedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// A panic in a Trace function or in a log costs neither a slot nor a waiter.
func TestAPanicInTraceOrLogLosesNothing(t *testing.T) {
	var armed atomic.Bool
	boom := func() {
		if armed.Load() {
			panic(os.ErrInvalid)
		}
	}
	for name, trace := range map[string]*Trace{
		"GetConn":  {GetConn: func(Addr) { boom() }},
		"Wait":     {Wait: func(WaitInfo) { boom() }},
		"GotConn":  {GotConn: func(GotInfo) { boom() }},
		"DialDone": {DialDone: func(DialInfo) { boom() }},
		"PutConn":  {PutConn: func(PutInfo) { boom() }},
		"Closed":   {Closed: func(CloseInfo) { boom() }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				armed.Store(true)
				n := open(t, Config{MaxPerAddr: 1, Trace: trace, Logger: slog.New(nosyHandler{boom})})
				var all tasks.Group
				for range 5 {
					all.Go(func() {
						b := n.borrow(bg, at("a"))
						b.quit()
						<-b.done
					})
				}
				all.Wait()
				armed.Store(false)
				n.use(at("a"))
				n.gauges(0, 1, 0)
				require.Equal(t, errBoom, n.p.With(bg, at("a"), discard))
				synctest.Wait()
				n.gauges(0, 0, 0)
				n.check()
			})
		})
	}
}

// TRY-53: each dial ends as one thing, whichever way it ends: what was dialled, less what
// failed, was closed or taken away, is open.
func TestTheCountersBalance(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var fail atomic.Bool
		stolen := errors.New("Setup fails")
		n := newTestnet(t)
		n.open(Config{MaxOpen: 8, DialTimeout: time.Second,
			Dialers: map[Transport]DialFunc{TCP: n.dial},
			Setup: func(_ context.Context, a Addr, nc net.Conn) (any, error) {
				switch {
				case !fail.Load():
					return nil, nil
				case a.Scope == "close":
					return nil, nc.Close()
				case a.Scope == "slow":
					time.Sleep(time.Minute)
					return nil, nil
				case a.Scope == "panic":
					panic(errBoom)
				}
				return nil, stolen
			}})
		balance := func(open int) {
			t.Helper()
			synctest.Wait()
			st := n.p.Stats()
			sum := st.DialErrors + st.Detached
			for _, k := range st.Closed {
				sum += k
			}
			require.Equal(t, open, st.Open)
			require.Equal(t, st.Dials, sum+uint64(st.Open), "%v %v", st, st.Closed)
			n.check()
		}
		n.use(at("a"))
		balance(1)
		for i, scope := range []string{"error", "close", "slow", "panic"} {
			fail.Store(true)
			a := at("b")
			a.Scope = scope
			n.fail(bg, a)
			time.Sleep(2 * time.Minute)
			balance(0) // a has expired
			require.EqualValues(t, i+1, n.p.Stats().Closed[ClosedSetupFailed])
			require.Zero(t, n.p.Stats().DialErrors)
		}
		fail.Store(false)
		nc, err := n.p.DialContext(bg, "tcp", "h:80")
		require.NoError(t, err)
		balance(1)
		require.NoError(t, nc.Close())
		balance(0)
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			nc, err := c.Detach()
			if err == nil {
				err = nc.Close()
			}
			return err
		}))
		balance(0)
		n.Host("a").FailNext(errBoom)
		n.fail(bg, at("a"))
		balance(0)
		require.Error(t, n.p.With(bg, at("a"), discard))
		balance(0)
	})
}
