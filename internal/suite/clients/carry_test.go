package clients

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// asker is a client that dials for itself, and whose connection nobody sees. It matches a reply
// by its position.
type asker struct {
	nc     net.Conn
	in     *bufio.Reader
	closed atomic.Int32

	mu  sync.Mutex // guards err
	err error      // what ended it
}

func dialAsker(ctx context.Context, addr connpool.Addr) (*asker, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr.Host, fmt.Sprint(addr.Port)))
	if err != nil {
		return nil, err
	}
	return &asker{nc: nc, in: bufio.NewReader(nc)}, nil
}

func (a *asker) ask(text string) (string, error) {
	fmt.Fprintf(a.nc, "1 %s\n", text)
	line, err := a.in.ReadString('\n')
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
	}
	return strings.TrimPrefix(strings.TrimSpace(line), "1 "), err
}

func (a *asker) alive() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

func (a *asker) Close() error {
	a.closed.Add(1)
	fmt.Fprint(a.nc, "bye\n")
	return a.nc.Close()
}

const carriedTransport connpool.Transport = "carried"

// askers are the clients that were dialled.
type askers struct {
	mu  sync.Mutex
	all []*asker
}

func (l *askers) add(a *asker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, a)
}

// closes says how often each was closed.
func (l *askers) closes() (times []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.all {
		times = append(times, int(a.closed.Load()))
	}
	return times
}

func (l *askers) first() *asker {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[0]
}

// carriers opens a pool whose dialer returns clients, and a server for them.
func carriers(t *testing.T, showSocket bool, change func(*connpool.Config)) (*connpool.Pool, connpool.Addr, *host, *faultnet.Server, *askers) {
	h := new(host)
	n := pooltest.StartSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) { h.serve(p) }})
	all := new(askers)
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{carriedTransport: func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			a, err := dialAsker(ctx, addr)
			if err != nil {
				return nil, err
			}
			all.add(a)
			if showSocket {
				return connpool.Carry(a, a.alive, a.nc), nil
			}
			return connpool.Carry(a, a.alive, nil), nil
		}}
		if change != nil {
			change(c)
		}
	})
	n.Addr.Transport = carriedTransport
	return p, n.Addr, h, n.Server, all
}

func askCarried(ctx context.Context, p *connpool.Pool, addr connpool.Addr, text string) error {
	return p.With(ctx, addr, func(c connpool.Conn) error {
		reply, err := connpool.State[*asker](c).ask(text)
		if err == nil && reply != text {
			err = fmt.Errorf("asked for %q, got %q", text, reply)
		}
		return err
	})
}

// ADO-02: a client that dials for itself is pooled: one dial, exclusive loans, limits, LRU,
// MaxUses; its Close runs once for each, and its goodbye reaches the server.
func TestAClientThatDialsForItselfIsPooled(t *testing.T) {
	for _, show := range []bool{false, true} {
		t.Run(fmt.Sprintf("socket=%v", show), func(t *testing.T) {
			p, addr, h, _, all := carriers(t, show, func(c *connpool.Config) { c.MaxOpen, c.MaxUses = 2, 60 })
			var users tasks.Group
			for w := range 8 {
				users.Go(func() {
					for i := range 10 {
						if err := askCarried(bg, p, addr, fmt.Sprintf("%d/%d", w, i)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			users.Wait()
			st := pooltest.Settled(t, p)
			require.LessOrEqual(t, st.Dials, uint64(4))
			require.Equal(t, st.Open, st.Residents)
			require.Zero(t, st.Unprobed)
			require.NoError(t, p.With(bg, addr, func(c connpool.Conn) error {
				_, err := c.Write([]byte("x"))
				require.ErrorIs(t, err, errors.ErrUnsupported)
				if show {
					require.NotNil(t, c.RemoteAddr())
				} else {
					require.Nil(t, c.RemoteAddr())
				}
				return nil
			}))
			require.NoError(t, p.Shutdown(bg))
			patience.Soon(t, "each has said goodbye", func() bool { return h.goodbyes() == len(all.closes()) })
			for _, times := range all.closes() {
				require.Equal(t, 1, times)
			}
		})
	}
}

// ADO-02: liveness is asked of the client; with its socket the pool also hears at once of the end.
func TestADeadCarriedClientIsNotLent(t *testing.T) {
	p, addr, _, _, all := carriers(t, false, nil)
	require.NoError(t, askCarried(bg, p, addr, "x"))
	first := all.first()
	first.mu.Lock()
	first.err = io.ErrUnexpectedEOF
	first.mu.Unlock()
	require.NoError(t, askCarried(bg, p, addr, "y"))
	patience.Soon(t, "it is closed", func() bool { return p.Stats().Closed[connpool.ClosedStale] == 1 && first.closed.Load() == 1 })

	p, addr, _, srv, _ := carriers(t, true, nil)
	require.NoError(t, askCarried(bg, p, addr, "x"))
	srv.CutIdle(-1, faultnet.FIN)
	patience.Soon(t, "the end is heard", func() bool { return p.Stats().Closed[connpool.ClosedStale] == 1 || !sock.CanWatch })
	if sock.CanWatch {
		require.NoError(t, askCarried(bg, p, addr, "y"))
	}
}

// ADO-02: a ctx that ends closes the client, which ends its I/O, and a dial that comes too late
// is closed as a client.
func TestACarriedClientIsClosedWithItsCtx(t *testing.T) {
	p, addr, _, _, all := carriers(t, false, nil)
	require.NoError(t, askCarried(bg, p, addr, "x"))
	ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	require.Error(t, p.With(ctx, addr, func(c connpool.Conn) error {
		a := connpool.State[*asker](c)
		_, err := a.nc.Read(make([]byte, 1)) // a reply that never comes
		return err
	}))
	patience.Soon(t, "it is closed", func() bool { return all.first().closed.Load() == 1 })
	require.NoError(t, askCarried(bg, p, addr, "x"))

	release := make(chan struct{})
	p, addr, _, _, all = carriers(t, false, func(c *connpool.Config) {
		dial := c.Dialers[carriedTransport]
		c.DialTimeout = 20 * time.Millisecond
		c.Dialers[carriedTransport] = func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			<-release
			return dial(context.WithoutCancel(ctx), addr)
		}
	})
	require.Error(t, askCarried(bg, p, addr, "x"))
	close(release)
	patience.Soon(t, "the client that came too late is closed", func() bool { return slices.Equal(all.closes(), []int{1}) })
}

// ADO-02: a Setup finds the client, and may bring a state of its own; a Resident is refused.
func TestASetupFindsTheCarriedClient(t *testing.T) {
	type login struct{ a *asker }
	p, addr, _, _, all := carriers(t, false, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			a := connpool.State[*asker](nc.(connpool.Conn))
			if _, err := a.ask("login"); err != nil {
				return nil, err
			}
			switch addr.Scope {
			case "own":
				return &login{a}, nil
			case "same":
				return a, nil
			case "resident":
				return connpool.Resident(a, nil), nil
			}
			return nil, nil
		}
	})
	require.NoError(t, askCarried(bg, p, addr, "x"))
	require.NoError(t, p.With(bg, pooltest.Scoped(addr, "own"), func(c connpool.Conn) error {
		_, err := connpool.State[*login](c).a.ask("x")
		return err
	}))
	require.NoError(t, askCarried(bg, p, pooltest.Scoped(addr, "same"), "x"))
	require.ErrorContains(t, askCarried(bg, p, pooltest.Scoped(addr, "resident"), "x"), "Resident for a client that Carry has brought")
	require.NoError(t, p.Shutdown(bg))
	patience.Soon(t, "each is closed, once", func() bool { return slices.Equal(all.closes(), []int{1, 1, 1, 1}) })
}
