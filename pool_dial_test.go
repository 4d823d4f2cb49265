package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

func TestAReturnServesAWaiterWhileItsDialRuns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.Host("a").SetLatency(time.Second)
		waiter := n.borrow(bg, at("a"))
		synctest.Wait()
		require.NoError(t, holder.giveBack())
		synctest.Wait()
		require.True(t, waiter.holds())
		require.Equal(t, "a#1", who(waiter.conn()))
		require.Equal(t, 1, n.p.Stats().Dialing)
		n.check()
		time.Sleep(time.Second)
		synctest.Wait()
		n.gauges(1, 1, 0) // the connection that came late is idle
		require.Equal(t, "a#2", n.use(at("a")))
		n.check()
	})
}

func TestALateDialServesTheNextWaiter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 2})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.Host("a").SetLatency(time.Second)
		start := time.Now()
		first := n.borrow(bg, at("a"))
		synctest.Wait()
		second := n.queue(1, at("a"))[0] // a borrower for whom there is no room
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#1", who(first.conn()))
		require.Equal(t, "a#2", who(second.conn()))
		require.Equal(t, time.Second, time.Since(start))
		require.Equal(t, 2, n.Host("a").Accepts())
		n.check()
	})
}

// A dial whose borrower gave up still serves the pool, and With does not wait for it.
func TestADialOutlivesItsBorrower(t *testing.T) {
	for _, latency := range []time.Duration{200 * time.Millisecond, time.Second} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxPerAddr: 1})
			n.Host("a").SetLatency(latency)
			start := time.Now()
			ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
			defer cancel()
			pe := n.fail(ctx, at("a"))
			require.ErrorIs(t, pe, context.DeadlineExceeded)
			require.Equal(t, 50*time.Millisecond, time.Since(start))
			n.check()
			if latency == time.Second {
				require.Equal(t, "a#1", n.use(at("a")), "for the next borrower it goes on from where it is")
				require.Equal(t, latency, time.Since(start))
			} else {
				time.Sleep(time.Second)
				n.gauges(0, 1, 0)
				require.Equal(t, "a#1", n.use(at("a")))
			}
			require.Equal(t, 1, n.Host("a").Accepts())
		})
	}
}

func TestValuesOfTheContextReachDialerAndSetup(t *testing.T) {
	type key struct{}
	bubble(t, func(t *testing.T) {
		var dialer, setup any
		n := newTestnet(t)
		n.open(Config{
			Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
				dialer = ctx.Value(key{})
				deadline, ok := ctx.Deadline()
				require.True(t, ok)
				require.Equal(t, 10*time.Second, time.Until(deadline), "DialTimeout, not the borrower's")
				return n.dial(ctx, addr)
			}},
			Setup: func(ctx context.Context, _ Addr, _ net.Conn) (any, error) {
				setup = ctx.Value(key{})
				return nil, ctx.Err()
			},
		})
		ctx, cancel := context.WithTimeout(context.WithValue(bg, key{}, "secret"), time.Second)
		defer cancel()
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
		require.Equal(t, "secret", dialer)
		require.Equal(t, "secret", setup)
	})
}

func TestDialTimeoutBoundsDialAndSetupTogether(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{DialTimeout: time.Second, Setup: func(ctx context.Context, _ Addr, nc net.Conn) (any, error) {
			_, err := nc.Read(make([]byte, 1)) // the peer never greets
			return nil, err
		}})
		for host, stage := range map[string]Stage{"hole": StageDial, "mute": StageSetup} {
			n.Host("hole").BlackHole(true)
			n.Host("mute").SetLatency(900 * time.Millisecond)
			start := time.Now()
			pe := n.fail(bg, at(host))
			require.Equal(t, stage, pe.Stage)
			require.Equal(t, KindTimeout, pe.Kind, pe)
			require.ErrorIs(t, pe, context.DeadlineExceeded)
			require.Equal(t, time.Second, time.Since(start))
			require.Equal(t, time.Second, pe.Waited)
			synctest.Wait()
			n.gauges(0, 0, 0)
			require.Empty(t, n.Host(host).Conns())
			n.check()
		}
		require.Zero(t, n.p.Stats().AbandonedCalls)
	})
}

// APR-X16
func TestTheCauseOfAFailedDialReachesTheBorrowerWhole(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		own := fmt.Errorf("dialer: %w", errBoom)
		n.Host("a").FailNext(syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.EACCES, own)
		n.Host("a").Serve(nil)
		for _, want := range []struct {
			err  error
			kind Kind
		}{{syscall.ECONNREFUSED, KindRefused}, {syscall.EHOSTUNREACH, KindAddress}, {syscall.EACCES, KindAccess}} {
			pe := n.fail(bg, at("a"))
			require.ErrorIs(t, pe, want.err)
			require.Equal(t, want.kind, pe.Kind)
			require.Equal(t, want.kind, KindOf(pe))
			require.Equal(t, StageDial, pe.Stage)
			require.Equal(t, at("a"), pe.Addr)
			var op *net.OpError
			require.ErrorAs(t, pe, &op)
		}
		pe := n.fail(bg, at("a"))
		require.True(t, pe.Err == own, "%v", pe.Err)
		require.Contains(t, pe.Error(), "connpool: dial mem://a: dialer: boom")
	})
}

// APR-14: New works although the peer is down.
func TestNewDialsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.Host("a").Down()
		n.open(Config{})
		time.Sleep(time.Hour)
		require.Zero(t, n.p.Stats().Dials)
		require.ErrorIs(t, n.fail(bg, at("a")), syscall.ECONNREFUSED)
	})
}

// APR-X25
func TestAPeerThatComesUpLaterIsFoundByThoseWhoNeedIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
			time.Sleep(time.Millisecond)
			return n.dial(ctx, a)
		}}})
		n.Host("a").Down()
		for range backoffAfter {
			n.fail(bg, at("a"))
		}
		var peak atomic.Int64
		time.AfterFunc(10*time.Second, func() {
			peak.Store(n.peakDialing.Load())
			n.Host("a").Up()
		})
		start := time.Now()
		dials := n.p.Stats().Dials
		n.peakDialing.Store(0)
		served := make(chan time.Duration)
		for range 20 {
			go func() {
				for n.p.With(bg, at("a"), func(Conn) error { return nil }) != nil {
					time.Sleep(100 * time.Millisecond)
				}
				served <- time.Since(start)
			}()
		}
		for range 20 {
			require.Less(t, <-served, 12*time.Second)
		}
		require.EqualValues(t, 1, peak.Load(), "one dial at a time while it is down")
		require.Less(t, n.p.Stats().Dials-dials, uint64(60))
		n.check()
	})
}

func TestAfterThreeFailuresOneProbesAndTheOthersFailAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Down()
		for i := range backoffAfter {
			for _, s := range n.p.Addrs() {
				require.False(t, s.BackingOff, "after %d failures", i)
			}
			require.Equal(t, StageDial, n.fail(bg, at("a")).Stage)
		}
		for _, s := range n.p.Addrs() {
			require.True(t, s.BackingOff)
			require.ErrorIs(t, s.LastErr, syscall.ECONNREFUSED)
			require.EqualValues(t, backoffAfter, s.DialErrors)
		}
		n.Host("a").SetLatency(time.Second)
		probe := n.queue(1, at("a"))[0]
		require.Zero(t, n.p.Stats().Dialing, "not yet")
		for _, wait := range []time.Duration{0, backoffMin, 500 * time.Millisecond} { // before its dial, and during it
			time.Sleep(wait)
			n.check()
			start := time.Now()
			pe := n.fail(bg, at("a"))
			require.Equal(t, StageBackoff, pe.Stage)
			require.ErrorIs(t, pe, syscall.ECONNREFUSED, "the last dial's error, not a bare time-out")
			require.Equal(t, KindRefused, pe.Kind)
			require.Zero(t, time.Since(start))
		}
		require.Equal(t, 1, n.p.Stats().Dialing)
		require.ErrorIs(t, probe.result(), syscall.ECONNREFUSED)
		n.check()

		// The pauses grow, but stay below a second.
		n.Host("a").SetLatency(0)
		var last time.Duration
		for range 20 {
			start := time.Now()
			n.fail(bg, at("a"))
			last = time.Since(start)
			require.LessOrEqual(t, last, backoffMax)
		}
		require.GreaterOrEqual(t, last, backoffMax/2)

		// A dial that succeeds ends the back-off.
		n.Host("a").Up()
		n.use(at("a"))
		for _, s := range n.p.Addrs() {
			require.False(t, s.BackingOff)
			require.NoError(t, s.LastErr)
		}
		n.p.CloseIdle()
		n.Host("a").Down()
		synctest.Wait()
		start := time.Now()
		for range backoffAfter {
			n.fail(bg, at("a"))
		}
		require.Zero(t, time.Since(start), "it is forgiven entirely")
	})
}

// The third failure answers all borrowers that queued before it but one.
func TestTheThirdFailureEndsTheWaitOfTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialing: 1})
		n.Host("a").SetLatency(time.Millisecond)
		n.Host("a").Down()
		var bs []*scripted
		for range 10 {
			bs = append(bs, n.borrow(bg, at("a")))
			synctest.Wait()
		}
		time.Sleep(time.Duration(backoffAfter) * time.Millisecond)
		synctest.Wait()
		waiting := 0
		for i, b := range bs {
			switch {
			case b.waits():
				waiting++
				require.Equal(t, backoffAfter, i, "the oldest is the one to probe")
			default:
				require.ErrorIs(t, b.err, syscall.ECONNREFUSED)
			}
		}
		require.Equal(t, 1, waiting)
		n.check()
	})
}

// While connections of the address are in use, waiters have something to wait for.
func TestBackOffLetsWaitersWaitForWhatIsInUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.Host("a").Down()
		for range backoffAfter {
			n.fail(bg, at("a"))
		}
		unlucky := n.queue(1, at("a"))[0] // the borrower for whom the next dial starts
		waiters := n.queue(3, at("a"))
		require.ErrorIs(t, unlucky.result(), syscall.ECONNREFUSED)
		n.Host("a").BlackHole(true)
		synctest.Wait()
		n.gauges(1, 0, 3)
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#1", who(waiters[0].conn()))
		n.check()
		require.NoError(t, waiters[0].giveBack())
		require.Equal(t, "a#1", who(waiters[1].conn()))
		// Now the last one is given up, and all waiters but one have nothing left to wait for.
		more := n.queue(2, at("a"))
		require.Equal(t, errBoom, waiters[1].finish(discard))
		synctest.Wait()
		require.True(t, waiters[2].waits())
		for _, w := range more {
			require.ErrorIs(t, w.result(), syscall.ECONNREFUSED)
		}
		n.check()
		require.Equal(t, StageDial, n.fail2(waiters[2]).Stage)
	})
}

// fail2 is the *Error that b ended with.
func (n *testnet) fail2(b *scripted) *Error {
	n.t.Helper()
	var pe *Error
	require.ErrorAs(n.t, b.result(), &pe)
	return pe
}

func TestFailuresAreForgottenAfterAWhile(t *testing.T) {
	for _, interval := range []time.Duration{0, -1} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{SweepInterval: interval})
			n.Host("a").Down()
			for range backoffAfter {
				n.fail(bg, at("a"))
			}
			require.Equal(t, 1, n.p.Stats().Addrs)
			time.Sleep(2*failureMemory + defaultSweepInterval)
			require.Zero(t, n.p.Stats().Addrs)
			n.check()
			start := time.Now()
			n.fail(bg, at("a"))
			require.Zero(t, time.Since(start))
		})
	}
}

// A failure of this process says nothing about the peer.
func TestWantOfHandlesIsNoReasonToBackOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").FailNext(syscall.EMFILE, syscall.EMFILE, syscall.EMFILE, syscall.EMFILE)
		start := time.Now()
		for range 4 {
			pe := n.fail(bg, at("a"))
			require.Equal(t, KindResource, pe.Kind)
			require.ErrorIs(t, pe, ErrNoneRemovable)
		}
		n.use(at("a"))
		require.Zero(t, time.Since(start))
		n.check()
	})
}

// Each connection that is given back may free the handle, although another may take that
// handle first. Only a time without any return ends the wait.
func TestADialWithoutAHandleBeginsItsWaitAnewWithEachReturn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var free atomic.Bool
		n.open(Config{Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
			if addr.Host == "late" && !free.Load() {
				return nil, syscall.EMFILE
			}
			return n.dial(ctx, addr)
		}}})
		n.p.sys.noHandleFree = func() bool { return !free.Load() }
		var busy []*scripted
		for _, host := range []string{"a", "b", "c", "d"} {
			busy = append(busy, n.borrow(bg, at(host)))
			busy[len(busy)-1].conn()
		}
		late := n.borrow(bg, at("late"))
		for _, b := range busy[:3] {
			time.Sleep(handlePatience * 19 / 20)
			require.True(t, late.waits())
			require.NoError(t, b.giveBack()) // its handle goes elsewhere
		}
		time.Sleep(handlePatience * 19 / 20)
		require.True(t, late.waits())
		free.Store(true)
		require.NoError(t, busy[3].giveBack())
		late.conn()
		n.check()
		require.NoError(t, late.giveBack())
	})
}

func TestDialersThatBreakTheirContractAreContained(t *testing.T) {
	for name, tc := range map[string]struct {
		dial func(n *testnet, ctx context.Context) (net.Conn, error)
		says string
		kind Kind
	}{
		"nothing":   {func(*testnet, context.Context) (net.Conn, error) { return nil, nil }, "neither", KindInternal},
		"typed nil": {func(*testnet, context.Context) (net.Conn, error) { return (*net.TCPConn)(nil), nil }, "neither", KindInternal},
		"both": {func(n *testnet, ctx context.Context) (net.Conn, error) {
			nc, _ := n.dial(ctx, at("a"))
			return nc, errBoom
		}, "boom", KindUnknown},
		"typed nil and error": {func(*testnet, context.Context) (net.Conn, error) { return (*net.TCPConn)(nil), errBoom }, "boom", KindUnknown},
		"panic":               {func(*testnet, context.Context) (net.Conn, error) { panic("oops") }, `Config.Dialers["mem"] panicked: oops`, KindInternal},
		"panic with error":    {func(*testnet, context.Context) (net.Conn, error) { panic(errBoom) }, "panicked: boom", KindInternal},
		"Goexit":              {func(*testnet, context.Context) (net.Conn, error) { runtime.Goexit(); return nil, nil }, "runtime.Goexit", KindInternal},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newTestnet(t)
				works := false
				n.open(Config{MaxPerAddr: 1, Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
					if works {
						return n.dial(ctx, addr)
					}
					return tc.dial(n, ctx)
				}}})
				for range 2 {
					pe := n.fail(bg, at("a"))
					require.Equal(t, StageDial, pe.Stage)
					require.Equal(t, tc.kind, pe.Kind)
					require.ErrorContains(t, pe, tc.says)
					var pan *PanicError
					if errors.As(pe, &pan) {
						require.Equal(t, name != "Goexit", len(pan.Stack) > 0)
					}
					if name == "panic with error" {
						require.ErrorIs(t, pe, errBoom)
					}
					synctest.Wait()
					n.gauges(0, 0, 0)
					require.Empty(t, n.Host("a").Conns())
					n.check()
				}
				works = true
				n.use(at("a"))
			})
		})
	}
}

// The slot of a dial that does not end is free a little after DialTimeout. A connection that
// the dialer returns later is closed.
func TestADialerThatIgnoresItsContextLosesItsSlot(t *testing.T) {
	for name, late := range map[string]func(n *testnet) (net.Conn, error){
		"connection": func(n *testnet) (net.Conn, error) { return n.dial(bg, at("a")) },
		"error":      func(*testnet) (net.Conn, error) { return nil, errBoom },
		"both": func(n *testnet) (net.Conn, error) {
			nc, _ := n.dial(bg, at("a"))
			return nc, errBoom
		},
		"panic":  func(*testnet) (net.Conn, error) { panic("late") },
		"Goexit": func(*testnet) (net.Conn, error) { runtime.Goexit(); return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newTestnet(t)
				var stuck atomic.Bool
				var setups atomic.Int64
				stuck.Store(true)
				n.open(Config{
					MaxPerAddr: 1, DialTimeout: time.Second,
					Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
						if stuck.Load() {
							time.Sleep(time.Minute)
							return late(n)
						}
						return n.dial(ctx, addr)
					}},
					Setup: func(context.Context, Addr, net.Conn) (any, error) { setups.Add(1); return nil, nil },
				})
				start := time.Now()
				first := n.borrow(bg, at("a"))
				synctest.Wait()
				second := n.queue(1, at("a"))[0]
				stuck.Store(false)
				pe := n.fail2(first)
				require.Equal(t, time.Second+hookGrace, time.Since(start))
				require.Equal(t, StageDial, pe.Stage)
				require.Equal(t, KindTimeout, pe.Kind)
				require.ErrorIs(t, pe, context.DeadlineExceeded)
				second.conn()
				require.Equal(t, time.Second+hookGrace, time.Since(start))
				require.EqualValues(t, 1, n.p.Stats().AbandonedCalls)
				n.check()
				time.Sleep(time.Hour)
				require.Len(t, n.Host("a").Conns(), 1, "the late one is closed")
				require.EqualValues(t, 1, setups.Load(), "and nobody sets it up")
				n.gauges(1, 0, 0)
				n.check()
			})
		})
	}
}

// TDBC-X03
func TestADialThatEndsAfterCloseIsClosed(t *testing.T) {
	for _, obedient := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			n := newTestnet(t)
			n.open(Config{Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
				if !obedient {
					time.Sleep(500 * time.Millisecond)
					ctx = bg
				}
				return n.dial(ctx, addr)
			}}})
			n.Host("a").SetLatency(400 * time.Millisecond)
			waiter := n.borrow(bg, at("a"))
			synctest.Wait()
			start := time.Now()
			require.NoError(t, n.p.Close())
			require.ErrorIs(t, waiter.result(), ErrClosed)
			if obedient {
				require.Zero(t, time.Since(start), "the dial was canceled")
				require.Zero(t, n.Host("a").Accepts())
			} else {
				require.Equal(t, 900*time.Millisecond, time.Since(start), "the dial was waited for")
				require.Equal(t, 1, n.Host("a").Accepts())
				n.closed(reasons{ClosedWithPool: 1})
			}
			require.Empty(t, n.Host("a").Conns())
			require.Zero(t, n.p.Stats().Open)
			n.check()
		})
	}
}

func TestADialUnderWayAtRetireIsNotLent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").SetLatency(time.Second)
		waiter := n.borrow(bg, at("a"))
		synctest.Wait()
		n.p.Retire(at("a"))
		require.Equal(t, "a#2", who(waiter.conn()))
		n.closed(reasons{ClosedRetired: 1})
		n.check()
	})
}

func TestBackOffIsPerAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Down()
		for range backoffAfter {
			n.fail(bg, at("a"))
		}
		scoped := Addr{Transport: memory, Host: "a", Scope: "t"}
		start := time.Now()
		n.fail(bg, scoped)
		n.use(at("b"))
		require.Zero(t, time.Since(start))
		n.check()
	})
}

// Otherwise the peer would see more connections than the limit.
func TestTheSlotOfAHungSetupIsFreeOnlyWithItsSocketClosed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		never := make(chan struct{})
		defer close(never)
		n := open(t, Config{MaxPerAddr: 1, DialTimeout: time.Second, Setup: func(context.Context, Addr, net.Conn) (any, error) {
			<-never
			return nil, errBoom
		}})
		require.ErrorIs(t, n.fail(bg, at("a")), context.DeadlineExceeded)
		synctest.Wait()
		require.Zero(t, n.p.Stats().Open)
		require.Empty(t, n.Host("a").Conns())
		require.EqualValues(t, 1, n.p.Stats().AbandonedCalls)
	})
}

// After a burst that returned connections serve, the pool must not keep a connection for
// each borrower: 50 callers, 5 idle, 2 ms of work, 150 ms for a dial.
func TestABurstThatReturnsServeLeavesOneNewConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 5)
		n.Host("a").SetLatency(150 * time.Millisecond)
		start := time.Now()
		done := make(chan time.Duration)
		for range 50 {
			go func() {
				err := n.p.With(bg, at("a"), func(Conn) error { time.Sleep(2 * time.Millisecond); return nil })
				if err != nil {
					t.Error(err)
				}
				done <- time.Since(start)
			}()
		}
		for range 50 {
			require.LessOrEqual(t, <-done, 20*time.Millisecond)
		}
		time.Sleep(surplusPatience)
		synctest.Wait()
		n.check()
		n.gauges(0, 5, 0)
		require.Equal(t, 1, n.p.Stats().Dialing)
		for _, st := range n.p.Addrs() {
			require.False(t, st.BackingOff, "what the pool gave up is no failure of the peer's")
			require.NoError(t, st.LastErr)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		require.LessOrEqual(t, n.Host("a").Accepts(), 6)
		n.gauges(0, 6, 0)
		n.check()
	})
}

// Most dials end before giving them up is worthwhile.
func TestAShortDialIsNotGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 2)
		n.Host("a").SetLatency(surplusPatience / 2)
		holders := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
		for _, h := range holders {
			h.conn()
		}
		waiters := n.queue(4, at("a"))
		for _, h := range holders {
			require.NoError(t, h.giveBack())
		}
		for _, w := range waiters {
			w.conn()
			require.NoError(t, w.giveBack())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		n.gauges(0, 6, 0)
		require.Zero(t, n.p.Stats().DialErrors)
		n.check()
	})
}

// Borrowers that come while dials are given up are served, by a dial of their own if
// necessary.
func TestABorrowerWhoComesAfterADialWasGivenUpIsServed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 8})
		n.idle(at("a"), 1)
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.Host("a").SetLatency(time.Second)
		first := n.queue(4, at("a"))
		require.NoError(t, holder.giveBack())
		for _, w := range first { // one connection serves all
			w.conn()
			require.NoError(t, w.giveBack())
		}
		time.Sleep(surplusPatience)
		synctest.Wait()
		n.check()
		require.Equal(t, 1, n.p.Stats().Dialing)
		again := make([]*scripted, 6)
		for i := range again {
			again[i] = n.borrow(bg, at("a"))
		}
		synctest.Wait()
		n.check()
		for _, w := range again {
			w.conn()
		}
		n.check()
		require.Equal(t, 6, n.p.Stats().InUse)
		for _, w := range again {
			require.NoError(t, w.giveBack())
		}
	})
}
