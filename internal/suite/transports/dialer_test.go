package transports

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// ADO-09: the settings of Config.Dialer hold for the pool's own dials, beside the QoS.
func TestTheBaseOfThePoolsDialsKeepsItsSettings(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "unix"} {
		for _, chained := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				n := pooltest.StartSock(t, name, faultnet.Options{})
				var controlled atomic.Int64
				count := func(string, string, syscall.RawConn) error { controlled.Add(1); return nil }
				d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, KeepAlive: time.Minute}
				if chained {
					d.ControlContext = func(_ context.Context, network, address string, c syscall.RawConn) error {
						return count(network, address, c)
					}
				} else {
					d.Control = count
				}
				p := n.Pool(t, func(c *connpool.Config) { c.Dialer = d })
				d.LocalAddr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)} // too late: New has copied
				addr := n.Addr
				if name != "unix" {
					addr.QoS.SendBuffer = 100_000 // so the pool has a control function of its own
				}
				for _, addr := range []connpool.Addr{n.Addr, addr} {
					require.NoError(t, p.With(context.Background(), addr, func(c connpool.Conn) error {
						if name != "unix" {
							require.Equal(t, "127.0.0.2", c.LocalAddr().(*net.TCPAddr).IP.String())
						}
						return nil
					}))
				}
				require.EqualValues(t, p.Stats().Dials, controlled.Load())
				if name == "tcp" {
					for _, network := range []string{"tcp", "tcp4"} {
						nc, err := p.DialContext(context.Background(), network, net.JoinHostPort(n.Addr.Host, itoa(n.Addr.Port)))
						require.NoError(t, err)
						require.Equal(t, "127.0.0.2", nc.LocalAddr().(*net.TCPAddr).IP.String())
						require.NoError(t, nc.Close())
					}
				}
			})
		}
	}
}

// ADO-09: an error of the base's control function is the dial's, and nothing is left open.
func TestTheControlOfTheBaseMayRefuse(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	refused := errors.New("not this one")
	n.Addr.QoS.SendBuffer = 100_000
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialer = &net.Dialer{Control: func(string, string, syscall.RawConn) error { return refused }}
	})
	require.ErrorIs(t, p.With(context.Background(), n.Addr, func(connpool.Conn) error { return nil }), refused)
	require.Zero(t, pooltest.Settled(t, p).Open)
}

// ADO-10: what the dialer returned, in the loan only.
func TestWhatLiesUnderALoan(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		var kept connpool.Conn
		require.NoError(t, p.With(context.Background(), n.Addr, func(c connpool.Conn) error {
			kept = c
			own, isTLS := connpool.Under[*tls.Conn](c)
			require.Equal(t, n.TLS, isTLS)
			if isTLS {
				require.True(t, own.ConnectionState().HandshakeComplete)
			}
			_, isTCP := connpool.Under[*net.TCPConn](c)
			_, isUnix := connpool.Under[*net.UnixConn](c)
			require.NotEqual(t, n.Name == "custom", isTCP || isUnix, "a wrapper without NetConn hides what lies below")
			_, any := connpool.Under[net.Conn](c)
			require.True(t, any)
			_, none := connpool.Under[interface{ Nothing() }](c)
			require.False(t, none)
			_, err := faultnet.Ask(c, "x")
			return err
		}))
		_, after := connpool.Under[net.Conn](kept)
		require.False(t, after)
		_, never := connpool.Under[net.Conn](connpool.Conn{})
		require.False(t, never)
	})
}

// ADO-10: I/O through what lies below leaves a connection that is still clean or still found dirty.
func TestIOThroughWhatLiesUnderIsJudgedAtTheEnd(t *testing.T) {
	for _, name := range []string{"tcp", "tls12", "tls13"} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
			p := n.Pool(t, nil)
			echo := func(read int) {
				require.NoError(t, p.With(context.Background(), n.Addr, func(c connpool.Conn) error {
					nc, ok := connpool.Under[interface {
						io.ReadWriter
						CloseWrite() error
					}](c)
					require.True(t, ok)
					_, err := io.WriteString(nc, "abcdef")
					require.NoError(t, err)
					_, err = io.ReadFull(nc, make([]byte, read))
					return err
				}))
			}
			echo(6)
			echo(6)
			require.EqualValues(t, 1, p.Stats().Dials)
			echo(3)
			echo(6)
			require.EqualValues(t, 2, p.Stats().Dials, "half a reply was left behind")
			require.EqualValues(t, 1, pooltest.Settled(t, p).Closed[connpool.ClosedDirty])
		})
	}
}

func itoa(port uint16) string { return strconv.Itoa(int(port)) }
