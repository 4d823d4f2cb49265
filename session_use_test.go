package connpool

import (
	"context"
	"errors"
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

// What a use of a session does to the connection, and a use inside a use.

// A connection that died or got dirty between two uses is not replaced in
// silence: what was begun on it is gone.
func TestALostConnectionIsToldOnce(t *testing.T) {
	for name, c := range map[string]struct {
		hurt   func(*faultnet.Conn)
		reason CloseReason
		kind   Kind
		is     error
	}{
		"closed": {func(c *faultnet.Conn) { c.Close() }, ClosedStale, KindEOF, io.EOF},
		"reset":  {func(c *faultnet.Conn) { c.Reset() }, ClosedStale, KindBroken, ErrSessionLost},
		"spoke":  {func(c *faultnet.Conn) { c.Write([]byte("x")) }, ClosedStale, KindBroken, ErrSessionLost},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxPerAddr: 1})
				ctx, end := n.session(bg)
				require.Equal(t, "a#1", n.useUnder(ctx, at("a")))
				c.hurt(n.Host("a").Conns()[0])
				pe := n.fail(ctx, at("a"))
				require.ErrorIs(t, pe, ErrSessionLost)
				require.ErrorIs(t, pe, c.is)
				require.Equal(t, [...]any{StageSession, c.kind}, [...]any{pe.Stage, pe.Kind})
				synctest.Wait()
				n.closed(reasons{c.reason: 1})
				require.Equal(t, "a#2", n.useUnder(ctx, at("a")), "the next use gets another")
				require.Equal(t, "a#2", n.useUnder(ctx, at("a")))
				end()
				n.check()
			})
		})
	}
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		if !n.probed {
			t.Skip("nobody can look into it")
		}
		p := n.pool(t, func(c *Config) { c.MaxOpen = 1 })
		ctx, end := p.Session(t.Context())
		defer end()
		serial := func() (r reply, err error) {
			err = p.With(ctx, n.addr, func(c Conn) (err error) { r, err = ask(c, newToken()); return err })
			p.check(t)
			return r, err
		}
		for lost := range 3 {
			for range 2 {
				r, err := serial()
				require.NoError(t, err)
				require.Equal(t, lost+1, r.serial)
			}
			soon(t, "the server to have no other", func() bool { return n.srv.Open() == 1 })
			if lost == 1 {
				require.Equal(t, 1, n.srv.PushIdle(1, []byte("unasked\n")))
			} else {
				require.Equal(t, 1, n.srv.CutIdle(1, faultnet.FIN))
			}
			soon(t, "the loss to be told", func() bool {
				_, err := serial()
				return errors.Is(err, ErrSessionLost)
			})
		}
		require.Equal(t, 0, p.Stats().InUse)
	})
}

func TestAUseThatFailsCostsTheSessionItsConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		ctx, end := n.session(bg)
		short, cancel := context.WithCancel(ctx)
		for i, fn := range []func(Conn) error{
			discard,
			func(Conn) error { panic(errBoom) },
			func(Conn) error { runtime.Goexit(); return nil },
			Conn.Close,
			Conn.CloseWrite,
			func(c Conn) error { c.SetReadDeadline(time.Unix(1, 0)); c.Read(make([]byte, 1)); return nil },
			func(Conn) error { cancel(); return nil },
		} {
			require.Equal(t, i+1, n.Host("a").Accepts()+1)
			require.Equal(t, n.useUnder(ctx, at("a")), n.useUnder(ctx, at("a")))
			b := n.borrow(short, at("a"))
			b.conn()
			b.finish(fn)
			synctest.Wait()
			n.gauges(0, 0, 0)
			n.check()
		}
		n.closed(reasons{ClosedFnError: 1, ClosedPanic: 1, ClosedGoexit: 1, ClosedByBorrower: 1, ClosedHalfClosed: 1, ClosedTimeout: 1, ClosedCanceled: 1})
		// Keep keeps it.
		name := n.useUnder(ctx, at("a"))
		require.Equal(t, errBoom, n.p.With(ctx, at("a"), func(Conn) error { return Keep(errBoom) }))
		require.Equal(t, name, n.useUnder(ctx, at("a")))
		end()
		n.gauges(0, 1, 0)
	})
}

// What a use inside another does to the connection is settled when the outer
// one ends; until then nobody gets to use it as if nothing had happened.
func TestAnInnerUseThatFailsCostsTheConnectionAtTheOutersEnd(t *testing.T) {
	for name, c := range map[string]struct {
		inner  func(Conn) error
		reason CloseReason
	}{
		"error": {discard, ClosedFnError},
		"panic": {func(Conn) error { panic(errBoom) }, ClosedPanic},
		"I/O":   {func(c Conn) error { c.Write(nil); c.c.nc.Close(); c.Read(make([]byte, 1)); return nil }, ClosedBroken},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxPerAddr: 1})
				ctx, end := n.session(bg)
				require.NoError(t, n.p.With(ctx, at("a"), func(outer Conn) error {
					func() {
						defer func() { recover() }()
						n.p.With(ctx, at("a"), c.inner)
					}()
					n.gauges(1, 0, 0)
					require.Equal(t, "a#1", who(outer), "it is closed when the outer use ends")
					pe := n.fail(ctx, at("a"))
					require.ErrorIs(t, pe, ErrSessionLost)
					n.check()
					return nil
				}))
				synctest.Wait()
				n.closed(reasons{c.reason: 1})
				require.Equal(t, "a#2", n.useUnder(ctx, at("a")))
				// A deeper one's failure is not forgotten when the one around it is content.
				require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
					return n.p.With(ctx, at("a"), func(Conn) error {
						defer func() { recover() }()
						n.p.With(ctx, at("a"), c.inner)
						return nil
					})
				}))
				synctest.Wait()
				n.closed(reasons{c.reason: 2})
				end()
				n.check()
			})
		})
	}
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		ctx, end := n.session(bg)
		defer end()
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
			require.NoError(t, n.p.With(ctx, at("a"), Conn.Close))
			require.ErrorIs(t, n.fail(ctx, at("a")), ErrSessionLost)
			return nil
		}))
		require.Equal(t, "a#2", n.useUnder(ctx, at("a")))
		// Kept, and so is what it forgives.
		require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
			require.Equal(t, errBoom, n.p.With(ctx, at("a"), func(c Conn) error {
				c.SetReadDeadline(time.Unix(1, 0))
				c.Read(make([]byte, 1))
				return Keep(errBoom)
			}))
			return nil
		}))
		require.Equal(t, "a#2", n.useUnder(ctx, at("a")))
		synctest.Wait()
		n.closed(reasons{ClosedByBorrower: 1})
	})
}

func TestTheCtxOfAnInnerUseGovernsItAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Serve(echoLines)
		ctx, end := n.session(bg)
		require.NoError(t, n.p.With(ctx, at("a"), func(outer Conn) error {
			// In time: nothing of its ctx is left.
			short, cancel := context.WithTimeout(ctx, time.Second)
			require.NoError(t, n.p.With(short, at("a"), func(c Conn) error { _, err := askLine(c, "x"); return err }))
			time.Sleep(2 * time.Second)
			cancel()
			_, err := askLine(outer, "y")
			return err
		}))
		require.Equal(t, "a#1", n.useUnder(ctx, at("a")))
		// Too late: the connection is lost, and the error says whose time ran out.
		require.NoError(t, n.p.With(ctx, at("a"), func(outer Conn) error {
			short, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			err := n.p.With(short, at("a"), func(c Conn) error { _, err := c.Read(make([]byte, 1)); return Keep(err) })
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			_, err = outer.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NotErrorIs(t, err, context.DeadlineExceeded, "the outer one's time has not run out")
			return nil
		}))
		synctest.Wait()
		n.closed(reasons{ClosedCanceled: 1})
		// What was detached is not interrupted by the pool any more.
		var mine net.Conn
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
			short, cancel := context.WithCancel(ctx)
			return n.p.With(short, at("a"), func(c Conn) (err error) {
				mine, err = c.Detach()
				cancel()
				synctest.Wait()
				return err
			})
		}))
		_, err := askLine(mine, "mine")
		require.NoError(t, err)
		require.NoError(t, mine.Close())
		end()
	})
}

// The interrupt of an inner use that comes when the use is over must not meet
// the next borrower.
func TestALateEndOfAnInnerCtxCostsTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		ctx, end := n.session(bg)
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
			short, cancel := context.WithCancel(ctx)
			return n.p.With(short, at("a"), func(Conn) error { cancel(); return nil })
		}))
		end()
		synctest.Wait()
		n.closed(reasons{ClosedCanceled: 1})
		require.Equal(t, "a#2", n.use(at("a")))
	})
}

// Hooks and dialers run on goroutines of their own while the borrower waits for
// them: if they borrow, the session must be out of the way.
func TestHooksOfASessionsUseBorrowForThemselves(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		through := func(ctx context.Context) error {
			return n.p.With(ctx, at("proxy"), func(Conn) error { return nil })
		}
		n.open(Config{
			Setup: func(ctx context.Context, a Addr, _ net.Conn) (any, error) {
				if a.Host == "proxy" {
					return nil, nil
				}
				return nil, through(ctx)
			},
			Reset: func(ctx context.Context, c Conn) error {
				if c.Addr().Host == "proxy" {
					return nil
				}
				return through(ctx)
			},
		})
		ctx, end := n.session(bg)
		require.NoError(t, n.p.With(ctx, at("proxy"), func(Conn) error {
			return n.p.With(ctx, at("a"), func(Conn) error { return nil })
		}))
		end()
		n.closed(reasons{})
	})
}

func TestTraceTellsTheStoryOfASession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var pools, own recorder
		n := open(t, Config{Trace: pools.trace(), MaxUses: 2})
		ctx, end := n.session(WithTrace(bg, own.trace()))
		for range 2 {
			require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
				time.Sleep(time.Second)
				return n.p.With(ctx, at("a"), func(Conn) error { return nil })
			}))
			time.Sleep(time.Minute)
		}
		end()
		synctest.Wait()
		want := []string{
			"get a", "wait a 1", "dialed a 1 0s ok", "got a 1 false 1 0s 0s", "put a 1 1s",
			"get a", "got a 1 true 2 1m0s 0s", "put a 1 1s",
			"closed a 1 max-uses 2 2m2s <nil>",
		}
		require.ElementsMatch(t, want, pools.take())
		require.ElementsMatch(t, want, own.take())
	})
}

// What was detached is out of the reach of the ctx under which that was done.
func TestACodecThatWasDetachedInAnInnerUseObeysItsDeadlines(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var guard net.Conn
		n := open(t, Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) { guard = nc; return nil, nil }})
		ctx, end := n.session(bg)
		defer end()
		inner, cancel := context.WithCancel(ctx)
		var nc net.Conn
		require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
			return n.p.With(inner, at("a"), func(c Conn) (err error) {
				nc, err = c.Detach()
				cancel()
				return err
			})
		}))
		defer nc.Close()
		require.NoError(t, guard.SetReadDeadline(time.Now().Add(time.Second)))
		stop := time.AfterFunc(time.Minute, func() { nc.Close() })
		defer stop.Stop()
		_, err := guard.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	})
}
