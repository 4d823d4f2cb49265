package connpool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// How the ctx of a loan governs its I/O: not before it matters, and never too late.

// noted is a connection that writes down the deadlines that it gets.
type noted struct {
	*faultnet.Conn
	began time.Time

	mu   sync.Mutex // guards what
	what []string
}

func (c *noted) note(kind string, t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	in := "never"
	switch {
	case t.IsZero():
	case t.Before(c.began):
		in = "past"
	default:
		in = t.Sub(c.began).String()
	}
	c.what = append(c.what, fmt.Sprintf("%s %s at %s", kind, in, time.Since(c.began)))
}

func (c *noted) SetDeadline(t time.Time) error { c.note("both", t); return c.Conn.SetDeadline(t) }
func (c *noted) SetReadDeadline(t time.Time) error {
	c.note("read", t)
	return c.Conn.SetReadDeadline(t)
}
func (c *noted) SetWriteDeadline(t time.Time) error {
	c.note("write", t)
	return c.Conn.SetWriteDeadline(t)
}

func (c *noted) told() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.what
}

// noting is a testnet whose connections write their deadlines down. The function returns the
// connection of "a", which is idle; its time begins now.
func noting(t *testing.T) (*testnet, func() *noted) {
	n := newTestnet(t)
	var c *noted
	n.open(Config{Dialers: n.wrapped(func(fc *faultnet.Conn) net.Conn {
		c = &noted{Conn: fc}
		return c
	})})
	return n, func() *noted {
		n.use(at("a"))
		c.began, c.what = time.Now(), nil
		return c
	}
}

// countedCtx counts the watches on a ctx.
type countedCtx struct {
	context.Context
	watches, stops atomic.Int32
}

// Value hides the ctx inside from package context, which would watch that one directly.
func (c *countedCtx) Value(any) any { return nil }

func (c *countedCtx) AfterFunc(f func()) func() bool {
	c.watches.Add(1)
	stop := context.AfterFunc(c.Context, f)
	return func() bool { c.stops.Add(1); return stop() }
}

func TestALoanThatEndsWithinATickIsNeitherWatchedNorGivenADeadline(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, fresh := noting(t)
		c := fresh()
		parent, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		ctx := &countedCtx{Context: parent}
		for range 100 {
			require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
				time.Sleep(clock.Tick * 3 / 4)
				_, err := c.Write([]byte("x"))
				return err
			}))
			time.Sleep(clock.Tick) // so that no tick falls into a loan
		}
		require.Zero(t, ctx.watches.Load())
		require.Empty(t, c.told())
		n.check()
	})
}

func TestALoanThatIsOutAtATickIsWatchedFromThenOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, fresh := noting(t)
		c := fresh()
		parent, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		ctx := &countedCtx{Context: parent}
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
			time.Sleep(10 * clock.Tick)
			synctest.Wait()
			require.EqualValues(t, 1, ctx.watches.Load())
			require.Equal(t, []string{"both 1h0m0s at 10ms"}, c.told())
			return nil
		}))
		require.EqualValues(t, 1, ctx.stops.Load())
		require.Equal(t, []string{"both 1h0m0s at 10ms", "both never at 100ms"}, c.told())
		n.check()
		// The pool rests: no timer goes on.
		require.NoError(t, n.p.With(bg, at("a"), func(Conn) error { return nil }))
		n.gauges(0, 1, 0)
	})
}

// USE-02
func TestTheEndOfACtxInterruptsALoanAfterATickAtMost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for after, most := range map[time.Duration]time.Duration{
			0: clock.Tick, clock.Tick / 2: clock.Tick / 2, clock.Tick * 3 / 2: 0, time.Second: 0,
		} {
			n.use(at("a"))
			ctx, cancel := context.WithCancel(bg)
			var ended time.Time
			err := n.p.With(ctx, at("a"), func(c Conn) error {
				time.AfterFunc(after, func() { ended = time.Now(); cancel() })
				_, err := c.Read(make([]byte, 1))
				return err
			})
			require.ErrorIs(t, err, context.Canceled)
			require.LessOrEqual(t, time.Since(ended), most, after)
			n.check()
		}
		synctest.Wait()
		n.closed(reasons{ClosedCanceled: 4})
	})
}

// USE-02
func TestADeadlineWithinTheNextTickIsSetAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, fresh := noting(t)
		for _, d := range []time.Duration{time.Microsecond, clock.Tick / 2, clock.Tick} {
			c := fresh()
			ctx, cancel := context.WithTimeout(bg, d)
			err := n.p.With(ctx, at("a"), func(l Conn) error {
				require.Equal(t, []string{fmt.Sprintf("both %v at 0s", d)}, c.told())
				_, err := l.Read(make([]byte, 1))
				return err
			})
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, d, time.Since(c.began))
			n.check()
		}
	})
}

// A deadline that fn sets for one direction takes the ctx's from neither.
func TestADeadlineOfFnComesAfterThatOfTheCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, fresh := noting(t)
		c := fresh()
		ctx, cancel := context.WithTimeout(bg, time.Minute)
		defer cancel()
		require.NoError(t, n.p.With(ctx, at("a"), func(l Conn) error {
			require.NoError(t, l.SetReadDeadline(time.Now().Add(time.Second)))
			require.NoError(t, l.SetWriteDeadline(time.Now().Add(time.Hour)))
			time.Sleep(3 * clock.Tick)
			synctest.Wait()
			require.Equal(t, []string{"both 1m0s at 0s", "read 1s at 0s", "write 1m0s at 0s"}, c.told(), "the tick must not undo what fn has set")
			return nil
		}))
		n.check()
	})
}

// hangingCtx is a ctx of foreign code, one of whose methods misbehaves once armed.
type hangingCtx struct {
	context.Context
	armed *atomic.Bool
	do    func()
}

func (c hangingCtx) Done() <-chan struct{} {
	if c.armed.Load() {
		c.do()
	}
	return c.Context.Done()
}

func TestACtxThatMisbehavesHarmsOnlyItsOwnLoan(t *testing.T) {
	for name, do := range map[string]func(){
		"panics": func() { panic("oops") },
		"exits":  runtime.Goexit,
		"hangs":  func() { time.Sleep(time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{Logger: slog.New(slog.DiscardHandler)})
				ctx, cancel := context.WithCancel(bg)
				defer cancel()
				bad := n.borrow(hangingCtx{ctx, new(atomic.Bool), do}, at("a"))
				bad.conn()
				armed := &atomic.Bool{}
				armed.Store(true)
				worse := make(chan error, 1)
				began := time.Now()
				ready := &atomic.Bool{}
				n.use(at("b"))
				go func() {
					worse <- n.p.With(hangingCtx{ctx, ready, do}, at("b"), func(Conn) error {
						ready.Store(true)
						time.Sleep(3 * clock.Tick)
						ready.Store(false)
						return nil
					})
				}()
				good, stop := context.WithCancel(bg)
				time.AfterFunc(2*clock.Tick, stop)
				err := n.p.With(good, at("c"), func(c Conn) error {
					_, err := c.Read(make([]byte, 1))
					return err
				})
				require.ErrorIs(t, err, context.Canceled)
				require.LessOrEqual(t, time.Since(began), 3*clock.Tick, "others are interrupted meanwhile")
				require.NoError(t, <-worse)
				require.NoError(t, bad.giveBack())
				n.use(at("b"))
				n.check()
			})
		})
	}
}

// USE-01
func TestALoanUnderACtxAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a sync.Pool forgets at random")
	}
	type key struct{}
	cancelable, cancel := context.WithCancel(context.Background())
	defer cancel()
	late, stop := context.WithTimeout(context.Background(), time.Hour)
	defer stop()
	deep := cancelable
	for i := range 10 {
		deep = context.WithValue(deep, key{}, i)
	}
	for _, name := range []string{"tcp", "tls13"} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, nil)
			for what, ctx := range map[string]context.Context{
				"Background": context.Background(), "TODO": context.TODO(), "cancelable": cancelable, "a deadline": late, "ten deep": deep,
			} {
				loan(t, p, n.addr)
				require.Zero(t, patience.Allocs(1000, func() {
					if err := p.With(ctx, n.addr, func(Conn) error { return nil }); err != nil {
						t.Error(err)
					}
				}), what)
			}
			// What fn uses of its caller may stay on the stack of the caller.
			require.Zero(t, patience.Allocs(1000, func() {
				var reply [64]byte
				lent := Conn{}
				if err := p.With(cancelable, n.addr, func(c Conn) error { lent = c; reply[0]++; return nil }); err != nil || lent == (Conn{}) || reply[0] != 1 {
					t.Error(err)
				}
			}))
			// A ctx that was made for the loan: the pool must not make it allocate its channel.
			alone := patience.Allocs(1000, func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
				if ctx.Err() != nil {
					t.Error(ctx.Err())
				}
				cancel()
			})
			with := patience.Allocs(1000, func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
				if err := p.With(ctx, n.addr, func(Conn) error { return nil }); err != nil {
					t.Error(err)
				}
				cancel()
			})
			require.Equal(t, alone, with)
		})
	}
}

// USE-02: no deadline, watch or interrupt of one loan reaches the next.
func TestRaceOfCancelAndReturn(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "custom"} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, func(c *Config) { c.MaxPerAddr = 1 })
			kept, cut := 0, 0
			for i := range rounds() {
				ctx, cancel := context.WithCancel(context.Background())
				if i%3 == 1 {
					ctx, cancel = context.WithDeadline(ctx, time.Now().Add(time.Duration(i%200)*time.Microsecond))
				}
				var others tasks.Group
				err := p.With(ctx, n.addr, func(c Conn) error {
					if i%4 > 1 {
						p.young.Beat() // so that the watch may begin at any moment
					}
					_, err := ask(c, "x")
					if i%2 == 0 {
						others.Go(p.young.Beat)
					}
					others.Go(func() {
						for range i % 7 {
							runtime.Gosched()
						}
						cancel()
					})
					return err
				})
				if err != nil {
					require.True(t, errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded), err)
					cut++
				} else {
					kept++
				}
				if i%5 != 0 {
					others.Wait()
				}
				// What was kept is as new, and stays so.
				require.NoError(t, p.With(context.Background(), n.addr, func(c Conn) error {
					_, err := ask(c, "y")
					return err
				}), "round %d", i)
				others.Wait()
				cancel()
			}
			t.Logf("%d loans kept, %d cut, closed %v", kept, cut, p.Stats().Closed)
			require.NotZero(t, kept)
		})
	}
}

// The ctx may be done before anybody watches it.
func TestAConnectionWhoseCtxIsDoneIsNotDetached(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for _, watched := range []bool{false, true} {
			ctx, cancel := context.WithCancel(bg)
			require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
				if watched {
					time.Sleep(2 * clock.Tick)
				}
				cancel()
				_, err := c.Detach()
				require.ErrorIs(t, err, context.Canceled)
				return nil
			}))
			n.check()
		}
		synctest.Wait()
		n.closed(reasons{ClosedCanceled: 2})
	})
}

// slowCtx is a ctx whose Done takes a while.
type slowCtx struct {
	context.Context
	in   chan struct{} // an element for each call of Done that has begun
	hold chan struct{} // closed when Done may return
}

func (c slowCtx) Done() <-chan struct{} {
	select {
	case c.in <- struct{}{}:
	default:
	}
	<-c.hold
	return c.Context.Done()
}

func TestTheEndOfALoanWaitsForTheWatchThatIsBeingSet(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxPerAddr = 1 })
	loan(t, p, n.addr)
	parent, cancel := context.WithCancel(context.Background())
	ctx := slowCtx{parent, make(chan struct{}, 1), make(chan struct{})}
	ended := make(chan error, 1)
	go func() {
		ended <- p.With(ctx, n.addr, func(Conn) error {
			<-ctx.in // the watch is being set
			return nil
		})
	}()
	select {
	case err := <-ended:
		t.Fatal("the loan ended before its watch was set", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(ctx.hold)
	require.NoError(t, inTime(t, ended))
	cancel() // no interrupt of that loan is left
	loan(t, p, n.addr)
	require.EqualValues(t, 1, p.Stats().Dials)
}

func TestADetachedConnectionForgetsTheDeadlineOfItsCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var guard net.Conn
		n := newTestnet(t)
		var c *noted
		n.open(Config{
			Dialers: n.wrapped(func(fc *faultnet.Conn) net.Conn {
				c = &noted{Conn: fc, began: time.Now()}
				return c
			}),
			Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) { guard = nc; return nil, nil },
		})
		for _, watched := range []bool{false, true} {
			n.use(at("a"))
			ctx, cancel := context.WithTimeout(bg, time.Minute)
			require.NoError(t, n.p.With(ctx, at("a"), func(l Conn) error {
				if watched {
					time.Sleep(2 * clock.Tick)
				}
				require.NoError(t, l.SetDeadline(time.Now().Add(time.Second)))
				nc, err := l.Detach()
				require.NoError(t, err)
				defer nc.Close()
				require.Zero(t, l.c.limited(time.Time{}), "a socket of package net asks for this")
				c.began, c.what = time.Now(), nil
				require.NoError(t, guard.SetDeadline(time.Now().Add(time.Hour)))
				require.Equal(t, []string{"both 1h0m0s at 0s"}, c.told())
				return nil
			}))
			cancel()
			n.check()
		}
	})
}

// brokenDeadline is a ctx whose Deadline panics once it is armed.
type brokenDeadline struct {
	context.Context
	armed *bool
}

func (c brokenDeadline) Deadline() (time.Time, bool) {
	if *c.armed {
		panic(errBoom)
	}
	return c.Context.Deadline()
}

func TestACtxThatPanicsAsItsLoanBeginsCostsTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		armed := false
		n := open(t, Config{Trace: &Trace{GetConn: func(Addr) { armed = true }}})
		for range 2 {
			armed = false
			require.NoError(t, n.p.With(bg, at("b"), func(Conn) error { return nil }))
			require.PanicsWithValue(t, errBoom, func() {
				n.p.With(brokenDeadline{bg, &armed}, at("b"), func(Conn) error { return nil })
			})
			n.check()
			n.gauges(0, 0, 0)
		}
	})
}

func TestDetachAsksTheCtxBeforeItTakesTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		armed := false
		require.PanicsWithValue(t, errBoom, func() {
			n.p.With(errCtx{bg, func() {
				if armed {
					panic(errBoom)
				}
			}}, at("a"), func(c Conn) error {
				armed = true
				c.Detach()
				return nil
			})
		})
		n.check()
		n.gauges(0, 0, 0)
		// The ctx around the use counts as that of the use does.
		s, end := n.p.Session(bg)
		outer, cancel := context.WithCancel(s)
		n.p.With(outer, at("a"), func(Conn) error {
			cancel()
			return n.p.With(s, at("a"), func(c Conn) error {
				_, err := c.Detach()
				require.ErrorIs(t, err, context.Canceled)
				return nil
			})
		})
		end()
		n.check()
	})
}

func TestASetupWhoseTimeWasUpIsAFailedDial(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{DialTimeout: 50 * time.Millisecond, Setup: func(context.Context, Addr, net.Conn) (any, error) {
			time.Sleep(5 * time.Millisecond)
			return nil, nil
		}})
		n.Host("a").SetLatency(47 * time.Millisecond)
		require.Error(t, n.p.With(bg, at("a"), func(Conn) error { return nil }))
		n.check()
	})
}

// stuckDeadline is a connection whose SetDeadline hangs for a while.
type stuckDeadline struct {
	*faultnet.Conn
	stuck *atomic.Bool
}

func (c stuckDeadline) SetDeadline(t time.Time) error {
	if c.stuck.Load() {
		time.Sleep(time.Minute)
	}
	return c.Conn.SetDeadline(t)
}

func TestADeadlineThatHangsAtTheTickCostsTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var stuck atomic.Bool
		n.open(Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return stuckDeadline{c, &stuck} })})
		n.use(at("a"))
		ctx, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		stuck.Store(true)
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
			time.Sleep(clock.Tick + time.Millisecond) // the loan ends while the deadline is being set
			return nil
		}))
		stuck.Store(false)
		time.Sleep(2 * time.Minute)
		n.closed(reasons{ClosedBroken: 1})
		n.check()
	})
}
