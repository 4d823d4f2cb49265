package connpool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// everyOperation is what can be tried with a handle.
func everyOperation(c Conn) map[string]error {
	b := make([]byte, 8)
	errs := make(map[string]error)
	_, errs["Read"] = c.Read(b)
	_, errs["Write"] = c.Write([]byte("stray"))
	_, errs["ReadFrom"] = c.ReadFrom(strings.NewReader("stray"))
	_, errs["WriteTo"] = c.WriteTo(io.Discard)
	_, errs["SyscallConn"] = c.SyscallConn()
	_, errs["Detach"] = c.Detach()
	errs["Close"] = c.Close()
	errs["CloseWrite"] = c.CloseWrite()
	past := time.Unix(1, 0)
	errs["SetDeadline"] = c.SetDeadline(past)
	errs["SetReadDeadline"] = c.SetReadDeadline(past)
	errs["SetWriteDeadline"] = c.SetWriteDeadline(past)
	return errs
}

func requireReturned(t *testing.T, c Conn) {
	t.Helper()
	tried := make(chan map[string]error, 1)
	go func() { tried <- everyOperation(c) }() // an operation that should be dead could block
	for op, err := range inTime(t, tried) {
		require.ErrorIs(t, err, ErrReturned, op)
		require.Equal(t, KindUsage, KindOf(err), op)
	}
	require.Nil(t, c.LocalAddr())
	require.Nil(t, c.RemoteAddr())
	require.Equal(t, ConnInfo{Addr: c.Addr()}, c.Info())
	require.Nil(t, State[*bufio.Reader](c))
	require.False(t, c.ConnectionState().HandshakeComplete)
}

// BETA-15, TDBC-04
func TestAHandleCarriedOutOfFnIsDeadAndHarmless(t *testing.T) {
	eachSockNet(t, faultnet.Options{Record: true}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) {
			c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
		})
		var leaked Conn
		var sent []string
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			leaked = c
			require.NotNil(t, State[*bufio.Reader](c))
			sent = append(sent, newToken())
			_, err := ask(c, sent[0])
			return err
		}))
		requireReturned(t, leaked) // while it is idle
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			require.Equal(t, 2, c.Info().Uses)
			requireReturned(t, leaked) // while somebody else has it
			sent = append(sent, newToken())
			if _, err := io.WriteString(c, sent[1]+"\n"); err != nil {
				return err
			}
			// In the middle of the exchange, and from many sides.
			var wg tasks.Group
			for range 4 {
				wg.Go(func() {
					for range 25 {
						for op, err := range everyOperation(leaked) {
							if !errors.Is(err, ErrReturned) {
								t.Errorf("%s: %v", op, err)
							}
						}
					}
				})
			}
			r, err := hear(c, sent[1])
			wg.Wait()
			require.Equal(t, reply{1, 2, sent[1]}, r)
			return err
		}))
		require.Equal(t, 1, loan(t, p, n.addr).serial)
		require.Equal(t, sent, n.srv.Lines(1)[:2], "a stray byte reached the server")
		requireReturned(t, Conn{})
	})
}

// BETA-15
func TestARawConnEndsWithItsLoan(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		ran := 0
		touch := func(fd uintptr) { ran++ }
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			raw, err := c.SyscallConn()
			if n.name == "custom" {
				require.ErrorIs(t, err, errors.ErrUnsupported)
				return nil
			}
			require.NoError(t, err)
			require.NoError(t, raw.Control(touch))
			require.NoError(t, raw.Write(func(uintptr) bool { return true }))
			t.Cleanup(func() {
				require.Equal(t, 1, ran)
			})
			after := func() {
				require.ErrorIs(t, raw.Control(touch), ErrReturned)
				require.ErrorIs(t, raw.Read(func(fd uintptr) bool { touch(fd); return true }), ErrReturned)
				require.ErrorIs(t, raw.Write(func(fd uintptr) bool { touch(fd); return true }), ErrReturned)
			}
			t.Cleanup(after)
			return nil
		}))
		require.Equal(t, 1, loan(t, p, n.addr).serial)
	})
}

// BETA-15: the same for what Setup was given, of which codecs are made.
func TestTheConnOfSetupIsDeadBetweenLoans(t *testing.T) {
	eachSockNet(t, faultnet.Options{Record: true}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) {
			c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				_, err := ask(nc, newToken()) // alive during Setup
				return nc, err
			}
		})
		var guard net.Conn
		for i := range 3 {
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				guard = State[net.Conn](c)
				r, err := ask(guard, newToken())
				require.Equal(t, i+2, r.seq)
				return err
			}))
			_, err := guard.Write([]byte("stray"))
			require.ErrorIs(t, err, ErrReturned)
			_, err = guard.Read(make([]byte, 1))
			require.ErrorIs(t, err, ErrReturned)
			require.ErrorIs(t, guard.SetDeadline(time.Unix(1, 0)), ErrReturned)
			require.ErrorIs(t, guard.Close(), ErrReturned)
		}
		require.Equal(t, 1, n.srv.Accepts())
		require.Len(t, n.srv.Lines(1), 4)

		// An operation that is still running when fn returns is "in flight",
		// also if it came this way.
		blocked := make(chan error, 1)
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			started := make(chan struct{})
			go func() {
				close(started)
				_, err := State[net.Conn](c).Read(make([]byte, 1))
				blocked <- err
			}()
			<-started
			soon(t, "the read inside", func() bool { return c.c.word.Load()&inFlight != 0 })
			return nil
		}))
		require.Error(t, inTime(t, blocked))
		require.EqualValues(t, 1, settled(t, p).Closed[ClosedInFlight])
	})
}

// BETA-21
func TestADetachedConnectionBelongsToItsTaker(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) {
			c.MaxPerAddr = 1
			c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return nc, nil }
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var mine, guard net.Conn
		served := make(chan reply, 1)
		sorry := errors.New("this verdict concerns no connection any more")
		require.ErrorIs(t, p.With(ctx, n.addr, func(c Conn) error {
			go func() { // no room for it, until this one leaves
				var r reply
				p.With(context.Background(), n.addr, func(c Conn) (err error) {
					r, err = ask(c, newToken())
					return err
				})
				served <- r
			}()
			queued(t, p, 1)
			require.NoError(t, c.SetReadDeadline(time.Unix(1, 0)))
			var err error
			guard = State[net.Conn](c)
			mine, err = c.Detach()
			require.NoError(t, err)
			requireReturned(t, c)
			_, err = c.Detach()
			require.ErrorIs(t, err, ErrReturned)
			require.Equal(t, 2, (<-served).serial)
			return sorry
		}), sorry)
		defer mine.Close()
		cancel() // the loan's ctx has no say any more
		st := settled(t, p)
		require.Equal(t, [...]int{1, 1}, [...]int{st.Open, st.Idle})
		require.EqualValues(t, 1, st.Detached)
		require.Empty(t, st.Closed)
		for i := range 2 {
			r, err := ask(mine, newToken())
			require.NoError(t, err)
			require.Equal(t, 2*i+1, r.seq)
			r, err = ask(guard, newToken())
			require.NoError(t, err)
			require.Equal(t, reply{1, 2*i + 2, r.token}, r)
			require.NoError(t, p.Close())
		}
		soon(t, "only the detached one open", func() bool { return n.srv.Open() == 1 })
	})
}

// BETA-22
func TestADiscardedConnectionIsClosedAtOnce(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxPerAddr = 1 })
		served := make(chan reply, 1)
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			_, err := ask(c, newToken())
			require.NoError(t, err)
			go func() {
				var r reply
				p.With(context.Background(), n.addr, func(c Conn) (err error) {
					r, err = ask(c, newToken())
					return err
				})
				served <- r
			}()
			queued(t, p, 1)
			require.NoError(t, c.Close())
			// While this fn is still running, the slot serves the next one.
			require.Equal(t, 2, (<-served).serial)
			soon(t, "the end at the server", func() bool { return n.srv.Open() == 1 })
			require.ErrorIs(t, c.Close(), net.ErrClosed)
			_, err = c.Write([]byte("x"))
			require.ErrorIs(t, err, net.ErrClosed)
			return nil
		}))
		st := settled(t, p)
		require.EqualValues(t, map[CloseReason]uint64{ClosedByBorrower: 1}, st.Closed)
		require.Equal(t, 2, loan(t, p, n.addr).serial)
	})
}

// halves is a server that answers in two halves, with a gate before the second
// one of the first reply.
func halves(gate <-chan struct{}) func(*faultnet.Peer) {
	return func(p *faultnet.Peer) {
		r := bufio.NewReader(p)
		for seq := 1; ; seq++ {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			whole := fmt.Sprintf("%d %d %s", p.Serial(), seq, line)
			io.WriteString(p, whole[:3])
			if p.Serial() == 1 && seq == 1 {
				<-gate
			}
			io.WriteString(p, whole[3:])
		}
	}
}

// BETA-X08, ORA-26
func TestATimeOutInMidReplyCostsTheConnection(t *testing.T) {
	for _, name := range sockNets {
		t.Run(name, func(t *testing.T) {
			gate := make(chan struct{})
			n := startSock(t, name, faultnet.Options{Handler: halves(gate)})
			p := n.pool(t, nil)
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
				_, err := ask(c, "slow")
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.Equal(t, KindTimeoutInTransfer, KindOf(err))
				return nil // as if nothing had been
			}))
			close(gate) // the late half is sent now, to nobody
			require.Equal(t, 2, loan(t, p, n.addr).serial)
			require.EqualValues(t, 1, settled(t, p).Closed[ClosedTimeout])
		})
	}
}

func TestOnlyKeepForgivesATimeOut(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		require.Equal(t, 1, loan(t, p, n.addr).serial)
		err := p.With(t.Context(), n.addr, func(c Conn) error {
			c.SetReadDeadline(time.Unix(1, 0))
			_, err := c.Read(make([]byte, 1)) // is there news? no
			require.Equal(t, KindTimeout, KindOf(err))
			return Keep(err)
		})
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, 1, loan(t, p, n.addr).serial)
	})
}

// BETA-X09
func TestCtxBoundsAllReadsOfALoanTogether(t *testing.T) {
	run := func(t *testing.T, addr Addr, p *Pool, ctx context.Context, want error, kind Kind) {
		start := time.Now()
		err := p.With(ctx, addr, func(c Conn) error { // an idle one, so that the time is all its own
			var errs []error
			for range 3 {
				_, err := c.Read(make([]byte, 1))
				require.ErrorIs(t, err, want)
				require.Equal(t, kind, KindOf(err))
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		})
		require.ErrorIs(t, err, want)
		require.NoError(t, p.With(context.Background(), addr, func(Conn) error { return nil }), "the slot is free")
		require.EqualValues(t, 1, p.Stats().Closed[ClosedCanceled])
		require.Less(t, time.Since(start), 200*time.Millisecond+slack(t))
	}
	t.Run("in a bubble", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			mem := faultnet.NewMem()
			defer mem.Close()
			addr := Addr{Transport: "mem", Host: "silent"}
			for _, cut := range []func(context.Context) (context.Context, context.CancelFunc, Kind, error){
				func(ctx context.Context) (context.Context, context.CancelFunc, Kind, error) {
					ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
					return ctx, cancel, KindTimeout, context.DeadlineExceeded
				},
				func(ctx context.Context) (context.Context, context.CancelFunc, Kind, error) {
					ctx, cancel := context.WithCancel(ctx)
					time.AfterFunc(100*time.Millisecond, cancel)
					return ctx, cancel, KindCanceled, context.Canceled
				},
			} {
				p, err := New(Config{MaxPerAddr: 1, Dialers: map[Transport]DialFunc{
					"mem": func(ctx context.Context, a Addr) (net.Conn, error) { return mem.Dial(ctx, a.Host) }}})
				require.NoError(t, err)
				require.NoError(t, p.With(context.Background(), addr, func(Conn) error { return nil }))
				ctx, cancel, kind, want := cut(context.Background())
				start := time.Now()
				run(t, addr, p, ctx, want, kind)
				require.Equal(t, 100*time.Millisecond, time.Since(start))
				cancel()
				require.NoError(t, p.Close())
			}
		})
	})
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxPerAddr = 1 })
		loan(t, p, n.addr)
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		run(t, n.addr, p, ctx, context.DeadlineExceeded, KindTimeout)
	})
}

// Whether the socket's clock or the ctx's runs out first is chance, and must
// not decide what becomes of the connection.
func TestKeepDoesNotSaveAConnectionWhoseDeadlinePassed(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	for range 50 {
		before := loan(t, p, n.addr)
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		ran := false
		err := p.With(ctx, n.addr, func(c Conn) error {
			ran = true
			_, err := c.Read(make([]byte, 1))
			return Keep(err)
		})
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		if ran { // a slow machine may have spent the millisecond already
			require.NotEqual(t, before.serial, loan(t, p, n.addr).serial)
		}
	}
	st := settled(t, p)
	require.Equal(t, map[CloseReason]uint64{ClosedCanceled: st.Dials - 1}, st.Closed)
}

// slack is what a loaded machine may add to what a clock measures; nothing in
// a bubble.
func slack(t *testing.T) time.Duration {
	if strings.Contains(t.Name(), "bubble") {
		return 0
	}
	return bounded / 2
}

// TDBC-06, G-03
func TestALeftOverDeadlineIsGoneWithItsLoan(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		for i, set := range []func(Conn, time.Time) error{Conn.SetDeadline, Conn.SetReadDeadline, Conn.SetWriteDeadline} {
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				_, err := ask(c, newToken())
				require.NoError(t, err)
				return set(c, time.Unix(1, 0))
			}))
			require.Equal(t, 2*(i+1), loan(t, p, n.addr).seq)
		}
		require.Equal(t, 1, n.srv.Accepts())
	})
}

// BETA-16
func TestHalfClosedConnectionsAreNotKept(t *testing.T) {
	for _, name := range []string{"tcp", "tls12", "tls13", "unix"} {
		done := make(chan struct{})
		n := startSock(t, name, faultnet.Options{Handler: func(p *faultnet.Peer) {
			line, _ := io.ReadAll(p)
			fmt.Fprintf(p, "%d 1 %s", p.Serial(), line)
			<-done
		}})
		t.Cleanup(func() { close(done) })
		p := n.pool(t, nil)
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			token := newToken()
			io.WriteString(c, token+"\n")
			require.NoError(t, c.CloseWrite())
			_, err := hear(c, token)
			return err
		}))
		require.Equal(t, map[CloseReason]uint64{ClosedHalfClosed: 1}, settled(t, p).Closed)
	}
}

// What one loan was forgiven is not why a later one costs the connection.
func TestAKeptTimeOutIsNotTheCauseOfALaterClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var why error
		n := open(t, Config{Trace: &Trace{Closed: func(i CloseInfo) { why = i.Err }}})
		require.ErrorIs(t, n.p.With(bg, at("a"), func(c Conn) error {
			c.SetReadDeadline(time.Now())
			_, err := c.Read(make([]byte, 1))
			return Keep(err)
		}), os.ErrDeadlineExceeded)
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
			require.True(t, c.Info().Reused)
			n.peer(c).Close()
			_, err := c.Read(make([]byte, 1))
			require.Error(t, err)
			return nil
		}))
		synctest.Wait()
		n.closed(reasons{ClosedBroken: 1})
		require.Error(t, why)
		require.NotErrorIs(t, why, os.ErrDeadlineExceeded)
	})
}

// BETA-14, BETA-16: a copy counts as an operation on both loans.
func TestACopyThatStillRunsCostsBothConnections(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		copied := make(chan error, 1)
		src, dst := hold(t, p, n.addr), hold(t, p, n.addr)
		go func() {
			_, err := io.Copy(dst, src)
			copied <- err
		}()
		soon(t, "the copy under way", func() bool {
			return src.c.word.Load()&inFlight != 0 && dst.c.word.Load()&inFlight != 0
		})
		require.NoError(t, dst.end(nil))
		require.NoError(t, src.end(nil))
		require.Error(t, inTime(t, copied))
		require.EqualValues(t, 2, settled(t, p).Closed[ClosedInFlight])
	})
}
