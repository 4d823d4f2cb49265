package connpool

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
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

// BETA-37, BETA-10
func TestCloseEndsEverythingButALoan(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 2})
		n.idle(at("idle"), 2)
		n.Host("a").Serve(echoLines)
		held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
		held[0].conn()
		held[1].conn()
		waiters := n.queue(3, at("a"))
		start := time.Now()
		require.NoError(t, n.p.Close())
		require.Empty(t, n.Host("idle").Conns())
		for _, w := range waiters {
			require.ErrorIs(t, w.result(), ErrClosed)
			require.Equal(t, KindUsage, KindOf(w.err))
		}
		require.ErrorIs(t, n.fail(bg, at("a")), ErrClosed)
		n.gauges(2, 0, 0)
		n.check()
		answer, err := askLine(held[0].conn(), "x")
		require.NoError(t, err)
		require.Equal(t, who(held[0].conn()), "a#"+answer[:1])
		require.NoError(t, held[0].giveBack())
		require.Equal(t, errBoom, held[1].finish(discard))
		synctest.Wait()
		require.Empty(t, n.Host("a").Conns())
		n.closed(reasons{ClosedWithPool: 3, ClosedFnError: 1})
		require.NoError(t, n.p.Close())
		require.Zero(t, time.Since(start))
		n.check()
	})
}

func TestShutdownWaitsForBorrowersAndNamesThem(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		early := n.borrow(bg, at("a"))
		early.conn()
		time.Sleep(2 * time.Second)
		late := n.borrow(bg, at("a"))
		late.conn()
		other := n.borrow(bg, Addr{Transport: memory, Host: "b", Scope: "t7"})
		other.conn()
		ctx, cancel := context.WithTimeoutCause(bg, time.Second, errBoom)
		defer cancel()
		start := time.Now()
		err := n.p.Shutdown(ctx)
		require.Equal(t, time.Second, time.Since(start))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, errBoom)
		require.ErrorContains(t, err, "2 in use for mem://a (for 3s)")
		require.ErrorContains(t, err, "1 in use for mem://b?scope=t7 (for 1s)")
		require.ErrorIs(t, n.fail(bg, at("a")), ErrClosed)
		require.True(t, early.holds(), "nothing is taken by force")

		time.AfterFunc(time.Second, early.quit)
		time.AfterFunc(2*time.Second, late.quit)
		time.AfterFunc(3*time.Second, other.quit)
		start = time.Now()
		require.NoError(t, n.p.Shutdown(bg))
		require.Equal(t, 3*time.Second, time.Since(start))
		require.NoError(t, n.p.Shutdown(bg))
		require.NoError(t, n.p.Close())
		n.closed(reasons{ClosedWithPool: 3})
	})
}

// ORA-X14
func TestRetireAndCloseIdle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 2)
		n.idle(at("b"), 2)
		held := n.borrow(bg, at("a"))
		heldB := n.borrow(bg, at("b"))
		held.conn()
		heldB.conn()
		require.Equal(t, "a#1", n.use(at("a")))

		n.p.Retire(at("a"))
		n.p.Retire(at("unknown"))
		synctest.Wait()
		n.closed(reasons{ClosedRetired: 1})
		require.Len(t, n.Host("a").Conns(), 1)
		require.Len(t, n.Host("b").Conns(), 2, "other addresses are not concerned")
		require.Equal(t, "a#3", n.use(at("a")), "what is opened from now on is good")
		require.NoError(t, held.giveBack())
		synctest.Wait()
		n.closed(reasons{ClosedRetired: 2})
		require.Equal(t, "a#3", n.use(at("a")))
		n.check()

		n.p.CloseIdle()
		synctest.Wait()
		n.closed(reasons{ClosedRetired: 2, ClosedOnRequest: 2})
		n.gauges(1, 0, 0)
		require.NoError(t, heldB.giveBack())
		n.gauges(0, 1, 0)
		require.Equal(t, heldB.name, n.use(at("b")), "what was in use then is kept")
		st := n.p.Stats()
		require.EqualValues(t, st.Open, st.Dials-4)
		n.check()
	})
}

// Retiring a connection makes room for a waiter.
func TestRetireServesWaiters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 2})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.p.Retire(at("a"))
		waiter := n.borrow(bg, at("a"))
		require.Equal(t, "a#2", who(waiter.conn()))
		more := n.queue(1, at("a"))[0]
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#3", who(more.conn()))
		n.check()
	})
}

// APR-13
func TestWhatIsDialedIsClosedExactlyOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var dials, closes, setups, states atomic.Int64
		n := newTestnet(t)
		n.open(Config{
			MaxOpen: 6, MaxPerAddr: 3, MaxIdle: 4, MaxUses: 10, MaxLifetime: time.Second, IdleTimeout: 100 * time.Millisecond, SweepInterval: 50 * time.Millisecond,
			Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
				dials.Add(1)
				return &strange{Conn: c, close: sync.OnceValue(func() error { closes.Add(1); return c.Close() })}
			}),
			Setup: func(context.Context, Addr, net.Conn) (any, error) {
				if rand.N(10) == 0 {
					return nil, errHook
				}
				setups.Add(1)
				return closeFunc(func() error { states.Add(1); return nil }), nil
			},
			Reset: func(context.Context, Conn) error {
				if rand.N(10) == 0 {
					return errHook
				}
				return nil
			},
		})
		var all tasks.Group
		for range 10 {
			all.Go(func() {
				for range 100 {
					ctx, cancel := context.WithTimeout(bg, rand.N(20*time.Millisecond))
					n.p.With(ctx, at([]string{"a", "b", "c"}[rand.N(3)]), func(c Conn) error {
						time.Sleep(rand.N(2 * time.Millisecond))
						switch rand.N(8) {
						case 0:
							return errBoom
						case 1:
							c.Close()
						case 2:
							n.peer(c).Reset()
						}
						return nil
					})
					cancel()
					if rand.N(50) == 0 {
						n.p.Retire(at("a"))
					}
				}
			})
		}
		all.Wait()
		n.check()
		require.NoError(t, n.p.Close())
		require.Equal(t, dials.Load(), closes.Load())
		require.Equal(t, setups.Load(), states.Load())
		require.Greater(t, dials.Load(), int64(100))
	})
}

type closeFunc func() error

func (c closeFunc) Close() error { return c() }

// APR-X15
func TestACloseThatFailsOrPanicsStopsNothing(t *testing.T) {
	for name, how := range map[string]func(){
		"fails": func() {}, "panics": func() { panic("close") }, "ends its goroutine": runtime.Goexit,
	} {
		for _, where := range []string{"connection", "state"} {
			t.Run(name+"/"+where, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var mu sync.Mutex
					told := make(map[CloseReason]int)
					n := newTestnet(t)
					cfg := Config{MaxOpen: 3, Trace: &Trace{Closed: func(i CloseInfo) {
						mu.Lock()
						defer mu.Unlock()
						told[i.Reason]++
					}}}
					if where == "connection" {
						cfg.Dialers = n.wrapped(func(c *faultnet.Conn) net.Conn {
							return &strange{Conn: c, close: func() error {
								c.Close()
								how()
								return errBoom
							}}
						})
					} else {
						cfg.Setup = func(context.Context, Addr, net.Conn) (any, error) {
							return closeFunc(func() error { how(); return errBoom }), nil
						}
					}
					n.open(cfg)
					require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error { c.Close(); return nil }))
					n.idle(at("a"), 3)
					require.Equal(t, "b#1", n.use(at("b")), "a is evicted for it")
					n.p.CloseIdle()
					time.Sleep(closeTimeout)
					synctest.Wait()
					mu.Lock()
					defer mu.Unlock()
					require.Equal(t, map[CloseReason]int{ClosedByBorrower: 1, ClosedEvicted: 1, ClosedOnRequest: 3}, told)
					require.Empty(t, n.Host("a").Conns())
					require.Empty(t, n.Host("b").Conns())
					n.gauges(0, 0, 0)
					require.Zero(t, n.p.Stats().Open)
					if name != "ends its goroutine" {
						require.Zero(t, n.p.Stats().AbandonedCalls)
					}
					n.check()
				})
			})
		}
	}
}

func TestACloseThatHangsIsGivenUpAfterFiveSeconds(t *testing.T) {
	for _, where := range []string{"connection", "state"} {
		t.Run(where, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				never := make(chan struct{})
				defer close(never)
				n := newTestnet(t)
				cfg := Config{MaxPerAddr: 1}
				if where == "connection" {
					cfg.Dialers = n.wrapped(hangingClose(never))
				} else {
					cfg.Setup = func(context.Context, Addr, net.Conn) (any, error) {
						return closeFunc(func() error { <-never; return nil }), nil
					}
				}
				n.open(cfg)
				holder := n.borrow(bg, at("a"))
				holder.conn()
				waiter := n.queue(1, at("a"))[0]
				start := time.Now()
				require.Equal(t, errBoom, holder.finish(discard))
				require.Zero(t, time.Since(start), "the borrower is not held up")
				require.Equal(t, 1, n.p.Stats().Closing)
				n.check()
				require.Equal(t, "a#2", who(waiter.conn()))
				require.Equal(t, closeTimeout, time.Since(start))
				require.EqualValues(t, 1, n.p.Stats().AbandonedCalls)
				require.NoError(t, waiter.giveBack())

				start = time.Now()
				addr, ok := n.p.EvictLRU()
				require.True(t, ok)
				require.Equal(t, at("a"), addr)
				require.Equal(t, closeTimeout, time.Since(start))
				require.EqualValues(t, 2, n.p.Stats().AbandonedCalls)

				n.use(at("a"))
				start = time.Now()
				require.ErrorContains(t, n.p.Close(), "1 closes")
				require.Equal(t, closeGrace, time.Since(start))
				require.NoError(t, n.p.Shutdown(bg))
				require.Equal(t, closeTimeout, time.Since(start))
				n.closed(reasons{ClosedFnError: 1, ClosedEvicted: 1, ClosedWithPool: 1})
				n.check()
			})
		})
	}
}

// No foreign code runs while the books are locked: each piece of foreign code here calls
// the pool for something that needs the lock, and would hang if the lock were held.
// APR-X11
func TestForeignCodeMayUseThePool(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var ran sync.Map
		nosy := func(where string) {
			n.p.Stats()
			for range n.p.Addrs() {
			}
			n.p.Retire(at("nobody"))
			if _, again := ran.LoadOrStore(where, true); again {
				return // the calls below lead back here
			}
			n.p.EvictLRU()
			if err := n.p.With(bg, at("other"), func(Conn) error { return nil }); err != nil {
				t.Errorf("With from %s: %v", where, err)
			}
			n.p.CloseIdle()
		}
		trace := func(whose string) *Trace {
			return &Trace{
				GetConn:  func(Addr) { nosy(whose + " GetConn") },
				Wait:     func(WaitInfo) { nosy(whose + " Wait") },
				GotConn:  func(GotInfo) { nosy(whose + " GotConn") },
				DialDone: func(DialInfo) { nosy(whose + " DialDone") },
				PutConn:  func(PutInfo) { nosy(whose + " PutConn") },
				Closed:   func(CloseInfo) { nosy(whose + " Closed") },
			}
		}
		var fail atomic.Bool
		fail.Store(true)
		n.open(Config{
			SweepInterval: time.Second, CheckAfterIdle: -1,
			Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
				nosy("dialer")
				if addr.Host == "full" && fail.Load() {
					return nil, &exhaustion
				}
				nc, err := n.dial(ctx, addr)
				if err != nil {
					return nil, err
				}
				c := nc.(*faultnet.Conn)
				return &strange{Conn: c,
					close: sync.OnceValue(func() error { nosy("Close"); return c.Close() }),
					probe: func() error { nosy("Probe"); return c.Probe() }}, nil
			}},
			Setup:         func(context.Context, Addr, net.Conn) (any, error) { nosy("Setup"); return nil, nil },
			Reset:         func(context.Context, Conn) error { nosy("Reset"); return nil },
			Check:         func(context.Context, Conn) error { nosy("Check"); return nil },
			NoneRemovable: func(*Error) bool { nosy("NoneRemovable"); fail.Store(false); return true },
			Trace:         trace("pool's"),
			Logger:        slog.New(nosyHandler{func() { nosy("Logger") }}),
		})
		sys := realSystem
		sys.noHandleFree = fail.Load // else the pool does not believe the dialer for long
		n.p.sys = &sys
		ctx := WithTrace(bg, trace("ctx's"))
		done := make(chan struct{})
		go func() {
			defer close(done)
			for _, host := range []string{"a", "a", "full", "a", "b"} {
				require.NoError(t, n.p.With(ctx, at(host), func(Conn) error { nosy("fn"); return nil }))
				require.Equal(t, errBoom, n.p.With(ctx, at(host), discard))
			}
			require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
			time.Sleep(3 * time.Second)
			require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
		}()
		select {
		case <-done:
		case <-time.After(time.Hour):
			t.Fatal("something waits for a lock")
		}
		for _, where := range []string{"dialer", "Close", "Probe", "Setup", "Reset", "Check", "NoneRemovable", "Logger", "fn",
			"pool's GetConn", "pool's Wait", "pool's GotConn", "pool's DialDone", "pool's PutConn", "pool's Closed",
			"ctx's GetConn", "ctx's Wait", "ctx's GotConn", "ctx's DialDone", "ctx's PutConn"} {
			_, ok := ran.Load(where)
			require.True(t, ok, "%s has not run", where)
		}
		n.check()
	})
}

var exhaustion = net.OpError{Op: "dial", Net: "mem", Err: syscall.EMFILE}

type nosyHandler struct{ f func() }

func (h nosyHandler) Enabled(context.Context, slog.Level) bool  { return true }
func (h nosyHandler) Handle(context.Context, slog.Record) error { h.f(); return nil }
func (h nosyHandler) WithAttrs([]slog.Attr) slog.Handler        { return h }
func (h nosyHandler) WithGroup(string) slog.Handler             { return h }

func TestStressAHundredPoolsAreClosedUnderTraffic(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var all tasks.Group
		for i := range 100 {
			n := newTestnet(t)
			n.open(Config{MaxOpen: 3, MaxPerAddr: 2, SweepInterval: time.Millisecond, IdleTimeout: 2 * time.Millisecond})
			for _, host := range []string{"a", "b"} {
				n.Host(host).SetLatency(time.Duration(i%4) * time.Millisecond)
			}
			for w := range 6 {
				all.Go(func() {
					for {
						err := n.p.With(bg, at([]string{"a", "b"}[w%2]), func(c Conn) error {
							time.Sleep(rand.N(2 * time.Millisecond))
							if w == 0 {
								return errBoom
							}
							return nil
						})
						switch {
						case errors.Is(err, ErrClosed):
							return
						case err != nil && err != errBoom:
							t.Errorf("pool %d: %v", i, err)
							return
						}
					}
				})
			}
			all.Go(func() {
				time.Sleep(rand.N(30 * time.Millisecond))
				n.check()
				if i%2 == 0 {
					if err := n.p.Close(); err != nil {
						t.Errorf("pool %d: %v", i, err)
					}
				} else if err := n.p.Shutdown(bg); err != nil {
					t.Errorf("pool %d: %v", i, err)
				}
			})
		}
		all.Wait()
	})
}

// A Prober is foreign code too.
func TestAProbeThatPanicsCostsItsConnectionOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxPerAddr: 1, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			return &strange{Conn: c, probe: func() error { panic("probe") }}
		})})
		n.use(at("a"))
		b := n.borrow(bg, at("a"))
		<-b.done
		var pan *PanicError
		require.ErrorAs(t, b.panicked.(error), &pan, "it ran for the borrower, as a hook does")
		require.Equal(t, "Probe", pan.Where)
		synctest.Wait()
		n.gauges(0, 0, 0)
		n.closed(reasons{ClosedStale: 1})
		n.check()
		require.Equal(t, "a#2", n.use(at("a")))
		time.Sleep(defaultSweepInterval) // the sweep probes too
		synctest.Wait()
		n.gauges(0, 0, 0)
		n.closed(reasons{ClosedStale: 2})
		n.check()
	})
}

// A borrower whose goroutine ends in a Trace function leaves the queue. A place left behind
// would lose a connection.
func TestGoexitInATraceFunctionLeaksNothing(t *testing.T) {
	for name, trace := range map[string]*Trace{
		"GetConn": {GetConn: func(Addr) { runtime.Goexit() }},
		"Wait":    {Wait: func(WaitInfo) { runtime.Goexit() }},
		"GotConn": {GotConn: func(GotInfo) { runtime.Goexit() }},
		"PutConn": {PutConn: func(PutInfo) { runtime.Goexit() }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxPerAddr: 1})
				holder := n.borrow(bg, at("a"))
				holder.conn()
				odd := n.borrow(WithTrace(bg, trace), at("a"))
				odd.quit()
				synctest.Wait()
				require.NoError(t, holder.giveBack())
				<-odd.done
				require.Equal(t, name != "Wait", odd.exited, "Wait is told in the middle of the pool's own work")
				synctest.Wait()
				ctx, cancel := context.WithTimeout(bg, time.Minute)
				defer cancel()
				require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
				n.gauges(0, 1, 0)
				n.check()
			})
		})
	}
}
