package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// eachProbed runs f over the transports whose connections can be looked into.
func eachProbed(t *testing.T, o faultnet.Options, f func(t *testing.T, n *sockNet)) {
	for _, name := range sockNets {
		if name == "custom" {
			continue
		}
		t.Run(name, func(t *testing.T) { f(t, startSock(t, name, o)) })
	}
}

// BETA-24, TDBC-X06
func TestAConnectionThatDiedWhileIdleIsNotLent(t *testing.T) {
	for _, how := range []faultnet.Cut{faultnet.FIN, faultnet.RST, faultnet.HalfClose} {
		t.Run(how.String(), func(t *testing.T) {
			eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
				p := n.pool(t, nil)
				before := loan(t, p, n.addr)
				require.Equal(t, 1, n.srv.CutIdle(-1, how))
				stirs(t, p, n.addr)
				require.Equal(t, before.serial+1, loan(t, p, n.addr).serial)
				st := settled(t, p)
				require.Equal(t, map[CloseReason]uint64{ClosedStale: 1}, st.Closed)
				require.EqualValues(t, 2, st.Dials)
			})
		})
	}
}

// BETA-24: a process that dies says nothing, under TLS no close_notify either.
func TestConnectionsOfADeadServerAreNotLent(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		before := loan(t, p, n.addr)
		require.NoError(t, n.srv.Restart())
		stirs(t, p, n.addr)
		require.Equal(t, before.serial+1, loan(t, p, n.addr).serial)
	})
}

// APR-X20, BETA-24
func TestARestartedServerFailsNobody(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxPerAddr = 10 })
		var out []held
		for range 10 {
			out = append(out, hold(t, p, n.addr))
		}
		for _, h := range out {
			_, err := ask(h, newToken())
			require.NoError(t, err)
		}
		for _, h := range out {
			require.NoError(t, h.end(nil))
		}
		require.NoError(t, n.srv.Restart())
		stirs(t, p, n.addr)
		var wg tasks.Group
		var failed atomic.Int32
		for range 40 {
			wg.Go(func() {
				if p.With(context.Background(), n.addr, func(c Conn) error {
					_, err := ask(c, newToken())
					return err
				}) != nil {
					failed.Add(1)
				}
			})
		}
		wg.Wait()
		require.Zero(t, failed.Load())
		loan(t, p, n.addr)
		// Between the two counts the watcher may take one.
		soon(t, "ten were found dead, or will be", func() bool {
			return settled(t, p).Closed[ClosedStale]+uint64(stale(p, n.addr)) == 10
		})
		require.LessOrEqual(t, p.Stats().Open, 10)
	})
}

// stale counts the idle connections whose end is there to be seen.
func stale(p *Pool, addr Addr) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sites.find(addr)
	if s == nil {
		return 0
	}
	for c := s.top; c != nil; c = c.down {
		c.sock.raw.Control(func(fd uintptr) {
			if sock.Peek(fd) != (sock.Seen{}) {
				n++
			}
		})
	}
	return n
}

// BETA-20, BETA-24
func TestAByteThatNobodyAskedForCostsTheConnection(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		loan(t, p, n.addr)
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("!")))
		stirs(t, p, n.addr)
		require.Equal(t, 2, loan(t, p, n.addr).serial)
		require.Equal(t, map[CloseReason]uint64{ClosedDirty: 1}, settled(t, p).Closed)
		soon(t, "the old connection closed", func() bool { return n.srv.Open() == 1 })
	})
}

// ORA-75, ORA-26, G-04: 1 of 11 bytes is read, and the rest lies in the kernel,
// in crypto/tls or in the state's buffer.
func TestUnreadBytesCostTheConnection(t *testing.T) {
	hello := func(p *faultnet.Peer) {
		r := bufio.NewReader(p)
		for {
			if _, err := r.ReadString('\n'); err != nil {
				return
			}
			io.WriteString(p, "hello world")
		}
	}
	readOne := func(r io.Reader, c Conn) error {
		io.WriteString(c, "hi\n")
		b := make([]byte, 1)
		_, err := io.ReadFull(r, b)
		return err
	}
	eachProbed(t, faultnet.Options{Handler: hello}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		for i := range 3 {
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				require.EqualValues(t, i+1, c.Info().ID, "a dirty connection was lent")
				return readOne(c, c)
			}))
			stirs(t, p, n.addr)
		}
		p.CloseIdle()
		st := settled(t, p)
		if n.tls { // what crypto/tls holds is found when it is given back
			require.EqualValues(t, 3, st.Closed[ClosedDirty])
		} else { // what the kernel holds, before it is lent
			require.EqualValues(t, 2, st.Closed[ClosedDirty])
		}
	})
	t.Run("in the buffer of the state", func(t *testing.T) {
		for _, name := range sockNets { // that of a bare connection too
			n := startSock(t, name, faultnet.Options{Handler: hello})
			p := n.pool(t, func(c *Config) {
				c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
			})
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error { return readOne(State[*bufio.Reader](c), c) }))
			require.Equal(t, map[CloseReason]uint64{ClosedDirty: 1}, settled(t, p).Closed)
		}
	})
}

// ORA-X02
func TestASocketThatFailedIsNotKeptThoughFnIsContent(t *testing.T) {
	for _, how := range []faultnet.Cut{faultnet.FIN, faultnet.RST} {
		t.Run(how.String(), func(t *testing.T) {
			eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
				p := n.pool(t, nil)
				loan(t, p, n.addr)
				require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
					n.srv.CutIdle(-1, how)
					_, err := c.Read(make([]byte, 1))
					require.Error(t, err)
					return nil
				}))
				require.Equal(t, map[CloseReason]uint64{ClosedBroken: 1}, settled(t, p).Closed)
				require.Equal(t, 2, loan(t, p, n.addr).serial)
			})
		})
	}
}

// APR-X24
func TestNothingReconnectsBehindTheBorrower(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		runs := 0
		err := p.With(t.Context(), n.addr, func(c Conn) error {
			runs++
			r, err := ask(c, newToken())
			require.NoError(t, err)
			require.Equal(t, 1, r.serial)
			require.Equal(t, 1, n.srv.CutIdle(-1, faultnet.RST))
			for range 3 { // broken it is, and broken it stays
				_, err = ask(c, newToken())
				require.Error(t, err)
			}
			return err
		})
		require.Error(t, err)
		var pe *Error
		require.False(t, errors.As(err, &pe), "fn ran, so its error comes back as it is")
		require.Equal(t, 1, runs)
		require.Equal(t, 1, n.srv.Accepts())
		require.Zero(t, settled(t, p).Open)
	})
}

// TDBC-20: of a connection that nobody can look into, the borrower finds out.
func TestABareConnectionThatDiedIsTheBorrowersToFind(t *testing.T) {
	n := startSock(t, "custom", faultnet.Options{})
	p := n.pool(t, nil)
	loan(t, p, n.addr)
	require.Equal(t, 1, p.Stats().Unprobed)
	require.Equal(t, 1, n.srv.CutIdle(-1, faultnet.FIN))
	require.Error(t, p.With(t.Context(), n.addr, func(c Conn) error {
		_, err := ask(c, newToken())
		return err
	}))
	require.Equal(t, 2, loan(t, p, n.addr).serial)
	require.Equal(t, 1, settled(t, p).Unprobed)
}

// A wrapper around a socket must not switch the look off in silence; one that
// shows what it wraps, or its SyscallConn, does not.
func TestAWrappedSocketIsLookedInto(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{
		"by NetConn":     func(nc net.Conn) net.Conn { return wrapped{nc} },
		"twice":          func(nc net.Conn) net.Conn { return wrapped{wrapped{nc}} },
		"by SyscallConn": func(nc net.Conn) net.Conn { return withRaw{nc, nc.(syscall.Conn)} },
		"by embedding":   func(nc net.Conn) net.Conn { return embedding{nc.(*net.TCPConn)} },
	} {
		for _, transport := range []string{"tcp", "tls13"} { // under TLS it is the socket below
			t.Run(name+" "+transport, func(t *testing.T) {
				n := startSock(t, transport, faultnet.Options{})
				p := n.pool(t, func(c *Config) {
					c.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
						nc, err := dialSocket(ctx, a)
						if err != nil {
							return nil, err
						}
						return wrap(nc), nil
					}}
				})
				loan(t, p, n.addr)
				require.Equal(t, 1, loan(t, p, n.addr).serial)
				require.Zero(t, p.Stats().Unprobed)
				n.srv.CutIdle(-1, faultnet.FIN)
				stirs(t, p, n.addr)
				require.Equal(t, 2, loan(t, p, n.addr).serial)
			})
		}
	}
}

type wrapped struct{ net.Conn }

func (w wrapped) NetConn() net.Conn { return w.Conn }

type withRaw struct {
	net.Conn
	raw syscall.Conn
}

func (w withRaw) SyscallConn() (syscall.RawConn, error) { return w.raw.SyscallConn() }

// A dialer may do the whole of TLS itself.
func TestTLSOfADialersOwnIsLookedThrough(t *testing.T) {
	for _, name := range []string{"tls12", "tls13"} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, func(c *Config) {
				config := c.TLS
				c.TLS = nil
				c.Dialers = map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
					d := tls.Dialer{Config: config}
					return d.DialContext(ctx, "tcp", n.srv.Addr().String())
				}}
			})
			for range 100 { // session tickets and all
				require.Equal(t, 1, loan(t, p, n.addr).serial)
			}
			for i, harm := range []func(){
				func() { n.srv.CutIdle(-1, faultnet.FIN) },
				func() { n.srv.CutIdle(-1, faultnet.RST) },
				func() { n.srv.PushIdle(-1, []byte("!")) },
			} {
				harm()
				stirs(t, p, n.addr)
				require.Equal(t, i+2, loan(t, p, n.addr).serial)
			}
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				io.WriteString(c, newToken()+"\n")
				_, err := io.ReadFull(c, make([]byte, 1))
				return err
			}))
			require.EqualValues(t, 2, settled(t, p).Closed[ClosedDirty])
		})
	}
}

// NoProbe is for protocols that begin with a ping of their own.
func TestNoProbeLeavesItToTheBorrower(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.NoProbe = true })
	loan(t, p, n.addr)
	n.srv.CutIdle(-1, faultnet.FIN)
	stirs(t, p, n.addr)
	sweepAll(p)
	require.Error(t, p.With(t.Context(), n.addr, func(c Conn) error {
		_, err := ask(c, newToken())
		return err
	}))
	require.Equal(t, 2, loan(t, p, n.addr).serial)
}

// TDBC-14
func TestASweepClosesWhatDiedAndKeepsWhatLives(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		p.watching.off = true // where nothing tells of the death before the sweep
		var out []held
		for range 5 {
			h := hold(t, p, n.addr)
			_, err := ask(h, newToken())
			require.NoError(t, err)
			out = append(out, h)
		}
		for _, h := range out {
			require.NoError(t, h.end(nil))
		}
		require.Equal(t, 3, n.srv.CutIdle(3, faultnet.FIN))
		soon(t, "three ends", func() bool { return stale(p, n.addr) == 3 })
		sweepAll(p)
		st := settled(t, p)
		require.Equal(t, 2, st.Idle)
		require.EqualValues(t, 3, st.Closed[ClosedStale])
		require.Equal(t, 5, loan(t, p, n.addr).serial)
		require.Equal(t, 5, n.srv.Accepts())
	})
}

// embedding embeds a connection, and is another type.
type embedding struct{ *net.TCPConn }
