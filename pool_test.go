package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// BETA-03, BETA-06
func TestAThousandBorrowsOpenOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for range 1000 {
			require.Equal(t, "a#1", n.use(at("a")))
			n.gauges(0, 1, 0)
		}
		require.Equal(t, 1, n.Host("a").Accepts())
		n.check()
	})
}

// BETA-04
func TestBorrowersAtOnceDialOnceEachAndTheirConnectionsStay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const k = 8
		n := open(t, Config{})
		for range 2 {
			n.idle(at("a"), k)
			n.gauges(0, k, 0)
			require.Equal(t, k, n.Host("a").Accepts())
			n.check()
		}
	})
}

// TDBC-07
func TestTheLastGivenBackIsLentFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		var held []*scripted
		for range 3 {
			b := n.borrow(bg, at("a"))
			b.conn()
			held = append(held, b)
		}
		for _, i := range []int{2, 0, 1} {
			require.NoError(t, held[i].giveBack())
		}
		for range 10 {
			require.Equal(t, "a#2", n.use(at("a")), "a steady load of one uses one connection")
		}
		for _, want := range []string{"a#2", "a#1", "a#3"} {
			b := n.borrow(bg, at("a"))
			require.Equal(t, want, who(b.conn()))
		}
	})
}

// ORA-62, ORA-63
func TestComponentsThatAreRarelyActiveShareFewConnections(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").SetLatency(time.Millisecond)
		const components, workers = 10, 10
		done := make(chan struct{})
		for range components {
			go func() {
				turn := make(chan struct{}, 1) // one worker of a component is active at a time
				over := make(chan struct{})
				for range workers {
					go func() {
						for range 20 {
							turn <- struct{}{}
							n.use(at("a"))
							<-turn
							time.Sleep(time.Millisecond)
						}
						over <- struct{}{}
					}()
				}
				for range workers {
					<-over
				}
				done <- struct{}{}
			}()
		}
		for range components {
			<-done
		}
		require.LessOrEqual(t, n.p.Stats().PeakOpen, components)
		last := n.use(at("a"))
		require.Equal(t, last, n.use(at("a")), "what one gave back serves another")
		n.check()
	})
}

// BETA-12
func TestTheOutcomeOfFnIsTheOutcomeOfWith(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		sentinel := errors.New("verdict")
		wrapped := fmt.Errorf("while asking: %w", sentinel)
		for _, want := range []error{nil, sentinel, wrapped, io.EOF, net.ErrClosed, ErrClosed} {
			err := n.p.With(bg, at("a"), func(Conn) error { return want })
			require.True(t, err == want, "%v came back as %v", want, err)
		}
		require.True(t, sentinel == n.p.With(bg, at("a"), func(Conn) error { return Keep(sentinel) }))
		// With a mark inside the error, With returns another error that wraps it: the mark must
		// not leave With (TRY-01).
		kept := fmt.Errorf("outside: %w", Keep(sentinel))
		err := n.p.With(bg, at("a"), func(Conn) error { return kept })
		require.ErrorIs(t, err, kept)
		require.ErrorIs(t, err, sentinel)
		require.Equal(t, kept.Error(), err.Error())
		n.gauges(0, 1, 0)

		n.Host("b").Down()
		pe := n.fail(bg, at("b"))
		require.Equal(t, StageDial, pe.Stage)
		require.ErrorIs(t, pe, syscall.ECONNREFUSED)
		var as *Error
		require.False(t, errors.As(n.p.With(bg, at("a"), func(Conn) error { return sentinel }), &as))
		n.check()
	})
}

// The table of verdicts: what happens to a connection after each end of fn.
// BETA-06, BETA-22
func TestVerdictOfEachEnd(t *testing.T) {
	late := func(c Conn) error { // a time-out before any byte moved
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		return err
	}
	var n *testnet
	broken := func(c Conn) error { // the peer resets the connection
		n.peer(c).Reset()
		_, err := c.Read(make([]byte, 1))
		return err
	}
	for name, tc := range map[string]struct {
		fn   func(Conn) error
		want CloseReason // ClosedUnknown: the connection is kept
	}{
		"nil":                        {func(Conn) error { return nil }, ClosedUnknown},
		"Keep":                       {func(Conn) error { return Keep(errBoom) }, ClosedUnknown},
		"Keep of nil":                {func(Conn) error { return Keep(nil) }, ClosedUnknown},
		"Keep under another error":   {func(Conn) error { return fmt.Errorf("%w", Keep(errBoom)) }, ClosedUnknown},
		"an error":                   {discard, ClosedFnError},
		"a joined error":             {func(Conn) error { return errors.Join(errBoom, io.EOF) }, ClosedFnError},
		"a time-out that Keep tells": {func(c Conn) error { return Keep(late(c)) }, ClosedUnknown},
		"a time-out, unsaid":         {func(c Conn) error { late(c); return nil }, ClosedTimeout},
		"a time-out, returned":       {late, ClosedFnError},
		"a reset, unsaid":            {func(c Conn) error { broken(c); return nil }, ClosedBroken},
		"a reset that Keep tells":    {func(c Conn) error { return Keep(broken(c)) }, ClosedBroken},
		"an end of stream, unsaid": {func(c Conn) error {
			n.peer(c).CloseWrite()
			c.Read(make([]byte, 1))
			return nil
		}, ClosedBroken},
		"closed for writing":         {func(c Conn) error { return c.CloseWrite() }, ClosedHalfClosed},
		"closed for writing, Keep":   {func(c Conn) error { c.CloseWrite(); return Keep(errBoom) }, ClosedHalfClosed},
		"Close":                      {func(c Conn) error { return c.Close() }, ClosedByBorrower},
		"Close, and an error":        {func(c Conn) error { c.Close(); return errBoom }, ClosedByBorrower},
		"Close twice":                {func(c Conn) error { c.Close(); require.ErrorIs(t, c.Close(), net.ErrClosed); return nil }, ClosedByBorrower},
		"a reader left behind":       {func(c Conn) error { go c.Read(make([]byte, 1)); synctest.Wait(); return nil }, ClosedInFlight},
		"a reader left behind, Keep": {func(c Conn) error { go c.Read(make([]byte, 1)); synctest.Wait(); return Keep(errBoom) }, ClosedInFlight},
		"a deadline left behind":     {func(c Conn) error { return c.SetDeadline(time.Unix(1, 0)) }, ClosedUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n = open(t, Config{MaxPerAddr: 1})
				n.p.With(bg, at("a"), tc.fn)
				synctest.Wait()
				n.check()
				if tc.want == ClosedUnknown {
					n.gauges(0, 1, 0)
					require.Equal(t, "a#1", n.use(at("a")))
				} else {
					n.gauges(0, 0, 0)
					n.closed(reasons{tc.want: 1})
					require.Equal(t, "a#2", n.use(at("a")))
				}
			})
		})
	}
}

// If the ctx is done, the peer may be in the middle of an answer, whatever fn returns.
func TestDoneContextCostsTheConnectionWhateverFnSays(t *testing.T) {
	for _, verdict := range []error{nil, Keep(errBoom), errBoom} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{})
			ctx, cancel := context.WithCancelCause(bg)
			err := n.p.With(ctx, at("a"), func(Conn) error {
				cancel(io.ErrNoProgress)
				return verdict
			})
			require.Equal(t, unkeep(verdict), err)
			synctest.Wait()
			n.closed(reasons{ClosedCanceled: 1})
			n.gauges(0, 0, 0)
			n.check()
		})
	}
}

// BETA-16, G-07
func TestEveryWayOfLeavingFnGivesTheConnectionBack(t *testing.T) {
	const each = 100
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		leave := func(how func(Conn) error) *scripted {
			b := n.borrow(bg, at("a"))
			b.conn()
			b.finish(how)
			return b
		}
		for range each {
			require.NoError(t, leave(func(Conn) error { return nil }).err)
			n.gauges(0, 1, 0)

			require.Equal(t, errBoom, leave(discard).err)
			require.Equal(t, "boom", leave(func(Conn) error { panic("boom") }).panicked)
			require.True(t, leave(func(Conn) error { runtime.Goexit(); return nil }).exited)

			ctx, cancel := context.WithCancel(bg)
			require.ErrorIs(t, n.p.With(ctx, at("a"), func(c Conn) error {
				time.AfterFunc(time.Millisecond, cancel)
				_, err := c.Read(make([]byte, 1))
				return err
			}), context.Canceled)

			require.NoError(t, leave(Conn.Close).err)
			require.NoError(t, leave(func(c Conn) error {
				nc, err := c.Detach()
				if err == nil {
					err = nc.Close()
				}
				return err
			}).err)
		}
		require.NoError(t, leave(func(Conn) error { return nil }).err)
		n.gauges(0, 1, 0)
		n.closed(reasons{ClosedFnError: each, ClosedPanic: each, ClosedGoexit: each, ClosedCanceled: each, ClosedByBorrower: each})
		require.EqualValues(t, each, n.p.Stats().Detached)
		n.check()
	})
}

// ORA-X16
func TestPanicWhileBuildingALayerLeaksNothing(t *testing.T) {
	type layer struct{ c Conn }
	build := func(c Conn) *layer { panic(fmt.Errorf("no layer over %s: %w", who(c), fs.ErrInvalid)) }
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		for range 3 {
			b := n.borrow(bg, at("a"))
			b.conn()
			b.finish(func(c Conn) error { return build(c).c.Close() })
			require.ErrorIs(t, b.panicked.(error), fs.ErrInvalid)
			synctest.Wait()
			n.gauges(0, 0, 0)
			n.check()
		}
		n.closed(reasons{ClosedPanic: 3})
	})
}

// BETA-10
func TestZeroAndClosedPoolsAnswerAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.use(at("a"))
		require.NoError(t, n.p.Close())
		var zero Pool
		for name, p := range map[string]*Pool{"zero": &zero, "closed": n.p} {
			before := time.Now()
			for _, addr := range []Addr{at("a"), at("b"), {}} {
				err := p.With(bg, addr, func(Conn) error { t.Error("fn ran"); return nil })
				var pe *Error
				require.ErrorAs(t, err, &pe, name)
				require.ErrorIs(t, err, ErrClosed, name)
				require.Equal(t, KindUsage, KindOf(err), name)
			}
			_, evicted := p.EvictLRU()
			require.False(t, evicted, name)
			p.Retire(at("a"))
			p.CloseIdle()
			for range p.Addrs() {
				t.Error("books of a pool without connections")
			}
			require.Zero(t, p.Stats().Open, name)
			require.NoError(t, p.Close(), name)
			require.NoError(t, p.Shutdown(bg), name)
			require.Zero(t, time.Since(before), name)
		}
	})
}

func TestMisuseIsToldBeforeAnythingIsTried(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		fn := func(Conn) error { t.Error("fn ran"); return nil }
		for name, tc := range map[string]struct {
			ctx  context.Context
			addr Addr
			fn   func(Conn) error
			says string
		}{
			"nil ctx":                  {nil, at("a"), fn, "ctx"},
			"nil fn":                   {bg, at("a"), nil, "fn"},
			"zero Addr":                {bg, Addr{}, fn, "Transport"},
			"port 0":                   {bg, Addr{Transport: TCP, Host: "a"}, fn, "Port"},
			"no host":                  {bg, at(""), fn, "Host"},
			"a port in the host":       {bg, Addr{Transport: TLS, Host: "a:1", Port: 1}, fn, "Port"},
			"a name where none is":     {bg, Addr{Transport: TCP, Host: "a", Port: 1, ServerName: "b"}, fn, "ServerName"},
			"a transport not dialable": {bg, Addr{Transport: "carrier-pigeon", Host: "a"}, fn, "carrier-pigeon"},
			"DSCP of 7 bits":           {bg, Addr{Transport: memory, Host: "a", QoS: QoS{DSCP: 64}}, fn, "DSCP"},
		} {
			err := n.p.With(tc.ctx, tc.addr, tc.fn)
			var pe *Error
			require.ErrorAs(t, err, &pe, name)
			require.Equal(t, StageUsage, pe.Stage, name)
			require.Equal(t, KindUsage, pe.Kind, name)
			require.ErrorContains(t, err, tc.says, name)
			require.Zero(t, pe.Waited, name)
		}
		require.Error(t, n.p.Shutdown(nil)) //lint:ignore SA1012 that is the mistake
		require.Zero(t, n.p.Stats().Addrs)
		require.Zero(t, n.p.Stats().Dials)
		n.p.Retire(Addr{})
		n.check()
	})
}

func TestDoneContextBorrowsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.use(at("a"))
		ctx, cancel := context.WithCancelCause(bg)
		cancel(io.ErrNoProgress)
		for _, addr := range []Addr{at("a"), at("b")} {
			pe := n.fail(ctx, addr)
			require.Equal(t, StageWait, pe.Stage)
			require.Equal(t, KindCanceled, pe.Kind)
			require.ErrorIs(t, pe, context.Canceled)
			require.ErrorIs(t, pe, io.ErrNoProgress, "the cause of a ctx is part of its error")
		}
		n.gauges(0, 1, 0)
		require.EqualValues(t, 1, n.p.Stats().Dials)
	})
}

func TestCloseInFnFreesTheSlotAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		holder := n.borrow(bg, at("a"))
		c := holder.conn()
		waiter := n.queue(1, at("a"))[0]
		require.NoError(t, c.Close())
		require.Equal(t, "a#2", who(waiter.conn()), "while the fn that closed is still running")
		require.True(t, holder.holds())
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, net.ErrClosed)
		n.check()
		require.NoError(t, holder.giveBack())
		n.gauges(1, 0, 0)
		require.NoError(t, waiter.giveBack())

		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			c.Close()
			require.Equal(t, "a#3", n.use(at("a")))
			return nil
		}))
		n.gauges(0, 1, 0)
		n.check()
	})
}

// BETA-21
func TestDetachFreesTheSlotAndOutlivesThePool(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").Serve(echoLines)
		ctx, cancel := context.WithTimeout(bg, time.Hour)
		holder := n.borrow(ctx, at("a"))
		c := holder.conn()
		waiter := n.queue(1, at("a"))[0]
		nc, err := c.Detach()
		require.NoError(t, err)
		require.Equal(t, "a#2", who(waiter.conn()))
		n.check()
		_, err = c.Write([]byte("x"))
		require.ErrorIs(t, err, ErrReturned)
		_, err = c.Detach()
		require.ErrorIs(t, err, ErrReturned)
		require.NoError(t, holder.giveBack())
		require.NoError(t, waiter.giveBack())
		require.NoError(t, n.p.Close())
		time.Sleep(2 * time.Hour)
		cancel()
		answer, err := askLine(nc, "still here")
		require.NoError(t, err)
		require.Equal(t, "1 still here", answer)
		require.IsType(t, &faultnet.Conn{}, nc)
		require.NoError(t, nc.Close())
		require.EqualValues(t, 1, n.p.Stats().Detached)
	})
}

// BETA-11
func TestNothingInTheAddressIsInterchangeable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{Dialers: map[Transport]DialFunc{"other": n.dial}})
		plain := at("a")
		all := []Addr{
			plain,
			{Transport: "other", Host: "a"},
			{Transport: memory, Host: "b"},
			{Transport: memory, Host: "a", Port: 1},
			{Transport: memory, Host: "a", ServerName: "a"},
			{Transport: memory, Host: "a", Scope: "s"},
			{Transport: memory, Host: "a", QoS: QoS{DSCP: 46}},
			{Transport: memory, Host: "a", QoS: QoS{Delay: true}},
			{Transport: memory, Host: "a", QoS: QoS{KeepAlive: time.Second}},
			{Transport: memory, Host: "a", QoS: QoS{KeepAlive: -1}},
			{Transport: memory, Host: "a", QoS: QoS{UserTimeout: time.Second}},
			{Transport: memory, Host: "a", QoS: QoS{SendBuffer: 1 << 16}},
			{Transport: memory, Host: "a", QoS: QoS{RecvBuffer: 1 << 16}},
		}
		names := make(map[string]Addr)
		for round := range 2 {
			for i, addr := range all {
				require.NoError(t, n.p.With(bg, addr, func(c Conn) error {
					require.Equal(t, addr, c.Addr())
					require.EqualValues(t, i+1, c.Info().ID)
					require.Equal(t, round == 1, c.Info().Reused)
					names[who(c)] = addr
					return nil
				}))
			}
			require.Len(t, names, len(all))
			n.check()
		}
		n.gauges(0, len(all), 0)
		same := Addr{Transport: memory, Host: "a", QoS: QoS{KeepAlive: -time.Hour}}
		require.NoError(t, n.p.With(bg, same, func(c Conn) error {
			require.True(t, c.Info().Reused, "every negative KeepAlive is one value")
			return nil
		}))
	})
}

// TDBC-06
func TestNoDeadlineIsFeltByTheNextBorrower(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Serve(echoLines)
		n.Host("a").SetDelay(time.Second)
		ctx, cancel := context.WithTimeout(bg, 6500*time.Millisecond)
		defer cancel()
		for _, loan := range []struct {
			ctx context.Context
			set func(Conn) error
		}{
			{bg, func(c Conn) error { return c.SetDeadline(time.Unix(1, 0)) }},
			{bg, func(c Conn) error { return c.SetReadDeadline(time.Unix(1, 0)) }},
			{bg, func(c Conn) error { return c.SetWriteDeadline(time.Now().Add(time.Millisecond)) }},
			{ctx, func(Conn) error { return nil }},
		} {
			require.NoError(t, n.p.With(loan.ctx, at("a"), loan.set))
			n.check()
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				answer, err := askLine(c, "x")
				require.Equal(t, "1 x", answer)
				return err
			}))
		}
		require.Equal(t, 1, n.Host("a").Accepts())
	})
}
