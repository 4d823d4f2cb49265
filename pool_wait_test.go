package connpool

import (
	"context"
	"fmt"
	"io"
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

// APR-X07
func TestWaitersAreServedInTheOrderTheyCame(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiters := n.queue(20, at("a"))
		for i, w := range waiters {
			require.NoError(t, holder.giveBack())
			newcomer := n.borrow(bg, at("a"))
			synctest.Wait()
			require.True(t, w.holds(), "waiter %d", i)
			require.True(t, newcomer.waits(), "a newcomer overtook waiter %d", i)
			n.check()
			holder = w
			newcomer.quit()
		}
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#1", n.use(at("a")))
	})
}

// APR-06, APR-08: a few connections serve many borrowers, strictly in turn.
func TestFewConnectionsServeMany(t *testing.T) {
	for _, limit := range []int{1, 4} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxPerAddr: limit})
			n.Host("a").Serve(echoLines)
			n.Host("a").SetDelay(time.Millisecond)
			n.Host("a").SetLatency(5 * time.Millisecond)
			var inside, served atomic.Int64
			var all tasks.Group
			for w := range 50 {
				all.Go(func() {
					for i := range 5 {
						token := fmt.Sprint(w, "-", i)
						err := n.p.With(bg, at("a"), func(c Conn) error {
							if now := inside.Add(1); int(now) > limit {
								t.Errorf("%d inside, %d allowed", now, limit)
							}
							defer inside.Add(-1)
							answer, err := askLine(c, token)
							if err == nil && answer[2:] != token {
								t.Errorf("%q got %q", token, answer)
							}
							return err
						})
						if err == nil {
							served.Add(1)
						}
					}
				})
			}
			all.Wait()
			require.EqualValues(t, 250, served.Load())
			require.Equal(t, limit, n.p.Stats().PeakOpen)
			require.Equal(t, limit, n.Host("a").Accepts())
			n.check()
		})
	}
}

// APR-X05
func TestAWaitEndsExactlyWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
		defer cancel()
		start := time.Now()
		pe := n.fail(ctx, at("a"))
		require.Equal(t, 50*time.Millisecond, time.Since(start))
		require.Equal(t, 50*time.Millisecond, pe.Waited)
		require.Equal(t, StageWait, pe.Stage)
		require.Equal(t, KindTimeout, pe.Kind)
		require.True(t, pe.Timeout())
		require.ErrorIs(t, pe, context.DeadlineExceeded)
		require.Equal(t, [5]int{1, 1, 0, 0, 1}, [5]int{pe.Open, pe.InUse, pe.Idle, pe.Waiting, pe.Limit})
		require.Equal(t, "connpool: wait mem://a: context deadline exceeded; the longest loan has lasted 50ms"+
			" (1 of 1 in use, 0 waiting;"+
			" raise MaxPerAddr, borrow for a shorter time, or give ctx longer), after 50ms", pe.Error())
		n.gauges(1, 0, 0)
		require.EqualValues(t, 1, n.p.Stats().WaitsFailed)

		ctx, stop := context.WithCancel(bg)
		waiter := n.borrow(ctx, at("a"))
		time.Sleep(time.Second)
		require.True(t, waiter.waits())
		stop()
		require.ErrorIs(t, waiter.result(), context.Canceled)
		require.Equal(t, KindCanceled, KindOf(waiter.err))
		n.check()
	})
}

// BETA-X12
func TestALimitNotSetNeverMeansFailNow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 1}) // everything else is zero
		holder := n.borrow(bg, at("a"))
		holder.conn()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		waiter := n.borrow(ctx, at("a"))
		other := n.borrow(ctx, at("b"))
		time.Sleep(999 * time.Millisecond)
		require.True(t, waiter.waits())
		require.True(t, other.waits())
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#1", who(waiter.conn()))
		require.NoError(t, waiter.giveBack())
		require.Equal(t, "b#1", who(other.conn()))
	})
	bubble(t, func(t *testing.T) { // with the zero Config a dial and a hook may take long
		n := open(t, Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { time.Sleep(4 * time.Second); return nil, nil },
			Reset: func(context.Context, Conn) error { time.Sleep(4 * time.Second); return nil }})
		n.Host("a").SetLatency(4 * time.Second)
		require.Equal(t, "a#1", n.use(at("a")))
		require.Equal(t, "a#1", n.use(at("a")))
	})
}

// APR-X06: a waiter is handed a connection that turns out to be unfit. The waiter has to go
// on waiting, its time goes on, and it keeps its place.
func TestAWaitIsTimedOnceAndKeepsItsPlace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, CheckAfterIdle: -1, Check: func(context.Context, Conn) error {
			time.Sleep(400 * time.Millisecond)
			return errBoom
		}})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		start := time.Now()
		waiter := n.borrow(ctx, at("a"))
		synctest.Wait()
		newcomer := n.queue(1, at("a"))[0]
		time.Sleep(200 * time.Millisecond)
		n.Host("a").SetLatency(10 * time.Second)
		require.NoError(t, holder.giveBack()) // it is checked until 600 ms, without success
		time.Sleep(500 * time.Millisecond)
		n.check()
		require.Equal(t, 1, n.p.Stats().Dialing)
		require.ErrorIs(t, waiter.result(), context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(start))
		var pe *Error
		require.ErrorAs(t, waiter.err, &pe)
		require.Equal(t, time.Second, pe.Waited)
		n.check()
		require.Equal(t, "a#2", who(newcomer.conn()))
	})
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		c := holder.conn()
		waiters := n.queue(2, at("a"))
		n.peer(c).Write([]byte("nobody asked"))
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#2", who(waiters[0].conn()))
		synctest.Wait()
		require.True(t, waiters[1].waits(), "the younger one overtook")
		n.closed(reasons{ClosedStale: 1})
		n.check()
	})
}

// A real socket, whose close frees the slot at once.
// APR-X07
func TestAWaiterHandedADirtyConnectionKeepsItsPlace(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{Handler: func(p *faultnet.Peer) {
		p.Write([]byte("ab"))
		p.Read(make([]byte, 1))
	}})
	require.NoError(t, err)
	defer srv.Close()
	dialed := make(chan struct{}, 10)
	p, err := New(Config{MaxPerAddr: 1, Trace: &Trace{
		DialDone: func(DialInfo) { dialed <- struct{}{} },
		Closed: func(i CloseInfo) { // the borrower must have its place in the queue by now
			if i.Reason != ClosedDirty {
				return
			}
			select {
			case <-dialed:
			case <-time.After(time.Minute):
				t.Error("no dial in its place")
			}
		},
	}})
	require.NoError(t, err)
	defer p.Close()
	addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
	order := make(chan int, 5)
	borrow := func(i int, fn func(Conn) error) <-chan error {
		done := make(chan error, 1)
		go func() {
			done <- p.With(bg, addr, func(c Conn) error {
				order <- i
				return fn(c)
			})
		}()
		require.Eventually(t, func() bool { st := p.Stats(); return st.InUse == 1 && st.Waiting == i }, time.Minute, time.Millisecond)
		return done
	}
	// A borrower that reads one byte of two leaves the other unread.
	half := func(c Conn) error {
		_, err := c.Read(make([]byte, 1))
		return err
	}
	release := make(chan struct{})
	ends := []<-chan error{borrow(0, func(c Conn) error { <-release; return half(c) })}
	for i := 1; i < 5; i++ {
		ends = append(ends, borrow(i, half))
	}
	<-dialed
	close(release)
	for i, end := range ends {
		require.NoError(t, <-end)
		require.Equal(t, i, <-order)
	}
	require.Equal(t, uint64(4), p.Stats().Closed[ClosedDirty])
	p.check(t)
}

// APR-X09
func TestDiscardWakesTheOldestWaiter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiters := n.queue(3, at("a"))
		for i, w := range waiters {
			require.Equal(t, errBoom, holder.finish(discard))
			require.Equal(t, fmt.Sprintf("a#%d", i+2), who(w.conn()))
			n.check()
			holder = w
		}
	})
}

// A slot may get lost at each event that can free one. Each event is tested with a waiter
// of the same address and with one of another.
// APR-X09, APR-X10, BETA-22
func TestEveryEventThatFreesASlotServesAWaiter(t *testing.T) {
	type scene struct {
		*testnet
		holder *scripted
		cancel context.CancelFunc
	}
	end := func(how func(Conn) error) func(*scene) {
		return func(s *scene) { s.holder.end <- how }
	}
	for name, tc := range map[string]struct {
		cfg  Config
		free func(*scene)
	}{
		"give back":      {Config{}, end(func(Conn) error { return nil })},
		"error":          {Config{}, end(discard)},
		"panic":          {Config{}, end(func(Conn) error { panic("x") })},
		"Goexit":         {Config{}, end(func(Conn) error { runtime.Goexit(); return nil })},
		"Close":          {Config{}, end(Conn.Close)},
		"Detach":         {Config{}, end(func(c Conn) error { nc, _ := c.Detach(); return nc.Close() })},
		"half close":     {Config{}, end(Conn.CloseWrite)},
		"reader left":    {Config{}, end(func(c Conn) error { go c.Read(make([]byte, 1)); synctest.Wait(); return nil })},
		"ctx":            {Config{}, func(s *scene) { s.cancel(); s.holder.quit() }},
		"MaxUses":        {Config{MaxUses: 1}, end(func(Conn) error { return nil })},
		"MaxIdle":        {Config{MaxIdle: -1}, end(func(Conn) error { return nil })},
		"MaxLifetime":    {Config{MaxLifetime: time.Second}, end(func(Conn) error { time.Sleep(time.Second); return nil })},
		"Retire":         {Config{}, func(s *scene) { s.p.Retire(at("a")); s.holder.quit() }},
		"Reset fails":    {Config{Reset: func(context.Context, Conn) error { return errBoom }}, end(func(Conn) error { return nil })},
		"Reset panics":   {Config{Reset: func(context.Context, Conn) error { panic("x") }}, end(func(Conn) error { return nil })},
		"PutConn panics": {Config{Trace: &Trace{PutConn: func(PutInfo) { panic("x") }}}, end(func(Conn) error { return nil })},
	} {
		for _, limits := range []Config{{MaxPerAddr: 1}, {MaxOpen: 1}} {
			for _, host := range []string{"a", "b"} {
				if limits.MaxPerAddr > 0 && host == "b" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/%s", name, limits.MaxOpen, host), func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						tc.cfg.MaxPerAddr, tc.cfg.MaxOpen = limits.MaxPerAddr, limits.MaxOpen
						ctx, cancel := context.WithCancel(bg)
						defer cancel()
						n := open(t, tc.cfg)
						s := &scene{n, n.borrow(ctx, at("a")), cancel}
						s.holder.conn()
						waiter := n.queue(1, at(host))[0]
						tc.free(s)
						waiter.conn()
						n.check()
						waiter.quit()
						<-waiter.done
						<-s.holder.done
						n.check()
					})
				})
			}
		}
	}
}

// APR-X10
func TestAFailedDialLetsTheNextWaiterTry(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").SetLatency(time.Millisecond)
		n.Host("a").FailNext(syscall.ECONNREFUSED)
		bs := make([]*scripted, 5)
		for i := range bs {
			bs[i] = n.borrow(bg, at("a"))
			synctest.Wait()
		}
		require.ErrorIs(t, bs[0].result(), syscall.ECONNREFUSED)
		for _, b := range bs[1:] {
			require.Equal(t, "a#1", who(b.conn()))
			n.check()
			require.NoError(t, b.giveBack())
		}
		n.gauges(0, 1, 0)
	})
	for name, setup := range map[string]func() (any, error){
		"error": func() (any, error) { return nil, errBoom },
		"panic": func() (any, error) { panic(errBoom) },
	} {
		bubble(t, func(t *testing.T) {
			first := true
			n := open(t, Config{MaxPerAddr: 1, Setup: func(context.Context, Addr, net.Conn) (any, error) {
				if first {
					first = false
					return setup()
				}
				return nil, nil
			}})
			n.Host("a").SetLatency(time.Millisecond)
			bs := make([]*scripted, 5)
			for i := range bs {
				bs[i] = n.borrow(bg, at("a"))
				synctest.Wait()
			}
			require.ErrorIs(t, bs[0].result(), errBoom, name)
			for _, b := range bs[1:] {
				require.Equal(t, "a#2", who(b.conn()), name)
				n.check()
				require.NoError(t, b.giveBack())
			}
		})
	}
}

func TestACancelledWaiterIsNeverHandedAConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		for range 100 {
			holder := n.borrow(bg, at("a"))
			holder.conn()
			ctx, cancel := context.WithCancel(bg)
			gone := n.borrow(ctx, at("a"))
			synctest.Wait()
			next := n.queue(1, at("a"))[0]
			cancel() // its goroutine has not run yet when the connection comes
			require.NoError(t, holder.giveBack())
			require.ErrorIs(t, gone.result(), context.Canceled)
			require.Empty(t, gone.got, "fn ran")
			require.Equal(t, "a#1", who(next.conn()))
			n.check()
			require.NoError(t, next.giveBack())
		}
		require.Empty(t, n.p.Stats().Closed)
	})
	// The same between queueing and waiting: first the ctx ends, then the connection comes.
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		for range 100 {
			holder := n.borrow(bg, at("a"))
			holder.conn()
			ctx, cancel := context.WithCancel(bg)
			ctx = WithTrace(ctx, &Trace{Wait: func(WaitInfo) {
				cancel()
				require.NoError(t, holder.giveBack())
			}})
			require.ErrorIs(t, n.fail(ctx, at("a")), context.Canceled)
			n.gauges(0, 1, 0)
			n.check()
		}
		require.Equal(t, 1, n.Host("a").Accepts())
	})
}

// BETA-X01
func TestAFullPoolMakesRoomByItself(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex
		var closed []Addr
		n := open(t, Config{MaxOpen: 4, Trace: &Trace{Closed: func(i CloseInfo) {
			mu.Lock()
			defer mu.Unlock()
			closed = append(closed, i.Addr)
		}}})
		for _, host := range []string{"1", "2", "3", "4", "1", "5", "6"} {
			n.use(at(host))
			time.Sleep(time.Millisecond)
			n.check()
		}
		mu.Lock()
		require.Equal(t, []Addr{at("2"), at("3")}, closed)
		mu.Unlock()
		n.closed(reasons{ClosedEvicted: 2})
		require.Equal(t, 4, n.p.Stats().PeakOpen)
		require.Empty(t, n.Host("2").Conns())
		require.Len(t, n.Host("1").Conns(), 1)
	})
}

func TestAFreedSlotGoesToTheOldestWaiterOfThePool(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		var waiters []*scripted
		for _, host := range []string{"c", "b", "d", "b", "c"} {
			waiters = append(waiters, n.queue(1, at(host))...)
		}
		for i, w := range waiters {
			require.Equal(t, errBoom, holder.finish(discard))
			w.conn()
			for _, later := range waiters[i+1:] {
				require.True(t, later.waits())
			}
			n.check()
			holder = w
		}
	})
}

func TestABusyAddressCannotStarveAnOlderWaiter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const limit = 3
		n := open(t, Config{MaxOpen: limit})
		stop := make(chan struct{})
		var busy tasks.Group
		for range 10 * limit { // a always has waiters
			busy.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if n.p.With(bg, at("a"), func(Conn) error { time.Sleep(time.Millisecond); return nil }) != nil {
						return
					}
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		for range 5 {
			ctx, cancel := context.WithTimeout(bg, time.Second)
			require.NoError(t, n.p.With(ctx, at("b"), func(Conn) error { return nil }))
			cancel()
			n.check()
		}
		close(stop)
		busy.Wait()
		require.LessOrEqual(t, n.p.Stats().PeakOpen, limit)
	})
}

func TestMaxWaitersRefusesOneMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, MaxWaiters: 2})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiters := n.queue(2, at("a"))
		pe := n.fail(bg, at("a"))
		require.ErrorIs(t, pe, ErrExhausted)
		require.Equal(t, KindResource, pe.Kind)
		require.Equal(t, StageWait, pe.Stage)
		require.Equal(t, "MaxWaiters", pe.LimitName)
		require.Equal(t, 2, pe.Limit)
		require.Zero(t, pe.Waited)
		require.EqualValues(t, 1, n.p.Stats().Exhausted)
		n.gauges(1, 0, 2)
		other := n.borrow(bg, at("b")) // has a queue of its own
		other.conn()
		n.check()
		require.NoError(t, holder.giveBack())
		waiters[0].conn()
		third := n.queue(1, at("a"))[0]
		require.ErrorIs(t, n.fail(bg, at("a")), ErrExhausted)
		// A borrower whose dial is under way does not count: both are served at once.
		require.Equal(t, errBoom, waiters[0].finish(discard))
		waiters[1].conn()
		require.NoError(t, waiters[1].giveBack())
		third.conn()
		n.check()
	})
}

// A borrower is served when it is handed a connection. If the connection turns out to be dead,
// the borrower gets its old place back. A connection that became free during the borrower's
// probe has gone to the next waiter, which would have waited for nothing otherwise. After
// that nobody overtakes the borrower.
//
// TRY-54
func TestABorrowerThatFoundItsConnectionDeadIsOvertakenDuringItsLookOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var mu sync.Mutex
		made := make(map[string]*strange)
		n.open(Config{MaxPerAddr: 2, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			mu.Lock()
			defer mu.Unlock()
			s := &strange{Conn: c}
			made[c.LocalAddr().String()] = s
			return s
		})})
		first, second := n.borrow(bg, at("a")), n.borrow(bg, at("a"))
		dies, lives := who(first.conn()), who(second.conn())
		line := n.queue(4, at("a"))
		made[dies].probe = func() error { // the probe of the oldest waiter's connection
			require.NoError(t, second.giveBack())
			require.Equal(t, lives, who(line[1].conn()), "the next does not wait for a look")
			return io.EOF
		}
		require.NoError(t, first.giveBack())
		synctest.Wait()
		require.Equal(t, "a#3", who(line[0].conn()), "the slot of the dead one is for whom it was handed to")
		require.True(t, line[2].waits())
		require.NoError(t, line[1].giveBack())
		require.Equal(t, lives, who(line[2].conn()))
		require.True(t, line[3].waits())
		require.NoError(t, line[0].giveBack())
		require.Equal(t, "a#3", who(line[3].conn()))
		synctest.Wait()
		n.closed(reasons{ClosedStale: 1})
		n.check()
	})
}

// While an idle connection could make room, it is not the slots that keep the older borrower of
// another address waiting, but MaxDialing. So no connection is closed for that borrower.
func TestNoConnectionIsClosedForWhoWaitsForADialOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 3, MaxDialing: 1, IdleTimeout: -1, SweepInterval: -1})
		n.idle(at("idle"), 1)
		holder := n.borrow(bg, at("busy"))
		holder.conn()
		n.Host("hole").BlackHole(true)
		ctx, cancel := context.WithCancel(bg)
		defer cancel()
		n.borrow(ctx, at("hole")) // has the only dial
		synctest.Wait()
		older := n.borrow(ctx, at("other"))
		synctest.Wait()
		require.True(t, older.waits())
		for range 6 { // more often than there are slots
			next := n.queue(1, at("busy"))[0]
			require.NoError(t, holder.giveBack())
			next.conn()
			holder = next
		}
		n.closed(reasons{})
		require.NoError(t, holder.giveBack())
	})
}
