package connpool

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// BETA-17
func TestSetupRunsOncePerConnectionBeforeAnyBorrower(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var j journal
		var setups atomic.Int64
		n := newTestnet(t)
		n.Host("a").Serve(j.Serve)
		n.open(Config{Setup: func(_ context.Context, addr Addr, nc net.Conn) (any, error) {
			setups.Add(1)
			require.Equal(t, at("a"), addr)
			_, err := askLine(nc, "login")
			return nil, err
		}})
		for range 2 {
			held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
			for _, b := range held {
				b.conn()
				require.NoError(t, b.finish(func(c Conn) error { _, err := askLine(c, "work"); return err }))
			}
		}
		synctest.Wait() // a dial that nobody needed any more may be in its Setup
		require.EqualValues(t, n.Host("a").Accepts(), setups.Load())
		for serial := range n.Host("a").Accepts() {
			lines := j.Of(serial + 1)
			require.Equal(t, "login", lines[0])
			require.NotContains(t, lines[1:], "login")
		}
		n.check()
	})
}

// deed is what a hook can do to a connection, and to the goroutine it runs on.
type deed struct {
	do     func(c net.Conn) error
	says   string
	sound  bool // the connection stays usable after the deed
	panics bool // the borrower gets it as a panic if it ran on its behalf
	hangs  bool // it runs on after the end of its ctx
}

var errHook = errors.New("the hook says no")

func deeds(never <-chan struct{}) map[string]deed {
	return map[string]deed{
		"nothing": {do: func(net.Conn) error { return nil }, sound: true},
		"exchange": {do: func(c net.Conn) error {
			_, err := askLine(c, "PING")
			return err
		}, sound: true},
		"deadline": {do: func(c net.Conn) error { return c.SetDeadline(time.Unix(1, 0)) }, sound: true},
		"error":    {do: func(net.Conn) error { return errHook }, says: errHook.Error()},
		"panic":    {do: func(net.Conn) error { panic(errHook) }, says: "panicked: " + errHook.Error(), panics: true},
		"Goexit":   {do: func(net.Conn) error { runtime.Goexit(); return nil }, says: "runtime.Goexit"},
		"close":    {do: net.Conn.Close, says: "closed the connection"},
		"close, and error": {do: func(c net.Conn) error {
			c.Close()
			return errHook
		}, says: errHook.Error()},
		"swallowed error": {do: func(c net.Conn) error {
			c.SetReadDeadline(time.Unix(1, 0))
			c.Read(make([]byte, 1))
			return nil
		}, says: "timeout"},
		"half close":   {do: func(c net.Conn) error { return c.(interface{ CloseWrite() error }).CloseWrite() }, says: "closed"},
		"reader left":  {do: func(c net.Conn) error { go c.Read(make([]byte, 1)); synctest.Wait(); return nil }},
		"blocked read": {do: func(c net.Conn) error { _, err := c.Read(make([]byte, 1)); return err }, says: "deadline"},
		"blocked":      {do: func(net.Conn) error { <-never; return nil }, says: "deadline", hangs: true},
		"sleeps longer": {do: func(net.Conn) error {
			select {
			case <-time.After(time.Minute):
			case <-never:
			}
			return nil
		}, says: "deadline", hangs: true},
	}
}

// BETA-17
func TestSetupThatFailsInAnyWayIsTheBorrowersAndLeavesNothing(t *testing.T) {
	for name := range deeds(nil) {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				never := make(chan struct{})
				defer close(never)
				d := deeds(never)[name]
				n := newTestnet(t)
				n.Host("a").Serve(echoLines)
				works := false
				n.open(Config{MaxPerAddr: 1, DialTimeout: 2 * time.Second, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
					if works {
						return nil, nil
					}
					return nil, d.do(nc)
				}})
				if d.sound {
					require.Equal(t, "a#1", n.use(at("a")))
					require.Equal(t, "a#1", n.use(at("a")))
					return
				}
				start := time.Now()
				for i := range 2 {
					pe := n.fail(bg, at("a"))
					require.ErrorContains(t, pe, d.says)
					if !d.hangs { // which code took the time is not known then
						require.Equal(t, StageSetup, pe.Stage)
					}
					if name == "error" || name == "panic" {
						require.ErrorIs(t, pe, errHook)
					}
					synctest.Wait()
					n.gauges(0, 0, 0)
					require.Empty(t, n.Host("a").Conns())
					require.EqualValues(t, i+1, n.p.Stats().Closed[ClosedSetupFailed])
					require.Zero(t, n.p.Stats().DialErrors, "what was opened, and closed, counts once") // TRY-53
					require.LessOrEqual(t, time.Since(start), time.Duration(i+1)*(2*time.Second+hookGrace))
					n.check()
				}
				n.closed(reasons{ClosedSetupFailed: 2})
				works = true
				n.use(at("a"))
				if d.hangs {
					require.EqualValues(t, 2, n.p.Stats().AbandonedCalls)
				}
			})
		})
	}
}

// The borrower does not wait for a peer's close, and its error is that of Setup, not that of
// the close.
func TestSetupErrorComesThoughTheCloseHangs(t *testing.T) {
	for _, timeout := range []time.Duration{0, -1} {
		bubble(t, func(t *testing.T) {
			never := make(chan struct{})
			defer close(never)
			n := newTestnet(t)
			n.open(Config{DialTimeout: timeout, Dialers: n.wrapped(hangingClose(never)),
				Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, errHook }})
			start := time.Now()
			ctx, cancel := context.WithTimeout(bg, time.Minute)
			defer cancel()
			require.ErrorIs(t, n.fail(ctx, at("a")), errHook)
			require.LessOrEqual(t, time.Since(start), closeTimeout)
			time.Sleep(closeTimeout)
			synctest.Wait()
			require.Zero(t, n.p.Stats().Open)
			require.EqualValues(t, 1, n.p.Stats().AbandonedCalls)
			n.check()
		})
	}
}

// TDBC-05, ORA-27
func TestResetThatFailsInAnyWayClosesTheConnectionAndHoldsNobodyUp(t *testing.T) {
	for name := range deeds(nil) {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				never := make(chan struct{})
				defer close(never)
				d := deeds(never)[name]
				n := newTestnet(t)
				n.Host("a").Serve(echoLines)
				n.open(Config{MaxPerAddr: 1, HookTimeout: 2 * time.Second, Reset: func(ctx context.Context, c Conn) error {
					return d.do(c)
				}})
				for i, verdict := range []error{nil, Keep(errBoom)} {
					start := time.Now()
					b := n.borrow(bg, at("a"))
					b.conn()
					b.finish(func(Conn) error { return verdict })
					require.LessOrEqual(t, time.Since(start), 2*time.Second+hookGrace)
					if d.panics {
						var pan *PanicError
						require.ErrorAs(t, b.panicked.(error), &pan)
						require.ErrorIs(t, pan, errHook)
						require.Equal(t, "Config.Reset", pan.Where)
					} else {
						require.Nil(t, b.panicked)
						require.Equal(t, unkeep(verdict), b.err, "what becomes of the connection is not the borrower's")
					}
					synctest.Wait()
					n.check()
					if d.sound {
						n.gauges(0, 1, 0)
						continue
					}
					n.gauges(0, 0, 0)
					n.closed(reasons{ClosedResetFailed: uint64(i + 1)})
					require.Empty(t, n.Host("a").Conns())
				}
				if d.hangs {
					require.EqualValues(t, 2, n.p.Stats().AbandonedCalls)
				}
				if d.sound { // the hook does not affect the next borrower
					require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
						_, err := askLine(c, "x")
						return err
					}))
				}
			})
		})
	}
}

// TDBC-05
func TestResetComesBeforeTheNextBorrower(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var j journal
		n := newTestnet(t)
		n.Host("a").Serve(j.Serve)
		n.Host("a").SetDelay(time.Millisecond)
		n.open(Config{MaxPerAddr: 1, Reset: func(_ context.Context, c Conn) error {
			_, err := askLine(c, "RESET")
			return err
		}})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiter := n.queue(1, at("a"))[0] // gets the connection directly from the borrower
		write := func(c Conn) error { _, err := askLine(c, "work"); return err }
		require.NoError(t, holder.finish(write))
		require.Equal(t, "a#1", who(waiter.conn()))
		require.NoError(t, waiter.finish(write))
		require.NoError(t, n.p.With(bg, at("a"), write)) // from the idle stack
		require.Equal(t, []string{"work", "RESET", "work", "RESET", "work", "RESET"}, j.Of(1))
		require.Equal(t, errBoom, n.p.With(bg, at("a"), discard))
		require.Len(t, j.Of(1), 6, "what is closed needs no reset")
		n.check()
	})
}

// A Reset that leaves part of its answer unread puts the connection out of step. No
// borrower gets the connection, and no waiter either.
func TestBytesThatResetLeavesReachNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.Host("a").Serve(echoLines)
		n.open(Config{MaxPerAddr: 1, Reset: func(_ context.Context, c Conn) error {
			_, err := io.WriteString(c, "RESET\n")
			time.Sleep(time.Millisecond)
			return err
		}})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiter := n.queue(1, at("a"))[0]
		require.NoError(t, holder.giveBack())
		require.Equal(t, "a#2", who(waiter.conn()))
		require.NoError(t, waiter.giveBack())
		require.Equal(t, "a#3", n.use(at("a")))
		n.check()
	})
}

// ORA-X12
func TestCheckPrecedesTheLoanOfWhatHasLongBeenIdle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		checks := 0
		var verdict error
		n := open(t, Config{SweepInterval: -1, CheckAfterIdle: 10 * time.Second, Check: func(ctx context.Context, c Conn) error {
			checks++
			require.Positive(t, c.Info().Uses)
			return verdict
		}})
		n.use(at("a"))
		time.Sleep(10*time.Second - 1)
		n.use(at("a"))
		require.Zero(t, checks)
		time.Sleep(10 * time.Second)
		require.Equal(t, "a#1", n.use(at("a")))
		require.Equal(t, 1, checks)
		n.idle(at("a"), 3)
		time.Sleep(10 * time.Second)
		verdict = errHook
		require.Equal(t, "a#4", n.use(at("a")), "as many as fail, and then a new one, which is trusted")
		require.Equal(t, 4, checks)
		synctest.Wait()
		n.closed(reasons{ClosedCheckFailed: 3})
		n.check()
	})
	bubble(t, func(t *testing.T) {
		checks := 0
		n := open(t, Config{CheckAfterIdle: -1, Check: func(context.Context, Conn) error { checks++; return nil }})
		for range 5 {
			n.use(at("a"))
		}
		require.Equal(t, 4, checks, "before every loan but the first")
	})
}

// TDBC-17
func TestCheckThatFailsInAnyWayCostsTheConnectionNotTheBorrow(t *testing.T) {
	for name := range deeds(nil) {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				never := make(chan struct{})
				defer close(never)
				d := deeds(never)[name]
				n := newTestnet(t)
				n.Host("a").Serve(echoLines)
				n.open(Config{MaxPerAddr: 1, CheckAfterIdle: -1, HookTimeout: 2 * time.Second, Check: func(_ context.Context, c Conn) error {
					return d.do(c)
				}})
				n.use(at("a"))
				start := time.Now()
				b := n.borrow(bg, at("a"))
				if d.panics {
					<-b.done
					var pan *PanicError
					require.ErrorAs(t, b.panicked.(error), &pan)
					require.Equal(t, "Config.Check", pan.Where)
					synctest.Wait()
					n.gauges(0, 0, 0)
				} else {
					c := b.conn()
					require.Equal(t, !d.sound, who(c) == "a#2")
					_, err := askLine(c, "x")
					require.NoError(t, err, "the next user feels nothing of the hook")
				}
				require.LessOrEqual(t, time.Since(start), 2*time.Second+hookGrace)
				if !d.sound {
					n.closed(reasons{ClosedCheckFailed: 1})
				}
				n.check()
			})
		})
	}
}

func TestBytesThatCheckLeavesReachNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.Host("a").Serve(echoLines)
		n.open(Config{MaxPerAddr: 1, CheckAfterIdle: -1, Check: func(_ context.Context, c Conn) error {
			_, err := io.WriteString(c, "PING\n")
			time.Sleep(time.Millisecond)
			return err
		}})
		n.use(at("a"))
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			answer, err := askLine(c, "x")
			require.Equal(t, "2 x", answer)
			return err
		}))
	})
}

// If the borrower's ctx ends, the Check that runs for the borrower ends, and the wait ends
// with it.
func TestCheckEndsWithTheBorrowersContext(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{CheckAfterIdle: -1, Check: func(ctx context.Context, c Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		}})
		n.Host("a").SetLatency(time.Millisecond)
		for i := range 2 {
			n.use(at("a"))
			ctx, cancel := context.WithTimeout(bg, time.Second)
			want := context.DeadlineExceeded
			if i == 0 {
				cancel()
				ctx, cancel = context.WithCancel(bg)
				time.AfterFunc(time.Second, cancel)
				want = context.Canceled
			}
			start := time.Now()
			require.ErrorIs(t, n.fail(ctx, at("a")), want)
			require.Equal(t, time.Second, time.Since(start))
			cancel()
			synctest.Wait()
			if i == 0 {
				n.closed(reasons{ClosedCanceled: 1})
			}
			time.Sleep(time.Second) // a dial to replace the connection may be under way
			n.p.CloseIdle()
			synctest.Wait()
			n.check()
		}
	})
}

type codec struct {
	*bufio.Reader
	net.Conn
	logins int
	closed *atomic.Int64
	err    error
}

func (c *codec) Close() error                { c.closed.Add(1); return c.err }
func (c *codec) Read(p []byte) (int, error)  { return c.Reader.Read(p) }
func (c *codec) Write(p []byte) (int, error) { return c.Conn.Write(p) }

// ORA-52
func TestStateStaysWithItsConnectionAndIsClosedWithIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var closed atomic.Int64
		logins := 0
		n := newTestnet(t)
		n.Host("a").Serve(echoLines)
		n.open(Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			logins++
			return &codec{Reader: bufio.NewReader(nc), Conn: nc, logins: logins, closed: &closed, err: errBoom}, nil
		}})
		var out Conn
		var outside *codec
		for round := range 3 {
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				s := State[*codec](c)
				require.Equal(t, 1, s.logins)
				require.Panics(t, func() { State[*bufio.Reader](c) }, "not a T")
				answer, err := askLine(s, "x") // with the Conn that Setup got
				require.Equal(t, "1 x", answer)
				out, outside = c, s
				return err
			}))
			require.Nil(t, State[*codec](out), "after the loan")
			_, err := outside.Conn.Write([]byte("x"))
			require.ErrorIs(t, err, ErrReturned, "the guard sleeps while nobody borrows")
			n.check()
			require.Equal(t, round+1, int(n.p.Stats().Loans))
		}
		two := n.borrow(bg, at("a"))
		two.conn()
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			require.Equal(t, 2, State[*codec](c).logins, "a new connection has a state of its own")
			return nil
		}))
		require.NoError(t, two.giveBack())
		require.Zero(t, closed.Load())
		n.p.EvictLRU()
		require.EqualValues(t, 1, closed.Load())
		require.Len(t, n.Host("a").Conns(), 1, "an error of the state's Close leaves no socket open")
		require.NoError(t, n.p.Close())
		require.EqualValues(t, 2, closed.Load())
	})
}

func TestWhatTheStateHasBufferedCountsAsUnread(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			return bufio.NewReader(nc), nil
		}})
		for i, verdict := range []error{nil, Keep(errBoom)} {
			n.p.With(bg, at("a"), func(c Conn) error {
				n.peer(c).Write([]byte("two lines\nand a rest"))
				_, err := State[*bufio.Reader](c).ReadString('\n')
				require.NoError(t, err)
				return verdict
			})
			synctest.Wait()
			n.gauges(0, 0, 0)
			n.closed(reasons{ClosedDirty: uint64(i + 1)})
			n.check()
		}
	})
}

// Without a Setup the first borrower gets a greeting. If the first borrower leaves the
// greeting unread, no other borrower gets it.
func TestAGreetingBelongsToTheFirstBorrowerAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.Host("a").Serve(func(c *faultnet.Conn) {
			c.Write([]byte("hello"))
			io.Copy(io.Discard, c)
		})
		n.open(Config{})
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			b := make([]byte, 5)
			_, err := io.ReadFull(c, b)
			require.Equal(t, "hello", string(b))
			return err
		}))
		require.Equal(t, "a#1", n.use(at("a")))
		n.p.CloseIdle()
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error { // does not read the greeting
			require.Equal(t, "a#2", who(c))
			synctest.Wait()
			return nil
		}))
		require.Equal(t, "a#3", n.use(at("a")))
		n.check()
	})
}

// TDBC-X07
func TestDeadOnesAreSkippedUntilALiveOneIsFound(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{SweepInterval: -1})
		n.idle(at("a"), 6)
		conns := n.Host("a").Conns()
		conns[1].Close()
		conns[2].Reset()
		conns[3].CloseWrite()
		conns[4].Write([]byte("x"))
		conns[5].Reset()
		require.Equal(t, "a#1", n.use(at("a")))
		synctest.Wait()
		n.gauges(0, 1, 0)
		n.closed(reasons{ClosedStale: 5})
		require.Equal(t, 6, n.Host("a").Accepts())
		n.check()
		conns[0].Reset()
		require.Equal(t, "a#7", n.use(at("a")), "and then a fresh one")
	})
}

func TestNoProbeLendsWhateverThereIs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{NoProbe: true})
		n.use(at("a"))
		n.Host("a").Conns()[0].Reset()
		time.Sleep(defaultSweepInterval)
		n.gauges(0, 1, 0)
		err := n.p.With(bg, at("a"), func(c Conn) error {
			require.Equal(t, "a#1", who(c))
			_, err := c.Read(make([]byte, 1))
			return err
		})
		require.ErrorIs(t, err, syscall.ECONNRESET)
		n.check()
	})
}

// A hook has the connection only while the hook runs.
func TestAHookCannotKeepTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var kept []Conn
		var guard net.Conn
		keep := func(_ context.Context, c Conn) error {
			_, err := c.Detach()
			require.Error(t, err)
			kept = append(kept, c)
			return nil
		}
		n := open(t, Config{CheckAfterIdle: -1, Reset: keep, Check: keep, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			guard = nc
			_, err := nc.(Conn).Detach()
			require.Error(t, err)
			return nil, nil
		}})
		n.use(at("a"))
		n.use(at("a"))
		require.Len(t, kept, 3)
		for _, c := range append(kept, guard.(Conn)) {
			_, err := c.Write([]byte("x"))
			require.ErrorIs(t, err, ErrReturned)
			require.ErrorIs(t, c.Close(), ErrReturned)
		}
		require.NoError(t, n.p.With(bg, at("a"), func(Conn) error {
			for _, c := range kept {
				_, err := c.Write([]byte("x"))
				require.ErrorIs(t, err, ErrReturned)
			}
			_, err := guard.Write([]byte("x"))
			return err
		}))
		n.gauges(0, 1, 0)
	})
}

// USE-05
func TestAHookCostsOneAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a sync.Pool forgets at random")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	hook := func(context.Context, Conn) error { return nil }
	for name, cfg := range map[string]func(*Config){
		"Reset": func(c *Config) { c.Reset = hook },
		"Check": func(c *Config) { c.Check, c.CheckAfterIdle = hook, -1 },
	} {
		p := n.pool(t, cfg)
		loan(t, p, n.addr)
		require.LessOrEqual(t, patience.Allocs(200, func() {
			if err := p.With(context.Background(), n.addr, func(Conn) error { return nil }); err != nil {
				t.Error(err)
			}
		}), 1.0, "%s: its ctx", name)
	}
}

func TestTheCtxOfAHookEndsWithItsRun(t *testing.T) {
	type key struct{}
	bubble(t, func(t *testing.T) {
		var kept []context.Context
		asked := false
		n := open(t, Config{HookTimeout: time.Minute, Reset: func(ctx context.Context, _ Conn) error {
			kept = append(kept, ctx)
			until, ok := ctx.Deadline()
			require.True(t, ok)
			require.Equal(t, time.Minute, time.Until(until))
			require.Equal(t, "v", ctx.Value(key{}))
			if asked = !asked; asked {
				require.NoError(t, ctx.Err())
				below, cancel := context.WithTimeout(ctx, time.Hour)
				defer cancel()
				require.NoError(t, below.Err())
			}
			return nil
		}})
		ctx, cancel := context.WithCancel(context.WithValue(bg, key{}, "v"))
		defer cancel()
		for range 2 {
			require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
		}
		require.Len(t, kept, 2)
		unasked := newHookCtx(n.p, ctx, false) // the pool asks for the end of a ctx only if its hook takes long
		unasked.finish()
		kept = append(kept, unasked)
		for _, old := range kept {
			<-old.Done()
			require.ErrorIs(t, old.Err(), context.Canceled)
			require.Equal(t, "v", old.Value(key{}))
		}
	})
}

func TestACheckThatOutlivesAPanicOfItsCtxIsCounted(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	let := make(chan struct{})
	p := n.pool(t, func(c *Config) {
		c.CheckAfterIdle = -1
		c.Check = func(context.Context, Conn) error { <-let; return nil }
	})
	defer close(let)
	loan(t, p, n.addr)
	require.Panics(t, func() { p.With(doneless{context.Background()}, n.addr, func(Conn) error { return nil }) })
	require.EqualValues(t, 1, p.Stats().AbandonedCalls)
	require.Zero(t, p.Stats().InUse)
}
