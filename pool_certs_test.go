package connpool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// certNet is a TLS server in memory, db.test, that says who the client is, for each byte it gets.
type certNet struct {
	*testnet
	ca     *faultnet.CA
	server *tls.Config
	mu     sync.Mutex // guards now
	now    tls.Certificate
	addr   Addr
}

// startCerts makes the server. It asks for client certificates of ca.
func startCerts(t *testing.T) *certNet {
	n := &certNet{testnet: newTestnet(t), ca: testCA(), addr: MustParseAddr("tls://db.test:1")}
	n.server = &tls.Config{
		Certificates: []tls.Certificate{n.ca.Server("db.test")},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: n.ca.Pool(),
	}
	n.Host("db.test").Serve(n.serve)
	return n
}

var testCA = sync.OnceValue(faultnet.NewCA)

func (n *certNet) serve(c *faultnet.Conn) {
	tc := tls.Server(c, n.server)
	defer tc.Close()
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(tc, b); err != nil {
			return
		}
		who := "nobody"
		if certs := tc.ConnectionState().PeerCertificates; len(certs) > 0 {
			who = certs[0].Subject.CommonName
		}
		fmt.Fprintln(tc, who)
	}
}

// config trusts the server and presents what is current.
func (n *certNet) config() *tls.Config {
	return &tls.Config{RootCAs: n.ca.Pool(), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		n.mu.Lock()
		defer n.mu.Unlock()
		now := n.now
		return &now, nil
	}}
}

// rotate makes another certificate the current one: of name, for the next d.
func (n *certNet) rotate(name string, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.now = n.ca.ClientUntil(time.Now().Add(d), name)
}

func (n *certNet) openTLS(cfg Config) *certNet {
	cfg.TLSExpiry, cfg.IdleTimeout = true, -1
	cfg.Dialers = map[Transport]DialFunc{TCP: n.dial}
	if cfg.TLS == nil {
		cfg.TLS = n.config()
	}
	n.open(cfg)
	return n
}

// who is whom the server sees on the connection that is lent next, and which that is.
func (n *certNet) who(a Addr) (name string, id uint64) {
	n.t.Helper()
	require.NoError(n.t, n.p.With(bg, a, func(c Conn) (err error) {
		id = c.Info().ID
		name, err = seenOver(c)
		return err
	}))
	return name, id
}

func seenOver(c net.Conn) (string, error) {
	_, err := io.WriteString(c, "?")
	var line []byte
	for b := make([]byte, 1); err == nil; {
		if _, err = io.ReadFull(c, b); err == nil && b[0] == '\n' {
			break
		}
		line = append(line, b...)
	}
	return string(line), err
}

// ADO-11
func TestAConnectionEndsWithItsClientCertificate(t *testing.T) {
	const d = 100 * time.Second
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := startCerts(t)
				n.server.MaxVersion = version
				n.rotate("first", d)
				n.openTLS(Config{SweepInterval: -1})
				first := func(name string, id uint64) {
					t.Helper()
					gotName, gotID := n.who(n.addr)
					require.Equal(t, name, gotName)
					require.Equal(t, id, gotID)
				}
				first("first", 1)
				time.Sleep(d*9/10 - 2*time.Second)
				first("first", 1)
				n.rotate("second", time.Hour)
				first("first", 1) // nothing has looked
				time.Sleep(d/10 + 2*time.Second)
				first("second", 2)
				n.closed(reasons{ClosedExpired: 1})
			})
			bubble(t, func(t *testing.T) { // nobody comes; and one in use
				n := startCerts(t)
				n.server.MaxVersion = version
				n.rotate("first", d)
				n.openTLS(Config{})
				l, err := n.p.Lease(bg, n.addr)
				require.NoError(t, err)
				n.who(n.addr)
				time.Sleep(d + defaultSweepInterval)
				n.closed(reasons{ClosedExpired: 1})
				who, err := seenOver(l)
				require.NoError(t, err, "no session is cut")
				require.Equal(t, "first", who)
				require.NoError(t, l.Return())
				n.closed(reasons{ClosedExpired: 2})
			})
		})
	}
}

// ADO-11
func TestWithoutTLSExpiryAConnectionOutlivesItsCertificates(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		n.rotate("first", time.Minute)
		n.open(Config{IdleTimeout: -1, TLS: n.config(), Dialers: map[Transport]DialFunc{TCP: n.dial}})
		n.who(n.addr)
		n.rotate("second", time.Minute)
		time.Sleep(time.Hour)
		who, id := n.who(n.addr)
		require.Equal(t, "first", who)
		require.EqualValues(t, 1, id)
	})
}

// ADO-11: of several certificates, that which the server takes counts.
func TestTheCertificateThatWasPresentedCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		soonOver := faultnet.NewNamedCA("another").ClientUntil(time.Now().Add(time.Minute), "of another authority")
		n.openTLS(Config{TLS: &tls.Config{RootCAs: n.ca.Pool(), Certificates: []tls.Certificate{soonOver, n.ca.ClientUntil(time.Now().Add(time.Hour), "right")}}})
		who, _ := n.who(n.addr)
		require.Equal(t, "right", who)
		time.Sleep(50 * time.Minute)
		n.gauges(0, 1, 0)
		time.Sleep(11 * time.Minute)
		n.closed(reasons{ClosedExpired: 1})
	})
	bubble(t, func(t *testing.T) { // a server that does not ask
		n := startCerts(t)
		n.server.ClientAuth = tls.NoClientCert
		n.openTLS(Config{TLS: &tls.Config{RootCAs: n.ca.Pool(), Certificates: []tls.Certificate{n.ca.ClientUntil(time.Now().Add(time.Minute), "x")}}})
		who, _ := n.who(n.addr)
		require.Equal(t, "nobody", who)
		time.Sleep(time.Hour)
		n.gauges(0, 1, 0)
	})
}

// ADO-11: the server's certificate, as far as it was verified.
func TestAConnectionEndsWithTheServersCertificate(t *testing.T) {
	for name, unverified := range map[string]bool{"verified": false, "not verified": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := startCerts(t)
				n.server.Certificates = []tls.Certificate{n.ca.ServerUntil(time.Now().Add(time.Minute), "db.test")}
				n.server.ClientAuth = tls.NoClientCert
				n.openTLS(Config{TLS: &tls.Config{RootCAs: n.ca.Pool(), InsecureSkipVerify: unverified}})
				n.who(n.addr)
				time.Sleep(2 * time.Minute)
				if unverified {
					n.gauges(0, 1, 0)
					return
				}
				n.closed(reasons{ClosedExpired: 1})
			})
		})
	}
}

// ADO-11
func TestTheFirstCertificateOfTheChainThatExpiresCounts(t *testing.T) {
	now := time.Now()
	ca := faultnet.NewCA()
	in := func(d time.Duration) time.Time { return now.Add(d).UTC().Truncate(time.Second) }
	cert := func(leaf, intermediate time.Duration) *clientCert {
		return &clientCert{chain: ca.Intermediate(in(intermediate)).ClientUntil(in(leaf), "x").Certificate}
	}
	chainOf := func(ends ...time.Duration) (chain []*x509.Certificate) {
		for _, d := range ends {
			chain = append(chain, &x509.Certificate{NotAfter: in(d)})
		}
		return chain
	}
	chains := func(all ...[]*x509.Certificate) tls.ConnectionState {
		return tls.ConnectionState{VerifiedChains: all}
	}
	for _, tc := range []struct {
		cert *clientCert
		peer tls.ConnectionState
		want time.Duration
	}{
		{cert(time.Hour, 2*time.Hour), chains(), time.Hour},
		{cert(2*time.Hour, time.Hour), chains(), time.Hour},
		{cert(2*time.Hour, -time.Hour), chains(), 2 * time.Hour}, // the server has another way to its root
		{nil, chains(chainOf(time.Hour, 2*time.Hour)), time.Hour},
		{nil, chains(chainOf(2*time.Hour, time.Hour)), time.Hour},
		{nil, chains(chainOf(3*time.Hour, time.Hour), chainOf(3*time.Hour, 2*time.Hour)), 2 * time.Hour}, // either will do
		{cert(time.Hour, time.Hour), chains(chainOf(2 * time.Hour)), time.Hour},
		{cert(2*time.Hour, 2*time.Hour), chains(chainOf(time.Hour)), time.Hour},
		{&clientCert{}, chains(), 0},
		{nil, chains(), 0},
	} {
		end, err := certsLast(tc.cert, tc.peer, now)
		require.NoError(t, err)
		if tc.want == 0 {
			require.Zero(t, end)
			continue
		}
		require.Equal(t, in(tc.want), end.UTC(), "%+v", tc.peer)
	}
	_, err := certsLast(cert(-time.Hour, time.Hour), chains(), now)
	require.ErrorContains(t, err, `the client certificate of "x" ended 1h0m`)
	_, err = certsLast(&clientCert{chain: [][]byte{{1}}}, chains(), now)
	require.ErrorContains(t, err, "the client certificate, of which certificate 0 cannot be read")
}

// ADO-11: a certificate that has expired would be presented again and again, if the server does
// not look.
func TestAClientCertificateThatHasExpiredFailsTheDial(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		n.server.ClientAuth = tls.RequireAnyClientCert
		n.rotate("old", -time.Hour)
		n.openTLS(Config{})
		e := n.fail(bg, n.addr)
		require.Equal(t, StageHandshake, e.Stage)
		require.Equal(t, KindInternal, e.Kind)
		require.ErrorContains(t, e, `the client certificate of "old" ended 1h0m0s ago: renew it`)
		n.rotate("new", time.Hour)
		who, _ := n.who(n.addr)
		require.Equal(t, "new", who)
	})
}

// ADO-11
func TestARotatedCertificateIsUsedWithinASweep(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, how := range []string{"GetClientCertificate", "TLSFor"} {
			t.Run(tls.VersionName(version)+" "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := startCerts(t)
					n.server.MaxVersion = version
					n.rotate("old", time.Hour)
					var mu sync.Mutex
					var whys []string
					cfg := Config{Trace: &Trace{Closed: func(i CloseInfo) {
						mu.Lock()
						defer mu.Unlock()
						whys = append(whys, fmt.Sprint(i.Reason, ": ", i.Err))
					}}}
					if how == "TLSFor" {
						cfg.TLSFor = func(Addr) (*tls.Config, error) { // another pointer each time
							n.mu.Lock()
							defer n.mu.Unlock()
							return &tls.Config{RootCAs: n.ca.Pool(), Certificates: []tls.Certificate{n.now}}, nil
						}
					}
					n.openTLS(cfg)
					n.idle2(n.addr, 3)
					l, err := n.p.Lease(bg, n.addr)
					require.NoError(t, err)
					time.Sleep(2 * defaultSweepInterval)
					n.gauges(1, 2, 0)
					n.rotate("new", time.Hour)
					time.Sleep(defaultSweepInterval)
					n.closed(reasons{ClosedRetired: 2})
					who, _ := n.who(n.addr)
					require.Equal(t, "new", who)
					who, err = seenOver(l)
					require.NoError(t, err, "no session is cut")
					require.Equal(t, "old", who)
					require.NoError(t, l.Return())
					n.closed(reasons{ClosedRetired: 3})
					time.Sleep(5 * defaultSweepInterval)
					n.gauges(0, 1, 0)
					mu.Lock()
					defer mu.Unlock()
					for _, why := range whys {
						require.Equal(t, "retired: its client certificate was replaced by another one", why)
					}
				})
			})
		}
	}
}

// idle2 makes k idle connections.
func (n *certNet) idle2(a Addr, k int) {
	n.t.Helper()
	var all []*Lease
	for range k {
		l, err := n.p.Lease(bg, a)
		require.NoError(n.t, err)
		all = append(all, l)
	}
	for _, l := range all {
		require.NoError(n.t, l.Return())
	}
}

// ADO-11: what the code that chooses the certificate does wrong costs no connection.
func TestOnlyAnotherCertificateRetiresAConnection(t *testing.T) {
	for name, answer := range map[string]func(context.Context) (*tls.Certificate, error){
		"an error":       func(context.Context) (*tls.Certificate, error) { return nil, errBoom },
		"nil":            func(context.Context) (*tls.Certificate, error) { return nil, nil },
		"no certificate": func(context.Context) (*tls.Certificate, error) { return new(tls.Certificate), nil },
		"a panic":        func(context.Context) (*tls.Certificate, error) { panic("no") },
		"Goexit":         func(context.Context) (*tls.Certificate, error) { runtime.Goexit(); return nil, nil },
		"no answer": func(context.Context) (*tls.Certificate, error) {
			time.Sleep(9*defaultSweepInterval + defaultSweepInterval/2)
			return nil, errBoom
		},
		"its ctx, which ended": func(ctx context.Context) (*tls.Certificate, error) { <-ctx.Done(); return nil, ctx.Err() },
	} {
		for _, how := range []string{"GetClientCertificate", "TLSFor"} {
			t.Run(name+" "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := startCerts(t)
					n.rotate("old", 10*time.Hour)
					var odd atomic.Bool
					var running, peak atomic.Int32
					now := func(ctx context.Context) (*tls.Certificate, error) {
						defer running.Add(-1)
						peak.Store(max(peak.Load(), running.Add(1)))
						return answer(ctx)
					}
					cfg := n.config()
					plain := cfg.GetClientCertificate
					odds := Config{TLS: cfg}
					if how == "TLSFor" {
						odds.TLSFor = func(Addr) (*tls.Config, error) {
							if odd.Load() {
								ended, cancel := context.WithCancel(bg)
								cancel()
								_, err := now(ended)
								return nil, errors.Join(err, errBoom)
							}
							return nil, nil
						}
					} else {
						cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
							if odd.Load() {
								return now(r.Context())
							}
							return plain(r)
						}
					}
					n.openTLS(odds)
					n.idle2(n.addr, 2)
					odd.Store(true)
					time.Sleep(10 * defaultSweepInterval)
					require.EqualValues(t, 1, peak.Load(), "one question at a time, whether it ends or not")
					n.gauges(0, 2, 0)
					odd.Store(false)
					n.rotate("new", 10*time.Hour)
					time.Sleep(2 * defaultSweepInterval)
					n.closed(reasons{ClosedRetired: 2})
				})
			})
		}
	}
}

// ADO-11: servers behind one name may take certificates of different authorities.
func TestEachConnectionIsComparedForItsOwnRequest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		otherCA := faultnet.NewNamedCA("another")
		backends := []*tls.Config{n.server.Clone(), n.server.Clone()}
		backends[1].ClientCAs = otherCA.Pool()
		var next atomic.Int32
		n.Host("db.test").Serve(func(c *faultnet.Conn) {
			other := &certNet{server: backends[next.Add(1)%2]}
			other.serve(c)
		})
		certs := []tls.Certificate{n.ca.Client("one"), otherCA.Client("two")}
		n.openTLS(Config{TLSFor: func(Addr) (*tls.Config, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			return &tls.Config{RootCAs: n.ca.Pool(), Certificates: certs}, nil
		}})
		n.idle2(n.addr, 6)
		time.Sleep(5 * defaultSweepInterval)
		n.gauges(0, 6, 0)
		n.mu.Lock()
		certs = []tls.Certificate{certs[0], otherCA.Client("three")}
		n.mu.Unlock()
		time.Sleep(2 * defaultSweepInterval)
		n.closed(reasons{ClosedRetired: 3})
	})
}

// ADO-11: a connection that was made without a certificate, which the server did not insist on.
func TestAFirstCertificateReplacesNone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		n.server.ClientAuth = tls.VerifyClientCertIfGiven
		n.openTLS(Config{})
		who, _ := n.who(n.addr)
		require.Equal(t, "nobody", who)
		time.Sleep(3 * defaultSweepInterval)
		n.gauges(0, 1, 0)
		n.rotate("somebody", time.Hour)
		time.Sleep(2 * defaultSweepInterval)
		who, _ = n.who(n.addr)
		require.Equal(t, "somebody", who)
	})
}

// ADO-11: a thousand connections that were made with one certificate are not closed in one second.
func TestAThousandConnectionsOfOneCertificateDoNotExpireInOneSecond(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const k, lasts = 1000, 10 * time.Minute
		n := startCerts(t)
		n.rotate("x", lasts)
		var mu sync.Mutex
		perSecond := map[time.Duration]int{}
		n.openTLS(Config{MaxOpen: -1, MaxDialing: -1, MaxDialingPerAddr: -1, SweepInterval: time.Second, NoProbe: true,
			Trace: &Trace{Closed: func(i CloseInfo) {
				if i.Reason == ClosedExpired {
					mu.Lock()
					defer mu.Unlock()
					perSecond[i.Age/time.Second]++
				}
			}}})
		require.NoError(t, n.p.Warm(bg, n.addr, k))
		time.Sleep(lasts * 89 / 100)
		n.gauges(0, k, 0)
		time.Sleep(lasts*11/100 + 2*time.Second)
		n.closed(reasons{ClosedExpired: k})
		mu.Lock()
		defer mu.Unlock()
		for second, n := range perSecond {
			require.Less(t, n, k/20, "in second %d", second)
		}
		// They share what is known of the certificate: here, that is one object.
	})
}

// ADO-11
func TestConnectionsOfOneCertificateShareWhatIsKnownOfIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		n.rotate("x", time.Hour)
		n.openTLS(Config{})
		n.idle2(n.addr, 3)
		seen := map[*clientCert]bool{}
		for _, c := range n.p.every() {
			seen[c.cold.Load().cert] = true
		}
		require.Len(t, seen, 1)
	})
}

// ADO-11: a resumed session would have the certificate of another handshake.
func TestNoSessionIsResumedWhereACertificateMayBePresented(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n, of := clientCerts(t, name)
			p := n.pool(t, func(c *Config) { c.TLSExpiry, c.TLS = true, of("a") })
			for range 3 {
				require.Equal(t, "a", seenOnce(t, p, n.addr))
			}
			insists := of("b").Clone() // it may be skipped, says the cache
			insists.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			p = n.pool(t, func(c *Config) { c.TLSExpiry, c.TLS = true, insists })
			for range 3 {
				require.Equal(t, "b", seenOnce(t, p, n.addr))
			}
		})
	}
	t.Run("without a certificate", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := startCerts(t)
			n.server.ClientAuth = tls.NoClientCert
			n.server.Certificates = []tls.Certificate{n.ca.ServerUntil(time.Now().Add(time.Hour), "db.test")}
			n.openTLS(Config{TLS: &tls.Config{RootCAs: n.ca.Pool()}})
			for i := range 3 {
				require.NoError(t, n.p.With(bg, n.addr, func(c Conn) error {
					_, err := seenOver(c)
					require.NoError(t, err)
					require.Equal(t, i > 0, c.ConnectionState().DidResume)
					if i == 2 {
						return nil
					}
					return c.Close()
				}))
			}
			time.Sleep(time.Hour)
			n.closed(reasons{ClosedByBorrower: 2, ClosedExpired: 1})
		})
	})
}

// ADO-11: the end of the pool does not wait for a certificate.
func TestCloseDoesNotWaitForACertificate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := startCerts(t)
		n.rotate("x", time.Hour)
		thaw := make(chan struct{})
		defer close(thaw)
		var hangs atomic.Bool
		cfg := n.config()
		plain := cfg.GetClientCertificate
		cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if hangs.Load() {
				<-thaw
			}
			return plain(r)
		}
		n.openTLS(Config{TLS: cfg})
		n.idle2(n.addr, 1)
		hangs.Store(true)
		time.Sleep(defaultSweepInterval + time.Second)
		start := time.Now()
		require.NoError(t, n.p.Close())
		require.Less(t, time.Since(start), askCertPatience/10)
		require.Zero(t, n.p.Stats().AbandonedCalls)
	})
}
