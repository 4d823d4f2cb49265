package connpool

import (
	"context"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// forget is what the garbage collector does about a lease that nobody can reach,
// for where it cannot: in a bubble.
func forget(l *Lease) {
	l.cleanup.Stop()
	l.state = leaseOver
	leakedLease(l.c)
	settleBubble()
}

func (n *testnet) lease(addr Addr) *Lease {
	n.t.Helper()
	l, err := n.p.Lease(bg, addr)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { l.Return() }) // and it cannot be forgotten: the collector knows no bubbles
	return l
}

// TDBC-03
func TestASecondReturnDoesNothingAndSaysSo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 2})
		l := n.lease(at("a"))
		n.gauges(1, 0, 0)
		require.NoError(t, l.Return())
		n.gauges(0, 1, 0)
		next := n.lease(at("a")) // the same connection, in other hands
		peer := n.peer(Conn{next.c, next.gen})
		require.Same(t, l.c, next.c)
		for what, again := range map[string]func() error{
			"Return": l.Return, "Close": l.Close, "Discard": l.Discard, "CloseWrite": l.CloseWrite,
			"Read":        func() error { _, err := l.Read(make([]byte, 1)); return err },
			"Write":       func() error { _, err := l.Write([]byte("stray")); return err },
			"ReadFrom":    func() error { _, err := l.ReadFrom(new(io.LimitedReader)); return err },
			"WriteTo":     func() error { _, err := l.WriteTo(io.Discard); return err },
			"SetDeadline": func() error { return l.SetDeadline(time.Now()) },
			"SyscallConn": func() error { _, err := l.SyscallConn(); return err },
			"Detach":      func() error { _, err := l.Detach(); return err },
			"Do":          func() error { return l.Do(bg, func(Conn) error { t.Error("fn ran"); return nil }) },
		} {
			err := again()
			require.ErrorIs(t, err, ErrReturned, what)
			require.ErrorIs(t, err, net.ErrClosed, what)
			require.Equal(t, KindUsage, KindOf(err), what)
		}
		require.Equal(t, [...]any{nil, nil, at("a"), ConnInfo{Addr: at("a")}}, [...]any{l.LocalAddr(), l.RemoteAddr(), l.Addr(), l.Info()})
		require.NoError(t, peer.Probe(), "nothing was sent, nothing was closed")
		require.NotSame(t, next.c, n.lease(at("a")).c, "one connection, one owner")
		n.gauges(2, 0, 0)
		n.check()
		n.closed(reasons{})
	})
}

// ORA-22: Close gives back what Lease borrowed, and closes what With borrowed.
func TestClosingALeaseGivesBackAndClosingAConnDiscards(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxOpen = 1 })
		serial := func() int { return loan(t, p, n.addr).serial }
		first := serial()
		l, err := p.Lease(t.Context(), n.addr)
		require.NoError(t, err)
		r, err := ask(l, newToken())
		require.NoError(t, err)
		require.Equal(t, first, r.serial)
		require.NoError(t, l.Close())
		require.Equal(t, first, serial())
		require.NoError(t, p.With(t.Context(), n.addr, Conn.Close))
		second := serial()
		require.NotEqual(t, first, second)
		l, err = p.Lease(t.Context(), n.addr)
		require.NoError(t, err)
		require.NoError(t, l.Discard())
		require.NotEqual(t, second, serial())
		p.check(t)
		settled(t, p)
		require.Equal(t, reasons{ClosedByBorrower: 2}, p.Stats().Closed)
	})
}

// ORA-32
func TestALeaseLastsAcrossCalls(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.IdleTimeout, c.MaxLifetime = time.Millisecond, time.Millisecond })
		ctx, cancel := context.WithCancel(t.Context())
		l, err := p.Lease(ctx, n.addr)
		require.NoError(t, err)
		cancel() // it governed the wait
		var serials []int
		for i := range 3 {
			soon(t, "older than it may become", func() bool { return l.Info().Age > time.Millisecond })
			if i == 1 { // also through Do
				require.NoError(t, l.Do(t.Context(), func(c Conn) error {
					r, err := ask(c, newToken())
					serials = append(serials, r.serial)
					return err
				}))
				continue
			}
			r, err := ask(l, newToken())
			require.NoError(t, err)
			serials = append(serials, r.serial)
			p.check(t)
		}
		require.Equal(t, []int{serials[0], serials[0], serials[0]}, serials)
		require.Equal(t, 1, p.Stats().InUse)
		require.Equal(t, n.tls, l.ConnectionState().HandshakeComplete)
		require.NotNil(t, l.RemoteAddr())
		require.EqualValues(t, 1, l.Info().ID)
		require.NoError(t, l.Return())
		require.Zero(t, p.Stats().InUse)
		require.Equal(t, uint64(1), settled(t, p).Closed[ClosedLifetime], "its age counts at its end")
	})
}

func TestALeaseIsJudgedAsALoanIs(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  Config
		do   func(t *testing.T, n *testnet, l *Lease)
		want CloseReason // unknown: kept
	}{
		"nothing":  {Config{}, func(*testing.T, *testnet, *Lease) {}, ClosedUnknown},
		"exchange": {Config{}, func(t *testing.T, n *testnet, l *Lease) { _, err := askLine(l, "x"); require.NoError(t, err) }, ClosedUnknown},
		"timeout": {Config{}, func(t *testing.T, n *testnet, l *Lease) {
			require.NoError(t, l.SetReadDeadline(time.Now().Add(time.Second)))
			_, err := l.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		}, ClosedTimeout},
		"timeout, then Do": {Config{}, func(t *testing.T, n *testnet, l *Lease) {
			require.NoError(t, l.SetReadDeadline(time.Now().Add(time.Second)))
			_, err := l.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NoError(t, l.Do(bg, func(c Conn) error { _, err := askLine(c, "x"); return err }))
		}, ClosedTimeout},
		"end of stream": {Config{}, func(t *testing.T, n *testnet, l *Lease) {
			n.peer(Conn{l.c, l.gen}).Close()
			_, err := l.Read(make([]byte, 1))
			require.Equal(t, io.EOF, err)
		}, ClosedBroken},
		"half-closed": {Config{}, func(t *testing.T, n *testnet, l *Lease) { require.NoError(t, l.CloseWrite()) }, ClosedHalfClosed},
		"half-closed in Do": {Config{}, func(t *testing.T, n *testnet, l *Lease) {
			require.NoError(t, l.Do(bg, Conn.CloseWrite))
			_, err := l.Read(make([]byte, 1)) // what the peer still says can be read
			require.Equal(t, io.EOF, err)
		}, ClosedBroken},
		"in flight": {Config{}, func(t *testing.T, n *testnet, l *Lease) {
			go l.Read(make([]byte, 1))
			synctest.Wait()
		}, ClosedInFlight},
		"leftovers": {Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { return new(buffered), nil }},
			func(_ *testing.T, _ *testnet, l *Lease) { *State[*buffered](Conn{l.c, l.gen}) = 1 }, ClosedDirty},
		"Reset fails": {Config{Reset: func(context.Context, Conn) error { return errBoom }},
			func(*testing.T, *testnet, *Lease) {}, ClosedResetFailed},
		"retired":   {Config{}, func(t *testing.T, n *testnet, l *Lease) { n.p.Retire(at("a")) }, ClosedRetired},
		"uses":      {Config{MaxUses: 1}, func(*testing.T, *testnet, *Lease) {}, ClosedMaxUses},
		"closed":    {Config{}, func(t *testing.T, n *testnet, l *Lease) { require.NoError(t, n.p.Close()) }, ClosedWithPool},
		"discarded": {Config{}, func(t *testing.T, n *testnet, l *Lease) { require.NoError(t, l.Discard()) }, ClosedByBorrower},
		"evicted":   {Config{}, func(t *testing.T, n *testnet, l *Lease) { n.p.EvictLRU(); n.p.CloseIdle() }, ClosedUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, c.cfg)
				n.Host("a").Serve(echoLines)
				l := n.lease(at("a"))
				c.do(t, n, l)
				n.check()
				l.Return()
				synctest.Wait()
				want := reasons{}
				if c.want != ClosedUnknown {
					want[c.want] = 1
				}
				n.closed(want)
				n.check()
				require.Zero(t, n.p.Stats().InUse)
			})
		})
	}
}

type buffered int

func (b *buffered) Buffered() int { return int(*b) }

func TestALeaseWaitsItsTurnAndGivesUpWithItsCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		l := n.lease(at("a"))
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		_, err := n.p.Lease(ctx, at("a"))
		var pe *Error
		require.ErrorAs(t, err, &pe)
		require.Equal(t, [...]any{StageWait, KindTimeout, time.Second}, [...]any{pe.Stage, pe.Kind, pe.Waited})
		w := n.queue(1, at("a"))[0]
		require.NoError(t, l.Return())
		w.conn()
		require.NoError(t, w.giveBack())

		l = n.lease(at("a"))
		short, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		require.ErrorContains(t, n.p.Shutdown(short), "1 in use for mem://a (for 1s)")
		require.NoError(t, l.Return())
		_, err = n.p.Lease(bg, at("a"))
		require.ErrorIs(t, err, ErrClosed)
		_, err = new(Pool).Lease(bg, at("a"))
		require.ErrorIs(t, err, ErrClosed)
		var none context.Context
		_, err = n.p.Lease(none, at("a"))
		require.ErrorContains(t, err, "ctx is nil")
	})
}

func TestDoGovernsItsIOByItsCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		l := n.lease(at("a"))
		var kept Conn
		require.NoError(t, l.Do(bg, func(c Conn) error { kept = c; return nil }))
		_, err := kept.Write([]byte("x"))
		require.ErrorIs(t, err, ErrReturned, "nothing of Do outlives it")
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		// A read that timed out with a deadline of fn's own, and Keep: in order.
		require.Equal(t, errBoom, l.Do(ctx, func(c Conn) error {
			c.SetReadDeadline(time.Now().Add(time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			return Keep(errBoom)
		}))
		require.True(t, !l.c.watched() && !l.c.deadlineSet, "no deadline outlives Do")
		n.peer(Conn{l.c, l.gen}).Write([]byte("y"))
		_, err = l.Read(make([]byte, 1))
		require.NoError(t, err)
		// The end of ctx costs the connection, and the lease is lost.
		err = l.Do(ctx, func(c Conn) error { _, err := c.Read(make([]byte, 1)); return Keep(err) })
		require.ErrorIs(t, err, context.DeadlineExceeded)
		synctest.Wait()
		n.closed(reasons{ClosedCanceled: 1})
		n.gauges(0, 0, 0)
		_, err = l.Read(nil)
		require.ErrorIs(t, err, net.ErrClosed)
		require.NotErrorIs(t, err, ErrReturned)
		require.NoError(t, l.Return(), "the first")
		require.ErrorIs(t, l.Return(), ErrReturned)

		var pe *Error
		l = n.lease(at("a"))
		require.ErrorAs(t, l.Do(ctx, func(Conn) error { t.Error("fn ran"); return nil }), &pe)
		require.ErrorIs(t, pe, context.DeadlineExceeded)
		require.ErrorContains(t, l.Do(bg, nil), "fn is nil")
		var none context.Context
		require.ErrorContains(t, l.Do(none, discard), "ctx is nil")
		require.NoError(t, l.Return())
		n.closed(reasons{ClosedCanceled: 1})
	})
}

func TestWhateverFnDoesInDoTheLeaseKnows(t *testing.T) {
	for name, c := range map[string]struct {
		fn   func(l *Lease, c Conn) error
		want CloseReason // by which the connection is gone after Do; unknown: it is not
	}{
		"nil":   {func(*Lease, Conn) error { return nil }, ClosedUnknown},
		"Keep":  {func(*Lease, Conn) error { return Keep(errBoom) }, ClosedUnknown},
		"error": {func(*Lease, Conn) error { return errBoom }, ClosedFnError},
		"panic": {func(*Lease, Conn) error { panic(errBoom) }, ClosedPanic},
		"exit":  {func(*Lease, Conn) error { runtime.Goexit(); return nil }, ClosedGoexit},
		"Close": {func(_ *Lease, c Conn) error { return c.Close() }, ClosedByBorrower},
		"in flight": {func(_ *Lease, c Conn) error {
			go c.Read(make([]byte, 1))
			synctest.Wait()
			return nil
		}, ClosedInFlight},
		"Discard": {func(l *Lease, c Conn) error {
			defer func() {
				_, err := c.Write([]byte("x"))
				if err == nil {
					panic("the connection lives")
				}
			}()
			return l.Discard()
		}, ClosedByBorrower},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxPerAddr: 1})
				l := n.lease(at("a"))
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					defer func() { recover() }()
					l.Do(bg, func(conn Conn) error {
						_, err := l.Write([]byte("x"))
						require.Equal(t, errLeaseBusy, err, "fn has it alone")
						require.ErrorIs(t, l.Do(bg, discard), errLeaseBusy)
						return c.fn(l, conn)
					})
				}()
				<-ended
				synctest.Wait()
				n.check()
				if c.want == ClosedUnknown {
					n.closed(reasons{})
					_, err := l.Write([]byte("x"))
					require.NoError(t, err)
				} else {
					n.closed(reasons{c.want: 1})
					_, err := l.Write([]byte("x"))
					require.ErrorIs(t, err, net.ErrClosed)
				}
				n.use(at("b"))
				if name == "Discard" {
					require.ErrorIs(t, l.Return(), ErrReturned)
				} else {
					require.NoError(t, l.Return())
				}
				require.ErrorIs(t, l.Return(), ErrReturned)
				n.use(at("a")) // its slot is free
				n.check()
			})
		})
	}
}

func TestReturnDuringDoTakesEffectAtItsEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").Serve(echoLines)
		l := n.lease(at("a"))
		require.NoError(t, l.Do(bg, func(c Conn) error {
			require.NoError(t, l.Return())
			require.ErrorIs(t, l.Return(), ErrReturned)
			require.ErrorIs(t, l.Discard(), ErrReturned)
			_, err := l.Write(nil)
			require.ErrorIs(t, err, ErrReturned)
			n.gauges(1, 0, 0)
			_, err = askLine(c, "still here")
			return err
		}))
		n.gauges(0, 1, 0)
		n.check()
		require.ErrorIs(t, l.Do(bg, discard), ErrReturned)
		n.closed(reasons{})
	})
}

func TestDoNeedsTheConnectionAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		l := n.lease(at("a"))
		read := make(chan error, 1)
		go func() { _, err := l.Read(make([]byte, 1)); read <- err }()
		synctest.Wait()
		err := l.Do(bg, func(Conn) error { t.Error("fn ran"); return nil })
		require.ErrorIs(t, err, errLeaseRunning)
		require.Equal(t, KindUsage, KindOf(err))
		n.peer(Conn{l.c, l.gen}).Write([]byte("x"))
		require.NoError(t, <-read, "the reader was not disturbed")
		require.NoError(t, l.Do(bg, func(Conn) error { return nil }))
		// Close interrupts a reader, at the cost of the connection.
		go func() { _, err := l.Read(make([]byte, 1)); read <- err }()
		synctest.Wait()
		require.NoError(t, l.Close())
		require.Error(t, <-read)
		n.closed(reasons{ClosedInFlight: 1})
	})
}

func TestADetachedLeaseIsTheCallersOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.Host("a").Serve(echoLines)
		l := n.lease(at("a"))
		nc, err := l.Detach()
		require.NoError(t, err)
		require.ErrorIs(t, l.Return(), ErrReturned)
		n.use(at("a"))
		_, err = askLine(nc, "mine")
		require.NoError(t, err)
		require.NoError(t, nc.Close())
		l = n.lease(at("a"))
		require.NoError(t, l.Do(bg, func(c Conn) (err error) { nc, err = c.Detach(); return err }))
		require.NoError(t, l.Return())
		_, err = askLine(nc, "mine too")
		require.NoError(t, err)
		require.NoError(t, nc.Close())
		require.EqualValues(t, 2, n.p.Stats().Detached)
	})
}
