package clients

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

func goexit() { runtime.Goexit() }

// codec is a plain state, which says goodbye when it is closed.
type codec struct {
	nc    net.Conn
	close func() error
}

func (c *codec) Close() error { return c.close() }

// ADO-03: before a clean close the state's Close runs while the connection works, so its
// goodbye reaches the server; a broken connection says nothing.
func TestAGoodbyeReachesTheServerBeforeACleanClose(t *testing.T) {
	for _, resident := range []bool{false, true} {
		t.Run(fmt.Sprintf("resident=%v", resident), func(t *testing.T) {
			onSockets(t, func(c *connpool.Config) {
				c.MaxOpen, c.IdleTimeout, c.SweepInterval, c.MaxUses = 1, time.Hour, 10*time.Millisecond, 3
				if !resident {
					c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
						return &codec{nc, func() error {
							_, err := io.WriteString(nc, "bye\n")
							return err
						}}, nil
					}
				}
			}, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
				byes := 0
				once := func(scope string) { pooltest.Hold(t, p, pooltest.Scoped(n.Addr, scope)).End(nil) }
				said := func(why string) {
					byes++
					patience.Soon(t, why, func() bool { return h.goodbyes() == byes })
				}
				once("a")
				once("b")
				said("evicted")
				p.Retire(pooltest.Scoped(n.Addr, "b"))
				said("retired")
				once("c")
				once("c")
				once("c")
				said("lent for the last time")
				once("d")
				p.CloseIdle()
				said("closed on request")
				patience.Soon(t, "all are closed", func() bool { return p.Stats().Open == 0 })

				// Nothing is said for what is not in step.
				require.ErrorIs(t, pooltest.Hold(t, p, n.Addr).End(io.ErrUnexpectedEOF), io.ErrUnexpectedEOF)
				require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { return c.Close() }))
				ctx, cancel := context.WithCancel(bg)
				require.NoError(t, p.With(ctx, n.Addr, func(c connpool.Conn) error { cancel(); return nil }))
				if resident || n.Probed {
					pooltest.Hold(t, p, n.Addr).End(nil)
				}
				patience.Soon(t, "all are closed", func() bool {
					n.Server.CutIdle(-1, faultnet.FIN) // again, since the server may not know the connection yet
					return p.Stats().Open == 0
				})
				require.Equal(t, byes, h.goodbyes())

				once("e")
				require.NoError(t, p.Shutdown(bg))
				said("the pool is shut down")
			})
		})
	}
}

// ADO-03: whatever the state does in its Close, the socket is closed and the slot is free.
func TestAGoodbyeOfAnyKindFreesTheSlot(t *testing.T) {
	for name, end := range map[string]func(nc net.Conn) error{
		"returns":    func(net.Conn) error { return nil },
		"fails":      func(net.Conn) error { return io.ErrClosedPipe },
		"panics":     func(net.Conn) error { panic("Close") },
		"goexit":     func(net.Conn) error { goexit(); return nil },
		"closes":     func(nc net.Conn) error { return nc.Close() },
		"twice":      func(nc net.Conn) error { return errors.Join(nc.Close(), nc.Close()) },
		"reads":      func(nc net.Conn) error { _, err := nc.Read(make([]byte, 1)); return err },
		"writes":     func(nc net.Conn) error { _, err := nc.Write(make([]byte, 1<<20)); return err },
		"reads long": func(nc net.Conn) error { nc.SetDeadline(time.Time{}); _, err := nc.Read(make([]byte, 1)); return err },
		"hangs":      func(net.Conn) error { <-time.After(time.Hour); return nil },
		"later":      func(nc net.Conn) error { go nc.Read(make([]byte, 1)); return nil },
	} {
		for _, resident := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/resident=%v", name, resident), func(t *testing.T) {
				pooltest.Bubble(t, func(t *testing.T) {
					var late atomic.Bool
					n := pooltest.Open(t, connpool.Config{MaxOpen: 1, IdleTimeout: -1, SweepInterval: -1, Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
						s := &codec{nc, func() error {
							if addr.Host != "a" {
								return nil
							}
							err := end(nc)
							late.Store(true)
							return err
						}}
						if resident {
							return connpool.Resident(s, nil), nil
						}
						return s, nil
					}})
					n.Host("a").Serve(func(c *faultnet.Conn) { <-t.Context().Done() })
					n.Host("b")
					n.Use(pooltest.At("a"))
					soon, cancel := context.WithTimeout(bg, 2*time.Second)
					defer cancel()
					require.NoError(t, n.Pool.With(soon, pooltest.At("b"), func(connpool.Conn) error { return nil }), "it evicts")
					time.Sleep(10 * time.Second)
					require.Zero(t, n.Pool.Stats().Closing)
					require.Empty(t, n.Host("a").Conns(), "the socket is closed")
					if name == "hangs" {
						require.False(t, late.Load())
						require.Equal(t, uint64(1), n.Pool.Stats().AbandonedCalls)
						time.Sleep(time.Hour)
					}
				})
			})
		}
	}
}

// ADO-03: whatever ended a connection, who waits for its slot does not wait for a state that hangs.
func TestASlotThatSomebodyWaitsForIsFreeSoonThoughAGoodbyeHangs(t *testing.T) {
	pooltest.Bubble(t, func(t *testing.T) {
		hung := make(chan struct{})
		n := pooltest.Open(t, connpool.Config{MaxOpen: 1, MaxUses: 1, Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			return &codec{nc, func() error {
				if addr.Host == "a" {
					<-hung
				}
				return nil
			}}, nil
		}})
		n.Use(pooltest.At("a"))
		soon, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		require.NoError(t, n.Pool.With(soon, pooltest.At("b"), nothing))
		close(hung)
	})
}

// ADO-03: a goodbye that the peer does not take is given up after a quarter of a second.
func TestAGoodbyeIsBounded(t *testing.T) {
	pooltest.Bubble(t, func(t *testing.T) {
		var took atomic.Int64
		n := pooltest.Open(t, connpool.Config{IdleTimeout: -1, SweepInterval: -1, Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{nc, func() error {
				began := time.Now()
				_, err := nc.Read(make([]byte, 1)) // the answer, which never comes
				took.Store(int64(time.Since(began)))
				return err
			}}, nil
		}})
		n.Use(pooltest.At("a"))
		n.Pool.Retire(pooltest.At("a"))
		time.Sleep(time.Minute)
		require.Equal(t, 250*time.Millisecond, time.Duration(took.Load()))
		n.Closed(map[connpool.CloseReason]uint64{connpool.ClosedRetired: 1})
	})
}

// ADO-01: the client closes its net.Conn by itself: between two loans, in a loan, and in a hook.
func TestAClientMayCloseItsConnection(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
		var r *reader
		with := func(fn func()) {
			require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
				r = connpool.State[*reader](c)
				fn()
				return nil
			}))
		}
		with(func() {})
		require.NoError(t, r.Close())
		patience.Soon(t, "it is closed", func() bool { return p.Stats().Closed[connpool.ClosedStale] == 1 })
		with(func() { require.NoError(t, r.Close()) })
		with(func() {
			require.NoError(t, r.Close())
			require.NoError(t, r.Close(), "a second time")
		})
		patience.Soon(t, "both are closed", func() bool {
			k := p.Stats().Closed // the peer may hang up on the goodbye before the client closes
			return k[connpool.ClosedByBorrower]+k[connpool.ClosedBroken] == 2
		})
		patience.Soon(t, "all are closed", func() bool { return p.Stats().Open == 0 })
		require.Zero(t, p.Stats().Residents)
	})
}

// ADO-01: the guard of a connection that has left the pool by Detach goes on.
func TestADetachedResidentGoesOn(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
		var r *reader
		var nc net.Conn
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) (err error) {
			r = connpool.State[*reader](c)
			nc, err = c.Detach()
			return err
		}))
		reply, err := r.ask(bg, "x")
		require.NoError(t, err)
		require.Equal(t, "x", reply)
		require.Zero(t, p.Stats().Open)
		require.Zero(t, p.Stats().Residents)
		require.NoError(t, nc.Close())
		<-r.done
	})
}

// ADO-01: limits, lifetimes, Reset, Check, sessions and leases are for residents, too.
func TestAResidentIsLentLikeAnyConnection(t *testing.T) {
	onSockets(t, func(c *connpool.Config) {
		c.MaxOpen, c.MaxUses, c.CheckAfterIdle = 1, 20, -1
		ping := func(ctx context.Context, c connpool.Conn) error {
			_, err := connpool.State[*reader](c).ask(ctx, "ping")
			return err
		}
		c.Reset, c.Check = ping, ping
		c.Push = func(context.Context, connpool.Conn) error { panic("a resident's messages are its own") }
	}, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
		for range 10 {
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
		}
		ctx, end := p.Session(bg)
		for range 3 {
			require.NoError(t, exchange(ctx, p, n.Addr, "x"))
		}
		end()
		l, err := p.Lease(bg, n.Addr)
		require.NoError(t, err)
		_, err = l.Read(make([]byte, 1))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.NoError(t, l.Do(bg, func(c connpool.Conn) error {
			_, err := connpool.State[*reader](c).ask(bg, "x")
			return err
		}))
		require.NoError(t, l.Return())
		for range 20 {
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
		}
		st := pooltest.Settled(t, p)
		require.Equal(t, map[connpool.CloseReason]uint64{connpool.ClosedMaxUses: 1}, st.Closed)
	})
}

// ADO-01: Read errors of the clients race with loans, returns, evictions and the end of the pool.
func TestResidentsInARace(t *testing.T) {
	onSockets(t, func(c *connpool.Config) {
		c.MaxOpen, c.MaxIdle, c.SweepInterval = 3, 2, time.Millisecond
	}, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
		var all tasks.Group
		stop := make(chan struct{})
		for w := range 6 {
			all.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					addr := pooltest.Scoped(n.Addr, fmt.Sprint(w%4))
					ctx, cancel := context.WithTimeout(bg, time.Duration(i%7)*time.Millisecond+time.Microsecond)
					err := exchange(ctx, p, addr, fmt.Sprintf("%d/%d", w, i))
					cancel()
					if err != nil && errors.Is(err, connpool.ErrReturned) {
						t.Error(err)
					}
				}
			})
		}
		for range 30 {
			<-time.After(5 * time.Millisecond)
			n.Server.CutIdle(-1, faultnet.FIN)
			p.EvictLRU()
		}
		close(stop)
		all.Wait()
		require.NoError(t, p.Shutdown(bg))
		require.Zero(t, p.Stats().Residents)
	})
}
