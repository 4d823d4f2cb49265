package clients

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// What a stranger tried against clients that do their own I/O. ADO-01 to ADO-03.

// ready waits for an event and ends the test if it does not come.
func ready(t *testing.T, what string, event <-chan struct{}) {
	t.Helper()
	select {
	case <-event:
	case <-time.After(time.Minute):
		require.FailNow(t, "this did not happen: "+what)
	}
}

// nothing borrows and does nothing.
func nothing(connpool.Conn) error { return nil }

func TestStateStaysInALoanWhoseConnectionIsGone(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
			r := connpool.State[*reader](c)
			require.NoError(t, r.Close())
			require.Same(t, r, connpool.State[*reader](c))
			return nil
		}))
		ctx, end := p.Session(bg)
		defer end()
		p.With(ctx, n.Addr, func(c connpool.Conn) error {
			r := connpool.State[*reader](c)
			short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			defer cancel()
			p.With(short, n.Addr, func(connpool.Conn) error { <-r.done; return nil })
			require.Same(t, r, connpool.State[*reader](c))
			return nil
		})
	})
}

func TestACopyBetweenTwoLoansDoesNotTouchAClientsConnection(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	p := n.Pool(t, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, a connpool.Addr, nc net.Conn) (any, error) {
			if a.Scope == "" {
				return nil, nil
			}
			return connpool.Resident(nc, nil), nil
		}
	})
	p.With(bg, n.Addr, func(plain connpool.Conn) error {
		return p.With(bg, pooltest.Scoped(n.Addr, "resident"), func(c connpool.Conn) error {
			_, err := io.Copy(c, plain)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			_, err = plain.ReadFrom(c)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			return nil
		})
	})
}

func TestADetachedClientMayBeClosed(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		var r *reader
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) (err error) {
			r = connpool.State[*reader](c)
			_, err = c.Detach()
			return err
		}))
		closed := make(chan struct{})
		go func() { defer close(closed); r.Close() }()
		ready(t, "the client is closed", closed)
	})
}

func TestAClientThatShutsItsSendingSideIsNotLent(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	var nc net.Conn
	p := n.Pool(t, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, _ connpool.Addr, conn net.Conn) (any, error) {
			nc = conn
			return connpool.Resident(conn, nil), nil
		}
	})
	require.NoError(t, p.With(bg, n.Addr, nothing))
	require.NoError(t, nc.(interface{ CloseWrite() error }).CloseWrite())
	require.NoError(t, p.With(bg, n.Addr, nothing))
	require.EqualValues(t, 2, p.Stats().Dials)
}

// etimedout is a connection whose keep-alive probes went unanswered.
type etimedout struct {
	net.Conn
	fail chan struct{}
}

func (e etimedout) Read([]byte) (int, error) {
	<-e.fail
	return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ETIMEDOUT)}
}

func TestAPeerThatKeepAliveFoundDeadIsAnEnd(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	fail, readers := make(chan struct{}), make(chan *reader, 10)
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
			return etimedout{nc, fail}, err
		}}
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			r := newReader(nc)
			readers <- r
			return connpool.Resident(r, nil), nil
		}
	})
	require.NoError(t, p.With(bg, n.Addr, nothing))
	close(fail)
	ready(t, "the read fails", (<-readers).done)
	patience.Soon(t, "it is closed", func() bool { return p.Stats().Closed[connpool.ClosedStale] == 1 })
}

// A reader that works in Setup has the deadline of the dial. If it meets that deadline in the moment in
// which Setup returns, the dial has failed.
func TestAReaderThatTimesOutAsSetupReturnsIsNotLent(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	i := 0
	p := n.Pool(t, func(c *connpool.Config) {
		c.DialTimeout, c.MaxUses = 15*time.Millisecond, 1
		c.Setup = func(ctx context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			r := newReader(nc)
			i++
			end, _ := ctx.Deadline()
			for time.Now().Before(end.Add(time.Duration(i%20-18) * 10 * time.Microsecond)) {
				<-time.After(5 * time.Microsecond)
			}
			return connpool.Resident(r, nil), nil
		}
	})
	for range short.Of(300, 60) {
		p.With(bg, pooltest.Scoped(n.Addr, fmt.Sprint(i)), func(c connpool.Conn) error {
			r := connpool.State[*reader](c)
			<-time.After(2 * time.Millisecond)
			select {
			case <-r.done:
				t.Error("a dead client was lent: ", r.alive())
			default:
			}
			return nil
		})
	}
}

// The client's own operations race with the begin and the end of loans.
func TestAClientsOperationsRaceWithLoans(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "custom"} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{})
			var users tasks.Group
			p := n.Pool(t, func(c *connpool.Config) {
				c.MaxUses = 3
				c.Reset = func(context.Context, connpool.Conn) error { return nil }
				c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
					for range 2 {
						users.Go(func() {
							for range 60 {
								nc.SetReadDeadline(time.Now().Add(time.Minute))
								nc.RemoteAddr()
							}
						})
					}
					return connpool.Resident(nc, nil), nil
				}
			})
			for range short.Of(600, 100) {
				ctx, cancel := context.WithTimeout(bg, time.Minute)
				require.NoError(t, p.With(ctx, n.Addr, nothing))
				cancel()
			}
			users.Wait()
		})
	}
}

// panics is a connection whose Close panics.
type panics struct{ *net.TCPConn }

func (panics) Close() error        { panic("Close") }
func (p panics) NetConn() net.Conn { return p.TCPConn }

func TestAWrapperThatPanicsInAGoodbyeLeavesNoSocket(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	sockets := make(chan *net.TCPConn, 1)
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
			if err != nil {
				return nil, err
			}
			sockets <- nc.(*net.TCPConn)
			return panics{nc.(*net.TCPConn)}, nil
		}}
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) { return &codec{nc, nc.Close}, nil }
	})
	require.NoError(t, p.With(bg, n.Addr, nothing))
	p.CloseIdle()
	below := <-sockets
	patience.Soon(t, "the socket is closed", func() bool { return errors.Is(below.SetDeadline(time.Time{}), net.ErrClosed) })
}

// twice counts how often a client that cannot be compared is closed.
type twice struct {
	x      any
	closes *atomic.Int32
}

func (w twice) Close() error { w.closes.Add(1); return nil }

func TestAClientThatCannotBeComparedIsClosedOnce(t *testing.T) {
	var closes atomic.Int32
	client := twice{[]int{1}, &closes}
	p, err := pooltest.New(connpool.Config{
		Dialers: map[connpool.Transport]connpool.DialFunc{carriedTransport: func(context.Context, connpool.Addr) (net.Conn, error) {
			return connpool.Carry(client, nil, nil), nil
		}},
		Setup: func(context.Context, connpool.Addr, net.Conn) (any, error) { return client, nil },
	})
	require.NoError(t, err)
	require.NoError(t, p.With(bg, connpool.Addr{Transport: carriedTransport, Host: "h"}, nothing))
	require.NoError(t, p.Shutdown(bg))
	require.EqualValues(t, 1, closes.Load())
}

func TestDialContextCannotReturnACarriedClient(t *testing.T) {
	var closes atomic.Int32
	p, err := pooltest.New(connpool.Config{Dialers: map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(context.Context, connpool.Addr) (net.Conn, error) {
		return connpool.Carry(twice{nil, &closes}, nil, nil), nil
	}}})
	require.NoError(t, err)
	_, err = p.DialContext(bg, "tcp", "127.0.0.1:1")
	require.ErrorContains(t, err, "a client of Carry")
	require.NoError(t, p.Shutdown(bg))
	require.EqualValues(t, 1, closes.Load())
}

// locked is a client whose Close waits for the command under way.
type locked struct {
	mu sync.Mutex
	nc net.Conn
}

func (l *locked) ask() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.nc.Read(make([]byte, 1))
	return err
}

func (l *locked) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nc.Close()
}

func TestACtxEndsACarriedClientThatWaitsForItsPeer(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
			return connpool.Carry(&locked{nc: nc}, nil, nc), err
		}}
	})
	ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	require.Error(t, p.With(ctx, n.Addr, func(c connpool.Conn) error { return connpool.State[*locked](c).ask() }))
	require.Zero(t, pooltest.Settled(t, p).AbandonedCalls, "nothing had to be given up")
}

func TestThePoolClosesInTimeThoughAGoodbyeIsNotAnswered(t *testing.T) {
	pooltest.Bubble(t, func(t *testing.T) {
		n := pooltest.Open(t, connpool.Config{Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{nc, func() error { _, err := nc.Read(make([]byte, 1)); return err }}, nil
		}})
		n.Idle(pooltest.At("a"), 5)
		require.NoError(t, n.Pool.Close())
	})
}
