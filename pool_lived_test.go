package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// TRY-10, TRY-11: a dial has worked when its connection has lived.

// heeding opens a pool whose connections in memory have what the watcher does for
// a socket: it hears when the peer hangs up, and if there is a Push, when it speaks.
// Setup takes a while.
func heeding(t testing.TB, cfg Config, took time.Duration) *testnet {
	t.Helper()
	n := newTestnet(t)
	n.Shared(true)
	t.Cleanup(func() { time.Sleep(time.Second) }) // those who heed have seen that all is closed
	cfg.Dialers = n.wrapped(func(c *faultnet.Conn) net.Conn { return probesForPush(c) })
	setup := cfg.Setup
	cfg.Setup = func(ctx context.Context, a Addr, nc net.Conn) (any, error) {
		go n.heed(nc.(Conn).c)
		time.Sleep(took)
		if setup != nil {
			return setup(ctx, a, nc)
		}
		return nil, nil
	}
	return n.open(cfg)
}

func (n *testnet) heed(c *conn) {
	sock := c.nc.(interface {
		Prober
		Serial() int
		Closed() bool
	})
	is := func(s *faultnet.Conn) bool { return s.Serial() == sock.Serial() }
	heard, began := false, time.Now()
	pause := func() {
		if time.Since(began) < 100*time.Millisecond {
			time.Sleep(time.Millisecond)
		} else {
			time.Sleep(250*time.Millisecond + 7*time.Microsecond)
		}
	}
	for pause(); !sock.Closed(); pause() {
		switch gone := !slices.ContainsFunc(n.Host(c.site.addr.Host).Conns(), is); {
		case gone && !heard:
			heard = true // once, as the watcher does
			c.word.Or(flagHungUp)
			idleRef{c, c.generation()}.examine(false)
		case n.p.cfg.Push != nil && errors.Is(sock.Probe(), ErrUnread):
			idleRef{c, c.generation()}.examine(false)
		}
	}
}

// hangsUp accepts and hangs up, answers serves.
func hangsUp(*faultnet.Conn)   {}
func answers(c *faultnet.Conn) { echoLines(c) }

// question is an exchange.
func question(c Conn) error {
	_, err := askLine(c, "x")
	return err
}

func (n *testnet) stats(addr Addr) AddrStats { return statsOf(n.p, addr) }

func statsOf(p *Pool, addr Addr) AddrStats {
	for a, st := range p.Addrs() {
		if a == addr {
			return st
		}
	}
	return AddrStats{}
}

func TestOneBorrowOpensThreeConnectionsAtMost(t *testing.T) {
	for name, serve := range map[string]func(*faultnet.Conn){
		"hangs up":            hangsUp,
		"speaks and hangs up": func(c *faultnet.Conn) { io.WriteString(c, "too many clients\n") },
		"resets":              func(c *faultnet.Conn) { c.Reset() },
	} {
		for _, push := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", Push ", push), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					cfg := Config{}
					if push {
						cfg.Push = func(_ context.Context, c Conn) error {
							_, err := io.ReadAll(c)
							return errors.Join(err, errBoom)
						}
					}
					n := heeding(t, cfg, 5*time.Millisecond)
					n.Host("a").Serve(serve)
					pe := n.fail(bg, at("a"))
					synctest.Wait()
					if name == "speaks and hangs up" { // what is unread after Setup fails the dial
						require.Equal(t, 1, n.Host("a").Accepts())
						require.Equal(t, StageSetup, pe.Stage, pe)
						return
					}
					require.Equal(t, maxHollow, n.Host("a").Accepts())
					require.Equal(t, StageDial, pe.Stage, pe)
					switch {
					case name == "resets":
						require.Equal(t, KindBroken, pe.Kind, pe)
					case name == "hangs up" || !push:
						require.Equal(t, KindEOF, pe.Kind, pe)
					}
					require.True(t, n.stats(at("a")).BackingOff)
					require.Error(t, n.stats(at("a")).LastErr)
					require.NotContains(t, pe.Error(), "\n")
					n.check()

					// From then on it is one for each borrow, after a pause.
					start := time.Now()
					n.fail(bg, at("a"))
					synctest.Wait()
					require.Equal(t, maxHollow+1, n.Host("a").Accepts())
					require.GreaterOrEqual(t, time.Since(start), backoffMin/2)
					n.check()
				})
			})
		}
	}
}

// The peer hangs up on a connection that is lent, before it has said anything.
func TestALoanThatMeetsTheEndBeforeAByteSpeaksAgainstTheAddress(t *testing.T) {
	for name, borrow := range map[string]func(n *testnet) error{
		"With": func(n *testnet) error { return n.p.With(bg, at("a"), question) },
		"With and Close": func(n *testnet) error {
			return n.p.With(bg, at("a"), func(c Conn) error { defer c.Close(); return question(c) })
		},
		"Keep": func(n *testnet) error { return n.p.With(bg, at("a"), func(c Conn) error { return Keep(question(c)) }) },
		"Lease": func(n *testnet) error {
			l, err := n.p.Lease(bg, at("a"))
			if err == nil {
				_, err = askLine(l, "x")
				l.Return()
			}
			return err
		},
		"Lease, Discard": func(n *testnet) error {
			l, err := n.p.Lease(bg, at("a"))
			if err == nil {
				_, err = askLine(l, "x")
				l.Discard()
			}
			return err
		},
		"Do": func(n *testnet) error {
			l, err := n.p.Lease(bg, at("a"))
			if err == nil {
				defer l.Return()
				err = l.Do(bg, question)
			}
			return err
		},
		"Session": func(n *testnet) error {
			ctx, end := n.p.Session(bg)
			defer end()
			return n.p.With(ctx, at("a"), question)
		},
		"written in advance": func(n *testnet) error {
			return n.p.With(bg, at("a"), func(c Conn) error {
				time.Sleep(time.Millisecond)
				_, err := c.Write([]byte("x"))
				return err
			})
		},
		"nothing done": func(n *testnet) error { // the look at the give-back sees it
			return n.p.With(bg, at("a"), func(Conn) error { time.Sleep(10 * time.Millisecond); return nil })
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := heeding(t, Config{}, 0)
				n.Host("a").Serve(func(*faultnet.Conn) { time.Sleep(time.Millisecond / 2) }) // later than the look after Setup
				for i := range backoffAfter {
					require.False(t, n.stats(at("a")).BackingOff, "after %d", i)
					if err := borrow(n); name != "nothing done" {
						require.Error(t, err)
						require.NotEqual(t, StageBackoff, stageOf(err))
					}
					synctest.Wait()
				}
				require.Equal(t, backoffAfter, n.Host("a").Accepts())
				st := n.stats(at("a"))
				require.True(t, st.BackingOff)
				require.Contains(t, []Kind{KindEOF, KindBroken}, KindOf(st.LastErr))
				n.check()

				// A caller who is alone waits, and is served when the peer works again.
				n.Host("a").Serve(answers)
				start := time.Now()
				require.NoError(t, n.p.With(bg, at("a"), question))
				require.Greater(t, time.Since(start), time.Duration(0))
				require.Less(t, time.Since(start), backoffMax)
				require.False(t, n.stats(at("a")).BackingOff)
				require.NoError(t, n.stats(at("a")).LastErr)
				n.check()
			})
		})
	}
}

func stageOf(err error) Stage {
	var pe *Error
	errors.As(err, &pe)
	if pe == nil {
		return 0
	}
	return pe.Stage
}

// What borrowers do themselves never counts against a peer that is well.
func TestAPeerIsNotSparedForWhatItsBorrowersDo(t *testing.T) {
	silent := func(c *faultnet.Conn) { io.Copy(io.Discard, c) }   // until the client goes
	oneByte := func(c *faultnet.Conn) { c.Read(make([]byte, 1)) } // and then it hangs up
	for name, tc := range map[string]struct {
		serve  func(*faultnet.Conn)
		borrow func(n *testnet)
	}{
		"an error of its own": {silent, func(n *testnet) { n.p.With(bg, at("a"), func(Conn) error { return io.EOF }) }},
		"a panic": {silent, func(n *testnet) {
			defer func() { _ = recover() }()
			n.p.With(bg, at("a"), func(c Conn) error { panic(io.ErrUnexpectedEOF) })
		}},
		"Goexit": {silent, func(n *testnet) {
			done := make(chan bool)
			go func() {
				defer close(done)
				n.p.With(bg, at("a"), func(Conn) error { runtime.Goexit(); return nil })
			}()
			<-done
		}},
		"a ctx that ends": {silent, func(n *testnet) {
			ctx, stop := context.WithTimeout(bg, time.Millisecond)
			defer stop()
			n.p.With(ctx, at("a"), question)
		}},
		"a deadline": {silent, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error { c.SetDeadline(time.Now().Add(time.Millisecond)); return question(c) })
		}},
		"an end that it asked for": {func(c *faultnet.Conn) { io.Copy(io.Discard, c) }, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error { c.Write([]byte("x")); c.CloseWrite(); return question(c) })
		}},
		"an end that is no news": {oneByte, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error {
				c.Write([]byte("x"))
				io.ReadAll(c)
				c.Read(make([]byte, 1))
				return nil
			})
		}},
		"an end long after": {func(*faultnet.Conn) { time.Sleep(youth) }, func(n *testnet) {
			l, _ := n.p.Lease(bg, at("a"))
			time.Sleep(youth)
			askLine(l, "x")
			l.Return()
		}},
		"a source that fails": {silent, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error {
				_, err := c.ReadFrom(io.MultiReader(strings.NewReader("x"), brokenReader{}))
				return err
			})
		}},
		"a reply that is an error": {func(c *faultnet.Conn) { c.Read(make([]byte, 1)); io.WriteString(c, "no\n") }, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error { return errors.Join(question(c), question(c)) })
		}},
		"Detach": {oneByte, func(n *testnet) {
			n.p.With(bg, at("a"), func(c Conn) error {
				c.Write([]byte("x"))
				c.Read(make([]byte, 1))
				nc, err := c.Detach()
				if err == nil {
					nc.Close()
				}
				return err
			})
		}},
		"Close": {silent, func(n *testnet) { n.p.With(bg, at("a"), Conn.Close) }},
		"a Retire": {silent, func(n *testnet) {
			n.p.Warm(bg, at("a"), 1)
			n.p.Retire(at("a"))
		}},
		"room for others": {silent, func(n *testnet) { n.p.Warm(bg, at("a"), 1); n.p.EvictLRU() }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := heeding(t, Config{MaxUses: 1}, 0)
				n.Host("a").Serve(tc.serve)
				for range 2 * backoffAfter {
					tc.borrow(n)
					synctest.Wait()
				}
				st := n.stats(at("a"))
				require.False(t, st.BackingOff, "%v", st.LastErr)
				require.NoError(t, st.LastErr)
				require.GreaterOrEqual(t, n.Host("a").Accepts(), 2*backoffAfter)
				n.check()
			})
		})
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A connection that was hollow is not made good by the next one that the peer
// accepts, but by the first one that lives: in the middle of its loan, too.
func TestTheBackOffEndsWhenAConnectionLives(t *testing.T) {
	for name, live := range map[string]func(*testing.T, *testnet, *scripted){
		"bytes both ways": func(t *testing.T, n *testnet, b *scripted) { require.NoError(t, question(b.conn())) },
		"good order":      func(t *testing.T, n *testnet, b *scripted) { require.NoError(t, b.giveBack()) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := heeding(t, Config{}, 0)
				n.Host("a").Serve(hangsUp)
				for range backoffAfter {
					require.Error(t, n.p.With(bg, at("a"), question))
				}
				n.Host("a").Serve(answers)
				first := n.borrow(bg, at("a"))
				first.conn()
				var others []*scripted
				for range 5 { // they wait for it, and for a dial after the pause
					others = append(others, n.borrow(bg, at("a")))
				}
				synctest.Wait()
				n.gauges(1, 0, 5)
				require.True(t, n.stats(at("a")).BackingOff, "it is connected")
				start := time.Now()
				live(t, n, first)
				for _, b := range others {
					b.conn()
					if name == "good order" {
						require.NoError(t, b.giveBack())
					}
				}
				require.Zero(t, time.Since(start))
				require.False(t, n.stats(at("a")).BackingOff)
				n.check()
			})
		})
	}
}

// One that is only held meanwhile holds up nobody for ever.
func TestAConnectionThatOnlyStandsLeavesTheOthersAPace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := heeding(t, Config{}, 0)
		n.Host("a").Serve(hangsUp)
		for range backoffAfter {
			n.p.With(bg, at("a"), question)
		}
		n.Host("a").Serve(answers)
		for range 4 {
			start := time.Now()
			b := n.borrow(bg, at("a"))
			b.conn()
			require.LessOrEqual(t, time.Since(start), backoffMax)
		}
		n.check()
		n.p.CloseIdle()
		time.Sleep(failureMemory + 2*defaultSweepInterval)
		require.False(t, n.stats(at("a")).BackingOff, "it is forgotten")
	})
}

func TestAConnectionThatStoodForASweepHasLived(t *testing.T) {
	for name, check := range map[string]func(context.Context, Conn) error{
		"a look": nil,
		"Check":  func(context.Context, Conn) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := heeding(t, Config{Check: check}, 0)
				n.Host("a").Serve(hangsUp)
				for range backoffAfter {
					n.p.With(bg, at("a"), question)
				}
				n.Host("a").Serve(answers)
				require.NoError(t, n.p.Warm(bg, at("a"), 1))
				require.True(t, n.stats(at("a")).BackingOff)
				time.Sleep(2 * defaultSweepInterval)
				synctest.Wait()
				require.False(t, n.stats(at("a")).BackingOff)
				n.check()
			})
		})
	}
}

func TestManyBorrowersAreNoStorm(t *testing.T) {
	for _, took := range []time.Duration{0, 5 * time.Millisecond} {
		bubble(t, func(t *testing.T) {
			n := heeding(t, Config{}, took)
			n.Host("a").Serve(hangsUp)
			ctx, stop := context.WithTimeout(bg, short.Of(time.Second, 300*time.Millisecond))
			defer stop()
			var running atomic.Int64
			for range 50 {
				running.Add(1)
				go func() {
					defer running.Add(-1)
					for ctx.Err() == nil {
						if n.p.With(ctx, at("a"), question) == nil {
							t.Error("who answered?")
						}
						time.Sleep(time.Millisecond)
					}
				}()
			}
			<-ctx.Done()
			time.Sleep(10 * time.Millisecond)
			require.Zero(t, running.Load())
			require.LessOrEqual(t, n.Host("a").Accepts(), 50)
			n.check()
		})
	}
}

// A TLS 1.3 server says after the handshake that it wants another certificate.
func TestACertificateThatIsRefusedAfterTheHandshakeIsAFailure(t *testing.T) {
	ca := faultnet.NewCA()
	srv, err := faultnet.Start(faultnet.Options{Network: "tls", TLS: &tls.Config{
		Certificates: []tls.Certificate{ca.Server("localhost")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
	}})
	require.NoError(t, err)
	defer srv.Close()
	p, err := New(Config{TLS: &tls.Config{RootCAs: ca.Pool()}})
	require.NoError(t, err)
	defer p.Close()
	addr := Addr{Transport: TLS, Host: srv.Host(), Port: srv.Port(), ServerName: "localhost"}
	for range backoffAfter {
		err := p.With(bg, addr, func(c Conn) error { _, err := askLine(c, "x"); return err })
		require.Error(t, err)
	}
	st := statsOf(p, addr)
	require.True(t, st.BackingOff)
	require.Equal(t, KindBadMessage, KindOf(st.LastErr), st.LastErr)
	require.ErrorContains(t, st.LastErr, "certificate")
	require.LessOrEqual(t, srv.Accepts(), backoffAfter+maxHollow)
	p.check(t)
}

// TRY-38: the look at the end of Setup may read the alert, and whoever looks next
// finds no more than the end. The borrower is told of the alert all the same.
func TestAnAlertThatAnEarlierLookHasReadIsToldOf(t *testing.T) {
	if !sock.CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	for name, own := range map[string]bool{"the pool's TLS": false, "a dialer's TLS": true} {
		t.Run(name, func(t *testing.T) {
			ca := faultnet.NewCA()
			srv, err := faultnet.Start(faultnet.Options{Network: "tls", TLS: &tls.Config{MinVersion: tls.VersionTLS13,
				Certificates: []tls.Certificate{ca.Server("localhost")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
			}})
			require.NoError(t, err)
			defer srv.Close()
			var p *Pool
			cfg := Config{TLS: &tls.Config{RootCAs: ca.Pool()}, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				c := nc.(Conn).c
				soon(t, "the server's alert", func() (said bool) {
					c.sock.raw.Control(func(fd uintptr) { said = p.sys.peek(fd).Bytes })
					return said
				})
				return nil, nil
			}}
			if own {
				cfg.Dialers = map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
					d := tls.Dialer{Config: &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}}
					return d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
				}}
			}
			p, err = New(cfg)
			require.NoError(t, err)
			defer p.Close()
			err = p.With(bg, Addr{Transport: TLS, Host: srv.Host(), Port: srv.Port(), ServerName: "localhost"}, nil2)
			require.ErrorContains(t, err, "certificate required")
			p.check(t)
		})
	}
}

// TRY-11. reserveOf counts what a reserve dials while nobody borrows.
func TestAReserveIsTriedOncePerSweepAndAddress(t *testing.T) {
	accepted := func(bad func(serial int) bool, how func(*faultnet.Conn)) func(*faultnet.Conn) {
		return func(c *faultnet.Conn) {
			if c.Serial() > 1 && bad(c.Serial()) {
				how(c)
				return
			}
			answers(c)
		}
	}
	always := func(int) bool { return true }
	speaks := func(c *faultnet.Conn) { io.WriteString(c, "too many clients\n"); io.Copy(io.Discard, c) }
	for name, serve := range map[string]func(*faultnet.Conn){
		"hangs up":              accepted(always, hangsUp),
		"hangs up a bit later":  accepted(always, func(c *faultnet.Conn) { time.AfterFunc(3*time.Second, func() { c.Close() }); answers(c) }),
		"speaks":                accepted(always, speaks),
		"speaks and hangs up":   accepted(always, func(c *faultnet.Conn) { io.WriteString(c, "too many clients\n") }),
		"every other hangs up":  accepted(func(n int) bool { return n%2 == 0 }, hangsUp),
		"every third hangs up":  accepted(func(n int) bool { return n%3 == 0 }, hangsUp),
		"every other speaks":    accepted(func(n int) bool { return n%2 == 0 }, speaks),
		"all but every seventh": accepted(func(n int) bool { return n%7 != 0 }, hangsUp),
	} {
		for _, push := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", Push ", push), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					cfg := Config{MinIdlePerAddr: 2, IdleTimeout: time.Hour}
					if push {
						cfg.Push = func(_ context.Context, c Conn) error {
							c.Read(make([]byte, 100))
							return errBoom
						}
					}
					n := heeding(t, cfg, 0)
					n.Host("a").Serve(serve)
					require.NoError(t, n.p.With(bg, at("a"), question))
					synctest.Wait()
					time.Sleep(defaultSweepInterval / 2)
					const sweeps = 30
					before := n.Host("a").Accepts()
					time.Sleep(sweeps * defaultSweepInterval)
					synctest.Wait()
					require.LessOrEqual(t, n.Host("a").Accepts()-before, sweeps, "with nobody there")
					n.check()

					// That a good connection is lent again and again is no news of
					// the others.
					before = n.Host("a").Accepts()
					for range 200 {
						err := n.p.With(bg, at("a"), question)
						require.True(t, err == nil || name == "hangs up a bit later", "%v", err)
						// Not in the very moment of a sweep, which may be looking at the good one.
						time.Sleep(defaultSweepInterval/20 + time.Millisecond)
					}
					limit := 2*10 + 2
					if name == "hangs up a bit later" {
						limit = 200 // until then each is as good as any
					}
					require.LessOrEqual(t, n.Host("a").Accepts()-before, limit, "of which some were lent, and each of those gave the right to one more")
					n.check()
				})
			})
		}
	}
}

// A dial for a reserve that fails now and then is tried again when there is news.
func TestAReserveWhoseDialsFailNowAndThenIsNoStorm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var dials atomic.Int64
		n.open(Config{MinIdlePerAddr: 3, MaxUses: 1, Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
			if dials.Add(1)%2 == 0 {
				return nil, &net.OpError{Op: "dial", Net: "mem", Err: syscall.ECONNREFUSED}
			}
			return n.dial(ctx, a)
		}}})
		n.Host("a").Serve(answers)
		loans := 0
		for range 100 {
			if n.p.With(bg, at("a"), question) == nil {
				loans++
			}
			time.Sleep(time.Millisecond)
		}
		require.Greater(t, loans, 20)
		require.LessOrEqual(t, dials.Load(), int64(3*100), "a borrower's, one for each loan, and what failed")
		n.check()
		before := dials.Load()
		time.Sleep(10 * defaultSweepInterval)
		require.LessOrEqual(t, dials.Load()-before, int64(10))
	})
}

// The reserve is whole again when the peer is.
func TestAReserveComesBackWithItsPeer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := heeding(t, Config{MinIdlePerAddr: 3}, 0)
		n.Host("a").Serve(answers)
		require.NoError(t, n.p.With(bg, at("a"), question))
		n.Host("a").Serve(hangsUp)
		for _, c := range n.Host("a").Conns() {
			c.Close()
		}
		time.Sleep(10*defaultSweepInterval + time.Second)
		n.gauges(0, 0, 0)
		n.Host("a").Serve(answers)
		time.Sleep(5 * defaultSweepInterval)
		synctest.Wait()
		require.GreaterOrEqual(t, n.p.Stats().Idle, 3)
		n.check()
	})
}

func TestAReserveThatIsBornTooOldIsNoStorm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1, MaxLifetime: 5 * time.Millisecond, Setup: func(context.Context, Addr, net.Conn) (any, error) {
			time.Sleep(10 * time.Millisecond)
			return nil, nil
		}})
		n.use(at("a"))
		before := n.p.Stats().Dials
		time.Sleep(10 * defaultSweepInterval)
		require.LessOrEqual(t, n.p.Stats().Dials-before, uint64(11))
		n.check()
	})
}

func TestWarmGivesUpBeforeAPeerThatKeepsNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		serve func(*faultnet.Conn)
		push  bool
		cause error
		kind  Kind
		stage Stage // what is unread after Setup fails the dial
	}{
		"hangs up":            {func(*faultnet.Conn) {}, false, io.EOF, KindEOF, StageDial},
		"speaks":              {func(c *faultnet.Conn) { io.WriteString(c, "no"); io.Copy(io.Discard, c) }, true, errBoom, KindUnknown, StageSetup},
		"speaks and hangs up": {func(c *faultnet.Conn) { io.WriteString(c, "no") }, false, nil, KindInternal, StageSetup},
		"the same, with Push": {func(c *faultnet.Conn) { io.WriteString(c, "no") }, true, errBoom, KindUnknown, StageSetup},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var dials atomic.Int64
				cfg := Config{Setup: func(context.Context, Addr, net.Conn) (any, error) {
					time.Sleep(time.Duration(dials.Add(1)) * 3 * time.Millisecond)
					return nil, nil
				}}
				if tc.push {
					cfg.Push = func(_ context.Context, c Conn) error { c.Read(make([]byte, 9)); return errBoom }
				}
				n := heeding(t, cfg, 0)
				n.Host("a").Serve(tc.serve)
				var pe *Error
				require.ErrorAs(t, n.p.Warm(bg, at("a"), 8), &pe)
				if tc.cause != nil {
					require.ErrorIs(t, pe, tc.cause, pe)
				}
				require.Equal(t, tc.kind, pe.Kind, pe)
				require.Equal(t, tc.stage, pe.Stage)
				synctest.Wait()
				require.LessOrEqual(t, n.Host("a").Accepts(), 8+maxHollow)
				n.check()
			})
		})
	}
}

// TRY-12: whatever a dialer or Setup makes of it that the pool breaks it off.
func TestADialThatThePoolBreaksOffIsNoFailureOfThePeer(t *testing.T) {
	for name, words := range map[string]func(error) error{
		"flattened": func(err error) error { return fmt.Errorf("login: %v", err) },
		"its own":   func(error) error { return errors.New("login failed") },
		"EOF":       func(error) error { return io.ErrUnexpectedEOF },
		"timeout":   func(error) error { return syscall.ETIMEDOUT },
	} {
		for _, inSetup := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", in Setup ", inSetup), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := newTestnet(t)
					var slow atomic.Bool
					greet := func(ctx context.Context) error {
						if !slow.Load() {
							return nil
						}
						select {
						case <-time.After(150 * time.Millisecond):
							return nil
						case <-ctx.Done():
							return words(ctx.Err())
						}
					}
					n.open(Config{
						Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
							if !inSetup {
								if err := greet(ctx); err != nil {
									return nil, err
								}
							}
							return n.dial(ctx, a)
						}},
						Setup: func(ctx context.Context, _ Addr, _ net.Conn) (any, error) {
							if inSetup {
								return nil, greet(ctx)
							}
							return nil, nil
						},
					})
					require.NoError(t, n.p.Warm(bg, at("a"), 5))
					slow.Store(true)
					burst := func() {
						done := make(chan error)
						for range 50 {
							go func() {
								done <- n.p.With(bg, at("a"), func(Conn) error { time.Sleep(2 * time.Millisecond); return nil })
							}()
						}
						for range 50 {
							require.NoError(t, <-done)
						}
					}
					burst()
					time.Sleep(4 * surplusPatience)
					synctest.Wait()
					st := n.stats(at("a"))
					require.Greater(t, st.DialErrors, uint64(backoffAfter), "the test means nothing otherwise")
					require.False(t, st.BackingOff, "%v", st.LastErr)
					require.NoError(t, st.LastErr)
					n.p.CloseIdle()
					burst()
					n.check()
				})
			})
		}
	}
}

// TRY-13
func TestAFailedDialIsToldToTheBorrowerForWhomItWasMade(t *testing.T) {
	type user struct{}
	for _, inSetup := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			n := newTestnet(t)
			login := func(ctx context.Context) error {
				time.Sleep(50 * time.Millisecond)
				if who := ctx.Value(user{}); who != "good" {
					return fmt.Errorf("wrong password of %v", who)
				}
				time.Sleep(50 * time.Millisecond)
				return nil
			}
			n.open(Config{
				Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
					if !inSetup {
						if err := login(ctx); err != nil {
							return nil, err
						}
					}
					return n.dial(ctx, a)
				}},
				Setup: func(ctx context.Context, _ Addr, _ net.Conn) (any, error) {
					if inSetup {
						return nil, login(ctx)
					}
					return nil, nil
				},
			})
			as := func(who string) context.Context { return context.WithValue(bg, user{}, who) }

			// One gives up, and the dial made for it goes on.
			ctx, stop := context.WithTimeout(as("one"), 10*time.Millisecond)
			defer stop()
			require.ErrorIs(t, n.fail(ctx, at("a")), context.DeadlineExceeded)
			good := n.borrow(as("good"), at("a"))
			good.conn()
			require.NoError(t, good.finish(discard2))

			// Several at a time, of whom one is wrong: it alone hears of it, and
			// not the oldest that waits.
			first := n.borrow(as("good"), at("a"))
			synctest.Wait()
			bad := n.borrow(as("two"), at("a"))
			synctest.Wait()
			last := n.borrow(as("good"), at("a"))
			time.Sleep(60 * time.Millisecond)
			require.True(t, bad.ended() && first.waits() && last.waits())
			first.conn()
			last.conn()
			require.ErrorContains(t, bad.result(), "wrong password of two")
			require.NoError(t, first.giveBack())
			require.NoError(t, last.giveBack())
			n.check()
		})
	}
}

func discard2(c Conn) error { return c.Close() }
