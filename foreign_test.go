package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Connections that are somebody else's code: they refuse deadlines, take them and
// do nothing, panic, or do not come back.

// deaf is a connection to whose deadlines, reads and closes something is done. It
// hides what else the connection below can do.
type deaf struct {
	net.Conn
	deadline func(set func(time.Time) error, t time.Time) error // in the place of the setters; nil: as below
	halves   bool                                               // ... but only of SetDeadline
	close    func() error                                       // in the place of Close
	read     func([]byte) (int, error)                          // in the place of Read
	closes   atomic.Int32
}

func (d *deaf) SetDeadline(t time.Time) error {
	if d.deadline != nil {
		return d.deadline(d.Conn.SetDeadline, t)
	}
	return d.Conn.SetDeadline(t)
}

func (d *deaf) SetReadDeadline(t time.Time) error { return d.half(d.Conn.SetReadDeadline, t) }

func (d *deaf) SetWriteDeadline(t time.Time) error { return d.half(d.Conn.SetWriteDeadline, t) }

func (d *deaf) half(set func(time.Time) error, t time.Time) error {
	if d.deadline != nil && !d.halves {
		return d.deadline(set, t)
	}
	return set(t)
}

func (d *deaf) Read(b []byte) (int, error) {
	if d.read != nil {
		return d.read(b)
	}
	return d.Conn.Read(b)
}

func (d *deaf) Close() error {
	d.closes.Add(1)
	if d.close != nil {
		return d.close()
	}
	return d.Conn.Close()
}

var errDeaf = errors.New("no deadlines here")

func refuses(func(time.Time) error, time.Time) error { return errDeaf }

// deafness is a way of not listening to deadlines.
type deafness struct {
	name   string
	make   func(thaw <-chan struct{}) func(func(time.Time) error, time.Time) error
	halves bool
}

var deafnesses = []deafness{
	{"refuses", func(<-chan struct{}) func(func(time.Time) error, time.Time) error { return refuses }, false},
	{"refuses both at once", func(<-chan struct{}) func(func(time.Time) error, time.Time) error { return refuses }, true},
	{"sets one half and refuses the other", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
		return func(set func(time.Time) error, t time.Time) error {
			set(t)
			return errDeaf
		}
	}, true},
	{"refuses now and then", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
		n := new(atomic.Int64)
		return func(set func(time.Time) error, t time.Time) error {
			if n.Add(1)%2 == 0 {
				return errDeaf
			}
			return set(t)
		}
	}, false},
	{"does nothing", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
		return func(func(time.Time) error, time.Time) error { return nil }
	}, false},
	{"panics", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
		return func(func(time.Time) error, time.Time) error { panic("no deadlines here") }
	}, false},
	{"ends its goroutine", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
		return func(func(time.Time) error, time.Time) error { runtime.Goexit(); return nil }
	}, false},
	{"does not return", func(thaw <-chan struct{}) func(func(time.Time) error, time.Time) error {
		return func(func(time.Time) error, time.Time) error { <-thaw; return nil }
	}, false},
}

// deafNet is a network whose connections are deaf.
type deafNet struct {
	*testnet
	thaw chan struct{}
	mu   sync.Mutex
	all  []*deaf
}

func newDeafNet(t *testing.T, how deafness, change func(*deaf, <-chan struct{}), cfg Config) *deafNet {
	n := &deafNet{testnet: newTestnet(t), thaw: make(chan struct{})}
	deadline := how.make(n.thaw)
	cfg.Dialers = n.wrapped(func(c *faultnet.Conn) net.Conn {
		d := &deaf{Conn: c, deadline: deadline, halves: how.halves}
		if change != nil {
			change(d, n.thaw)
		}
		n.mu.Lock()
		n.all = append(n.all, d)
		n.mu.Unlock()
		return d
	})
	n.open(cfg)
	return n
}

// release lets everything come back that hangs.
func (n *deafNet) release() {
	n.mu.Lock()
	select {
	case <-n.thaw:
	default:
		close(n.thaw)
	}
	n.mu.Unlock()
	synctest.Wait()
}

// closedOnce checks that each connection but those that live was closed, and once.
func (n *deafNet) closedOnce(live int) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	open := 0
	for _, d := range n.all {
		require.LessOrEqual(n.t, d.closes.Load(), int32(1))
		if d.closes.Load() == 0 {
			open++
		}
	}
	require.LessOrEqual(n.t, open, live)
}

func readOne(c net.Conn) error { _, err := c.Read(make([]byte, 1)); return err }

// fillUp writes until the window is full.
func fillUp(c net.Conn) error {
	for {
		if _, err := c.Write(make([]byte, 32<<10)); err != nil {
			return err
		}
	}
}

// TRY-06, TRY-07
func TestADeafConnectionCostsItsBorrowerCtxAndABound(t *testing.T) {
	with := func(op func(net.Conn) error) func(*Pool, context.Context) error {
		return func(p *Pool, ctx context.Context) error {
			return p.With(ctx, at("a"), func(c Conn) error { return op(c) })
		}
	}
	uses := map[string]func(*Pool, context.Context) error{
		"read":  with(readOne),
		"write": with(fillUp),
		"copy in": with(func(c net.Conn) error {
			_, err := c.(Conn).ReadFrom(strings.NewReader(strings.Repeat("x", 1<<20)))
			return err
		}),
		"copy out": with(func(c net.Conn) error { _, err := c.(Conn).WriteTo(io.Discard); return err }),
		"Do": func(p *Pool, ctx context.Context) error {
			l, err := p.Lease(bg, at("a"))
			if err != nil {
				return err
			}
			defer l.Return()
			return l.Do(ctx, func(c Conn) error { return readOne(c) })
		},
		"session": func(p *Pool, ctx context.Context) error {
			s, end := p.Session(ctx)
			defer end()
			return p.With(s, at("a"), func(c Conn) error { return readOne(c) })
		},
		"use in a use": func(p *Pool, ctx context.Context) error {
			s, end := p.Session(bg)
			defer end()
			return p.With(s, at("a"), func(Conn) error {
				s, stop := context.WithCancel(s)
				defer stop()
				defer context.AfterFunc(ctx, stop)()
				return p.With(s, at("a"), func(c Conn) error { return readOne(c) })
			})
		},
		"again and again": with(func(c net.Conn) error {
			var err error
			for range 3 {
				err = readOne(c)
			}
			return err
		}),
	}
	// What the connection's own Close makes of what is blocked.
	closes := map[string]func(*deaf, <-chan struct{}){
		"a close wakes": nil,
		"a close wakes nobody": func(d *deaf, thaw <-chan struct{}) {
			d.close = func() error { return nil }
			context.AfterFunc(untilClosed(thaw), func() { d.Conn.Close() })
		},
	}
	for _, how := range deafnesses {
		for name, use := range uses {
			for wakes, change := range closes {
				for _, ends := range []string{"deadline", "cancel"} {
					t.Run(how.name+"/"+name+"/"+wakes+"/"+ends, func(t *testing.T) {
						bubble(t, func(t *testing.T) {
							n := newDeafNet(t, how, change, Config{MaxPerAddr: 1})
							defer n.release()
							ctx, cancel := context.WithTimeout(bg, time.Second)
							if ends == "cancel" {
								ctx, cancel = context.WithCancel(bg)
								time.AfterFunc(time.Second, cancel)
							}
							defer cancel()
							start := time.Now()
							err := use(n.p, ctx)
							took := time.Since(start)
							require.LessOrEqual(t, took, time.Second+3*foreignPatience)
							if name != "copy in" && name != "again and again" {
								require.GreaterOrEqual(t, took, time.Second)
							}
							if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
								require.NoError(t, err, "the error is the ctx's")
								t.Fatal("no error")
							}
							next, stop := context.WithTimeout(bg, time.Second)
							defer stop()
							require.NoError(t, n.p.With(next, at("a"), func(Conn) error { return nil }), "the slot is free")
							time.Sleep(time.Minute)
							n.closedOnce(1)
							n.gauges(0, n.p.Stats().Idle, 0)
							hears := how.name == "refuses now and then" || how.name == "sets one half and refuses the other"
							switch late := n.p.Stats().AbandonedCalls; {
							case how.name == "does nothing", how.name == "does not return" && ends == "deadline", wakes != "a close wakes" && !hears:
								require.NotZero(t, late)
							case how.name != "does not return" && !hears:
								require.Zero(t, late)
							}
						})
					})
				}
			}
		}
	}
}

// untilClosed is a ctx that is done when ch is closed.
func untilClosed(ch <-chan struct{}) context.Context {
	ctx, cancel := context.WithCancel(bg)
	go func() { <-ch; cancel() }()
	return ctx
}

// TRY-07: what begins after the end of ctx ends at once, as on a socket whose deadline
// is past.
func TestNothingBeginsOnADeafConnectionAfterTheEndOfCtx(t *testing.T) {
	for _, how := range deafnesses {
		bubble(t, func(t *testing.T) {
			n := newDeafNet(t, how, nil, Config{})
			defer n.release()
			ctx, cancel := context.WithCancel(bg)
			require.ErrorIs(t, n.p.With(ctx, at("a"), func(c Conn) error {
				cancel()
				time.Sleep(time.Second)
				start := time.Now()
				err := readOne(c)
				require.Zero(t, time.Since(start), how.name)
				require.ErrorIs(t, fillUp(c), context.Canceled)
				require.Zero(t, time.Since(start), how.name)
				return err
			}), context.Canceled)
		})
	}
}

// TRY-07: a question that begins after the end of ctx meets no interrupt any more. It
// has a bound of its own.
func TestAQuestionAfterTheEndOfCtxHasABound(t *testing.T) {
	for name, ask := range map[string]func(Conn){
		"an address": func(c Conn) { c.RemoteAddr() },
		"CloseWrite": func(c Conn) { c.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				thaw := make(chan struct{})
				defer close(thaw)
				n := newTestnet(t)
				n.open(Config{MaxPerAddr: 1, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &speechless{c, thaw} })})
				ctx, cancel := context.WithCancel(bg)
				require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
					cancel()
					time.Sleep(time.Second)
					start := time.Now()
					ask(c)
					require.Equal(t, foreignPatience, time.Since(start))
					return nil
				}))
				synctest.Wait()
				require.NotZero(t, n.p.Stats().AbandonedCalls)
				require.Zero(t, n.p.Stats().InUse)
			})
		})
	}
}

// TRY-07: nor does a copy begin that has such a loan at its other end.
func TestNoCopyBeginsWithALoanWhoseCtxIsDone(t *testing.T) {
	for name, copied := range map[string]func(alive, over Conn) (int64, error){
		"from": func(alive, over Conn) (int64, error) { return alive.ReadFrom(over) },
		"to":   func(alive, over Conn) (int64, error) { return alive.WriteTo(over) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newDeafNet(t, deafnesses[4], nil, Config{})
				defer n.release()
				ctx, cancel := context.WithCancel(bg)
				n.p.With(ctx, at("a"), func(over Conn) error {
					cancel()
					time.Sleep(time.Second)
					return n.p.With(bg, at("b"), func(alive Conn) error {
						start := time.Now()
						_, err := copied(alive, over)
						require.ErrorIs(t, err, os.ErrDeadlineExceeded)
						require.Zero(t, time.Since(start))
						return err
					})
				})
				synctest.Wait()
				require.Zero(t, n.p.Stats().InUse)
			})
		})
	}
}

// speechless is a connection that answers no question.
type speechless struct {
	*faultnet.Conn
	thaw chan struct{}
}

func (s *speechless) RemoteAddr() net.Addr { <-s.thaw; return nil }
func (s *speechless) CloseWrite() error    { <-s.thaw; return nil }

// TRY-06, TRY-07: hooks too.
func TestHooksOverADeafConnectionEndInTime(t *testing.T) {
	blocks := func(_ context.Context, c Conn) error { return readOne(c) }
	for _, how := range deafnesses {
		for name, cfg := range map[string]Config{
			"Setup": {DialTimeout: time.Second, Setup: func(ctx context.Context, _ Addr, nc net.Conn) (any, error) { return nil, readOne(nc) }},
			"Reset": {HookTimeout: time.Second, Reset: blocks},
			"Check": {HookTimeout: time.Second, CheckAfterIdle: -1, Check: blocks},
			"Push":  {HookTimeout: time.Second, Push: blocks, Setup: func(context.Context, Addr, net.Conn) (any, error) { return buffered(1), nil }},
		} {
			t.Run(how.name+"/"+name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					cfg.MaxPerAddr = 1
					n := newDeafNet(t, how, nil, cfg)
					defer n.release()
					for range 3 {
						start := time.Now()
						err := n.p.With(bg, at("a"), func(Conn) error { return nil })
						var pe *Error
						if name == "Setup" || err != nil { // a deadline that cannot be cleared after Setup fails it, too
							require.ErrorAs(t, err, &pe)
							require.Equal(t, StageSetup, pe.Stage)
						}
						require.LessOrEqual(t, time.Since(start), 2*(time.Second+hookGrace+2*foreignPatience)+backoffMax)
					}
					time.Sleep(time.Minute)
					n.closedOnce(1)
					st := n.p.Stats()
					require.Zero(t, st.InUse+st.Dialing+st.Closing, "%v", st)
				})
			})
		}
	}
}

// TRY-06: such connections are pooled like others, also under deadlines.
func TestAConnectionThatRefusesDeadlinesIsReused(t *testing.T) {
	for _, how := range deafnesses[:3] {
		t.Run(how.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newDeafNet(t, how, nil, Config{IdleTimeout: -1})
				defer n.release()
				n.Host("a").Serve(echoLines)
				for i := range 6 {
					ctx, cancel := context.WithTimeout(bg, time.Minute)
					require.NoError(t, n.p.With(ctx, at("a"), func(c Conn) error {
						if i%2 == 1 {
							c.SetReadDeadline(time.Now().Add(time.Second)) // which may fail: fn's own business
						}
						answer, err := askLine(c, "x")
						require.Equal(t, "1 x", answer)
						return err
					}))
					cancel()
					time.Sleep(2 * time.Minute) // a deadline that was left behind has passed
					require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
						answer, err := askLine(c, "y")
						require.Equal(t, "1 y", answer)
						return err
					}))
				}
				require.Equal(t, 1, n.p.Stats().Idle)
				n.closed(reasons{})
			})
		})
	}
}

// TRY-06, TRY-45: one that was set, and cannot be cleared, must not strike the next
// borrower.
func TestADeadlineThatCannotBeClearedEndsTheConnection(t *testing.T) {
	for name, end := range map[string]func(Conn) error{
		"return": func(Conn) error { return nil },
		"detach": func(c Conn) error {
			_, err := c.Detach()
			require.ErrorIs(t, err, errDeaf)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				once := deafness{make: func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
					return func(set func(time.Time) error, t time.Time) error {
						if t.IsZero() {
							return errDeaf
						}
						return set(t)
					}
				}}
				n := newDeafNet(t, once, nil, Config{})
				defer n.release()
				require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
					require.NoError(t, c.SetReadDeadline(time.Now().Add(time.Hour)))
					return end(c)
				}))
				synctest.Wait()
				n.closed(reasons{ClosedBroken: 1})
				n.closedOnce(0)
				require.Zero(t, n.p.Stats().Detached)
			})
		})
	}
}

// TRY-07: a Read that was left behind has a buffer of its own.
func TestWhatWasLeftBehindTouchesNoBufferOfTheBorrowers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newDeafNet(t, deafnesses[0], func(d *deaf, thaw <-chan struct{}) {
			d.close = func() error { return nil }
			d.read = func(b []byte) (int, error) {
				<-thaw
				for i := range b {
					b[i] = 'x'
				}
				return len(b), nil
			}
			context.AfterFunc(untilClosed(thaw), func() { d.Conn.Close() })
		}, Config{})
		defer n.release()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		mine := make([]byte, 8)
		require.ErrorIs(t, n.p.With(ctx, at("a"), func(c Conn) error { _, err := c.Read(mine); return err }), context.DeadlineExceeded)
		n.release()
		require.Equal(t, make([]byte, 8), mine)
	})
}

// TRY-45: what an operation of a foreign connection does to its goroutine it does to
// the borrower's, as if there had been no other.
func TestAPanicOfAForeignReadIsTheBorrowers(t *testing.T) {
	for name, read := range map[string]func([]byte) (int, error){
		"panic":  func([]byte) (int, error) { panic(errBoom) },
		"goexit": func([]byte) (int, error) { runtime.Goexit(); return 0, nil },
	} {
		bubble(t, func(t *testing.T) {
			n := newDeafNet(t, deafnesses[0], func(d *deaf, _ <-chan struct{}) { d.read = read }, Config{MaxPerAddr: 1})
			defer n.release()
			ctx, cancel := context.WithTimeout(bg, time.Hour)
			defer cancel()
			b := n.borrow(ctx, at("a"))
			b.conn()
			b.end <- func(c Conn) error { return readOne(c) }
			<-b.done
			require.Equal(t, name == "goexit", b.exited)
			require.Equal(t, name == "panic", b.panicked == any(errBoom))
			synctest.Wait()
			n.gauges(0, 0, 0)
			n.closedOnce(0)
		})
	}
}

// tlsPipes is a network of TLS over pipes: the server handshakes, and goes on with serve.
func tlsPipes(t *testing.T, wrap func(net.Conn) net.Conn, serve func(*tls.Conn)) (client *tls.Config, dial DialFunc) {
	t.Helper()
	ca := faultnet.NewCA()
	server := &tls.Config{Certificates: []tls.Certificate{ca.Server("localhost")}}
	return &tls.Config{RootCAs: ca.Pool()}, func(ctx context.Context, _ Addr) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			tc := tls.Server(far, server)
			if tc.HandshakeContext(bg) == nil {
				serve(tc)
			}
		}()
		return wrap(near), nil
	}
}

// TRY-08
func TestTheGoodbyeOfTLSEndsInTimeAndTheSocketIsClosedOnce(t *testing.T) {
	for _, above := range []string{"the pool's TLS", "a dialer's own"} {
		for name, spoil := range map[string]func(*deaf, <-chan struct{}){
			"a peer that does not read": nil,
			"panics": func(d *deaf, _ <-chan struct{}) {
				d.Conn = &badWriter{Conn: d.Conn, write: func([]byte) (int, error) { panic("write") }}
			},
			"ends its goroutine": func(d *deaf, _ <-chan struct{}) {
				d.Conn = &badWriter{Conn: d.Conn, write: func([]byte) (int, error) { runtime.Goexit(); return 0, nil }}
			},
			"hangs for good": func(d *deaf, thaw <-chan struct{}) {
				d.Conn = &badWriter{Conn: d.Conn, write: func([]byte) (int, error) { <-thaw; return 0, errDeaf }}
			},
		} {
			for _, how := range append(deafnesses, deafness{"listens", func(<-chan struct{}) func(func(time.Time) error, time.Time) error {
				return func(set func(time.Time) error, t time.Time) error { return set(t) }
			}, false}) {
				t.Run(above+"/"+name+"/"+how.name, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						thaw := make(chan struct{})
						var socket *deaf
						client, dial := tlsPipes(t, func(nc net.Conn) net.Conn {
							socket = &deaf{Conn: nc}
							return socket
						}, func(tc *tls.Conn) { // and reads no more
							<-thaw
							tc.NetConn().Close()
						})
						cfg := Config{TLS: client, Dialers: map[Transport]DialFunc{TCP: dial}}
						if above != "the pool's TLS" {
							cfg.Dialers = map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
								nc, _ := dial(ctx, a)
								own := client.Clone()
								own.ServerName = "localhost"
								tc := tls.Client(nc, own)
								return tc, tc.HandshakeContext(bg)
							}}
						}
						p, err := New(cfg)
						require.NoError(t, err)
						addr := Addr{Transport: TLS, Host: "localhost", Port: 1}
						require.NoError(t, p.With(bg, addr, func(Conn) error { return nil }))
						socket.deadline = how.make(thaw)
						if spoil != nil {
							spoil(socket, thaw)
						}
						start := time.Now()
						p.EvictLRU()
						require.LessOrEqual(t, time.Since(start), tlsGoodbye)
						require.EqualValues(t, 1, socket.closes.Load())
						require.Zero(t, p.Stats().Open)
						close(thaw)
						require.NoError(t, p.Close())
						synctest.Wait()
						require.EqualValues(t, 1, socket.closes.Load())
					})
				})
			}
		}
	}
}

type badWriter struct {
	net.Conn
	write func([]byte) (int, error)
}

func (b *badWriter) Write(p []byte) (int, error) { return b.write(p) }

// TRY-06: what is done to find out whether crypto/tls holds something does not wait
// for the peer.
func TestTheLookThroughTLSNeverWaitsForADeafConnection(t *testing.T) {
	for _, push := range []bool{false, true} {
		for _, above := range []string{"the pool's TLS", "a dialer's own"} {
			for _, how := range deafnesses {
				t.Run(fmt.Sprintf("push=%v/%s/%s", push, above, how.name), func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						thaw := make(chan struct{})
						client, dial := tlsPipes(t, func(nc net.Conn) net.Conn { return &deaf{Conn: nc, deadline: how.make(thaw), halves: how.halves} },
							func(tc *tls.Conn) {
								b := make([]byte, 1)
								for {
									if _, err := tc.Read(b); err != nil {
										return
									}
									if _, err := tc.Write([]byte("xy")); err != nil { // the reply, and a message, in one record
										return
									}
								}
							})
						cfg := Config{TLS: client, MaxPerAddr: 1, HookTimeout: time.Second, Dialers: map[Transport]DialFunc{TCP: dial}}
						if above != "the pool's TLS" {
							cfg.Dialers = map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
								nc, _ := dial(ctx, a)
								own := client.Clone()
								own.ServerName = "localhost"
								tc := tls.Client(nc, own)
								return tc, tc.HandshakeContext(bg)
							}}
						}
						if push {
							cfg.Push = func(_ context.Context, c Conn) error { return readOne(c) }
						}
						p, err := New(cfg)
						require.NoError(t, err)
						addr := Addr{Transport: TLS, Host: "localhost", Port: 1}
						for range 3 {
							start := time.Now()
							require.NoError(t, p.With(bg, addr, func(c Conn) error {
								if _, err := c.Write([]byte("x")); err != nil {
									return err
								}
								b := make([]byte, 1)
								_, err := c.Read(b)
								require.Equal(t, "x", string(b), "the rest of the last reply")
								return err
							}))
							require.LessOrEqual(t, time.Since(start), 4*foreignPatience+cfg.HookTimeout+hookGrace+tlsGoodbye)
						}
						time.Sleep(time.Minute)
						st := p.Stats()
						require.Zero(t, st.InUse+st.Closing, "%v", st)
						if how.name == "refuses" { // that it was refused is known before anything could block
							require.Zero(t, st.AbandonedCalls, "%v", st)
						}
						close(thaw)
						require.NoError(t, p.Close())
						synctest.Wait()
					})
				})
			}
		}
	}
}

// TRY-45: a dial that hangs between its socket and its connection gives both up.
func TestAHangBeforeTheHandshakeKeepsNoSocket(t *testing.T) {
	for _, where := range []string{"TLSFor", "VerifyConnection"} {
		t.Run(where, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				thaw := make(chan struct{})
				var socket *deaf
				client, dial := tlsPipes(t, func(nc net.Conn) net.Conn {
					socket = &deaf{Conn: nc}
					return socket
				}, func(tc *tls.Conn) { tc.Read(make([]byte, 1)) })
				own := client.Clone()
				if where == "VerifyConnection" {
					own.VerifyConnection = func(tls.ConnectionState) error { <-thaw; return nil }
				}
				p, err := New(Config{DialTimeout: time.Second, Dialers: map[Transport]DialFunc{TCP: dial}, TLSFor: func(Addr) (*tls.Config, error) {
					if where == "TLSFor" {
						<-thaw
					}
					return own, nil
				}})
				require.NoError(t, err)
				require.Error(t, p.With(bg, Addr{Transport: TLS, Host: "localhost", Port: 1}, func(Conn) error { return nil }))
				synctest.Wait()
				require.EqualValues(t, 1, socket.closes.Load())
				require.Zero(t, p.Stats().Open)
				require.EqualValues(t, 1, p.Stats().AbandonedCalls)
				close(thaw)
				require.NoError(t, p.Close())
				synctest.Wait()
				require.EqualValues(t, 1, socket.closes.Load())
			})
		})
	}
}

// failingCtx is a ctx whose Err panics when it is told to.
type failingCtx struct {
	context.Context
	fails *atomic.Bool
}

func (c failingCtx) Err() error {
	if c.fails.Load() {
		panic(errBoom)
	}
	return c.Context.Err()
}

// TRY-45: so is a ctx that panics: what the queue served, or a Check looked at, goes
// back or is closed.
func TestACtxThatPanicsLosesNoConnection(t *testing.T) {
	for _, where := range []string{"queue", "Check"} {
		bubble(t, func(t *testing.T) {
			var fails atomic.Bool
			n := open(t, Config{MaxPerAddr: 1, CheckAfterIdle: -1, Check: func(context.Context, Conn) error {
				fails.Store(true)
				return nil
			}})
			var held *scripted
			if where == "queue" {
				held = n.borrow(bg, at("a"))
				held.conn()
			} else {
				n.use(at("a"))
			}
			odd := n.borrow(failingCtx{bg, &fails}, at("a"))
			synctest.Wait()
			if held != nil {
				fails.Store(true)
				require.NoError(t, held.giveBack())
			}
			<-odd.done
			require.Equal(t, any(errBoom), odd.panicked)
			fails.Store(false)
			synctest.Wait()
			require.Zero(t, n.p.Stats().InUse)
			n.use(at("a"))
		})
	}
}

// TRY-07, TRY-45: nor does one whose Done panics cost the place in a queue that it
// waits in, of the pool or of a session, and what is served there; nor one whose Err
// panics while its borrower has a connection that died.
func TestACtxThatPanicsWhereItWaitsLosesNoPlace(t *testing.T) {
	t.Run("queue", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxPerAddr: 1})
			require.PanicsWithValue(t, errBoom, func() { n.p.With(doneless{bg}, at("a"), discard) })
			synctest.Wait()
			n.gauges(0, 1, 0)
			n.use(at("a"))
		})
	})
	t.Run("session", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxPerAddr: 1})
			inSession, end := n.p.Session(bg)
			first := n.borrow(inSession, at("a"))
			first.conn()
			require.PanicsWithValue(t, errBoom, func() { n.p.With(doneless{inSession}, at("a"), discard) })
			require.NoError(t, first.giveBack())
			end()
			synctest.Wait()
			n.gauges(0, 1, 0)
		})
	})
	t.Run("beside a dead connection", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			var fails atomic.Bool
			n := newTestnet(t)
			n.open(Config{MaxPerAddr: 1, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
				return &probed{c, func() error {
					fails.Store(true)
					return io.EOF
				}}
			})})
			n.use(at("a"))
			require.PanicsWithValue(t, errBoom, func() { n.p.With(failingCtx{bg, &fails}, at("a"), discard) })
			synctest.Wait()
			n.gauges(0, 0, 0)
			n.use(at("a"))
		})
	})
}

// doneless is a ctx whose Done panics.
type doneless struct{ context.Context }

func (doneless) Done() <-chan struct{} { panic(errBoom) }

// probed is a connection whose Probe is the test's.
type probed struct {
	*faultnet.Conn
	probe func() error
}

func (p *probed) Probe() error { return p.probe() }

// stuckCtx is a ctx whose Value, from a moment on, does not return.
type stuckCtx struct {
	context.Context
	stuck *atomic.Bool
	thaw  chan struct{}
}

func (c stuckCtx) Value(key any) any {
	if c.stuck.Load() {
		<-c.thaw
	}
	return c.Context.Value(key)
}

// TRY-07: a dial asks the ctx of its borrower for values. One that does not answer
// costs DialTimeout, as a dialer does that does not return.
func TestACtxThatDoesNotAnswerItsDialKeepsNoSlot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		stuck := stuckCtx{bg, new(atomic.Bool), make(chan struct{})}
		WithTrace(bg, new(Trace)) // from then on each ctx is asked for one
		n := open(t, Config{MaxPerAddr: 1, DialTimeout: time.Second, Trace: &Trace{
			GetConn: func(Addr) { stuck.stuck.Store(true) }, // With itself has asked by now
		}})
		impatient, cancel := context.WithTimeout(stuck, time.Minute)
		defer cancel()
		require.ErrorIs(t, n.p.With(impatient, at("a"), discard), context.DeadlineExceeded)
		require.Zero(t, n.p.Stats().Open)
		require.EqualValues(t, 1, n.p.Stats().AbandonedCalls)
		close(stuck.thaw)
		synctest.Wait()
		require.Zero(t, n.Host("a").Accepts(), "it was given up before anything was dialled")
		n.use(at("a"))
	})
}

// wicked is an error one method of which panics.
type wicked struct{ method string }

func (e *wicked) does(method string) {
	if e.method == method {
		panic(method + " of an error")
	}
}
func (e *wicked) Error() string { e.does("Error"); return "wicked" }
func (e *wicked) Is(error) bool { e.does("Is"); return false }
func (e *wicked) As(any) bool   { e.does("As"); return false }
func (e *wicked) Unwrap() error { e.does("Unwrap"); return nil }
func (e *wicked) Timeout() bool { e.does("Timeout"); return false }

// TRY-45: the methods of an error are foreign code as well. Wherever it comes from, one
// that panics costs no slot, no lock and not the process.
func TestAnErrorWhoseMethodsPanicCostsNoMoreThanAnother(t *testing.T) {
	for _, method := range []string{"Error", "Is", "As", "Unwrap", "Timeout", "all, which use the pool"} {
		var p *Pool
		evil := error(&wicked{method})
		if method[0] == 'a' {
			evil = asking{func() { p.Stats() }}
		}
		hook := func(context.Context, Conn) error { return evil }
		for _, c := range []struct {
			from string
			cfg  func(n *testnet) Config
		}{
			{"the dialer", func(*testnet) Config {
				return Config{Dialers: map[Transport]DialFunc{memory: func(context.Context, Addr) (net.Conn, error) { return nil, evil }}}
			}},
			{"a panic of the dialer", func(*testnet) Config {
				return Config{Dialers: map[Transport]DialFunc{memory: func(context.Context, Addr) (net.Conn, error) { panic(evil) }}}
			}},
			{"Setup", func(*testnet) Config {
				return Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, evil }}
			}},
			{"Reset", func(*testnet) Config { return Config{Reset: hook} }},
			{"a panic of Reset", func(*testnet) Config { return Config{Reset: func(context.Context, Conn) error { panic(evil) }} }},
			{"Check", func(*testnet) Config { return Config{Check: hook} }},
			{"Probe", func(n *testnet) Config {
				return Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &probed{c, func() error { return evil }} })}
			}},
			{"Read", func(n *testnet) Config {
				return Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &badReader{c, evil} })}
			}},
		} {
			t.Run(c.from+"/"+method, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := newTestnet(t)
					n.open(c.cfg(n))
					p = n.p
					n.Host("a").Serve(echoLines)
					for range 5 { // so many that the address is backing off
						go func() {
							defer func() { _ = recover() }()
							n.p.With(bg, at("a"), func(c Conn) error {
								if _, err := askLine(c, "x"); err != nil {
									return errBoom
								}
								return nil
							})
						}()
					}
					go func() {
						defer func() { _ = recover() }()
						n.p.Warm(bg, at("a"), 2)
					}()
					go func() {
						defer func() { _ = recover() }()
						n.p.With(bg, at("a"), func(Conn) error { return nil })
					}()
					time.Sleep(time.Minute) // sweeps look at what is idle
					synctest.Wait()
					require.True(t, n.p.mu.TryLock())
					n.p.mu.Unlock()
					require.Zero(t, n.p.Stats().InUse)
				})
			})
		}
	}
}

// asking is an error whose methods use the pool.
type asking struct{ use func() }

func (e asking) Error() string { e.use(); return "asking" }
func (e asking) Is(error) bool { e.use(); return false }
func (e asking) As(any) bool   { e.use(); return false }
func (e asking) Unwrap() error { e.use(); return nil }

// badReader is a connection from which nothing can be read.
type badReader struct {
	*faultnet.Conn
	err error
}

func (b *badReader) Read([]byte) (int, error) { return 0, b.err }

// TRY-07: a copy between two loans ends with the ctx of either. The end that lives on
// is not lent again: what was left behind still reads from it.
func TestACopyThatWasLeftBehindReadsNoReplyOfTheNextBorrower(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newDeafNet(t, deafnesses[4], nil, Config{})
		n.Host("from").Serve(echoLines)
		var id uint64
		require.ErrorContains(t, n.p.With(bg, at("from"), func(from Conn) error {
			id = from.Info().ID
			ctx, cancel := context.WithTimeout(bg, time.Second)
			defer cancel()
			var copied error
			n.p.With(ctx, at("to"), func(to Conn) error {
				_, copied = from.WriteTo(to)
				return copied
			})
			return Keep(copied)
		}), "did not return")
		require.NoError(t, n.p.With(bg, at("from"), func(c Conn) error {
			require.NotEqual(t, id, c.Info().ID)
			_, err := askLine(c, "mine")
			return err
		}))
	})
}

// uselessRaw is a RawConn that shows no descriptor.
type uselessRaw struct{ err error }

func (r uselessRaw) Control(func(uintptr)) error    { return r.err }
func (r uselessRaw) Read(func(uintptr) bool) error  { return r.err }
func (r uselessRaw) Write(func(uintptr) bool) error { return r.err }

type uselessSys struct {
	*faultnet.Conn
	err error
}

func (s *uselessSys) SyscallConn() (syscall.RawConn, error) { return uselessRaw{s.err}, nil }

// TDBC-20, BETA-25: a connection whose RawConn shows no descriptor has none: it is not
// taken for another with the number 0, nor for dead.
func TestARawConnWithoutADescriptorIsNone(t *testing.T) {
	for _, err := range []error{nil, errors.ErrUnsupported} {
		bubble(t, func(t *testing.T) {
			n := newTestnet(t)
			n.open(Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &uselessSys{c, err} })})
			n.idle(at("a"), 2)
			n.use(at("a"))
			time.Sleep(time.Minute) // sweeps
			synctest.Wait()
			n.use(at("a"))
			n.gauges(0, 2, 0)
			n.closed(reasons{})
		})
	}
}

type uselessPipe struct {
	net.Conn
	err error
}

func (s *uselessPipe) SyscallConn() (syscall.RawConn, error) { return uselessRaw{s.err}, nil }

// TDBC-20, BETA-25: nor is it read without waiting by a number that it has not, under the
// pool's TLS.
func TestARawConnWithoutADescriptorIsNoneUnderTLS(t *testing.T) {
	for _, useless := range []error{errors.ErrUnsupported, nil} {
		bubble(t, func(t *testing.T) {
			client, dial := tlsPipes(t, func(nc net.Conn) net.Conn { return &uselessPipe{nc, useless} }, func(tc *tls.Conn) { io.Copy(tc, tc) })
			p, err := New(Config{
				TLS: client, Dialers: map[Transport]DialFunc{TCP: dial},
				Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return nil, echo(nc, "hello") },
				Push:  func(_ context.Context, c Conn) error { return errBoom },
			})
			require.NoError(t, err)
			defer p.Close()
			for range 3 {
				require.NoError(t, p.With(bg, MustParseAddr("tls://localhost:1"), func(c Conn) error { return echo(c, "mine") }))
				synctest.Wait()
			}
			s := p.Stats()
			require.EqualValues(t, 1, s.Dials)
			require.Zero(t, s.AbandonedCalls)
			require.Equal(t, 1, s.Idle)
		})
	}
}
