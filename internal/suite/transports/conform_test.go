package transports

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// What a borrower holds is a complete net.Conn.

// BETA-14
func TestCopyBetweenTwoLoansMovesEveryByte(t *testing.T) {
	payload := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	for _, name := range pooltest.SockNets {
		t.Run(name, func(t *testing.T) {
			sunk := make(chan []byte, 1)
			n := pooltest.StartSock(t, name, faultnet.Options{Handler: func(p *faultnet.Peer) {
				b := make([]byte, 1)
				if p.Read(b); b[0] == 'G' {
					p.Write(payload)
					p.CloseWrite()
					io.Copy(io.Discard, p)
					return
				}
				all, _ := io.ReadAll(p)
				sunk <- all
			}})
			p := n.Pool(t, nil)
			for _, copyWith := range []func(dst, src connpool.Conn) (int64, error){
				func(dst, src connpool.Conn) (int64, error) { return io.Copy(dst, src) },
				func(dst, src connpool.Conn) (int64, error) { return dst.ReadFrom(src) },
				func(dst, src connpool.Conn) (int64, error) { return dst.ReadFrom(struct{ io.Reader }{src}) },
				func(dst, src connpool.Conn) (int64, error) { return src.WriteTo(struct{ io.Writer }{dst}) },
			} {
				require.NoError(t, p.With(t.Context(), n.Addr, func(src connpool.Conn) error {
					io.WriteString(src, "G")
					return p.With(t.Context(), n.Addr, func(dst connpool.Conn) error {
						io.WriteString(dst, "S")
						moved, err := copyWith(dst, src)
						require.NoError(t, err)
						require.EqualValues(t, len(payload), moved)
						if n.Name == "custom" {
							return dst.Close()
						}
						return dst.CloseWrite()
					})
				}))
				require.True(t, bytes.Equal(payload, <-sunk))
				p.CloseIdle()
			}
		})
	}
}

// spy is a TCP connection that says what the kernel was asked to copy from.
type spy struct {
	*net.TCPConn
	from *atomic.Value
}

func (s spy) ReadFrom(r io.Reader) (int64, error) {
	s.from.Store(fmt.Sprintf("%T", r))
	return s.TCPConn.ReadFrom(r)
}

// BETA-14: sendfile and splice work on sockets, not on handles.
func TestTheKernelSeesBothSocketsOfACopy(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) {
		io.ReadFull(p, make([]byte, 1)) // one that ends before it is asked is not lent
		io.WriteString(p, "x")
		p.CloseWrite()
		io.Copy(io.Discard, p)
	}})
	var from atomic.Value
	p := n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			var d net.Dialer
			nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))))
			if err != nil {
				return nil, err
			}
			return spy{nc.(*net.TCPConn), &from}, nil
		}}
	})
	for _, copyWith := range []func(dst, src connpool.Conn) (int64, error){
		func(dst, src connpool.Conn) (int64, error) { return io.Copy(dst, src) },
		func(dst, src connpool.Conn) (int64, error) { return dst.ReadFrom(src) },
	} {
		from.Store("nothing")
		require.NoError(t, p.With(t.Context(), n.Addr, func(src connpool.Conn) error {
			if _, err := io.WriteString(src, "?"); err != nil {
				return err
			}
			return p.With(t.Context(), n.Addr, func(dst connpool.Conn) error {
				moved, err := copyWith(dst, src)
				require.EqualValues(t, 1, moved)
				return err
			})
		}))
		require.Contains(t, []any{"transports.spy", "net.tcpConnWithoutWriteTo"}, from.Load())
	}
}

// BETA-X10
func TestAHandleTellsAboutItsConnection(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		for i := range 3 {
			require.NoError(t, p.With(t.Context(), n.Addr, func(c connpool.Conn) error {
				require.Equal(t, n.Addr, c.Addr())
				info := c.Info()
				require.Positive(t, info.Age)
				require.Less(t, info.Age, time.Minute)
				require.Equal(t, i > 0, info.IdleFor > 0)
				require.Equal(t, n.Server.Addr().String(), c.RemoteAddr().String())
				require.NotEmpty(t, c.LocalAddr().Network())
				require.Equal(t, n.TLS, c.ConnectionState().HandshakeComplete)
				require.Equal(t, connpool.ConnInfo{
					Addr: n.Addr, ID: 1, Uses: i + 1, Reused: i > 0, Age: info.Age, IdleFor: info.IdleFor,
					LocalAddr: c.LocalAddr(), RemoteAddr: c.RemoteAddr(), TLSVersion: c.ConnectionState().Version,
				}, info)
				require.Equal(t, n.TLS, info.TLSVersion >= tls.VersionTLS12)
				return nil
			}))
		}
	})
}
