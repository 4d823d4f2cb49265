package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

var bothTLS = []string{"tls12", "tls13"}

// G-04: session tickets look like bytes that nobody asked for. A server that
// asks for a certificate sends them after the handshake, so that they wait in
// the kernel; any other with its last part, so that they wait in crypto/tls.
func TestAFreshTLSConnectionWithUnreadTicketsIsReused(t *testing.T) {
	for _, asks := range []tls.ClientAuthType{tls.NoClientCert, tls.RequestClientCert} {
		for _, cache := range []tls.ClientSessionCache{nil, tls.NewLRUClientSessionCache(8)} {
			for _, name := range bothTLS {
				t.Run(fmt.Sprintf("%s %v %T", name, asks, cache), func(t *testing.T) {
					n := startSock(t, name, faultnet.Options{TLS: &tls.Config{ClientAuth: asks}})
					p := n.pool(t, func(c *Config) { c.TLS.ClientSessionCache = cache })
					unread := func(a Addr) {
						require.NoError(t, p.With(t.Context(), a, func(Conn) error { return nil }))
						if name == "tls13" && asks != tls.NoClientCert {
							stirs(t, p, a)
						}
						p.check(t)
					}
					unread(n.addr)
					for range 100 {
						require.NoError(t, p.With(t.Context(), n.addr, func(Conn) error { return nil }))
						require.Equal(t, 1, loan(t, p, n.addr).serial)
					}
					require.Equal(t, 1, n.srv.Accepts())
					require.Empty(t, p.Stats().Closed)

					// What comes behind them is seen all the same.
					other := n.addr
					other.Scope = "other"
					unread(other)
					soon(t, "the second handshake", func() bool { return n.srv.Handshakes() == 2 })
					require.Equal(t, 2, n.srv.PushIdle(-1, []byte("!")))
					soon(t, "the byte behind the tickets", func() (fresh bool) {
						require.NoError(t, p.With(t.Context(), other, func(c Conn) error {
							fresh = !c.Info().Reused
							return nil
						}))
						return fresh
					})
				})
			}
		}
	}
}

// APR-01
func TestAHundredBorrowsShakeHandsAndLogInOnce(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{Record: true})
			p := n.pool(t, func(c *Config) {
				c.Setup = func(ctx context.Context, a Addr, nc net.Conn) (any, error) { return ask(nc, "LOGIN") }
			})
			for range 100 {
				r := loan(t, p, n.addr)
				require.Equal(t, 1, r.serial)
			}
			require.Equal(t, [...]int{1, 1}, [...]int{n.srv.Accepts(), n.srv.Handshakes()})
			lines := n.srv.Lines(1)
			require.Len(t, lines, 101)
			require.Equal(t, "LOGIN", lines[0])
			require.NotContains(t, lines[1:], "LOGIN")
		})
	}
}

// ORA-18, ORA-X14: a session is resumed under the identity it was made with,
// and no other.
func TestSessionsAreResumedPerAddressOnly(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			// A cache that the user brought must not become a bridge.
			p := n.pool(t, func(c *Config) { c.TLS.ClientSessionCache = tls.NewLRUClientSessionCache(8) })
			resumed := func(a Addr) (did bool) {
				t.Helper()
				require.NoError(t, p.With(t.Context(), a, func(c Conn) error {
					did = c.ConnectionState().DidResume
					_, err := ask(c, newToken()) // the ticket is read with the reply
					require.NoError(t, err)
					return c.Close()
				}))
				return did
			}
			a := n.addr
			a.ServerName = "server.test"
			require.False(t, resumed(a))
			require.True(t, resumed(a))
			for _, change := range []func(*Addr){
				func(a *Addr) { a.Scope = "bob" },
				func(a *Addr) { a.ServerName = "localhost" },
				func(a *Addr) { a.ServerName = "" },
				func(a *Addr) { a.QoS.Delay = true },
				func(a *Addr) { a.Host = "localhost" },
			} {
				b := a
				change(&b)
				require.False(t, resumed(b), "%v on a session of %v", b, a)
				require.True(t, resumed(b))
			}
			p.Retire(a)
			require.False(t, resumed(a), "the session outlived Retire")
		})
	}
}

// clientCerts is a server that answers each line with the name in the client's
// certificate, and what its clients need.
func clientCerts(t *testing.T, name string) (n *sockNet, of func(who string) *tls.Config) {
	ca := faultnet.NewCA()
	n = startSock(t, name, faultnet.Options{
		TLS: &tls.Config{
			Certificates: []tls.Certificate{ca.Server("127.0.0.1", "server.test")},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    ca.Pool(),
		},
		Handler: func(p *faultnet.Peer) {
			r := bufio.NewReader(p)
			for {
				if _, err := r.ReadString('\n'); err != nil {
					return
				}
				fmt.Fprintln(p, p.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName)
			}
		},
	})
	var made sync.Map
	return n, func(who string) *tls.Config {
		config, _ := made.LoadOrStore(who, &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{ca.Client(who)}})
		return config.(*tls.Config)
	}
}

// ORA-18
func TestEachScopeKeepsItsClientCertificate(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n, of := clientCerts(t, name)
			p := n.pool(t, func(c *Config) {
				c.MaxPerAddr = 3
				c.TLS = of("nobody special")
				c.TLSFor = func(a Addr) (*tls.Config, error) {
					switch a.Scope {
					case "":
						return nil, nil
					case "mallory":
						return nil, errors.New("no certificate for mallory")
					}
					return of(a.Scope), nil
				}
			})
			var wg tasks.Group
			failures := make(chan error, 8)
			for w := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 7))
					for range 50 {
						a, who := n.addr, "nobody special"
						if i := rng.IntN(3); i > 0 {
							who = []string{"alice", "bob"}[i-1]
							a.Scope = who
						}
						err := p.With(context.Background(), a, func(c Conn) error {
							io.WriteString(c, "who am I?\n")
							got, err := bufio.NewReader(c).ReadString('\n')
							if err == nil && got != who+"\n" {
								err = fmt.Errorf("%s was taken for %s", who, got)
							}
							if err == nil && rng.IntN(10) == 0 {
								c.Close() // so that sessions are resumed
							}
							return err
						})
						if err != nil {
							failures <- err
							return
						}
					}
				})
			}
			wg.Wait()
			close(failures)
			require.NoError(t, <-failures)

			a := n.addr
			a.Scope = "mallory"
			var pe *Error
			require.ErrorAs(t, p.With(t.Context(), a, func(Conn) error { return nil }), &pe)
			require.Equal(t, StageHandshake, pe.Stage)
			require.ErrorContains(t, pe, "no certificate for mallory")
			settled(t, p)
		})
	}
}

// G-04: crypto/tls writes no more after a write that timed out, whatever fn
// makes of it.
func TestAWriteTimeOutUnderTLSCostsTheConnection(t *testing.T) {
	for _, name := range bothTLS {
		for verdict, of := range map[string]func(error) error{
			"swallowed": func(error) error { return nil },
			"kept":      Keep,
		} {
			t.Run(name+" "+verdict, func(t *testing.T) {
				n := startSock(t, name, faultnet.Options{})
				p := n.pool(t, nil)
				before := loan(t, p, n.addr)
				p.With(t.Context(), n.addr, func(c Conn) error {
					c.SetWriteDeadline(time.Unix(1, 0))
					_, err := c.Write([]byte("x"))
					require.Error(t, err)
					return of(err)
				})
				require.Equal(t, before.serial+1, loan(t, p, n.addr).serial)
			})
		}
	}
}

// BETA-11: what was negotiated is the borrower's to see.
func TestTheProtocolThatTLSNegotiatedIsShown(t *testing.T) {
	for i, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{TLS: &tls.Config{NextProtos: []string{"b/1", "a/1"}}})
			p := n.pool(t, func(c *Config) { c.TLS.NextProtos = []string{"a/1"} })
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				st := c.ConnectionState()
				require.True(t, st.HandshakeComplete)
				require.Equal(t, "a/1", st.NegotiatedProtocol)
				require.Equal(t, uint16(tls.VersionTLS12+i), st.Version)
				require.NotEmpty(t, st.VerifiedChains)
				return nil
			}))
		})
	}
}

func TestTheNameOfTheServerIsVerified(t *testing.T) {
	n := startSock(t, "tls13", faultnet.Options{})
	p := n.pool(t, nil)
	for name, good := range map[string]bool{"": true, "server.test": true, "localhost": true, "::1": true, "other.test": false, "127.0.0.2": false} {
		a := n.addr
		a.ServerName = name
		err := p.With(t.Context(), a, func(c Conn) error { _, err := ask(c, newToken()); return err })
		if good {
			require.NoError(t, err, name)
			continue
		}
		var pe *Error
		require.ErrorAs(t, err, &pe, name)
		require.Equal(t, [...]any{StageHandshake, KindBadMessage}, [...]any{pe.Stage, pe.Kind})
	}
}

// counting counts the writes of a socket below TLS.
type counting struct {
	*net.TCPConn
	writes *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.TCPConn.Write(b)
}

// The farewell is for a peer that is in step, and only for that.
func TestTLSSaysGoodbyeUnlessTheConnectionWasBroken(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			var writes atomic.Int64
			p := n.pool(t, func(c *Config) {
				c.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
					nc, err := dialSocket(ctx, a)
					if err != nil {
						return nil, err
					}
					return counting{nc.(*net.TCPConn), &writes}, nil
				}}
			})
			fine := func(Conn) error { return nil }
			var cancel context.CancelFunc
			for what, c := range map[string]struct {
				fn      func(Conn) error
				end     func()
				goodbye int64
			}{
				"evicted":      {fine, func() { p.EvictLRU() }, 1},
				"on request":   {fine, func() { p.CloseIdle() }, 1},
				"retired":      {fine, func() { p.Retire(n.addr) }, 1},
				"by borrower":  {Conn.Close, func() {}, 1},
				"error of fn":  {func(Conn) error { return io.ErrNoProgress }, func() {}, 0},
				"ctx canceled": {func(Conn) error { cancel(); return nil }, func() {}, 0},
			} {
				var ctx context.Context
				ctx, cancel = context.WithCancel(t.Context())
				defer cancel()
				var before int64
				p.With(ctx, n.addr, func(h Conn) error {
					_, err := ask(h, newToken())
					require.NoError(t, err)
					before = writes.Load()
					return c.fn(h)
				})
				c.end()
				require.Zero(t, settled(t, p).Open, what)
				require.Equal(t, c.goodbye, writes.Load()-before, what)
			}
		})
	}
}

// lessons of net/http: a TLS close may wait for a peer that does not read.
func TestAPeerThatDoesNotReadHoldsUpNobody(t *testing.T) {
	for _, name := range short.Of(bothTLS, bothTLS[1:]) {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			n := startSock(t, name, faultnet.Options{Handler: func(*faultnet.Peer) { <-release }})
			t.Cleanup(func() { close(release) })
			p := n.pool(t, func(c *Config) { c.MaxPerAddr = 1 })
			stuff := func(c Conn) {
				raw, err := c.SyscallConn()
				require.NoError(t, err)
				for full := false; !full; { // below TLS, which would notice
					require.NoError(t, raw.Write(func(fd uintptr) bool {
						full = !fits(fd)
						return true
					}))
				}
			}
			quickOnce(t, 2*tlsGoodbye+2*time.Second, func() { // one goodbye of crypto/tls takes five
				require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
					stuff(c)
					return c.Close() // would like to say goodbye
				}))
				require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
					stuff(c)
					return nil
				}))
				_, ok := p.EvictLRU()
				require.True(t, ok)
				settled(t, p)
			})
		})
	}
}

// Config.TLSFor: its result is copied once per address for as long as it is the
// same; another one is another identity, with sessions of its own.
//
// TRY-22
func TestATLSConfigIsCopiedOncePerAddress(t *testing.T) {
	caches := newSessionCaches()
	configFor := func(a Addr, from *tls.Config) *tls.Config { return caches.configFor(a, from, caches.age()) }
	one, two := &tls.Config{ServerName: "not this"}, new(tls.Config)
	a := Addr{Transport: TLS, Host: "fe80::1%eth0", Port: 1}
	b := Addr{Transport: TLS, Host: "a.example", ServerName: "b.example", Port: 1}
	first := configFor(a, one)
	require.NotSame(t, one, first)
	require.Equal(t, "fe80::1", first.ServerName, "no certificate names a zone")
	require.Equal(t, "not this", one.ServerName, "what was given stays as it is")
	require.Same(t, first, configFor(a, one))
	other := configFor(b, one)
	require.Equal(t, "b.example", other.ServerName)
	require.NotSame(t, first.ClientSessionCache, other.ClientSessionCache, "no session crosses from one address to another")
	changed := configFor(a, two)
	require.NotSame(t, first, changed)
	require.NotSame(t, first.ClientSessionCache, changed.ClientSessionCache, "nor from one identity to another")
	back := configFor(a, one)
	require.NotSame(t, changed.ClientSessionCache, back.ClientSessionCache)
	require.Same(t, other, configFor(b, one), "the other address has what it had")
	caches.drop(a)
	renewed := configFor(a, one)
	require.NotSame(t, back.ClientSessionCache, renewed.ClientSessionCache, "Retire forgets sessions")

	// What was asked for before a Retire is for one dial alone.
	before := caches.age()
	caches.drop(a)
	late := caches.configFor(a, one, before)
	now := configFor(a, one)
	require.NotSame(t, late.ClientSessionCache, now.ClientSessionCache)
	later := caches.configFor(a, one, before)
	require.NotSame(t, now.ClientSessionCache, later.ClientSessionCache)
	require.NotSame(t, late.ClientSessionCache, later.ClientSessionCache)
	require.Same(t, now, configFor(a, one), "and takes nobody's place")

	// A new one for each dial costs no memory that grows.
	for range 10 * 1024 {
		configFor(a, new(tls.Config))
	}
	require.Equal(t, 2, caches.lru.Len())
}

// crypto/tls closes the socket after a failed handshake, and the pool closes it too. By
// then the descriptor may be another socket's.
func TestTheSocketUnderTLSIsClosedOnce(t *testing.T) {
	client, server := net.Pipe()
	defer server.Close()
	below := &deaf{Conn: client}
	s := &tlsSocket{Conn: below}
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Close(), net.ErrClosed)
	require.EqualValues(t, 1, below.closes.Load())
}
