package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// A loan that only read, and in vain, may leave something inside crypto/tls.

// holdBack is the socket of a server that passes the first bytes of the next
// record only, and the rest when it is told.
type holdBack struct {
	net.Conn
	first   int // bytes of the next write that pass; 0: all
	release chan struct{}
}

func (h *holdBack) Write(b []byte) (int, error) {
	first := h.first
	h.first = 0
	if first == 0 {
		return h.Conn.Write(b)
	}
	n, err := h.Conn.Write(b[:first])
	if err != nil {
		return n, err
	}
	<-h.release
	m, err := h.Conn.Write(b[n:])
	return n + m, err
}

// recordHalves is a server of TLS that answers one byte, and then, when begin is closed,
// writes something unasked, in a record of which only so many bytes go out.
type recordHalves struct {
	addr           Addr
	client         *tls.Config
	begin, release chan struct{}
}

func serveHalves(t *testing.T, version uint16, first int) *recordHalves {
	t.Helper()
	nothingLeaks(t)
	ca := faultnet.NewCA()
	cfg := &tls.Config{Certificates: []tls.Certificate{ca.Server("127.0.0.1")}, MinVersion: version, MaxVersion: version}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h := &recordHalves{client: &tls.Config{RootCAs: ca.Pool()}, begin: make(chan struct{}), release: make(chan struct{})}
	h.addr = Addr{Transport: TLS, Host: "127.0.0.1", Port: uint16(ln.Addr().(*net.TCPAddr).Port)}
	over := make(chan struct{})
	var running tasks.Group
	running.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer nc.Close()
				sock := &holdBack{Conn: nc, release: h.release}
				tc := tls.Server(sock, cfg)
				one := make([]byte, 1)
				if _, err := tc.Read(one); err != nil {
					return
				}
				tc.Write(one)
				select {
				case <-h.begin:
				case <-over:
					return
				}
				sock.first = first
				tc.Write([]byte("late reply\n"))
				<-over
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		close(over)
		running.Wait()
	})
	return h
}

func halvesByte(c Conn) error {
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// TRY-46
func TestHalfARecordIsSeenAfterALoanThatOnlyRead(t *testing.T) {
	nop := func(Conn) error { return nil }
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for name, first := range map[string]int{"half a header": 2, "half a body": 9} {
			for how, poll := range map[string]func(p *Pool, a Addr, fn func(Conn) error) error{
				"With": func(p *Pool, a Addr, fn func(Conn) error) error { return p.With(bg, a, fn) },
				"a session": func(p *Pool, a Addr, fn func(Conn) error) error {
					ctx, end := p.Session(bg)
					defer end()
					return p.With(ctx, a, fn)
				},
				"a use in a use": func(p *Pool, a Addr, fn func(Conn) error) error {
					ctx, end := p.Session(bg)
					defer end()
					var inner error
					return errors.Join(p.With(ctx, a, func(Conn) error { inner = p.With(ctx, a, fn); return nil }), inner)
				},
				"Do of a lease": func(p *Pool, a Addr, fn func(Conn) error) error {
					l, err := p.Lease(bg, a)
					require.NoError(t, err)
					return errors.Join(l.Do(bg, fn), l.Do(bg, nop), l.Return())
				},
			} {
				t.Run(fmt.Sprint(tls.VersionName(version), " ", name, " ", how), func(t *testing.T) {
					h := serveHalves(t, version, first)
					p := (&sockNet{}).pool(t, func(c *Config) { c.TLS = h.client })
					// The first loan is always followed by a question to crypto/tls.
					require.NoError(t, p.With(bg, h.addr, halvesByte))
					id := p.every()[0].id
					err := poll(p, h.addr, func(c Conn) (err error) {
						require.Equal(t, id, c.Info().ID)
						close(h.begin) // what comes before is the business of the look
						for end := time.Now().Add(bounded); !c.c.sock.belowTLS().record.Partial(); {
							require.True(t, time.Now().Before(end))
							require.NoError(t, c.SetReadDeadline(time.Now().Add(time.Millisecond)))
							n, e := c.Read(make([]byte, 64))
							require.Zero(t, n)
							require.ErrorIs(t, e, os.ErrDeadlineExceeded)
							err = Keep(e) // the connection is in step, fn believes
						}
						return err
					})
					require.ErrorIs(t, err, os.ErrDeadlineExceeded)
					close(h.release)
					require.NoError(t, p.With(bg, h.addr, func(c Conn) error {
						require.NotEqual(t, id, c.Info().ID, "lent again with half a record inside")
						return nil
					}))
					settled(t, p)
					require.Equal(t, reasons{ClosedDirty: 1}, p.Stats().Closed)
				})
			}
		}
	}
}

// What a loan may have left is asked for once, not by each loan after it.
//
// TRY-46
func TestALoanThatReadNothingAsksNothing(t *testing.T) {
	for _, name := range bothTLS {
		for _, suite := range []uint16{0, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA} { // whose overhead is not known
			t.Run(fmt.Sprint(name, suite), func(t *testing.T) {
				n := startSock(t, name, faultnet.Options{})
				p := n.pool(t, func(c *Config) {
					if suite != 0 {
						c.TLS.CipherSuites = []uint16{suite}
					}
				})
				loan(t, p, n.addr)
				require.NoError(t, p.With(bg, n.addr, func(Conn) error { return nil }))
				sock := p.every()[0].sock.belowTLS()
				require.True(t, sock.record.Untouched())
				// In vain, and it says so: it is asked again.
				require.ErrorIs(t, p.With(bg, n.addr, func(c Conn) error {
					c.SetReadDeadline(aLongTimeAgo)
					_, err := c.Read(make([]byte, 1))
					require.False(t, sock.record.Untouched())
					return Keep(err)
				}), os.ErrDeadlineExceeded)
				require.True(t, sock.record.Untouched())
				require.Empty(t, p.Stats().Closed)
			})
		}
	}
}

// severed lets no answer through to what was written while it was armed: the
// reader's time is up.
type severed struct {
	*net.TCPConn
	armed, wrote atomic.Bool
}

func (c *severed) Write(b []byte) (int, error) {
	c.wrote.Store(c.armed.Load())
	return c.TCPConn.Write(b)
}

func (c *severed) Read(b []byte) (int, error) {
	if c.armed.Load() && c.wrote.Load() {
		return 0, os.ErrDeadlineExceeded
	}
	return c.TCPConn.Read(b)
}

// A server that asks for a renegotiation while the connection is idle, or lent
// to a borrower who has no time for it: crypto/tls does not take up one that was
// cut short, so the connection is lost, and must be seen to be.
//
// TRY-46
func TestARenegotiationThatIsCutShortEndsTheConnection(t *testing.T) {
	for name, idle := range map[string]bool{"idle": true, "lent": false} {
		t.Run(name, func(t *testing.T) {
			s := openssl(t, "-no_tls1_3", "-naccept", "2")
			var cut *severed // of the first connection
			p, err := New(Config{
				SweepInterval: -1,
				TLS:           &tls.Config{RootCAs: tlAuthority().RootCAs, Renegotiation: tls.RenegotiateFreelyAsClient},
				Dialers: map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
					nc, err := dialSocket(ctx, a)
					if err != nil {
						return nil, err
					}
					c := &severed{TCPConn: nc.(*net.TCPConn)}
					if cut == nil {
						cut = c
					}
					return c, nil
				}},
			})
			require.NoError(t, err)
			defer p.Close()
			require.NoError(t, p.With(bg, s.addr, func(c Conn) error {
				require.False(t, c.c.sock.belowTLS().record.CanProve(), "nothing is proven where the cipher may change")
				_, err := c.Write([]byte("one\n"))
				return errors.Join(err, s.said("one"))
			}))
			c := p.every()[0]
			renegotiate := func() { fmt.Fprintln(s.stdin, "R") }
			if idle {
				renegotiate()
				soon(t, "the request for a handshake", func() bool {
					c.sock.raw.Control(func(fd uintptr) { idle = p.sys.peek(fd).Bytes })
					return idle || p.Stats().Idle == 0
				})
			} else {
				err := p.With(bg, s.addr, func(h Conn) error {
					renegotiate()
					cut.armed.Store(true)
					defer cut.armed.Store(false)
					n, err := h.Read(make([]byte, 1))
					require.Zero(t, n)
					require.ErrorIs(t, err, os.ErrDeadlineExceeded)
					return Keep(err)
				})
				require.Error(t, err)
			}
			p.With(bg, s.addr, func(h Conn) error {
				require.NotEqual(t, uint64(1), h.Info().ID, "it can never be used again")
				return nil
			})
			soon(t, "it is counted, also by a watcher that still looks", func() bool {
				st := p.Stats()
				return st.Closed[ClosedStale]+st.Closed[ClosedDirty] == 1
			})
		})
	}
}
