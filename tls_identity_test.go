package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Which client the server sees, and whether by a full handshake, when the
// identity of an address changes.

// seenBy asks the server of clientCerts over c who the client is.
func seenBy(c net.Conn) (string, error) {
	if _, err := io.WriteString(c, "who am I?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n') // the tickets of TLS 1.3 are read with it
	return strings.TrimSuffix(line, "\n"), err
}

// seenOnce is a use on a connection of its own: whom the server saw, and how.
func seenOnce(t *testing.T, p *Pool, a Addr) string {
	t.Helper()
	var seen string
	require.NoError(t, p.With(t.Context(), a, func(c Conn) error {
		who, err := seenBy(c)
		require.NoError(t, err)
		require.False(t, c.Info().Reused)
		seen = who
		if c.ConnectionState().DidResume {
			seen += " resumed"
		}
		return c.Close()
	}))
	return seen
}

// identities is what TLSFor says at the moment.
type identities struct {
	mu  sync.Mutex
	now *tls.Config
}

func (i *identities) set(c *tls.Config) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.now = c
}

func (i *identities) tlsFor(Addr) (*tls.Config, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now, nil
}

// TRY-22
func TestANewResultOfTLSForResumesNoSessionOfTheOld(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n, of := clientCerts(t, name)
			var id identities
			p := n.pool(t, func(c *Config) { c.TLSFor = id.tlsFor })
			var seen []string
			for _, who := range []string{"a", "a", "b", "b", "a", "a", "b"} {
				id.set(of(who))
				seen = append(seen, seenOnce(t, p, n.addr))
			}
			require.Equal(t, []string{"a", "a resumed", "b", "b resumed", "a", "a resumed", "b"}, seen)

			// Another pointer to the same identity, each time.
			for range 3 {
				id.set(of("b").Clone())
				require.Equal(t, "b", seenOnce(t, p, n.addr))
			}
			require.Equal(t, 1, p.sessions.lru.Len())

			// Trust is a part of it.
			strict := of("b").Clone()
			strict.RootCAs = x509.NewCertPool()
			id.set(strict)
			err := p.With(t.Context(), n.addr, func(Conn) error { t.Error("lent"); return nil })
			require.ErrorAs(t, err, new(*tls.CertificateVerificationError))
		})
	}
}

// A ticket of TLS 1.3 comes behind the handshake, whenever the server likes, and
// is read with whatever is read next.
//
// TRY-42
func TestATicketThatComesAfterAChangeOfIdentityIsOfNoUse(t *testing.T) {
	for _, name := range bothTLS {
		for how, change := range map[string]func(p *Pool, a Addr, id *identities, c *tls.Config){
			"Retire": func(p *Pool, a Addr, id *identities, c *tls.Config) { id.set(c); p.Retire(a) },
			"TLSFor": func(_ *Pool, _ Addr, id *identities, c *tls.Config) { id.set(c) },
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				n, of := clientCerts(t, name)
				var id identities
				id.set(of("old"))
				p := n.pool(t, func(c *Config) { c.TLSFor = id.tlsFor })
				l, err := p.Lease(t.Context(), n.addr)
				require.NoError(t, err)
				change(p, n.addr, &id, of("new"))
				require.Equal(t, "new", seenOnce(t, p, n.addr))
				who, err := seenBy(l) // and only now are its tickets read
				require.NoError(t, err)
				require.Equal(t, "old", who)
				require.NoError(t, l.Return())
				p.CloseIdle()
				require.Equal(t, "new resumed", seenOnce(t, p, n.addr))
				require.Equal(t, "new resumed", seenOnce(t, p, n.addr))
			})
		}
	}
}

// TRY-42
func TestRetireBesideASlowTLSForLeavesNoSessionOfTheOldIdentity(t *testing.T) {
	for _, name := range bothTLS {
		for how, same := range map[string]bool{"another config": false, "the same config": true} {
			t.Run(name+" "+how, func(t *testing.T) {
				n, of := clientCerts(t, name)
				// Under the same pointer, whose certificate depends on what it is
				// asked when. That it asks for its cache says that it may be skipped.
				var mu sync.Mutex
				current := "old"
				get := of("old").Clone()
				get.Certificates = nil
				get.ClientSessionCache = tls.NewLRUClientSessionCache(1)
				get.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					mu.Lock()
					defer mu.Unlock()
					return &of(current).Certificates[0], nil
				}
				loading, goOn := make(chan struct{}), make(chan struct{})
				var once sync.Once
				var seen []string // connection by connection, by Setup
				p := n.pool(t, func(c *Config) {
					c.TLSFor = func(Addr) (*tls.Config, error) {
						mu.Lock()
						cfg := of(current)
						mu.Unlock()
						if same {
							cfg = get
						}
						once.Do(func() { close(loading); <-goOn }) // it fetches a key
						return cfg, nil
					}
					c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
						who, err := seenBy(nc) // which reads the tickets
						if nc.(Conn).ConnectionState().DidResume {
							who += " resumed"
						}
						mu.Lock()
						defer mu.Unlock()
						seen = append(seen, who)
						return nil, err
					}
				})
				done := make(chan error, 1)
				go func() { done <- p.With(context.Background(), n.addr, Conn.Close) }()
				<-loading
				mu.Lock()
				current = "new" // the certificate was changed,
				mu.Unlock()
				p.Retire(n.addr) // and the pool was told
				close(goOn)
				require.NoError(t, <-done)
				require.NoError(t, p.With(t.Context(), n.addr, Conn.Close))
				settled(t, p)
				mu.Lock()
				defer mu.Unlock()
				want := []string{"old", "new", "new resumed"}
				if same {
					want[0] = "new" // it was asked after the change
				}
				require.Equal(t, want, seen)
			})
		}
	}
}

// A resumed session would pass over them in silence.
//
// TRY-22
func TestAFunctionThatIsToRunInEachHandshakeRunsForEachConnection(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n, of := clientCerts(t, name)
			var verified, connected int
			who, refuse := "one", false
			get := of("one").Clone()
			get.Certificates = nil
			get.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &of(who).Certificates[0], nil
			}
			peer := of("one").Clone()
			peer.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error {
				verified++
				if refuse {
					return errBoom
				}
				return nil
			}
			conn := of("one").Clone()
			conn.VerifyConnection = func(tls.ConnectionState) error {
				connected++
				if refuse {
					return errBoom
				}
				return nil
			}
			with := func(c *tls.Config) *Pool { return n.pool(t, func(cfg *Config) { cfg.TLS = c }) }

			p := with(get)
			require.Equal(t, "one", seenOnce(t, p, n.addr))
			who = "two"
			require.Equal(t, "two", seenOnce(t, p, n.addr))

			fails := func(p *Pool) {
				t.Helper()
				refuse = true
				defer func() { refuse = false }()
				err := p.With(t.Context(), n.addr, func(Conn) error { t.Error("lent"); return nil })
				require.ErrorIs(t, err, errBoom)
			}
			p = with(peer)
			for range 3 {
				require.Equal(t, "one", seenOnce(t, p, n.addr))
			}
			require.Equal(t, 3, verified)
			fails(p)

			p = with(conn)
			require.Equal(t, "one", seenOnce(t, p, n.addr))
			require.Equal(t, "one resumed", seenOnce(t, p, n.addr))
			require.Equal(t, 2, connected)
			fails(p)

			// A cache says that they may be skipped, until Retire.
			who = "one"
			get = get.Clone()
			get.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			p = with(get)
			require.Equal(t, "one", seenOnce(t, p, n.addr))
			who = "two"
			require.Equal(t, "one resumed", seenOnce(t, p, n.addr))
			p.Retire(n.addr)
			require.Equal(t, "two", seenOnce(t, p, n.addr))
		})
	}
}
