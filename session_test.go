package connpool

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// useUnder borrows under ctx, and says which connection it was.
func (n *testnet) useUnder(ctx context.Context, addr Addr) (name string) {
	n.t.Helper()
	require.NoError(n.t, n.p.With(ctx, addr, func(c Conn) error {
		name = who(c)
		return nil
	}))
	n.check()
	return name
}

// session is Pool.Session, ended with the test at the latest.
func (n *testnet) session(ctx context.Context) (context.Context, func()) {
	ctx, end := n.p.Session(ctx)
	n.t.Cleanup(end)
	return ctx, end
}

// APR-17, APR-X21, ORA-29
func TestASessionHasOneConnectionForAnAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").Serve(echoLines)
		ctx, end := n.session(bg)
		n.gauges(0, 0, 0)
		require.NoError(t, n.p.With(ctx, at("a"), func(outer Conn) error {
			child, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			require.NoError(t, n.p.With(child, at("a"), func(inner Conn) error {
				require.Equal(t, outer, inner)
				require.Equal(t, "b#1", n.useUnder(child, at("b")), "another address")
				require.Equal(t, "a#1", n.useUnder(ctx, Addr{Transport: memory, Host: "a"}), "three deep")
				_, err := askLine(inner, "inner")
				return err
			}))
			n.gauges(2, 0, 0)
			_, err := askLine(outer, "outer goes on")
			return err
		}))
		n.gauges(2, 0, 0) // kept
		require.Equal(t, "a#1", n.useUnder(ctx, at("a")))
		stranger := n.queue(1, at("a"))[0]
		require.Equal(t, "a#1", n.useUnder(ctx, at("a")), "nobody is let in between")
		other, endOther := n.session(bg)
		require.Equal(t, "c#1", n.useUnder(other, at("c")))
		endOther()
		n.gauges(2, 1, 1)
		end()
		require.Equal(t, "a#1", who(stranger.conn()))
		require.NoError(t, stranger.giveBack())
		n.gauges(0, 3, 0)
		end() // does nothing
		n.check()
		n.closed(reasons{})
		require.Zero(t, n.p.inSession.Load())
	})
}

// ORA-30
func TestPartsOfARequestInAnyOrderShareOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").Serve(echoLines)
		rng := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			ctx, end := n.p.Session(bg)
			loans := n.p.Stats().Loans
			// Each part borrows for itself, and may call the rest while it holds.
			var parts func(k int)
			parts = func(k int) {
				if k == 0 {
					return
				}
				inside := rng.IntN(2) == 0
				require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
					if inside {
						parts(k - 1)
					}
					_, err := askLine(c, "part")
					return err
				}))
				if !inside {
					parts(k - 1)
				}
			}
			parts(1 + rng.IntN(4))
			n.gauges(1, 0, 0)
			require.Greater(t, n.p.Stats().Loans, loans)
			end()
			n.gauges(0, 1, 0)
			n.check()
		}
		require.EqualValues(t, 1, n.p.Stats().Dials)
	})
}

// ORA-X17
func TestAfterTheEndOfASessionItsCtxBorrowsAfresh(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		ctx, end := n.session(bg)
		var old Conn
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error { old = c; return nil }))
		_, err := old.Write([]byte("x"))
		require.ErrorIs(t, err, ErrReturned, "between two uses nobody has it")
		end()
		b := n.borrow(bg, at("a"))
		require.Equal(t, "a#1", who(b.conn()))
		require.Equal(t, "a#2", n.useUnder(ctx, at("a")), "the old one is somebody else's")
		_, err = old.Write([]byte("x"))
		require.ErrorIs(t, err, ErrReturned)
		n.gauges(1, 1, 0)
		require.NoError(t, n.peer(b.conn()).Probe())
		again, endAgain := n.session(ctx) // a new one inside an old one is no part of it
		require.Equal(t, "a#2", n.useUnder(again, at("a")))
		n.gauges(2, 0, 0)
		endAgain()
		require.NoError(t, b.giveBack())
	})
}

func TestASessionEndsWithItsCtxAndAfterTheUseUnderWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		parent, cancel := context.WithCancel(bg)
		ctx, _ := n.session(parent)
		n.useUnder(ctx, at("a"))
		n.gauges(1, 0, 0)
		cancel()
		synctest.Wait()
		n.gauges(0, 1, 0)
		require.ErrorIs(t, n.fail(ctx, at("a")), context.Canceled)

		// end in the middle of a use, in the same goroutine and in another.
		ctx, end := n.session(bg)
		busy := n.borrow(ctx, at("b"))
		busy.conn()
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
			end()
			n.gauges(2, 0, 0)
			require.Equal(t, who(c), n.useUnder(ctx, at("a")), "what is inside goes on inside")
			n.peer(c).Write([]byte("x"))
			_, err := c.Read(make([]byte, 1))
			return err
		}))
		n.gauges(1, 1, 0)
		require.EqualValues(t, 1, n.p.inSession.Load())
		require.NoError(t, busy.giveBack())
		n.gauges(0, 2, 0)
		require.Zero(t, n.p.inSession.Load())
		n.closed(reasons{})
		n.check()
	})
}

func TestTwoGoroutinesOfASessionTakeTurns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Serve(echoLines)
		ctx, end := n.session(bg)
		var inside, most, total atomic.Int64
		var wg tasks.Group
		for range 20 {
			wg.Go(func() {
				for range 20 {
					err := n.p.With(ctx, at("a"), func(c Conn) error {
						now := inside.Add(1)
						defer inside.Add(-1)
						if now > most.Load() {
							most.Store(now)
						}
						total.Add(1)
						time.Sleep(time.Millisecond)
						_, err := askLine(c, "x")
						return err
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		require.Equal(t, [2]int64{1, 400}, [2]int64{most.Load(), total.Load()})
		require.EqualValues(t, 1, n.p.Stats().Dials)

		// First come, first served; who gives up is passed over.
		first := n.borrow(ctx, at("a"))
		first.conn()
		var line []*scripted
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		for i := range 4 {
			under := ctx
			if i == 1 {
				under = short
			}
			line = append(line, n.borrow(under, at("a")))
			synctest.Wait()
		}
		n.gauges(1, 0, 0) // they wait within the session
		time.Sleep(2 * time.Second)
		var pe *Error
		require.ErrorAs(t, line[1].result(), &pe)
		require.Equal(t, [...]any{StageSession, KindTimeout, time.Second}, [...]any{pe.Stage, pe.Kind, pe.Waited})
		require.NoError(t, first.giveBack())
		for _, i := range []int{0, 2, 3} {
			line[i].conn()
			synctest.Wait()
			for _, j := range []int{2, 3} {
				require.Equal(t, j <= i && line[j].holds(), line[j].holds())
			}
			require.NoError(t, line[i].giveBack())
		}
		// The end lets those in line go on by themselves.
		first = n.borrow(ctx, at("a"))
		first.conn()
		second := n.borrow(ctx, at("a"))
		synctest.Wait()
		require.True(t, second.waits())
		end()
		require.Equal(t, "a#2", who(second.conn()))
		require.NoError(t, second.giveBack())
		require.NoError(t, first.giveBack())
		n.check()
	})
}

func TestAGoroutineThatFnWaitsForIsToldWhyItWaited(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		ctx, end := n.session(bg)
		defer end()
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
			res := make(chan error)
			go func() {
				short, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				res <- n.p.With(short, at("a"), func(Conn) error { return nil })
			}()
			err := <-res
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorContains(t, err, "leave the session out of its ctx")
			n.check()
			go func() { res <- n.p.With(bg, at("a"), func(Conn) error { return nil }) }()
			return <-res
		}))
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }), "no harm was done")
	})
}

func TestResetRunsAtTheEndOfTheSession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		resets := 0
		n := open(t, Config{MaxUses: 2, Reset: func(ctx context.Context, c Conn) error {
			resets++
			if c.Addr().Host == "panics" {
				panic(errBoom)
			}
			return nil
		}})
		ctx, end := n.session(bg)
		for i := range 5 {
			require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
				require.Equal(t, i+1, c.Info().Uses)
				return nil
			}))
		}
		require.Zero(t, resets, "a transaction may be open")
		end()
		require.Equal(t, 1, resets)
		synctest.Wait()
		n.closed(reasons{ClosedMaxUses: 1})
		require.EqualValues(t, 5, n.p.Stats().Loans)
		require.EqualValues(t, 4, n.p.Stats().Reused)

		// Whatever Reset does, all the others are given back.
		ctx, end = n.session(bg)
		for _, host := range []string{"b", "panics", "c", "d"} {
			n.useUnder(ctx, at(host))
		}
		func() {
			defer func() {
				var pan *PanicError
				require.ErrorAs(t, recover().(error), &pan)
			}()
			end()
		}()
		synctest.Wait()
		n.gauges(0, 3, 0)
		require.EqualValues(t, 1, n.p.Stats().Closed[ClosedResetFailed])
		n.check()
		// At the end of the ctx there is nobody whom the panic could reach.
		parent, cancel := context.WithCancel(bg)
		ctx, _ = n.session(parent)
		n.useUnder(ctx, at("panics"))
		cancel()
		synctest.Wait()
		require.EqualValues(t, 2, n.p.Stats().Closed[ClosedResetFailed])
	})
}

// ORA-48
func TestTwoPoolsDoNotKnowEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := open(t, Config{MaxOpen: 1}), open(t, Config{MaxOpen: 2})
		ctx, endA := a.session(bg)
		a.useUnder(ctx, at("x"))
		a.gauges(1, 0, 0)
		b.useUnder(ctx, at("x"))
		b.gauges(0, 1, 0) // no session of b's
		ctx, endB := b.session(ctx)
		b.useUnder(ctx, at("x"))
		b.useUnder(ctx, at("y"))
		a.useUnder(ctx, at("x"))
		a.gauges(1, 0, 0)
		b.gauges(2, 0, 0)
		// The limit of one is not that of the other.
		short, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		require.Equal(t, "MaxOpen", a.fail(short, at("y")).LimitName)
		endA()
		a.gauges(0, 1, 0)
		b.gauges(2, 0, 0)
		require.NoError(t, a.p.Close())
		b.useUnder(ctx, at("x"))
		a.fail(ctx, at("x"))
		endB()
		b.gauges(0, 2, 0)
		require.Equal(t, Stats{Closed: reasons{}, Limit: 2, PeakOpen: 2, Open: 2, Idle: 2, Addrs: 2, Loans: 4, Reused: 2, Dials: 2, Waits: 2}, b.p.Stats())
	})
}

func TestASessionInsideASessionJoinsIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		ctx, end := n.session(bg)
		n.useUnder(ctx, at("a"))
		child, cancel := context.WithCancel(ctx)
		inner, endInner := n.session(child)
		require.Equal(t, "a#1", n.useUnder(inner, at("a")))
		endInner()
		cancel()
		synctest.Wait()
		n.gauges(1, 0, 0)
		require.Equal(t, "a#1", n.useUnder(ctx, at("a")))
		end()
		n.gauges(0, 1, 0)
	})
}

func TestAPoolThatClosesWaitsForItsSessions(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		ctx, end := n.session(bg)
		n.useUnder(ctx, at("a"))
		n.useUnder(ctx, at("b"))
		n.p.Retire(at("a")) // takes effect at the end
		_, evicted := n.p.EvictLRU()
		require.False(t, evicted)
		require.Equal(t, "a#1", n.useUnder(ctx, at("a")))
		busy := n.borrow(ctx, at("c"))
		busy.conn()
		inLine := n.borrow(ctx, at("c"))
		synctest.Wait()
		require.NoError(t, n.p.Close())
		require.ErrorIs(t, inLine.result(), ErrClosed)
		short, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		err := n.p.Shutdown(short)
		require.ErrorContains(t, err, "1 in use for mem://a")
		require.ErrorContains(t, err, "1 in use for mem://b")
		require.ErrorIs(t, n.fail(ctx, at("a")), ErrClosed)
		n.gauges(2, 0, 0) // that one is of no use to anybody
		require.NoError(t, busy.giveBack())
		end()
		require.NoError(t, n.p.Shutdown(bg))
		n.closed(reasons{ClosedWithPool: 3})
		ctx, end = n.session(bg)
		require.ErrorIs(t, n.fail(ctx, at("a")), ErrClosed)
		end()
		require.Zero(t, n.p.inSession.Load())
		ctx, end = new(Pool).Session(bg)
		require.ErrorIs(t, new(Pool).With(ctx, at("a"), discard), ErrClosed)
		end()
	})
}

func TestAForgottenSessionIsTakenBack(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	told := make(chan HeldInfo, 4)
	p := n.pool(t, func(c *Config) {
		c.Debug = true
		c.Trace = &Trace{Leaked: func(i HeldInfo) { told <- i }}
	})
	startAndForget(t, p, n.addr)
	require.Equal(t, 2, p.Stats().InUse)
	soon(t, "the collector to find it", func() bool { runtime.GC(); return p.Stats().Leaked == 2 })
	for range 2 {
		info := inTime(t, told)
		require.Contains(t, info.Place, "startAndForget")
	}
	require.Equal(t, reasons{ClosedLeaked: 2}, settled(t, p).Closed)
	require.Zero(t, p.inSession.Load())
	// One that has a ctx to end with is not forgotten, only not over yet.
	parent, cancel := context.WithCancel(t.Context())
	startAndForgetUnder(t, p, parent, n.addr)
	for range 5 {
		runtime.GC()
	}
	require.EqualValues(t, 2, p.Stats().Leaked)
	require.Equal(t, 1, p.Stats().InUse)
	cancel()
	soon(t, "the end of the ctx to give it back", func() bool { return p.Stats().Idle == 1 })
	p.check(t)
}

//go:noinline
func startAndForget(t *testing.T, p *Pool, addr Addr) {
	ctx, _ := p.Session(context.Background())
	for _, a := range []Addr{addr, scoped(addr, 1)} {
		require.NoError(t, p.With(ctx, a, func(c Conn) error { _, err := ask(c, newToken()); return err }))
	}
}

//go:noinline
func startAndForgetUnder(t *testing.T, p *Pool, parent context.Context, addr Addr) {
	ctx, _ := p.Session(parent)
	require.NoError(t, p.With(ctx, addr, func(c Conn) error { _, err := ask(c, newToken()); return err }))
}

func TestASessionElsewhereCostsALoanNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates on its own account")
	}
	n := open(t, Config{})
	_, end := n.p.Session(bg)
	defer end()
	fn := func(Conn) error { return nil }
	ctx := context.WithValue(bg, sessionKey{nil}, 1) // something to walk past
	require.Zero(t, patience.Allocs(1000, func() {
		if n.p.With(ctx, at("a"), fn) != nil {
			panic("With failed")
		}
	}))
}
