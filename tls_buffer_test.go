package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// recordwise is a socket with a buffer of its own, as a tunnel has one. A Read returns bytes of
// one TLS record at most.
type recordwise struct {
	net.Conn
	buf  *bufio.Reader
	left int
}

func (r *recordwise) NetConn() net.Conn { return r.Conn }

func (r *recordwise) Read(b []byte) (int, error) {
	if r.left == 0 {
		head, err := r.buf.Peek(5)
		if err != nil {
			return 0, err
		}
		r.left = 5 + int(head[3])<<8 + int(head[4])
	}
	n, err := r.buf.Read(b[:min(len(b), r.left)])
	r.left -= n
	return n, err
}

// gathering is a socket that sends in one piece what was written while gather is set.
type gathering struct {
	net.Conn
	gather bool
	text   []byte
}

func (g *gathering) Write(b []byte) (int, error) {
	if !g.gather {
		return g.Conn.Write(b)
	}
	g.text = append(g.text, b...)
	return len(b), nil
}

// What a dialer's own TLS has not asked for yet may lie in a buffer below it, where neither
// crypto/tls nor the kernel shows it. A read through crypto/tls finds it.
func TestWhatABufferBelowADialersTLSHoldsIsFound(t *testing.T) {
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			ca := faultnet.NewCA()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
			serve := func(nc net.Conn) {
				defer nc.Close()
				below := &gathering{Conn: nc}
				s := tls.Server(below, &tls.Config{Certificates: []tls.Certificate{ca.Server("localhost")}, MaxVersion: version})
				if s.Handshake() != nil {
					return
				}
				for ask := make([]byte, 1); ; {
					if _, err := io.ReadFull(s, ask); err != nil {
						return
					}
					below.gather, below.text = true, nil
					s.Write([]byte("for " + string(ask)))
					s.Write([]byte("too late for " + string(ask)))
					below.gather = false
					nc.Write(below.text)
				}
			}
			go func() {
				for {
					nc, err := ln.Accept()
					if err != nil {
						return
					}
					go serve(nc)
				}
			}()
			p, err := New(Config{Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, _ Addr) (net.Conn, error) {
				nc, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					return nil, err
				}
				c := tls.Client(&recordwise{Conn: nc, buf: bufio.NewReader(nc)}, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", MaxVersion: version})
				return c, c.HandshakeContext(ctx)
			}}})
			require.NoError(t, err)
			defer p.Close()
			for _, ask := range []string{"A", "B", "C"} {
				require.NoError(t, p.With(bg, at("h"), func(c Conn) error {
					if _, err := c.Write([]byte(ask)); err != nil {
						return err
					}
					b := make([]byte, 100)
					n, err := c.Read(b)
					require.Equal(t, "for "+ask, string(b[:n]))
					return err
				}))
			}
			require.EqualValues(t, 3, p.Stats().Dials)
		})
	}
}
