package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// What bit other pools and clients, one test for each, named after the
// advisory. docs/security.md has the table of them.

// advNet is a network in which every dial succeeds and is remembered.
type advNet struct {
	mu    sync.Mutex // guards dials
	dials []Addr
}

func (n *advNet) dial(_ context.Context, addr Addr) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dials = append(n.dials, addr)
	near, far := net.Pipe()
	return &advPipe{near, far}, nil
}

type advPipe struct {
	net.Conn
	far net.Conn
}

func (p *advPipe) Close() error { return errors.Join(p.far.Close(), p.Conn.Close()) }

func (n *advNet) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.dials)
}

// advPool makes a pool whose connections lead nowhere.
func advPool(t *testing.T, change ...func(*Config)) (*Pool, *advNet) {
	t.Helper()
	n := new(advNet)
	p := tlPool(t, false, append([]func(*Config){func(cfg *Config) {
		cfg.Dialers = map[Transport]DialFunc{TCP: n.dial, TLS: n.dial, Unix: n.dial, "other": n.dial}
	}}, change...)...)
	return p, n
}

// advID borrows once and says which connection it was.
func advID(t *testing.T, p *Pool, addr Addr) uint64 {
	t.Helper()
	id, err := tlWith(t, p, addr, tlNothing)
	require.NoError(t, err)
	return id
}

// advKeys expects a connection for each address, and the same one again.
func advKeys(t *testing.T, addrs ...Addr) {
	t.Helper()
	p, n := advPool(t)
	ids := make(map[uint64]Addr)
	for range 3 {
		for _, a := range addrs {
			id := advID(t, p, a)
			if b, taken := ids[id]; taken {
				require.Equal(t, b, a, "they share a connection")
			}
			ids[id] = a
		}
	}
	require.Len(t, ids, len(addrs))
	require.Equal(t, len(addrs), n.count())
}

// --- wrong reuse: the key was not the whole identity ---

// advWhoAmI serves TLS to clients with a certificate, and tells each the name
// in it for every byte it sends.
func advWhoAmI(t *testing.T, ca *faultnet.CA, version uint16) Addr {
	t.Helper()
	s, err := faultnet.Start(faultnet.Options{Network: "tls",
		TLS: &tls.Config{
			Certificates: tlAuthority().Certificates, MinVersion: version, MaxVersion: version,
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
		},
		Handler: func(p *faultnet.Peer) {
			name := p.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
			for b := make([]byte, 1); ; {
				if _, err := p.Read(b); err != nil {
					return
				}
				io.WriteString(p, name+"\n")
			}
		},
	})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	return Addr{Transport: TLS, Host: s.Host(), Port: s.Port()}
}

// curl CVE-2016-5420 and CVE-2026-8932: a connection made with one client
// certificate, or key, was reused for another.
func TestCVE_2016_5420_ClientCertificateIsPartOfTheIdentity(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			tlBaseline(t)
			ca := faultnet.NewCA()
			addr := advWhoAmI(t, ca, version)
			certs := map[string]tls.Certificate{"alice": ca.Client("alice"), "bob": ca.Client("bob")}
			p := tlPool(t, true, func(cfg *Config) {
				cfg.TLSFor = func(a Addr) (*tls.Config, error) {
					own := &tls.Config{RootCAs: tlAuthority().RootCAs}
					if cert, known := certs[a.Scope]; known {
						own.Certificates = []tls.Certificate{cert}
					}
					return own, nil
				}
			})
			whoAmI := func(scope, want string) error {
				addr.Scope = scope
				_, err := tlWith(t, p, addr, func(c Conn) error {
					if _, err := c.Write([]byte("?")); err != nil {
						return err
					}
					return tlExpect(c, want+"\n")
				})
				return err
			}
			for n := range 50 {
				require.NoError(t, whoAmI("alice", "alice"))
				require.NoError(t, whoAmI("bob", "bob"))
				if n%10 == 9 {
					p.CloseIdle() // the next ones resume their sessions
				}
			}
			require.Error(t, whoAmI("", "alice"), "without a certificate there is no connection, though two are idle")
		})
	}
}

// curl CVE-2015-3143 and CVE-2016-7141: a request without credentials was sent
// over a connection that somebody had authenticated.
func TestCVE_2015_3143_NoCredentialsIsAValueAndNoWildcard(t *testing.T) {
	alice := Addr{Transport: TCP, Host: "db.example", Port: 1, Scope: "alice"}
	nobody := alice
	nobody.Scope = ""
	for name, order := range map[string][]Addr{"alice first": {alice, nobody}, "nobody first": {nobody, alice}} {
		t.Run(name, func(t *testing.T) {
			p, n := advPool(t, func(cfg *Config) {
				cfg.Setup = func(_ context.Context, a Addr, _ net.Conn) (any, error) { return "logged in as " + a.Scope, nil }
			})
			for range 3 {
				for _, a := range order {
					_, err := tlWith(t, p, a, func(c Conn) error {
						require.Equal(t, "logged in as "+a.Scope, State[string](c))
						return nil
					})
					require.NoError(t, err)
				}
			}
			require.Equal(t, 2, n.count())
		})
	}
	// As long as one of them is all the room there is, too.
	p, n := advPool(t, func(cfg *Config) { cfg.MaxOpen = 1 })
	for range 3 {
		advID(t, p, alice)
		advID(t, p, nobody)
	}
	require.Equal(t, 6, n.count())
}

// curl CVE-2016-8616 and CVE-2021-22924: secrets and paths were compared
// without regard to case. Only what is the same to DNS is folded here.
func TestCVE_2016_8616_OnlyHostNamesAreFolded(t *testing.T) {
	tcp := Addr{Transport: TCP, Host: "db.example", Port: 1}
	with := func(a Addr, f func(*Addr)) Addr { f(&a); return a }
	advKeys(t,
		tcp,
		with(tcp, func(a *Addr) { a.Scope = "secret" }), with(tcp, func(a *Addr) { a.Scope = "Secret" }),
		with(tcp, func(a *Addr) { a.Scope = "secret " }), with(tcp, func(a *Addr) { a.Scope = "ſecret" }), // folds to s
		Addr{Transport: Unix, Host: "/run/db"}, Addr{Transport: Unix, Host: "/run/DB"}, Addr{Transport: Unix, Host: "/run//db"},
		Addr{Transport: "other", Host: "db.example"}, Addr{Transport: "other", Host: "DB.example"}, Addr{Transport: "other", Host: "db.example."},
		Addr{Transport: "other", Host: "db.example", ServerName: "x"}, Addr{Transport: "other", Host: "db.example", ServerName: "X"},
	)
	p, n := advPool(t)
	for _, host := range []string{"db.example", "DB.example", "Db.Example."} {
		require.EqualValues(t, 1, advID(t, p, with(tcp, func(a *Addr) { a.Host = host })))
	}
	require.Equal(t, 1, n.count())
}

// curl CVE-2022-27775: the zone of an IPv6 address was ignored.
func TestCVE_2022_27775_TheZoneIsPartOfTheIdentity(t *testing.T) {
	var addrs []Addr
	for _, host := range []string{"fe80::1%eth0", "fe80::1%eth1", "fe80::1%ETH1", "fe80::1"} {
		addrs = append(addrs, Addr{Transport: TLS, Host: host, Port: 1})
	}
	advKeys(t, addrs...)

	// What is folded beside it does not take it away either.
	p, n := advPool(t)
	for range 2 {
		for i, host := range []string{"fe80::1%eth0", "FE80:0::1%eth0", "fe80::1%eth1", "FE80:0::1%eth1"} {
			require.EqualValues(t, 1+i/2, advID(t, p, Addr{Transport: TLS, Host: host, Port: 1}), host)
		}
	}
	require.Equal(t, 2, n.count())
}

// curl CVE-2022-27782 and CVE-2026-11564, requests CVE-2024-35195, trpc-go: a
// connection that was made without verification, or under other roots, was
// reused where the settings had become stricter.
func TestCVE_2024_35195_TrustIsPartOfTheIdentity(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, tlVersion(tls.VersionTLS13))
	t.Run("by scope", func(t *testing.T) {
		p := tlPool(t, true, func(cfg *Config) {
			cfg.TLSFor = func(a Addr) (*tls.Config, error) {
				if a.Scope == "lax" {
					return &tls.Config{InsecureSkipVerify: true}, nil
				}
				return &tls.Config{RootCAs: x509.NewCertPool()}, nil
			}
		})
		lax, strict := s.addr(), s.addr()
		lax.Scope, strict.Scope = "lax", "strict"
		for range 2 {
			_, err := tlWith(t, p, lax, tlChat)
			require.NoError(t, err)
			_, err = tlWith(t, p, strict, func(Conn) error { t.Error("lent without verification"); return nil })
			require.ErrorAs(t, err, new(*tls.CertificateVerificationError))
			require.Equal(t, KindBadMessage, KindOf(err))
		}
	})
	t.Run("by pool", func(t *testing.T) {
		mine := &tls.Config{InsecureSkipVerify: true}
		p := tlPool(t, true, func(cfg *Config) { cfg.TLS = mine })
		strict := tlPool(t, true, func(cfg *Config) { cfg.TLS = &tls.Config{RootCAs: x509.NewCertPool()} })
		_, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		_, err = tlWith(t, strict, s.addr(), tlChat)
		require.ErrorAs(t, err, new(*tls.CertificateVerificationError))

		// What New was given is what holds, whatever becomes of it.
		mine.InsecureSkipVerify = false
		p.CloseIdle()
		_, err = tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
	})
	t.Run("by time", func(t *testing.T) {
		var roots atomic.Pointer[x509.CertPool]
		roots.Store(tlAuthority().RootCAs)
		p := tlPool(t, true, func(cfg *Config) {
			cfg.TLSFor = func(Addr) (*tls.Config, error) { return &tls.Config{RootCAs: roots.Load()}, nil }
		})
		_, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		roots.Store(x509.NewCertPool()) // the authority is not trusted any more
		p.Retire(s.addr())
		_, err = tlWith(t, p, s.addr(), tlChat) // neither by the old connection nor by its session
		require.ErrorAs(t, err, new(*tls.CertificateVerificationError))
		require.Eventually(t, func() bool { return p.Stats().Closed[ClosedRetired] == 1 }, time.Minute, time.Millisecond)
	})
}

// curl CVE-2026-4873: a plaintext connection was reused where TLS was required.
func TestCVE_2026_4873_PlaintextNeverStandsInForTLS(t *testing.T) {
	tlBaseline(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var running tasks.Group
	t.Cleanup(func() { ln.Close(); running.Wait() })
	running.Go(func() { // speaks both on one port
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer nc.Close()
				in := bufio.NewReader(nc)
				first, err := in.Peek(1)
				if err != nil {
					return
				}
				var c net.Conn = advBuffered{nc, in}
				if first[0] == 22 {
					c = tls.Server(c, tlVersion(tls.VersionTLS13))
				}
				io.Copy(c, c)
			})
		}
	})
	at := ln.Addr().(*net.TCPAddr)
	p := tlPool(t, true)
	for n := range 6 {
		addr := Addr{Transport: TCP, Host: "127.0.0.1", Port: uint16(at.Port)}
		if n%2 == 1 {
			addr.Transport = TLS
		}
		_, err := tlWith(t, p, addr, func(c Conn) error {
			require.Equal(t, addr.Transport == TLS, c.ConnectionState().HandshakeComplete)
			if _, err := io.WriteString(c, "secret"); err != nil {
				return err
			}
			return tlExpect(c, "secret")
		})
		require.NoError(t, err)
	}
	require.EqualValues(t, 2, p.Stats().Dials)
}

type advBuffered struct {
	net.Conn
	in *bufio.Reader
}

func (b advBuffered) Read(p []byte) (int, error) { return b.in.Read(p) }

// curl CVE-2020-8231: a connection was remembered by its address in memory,
// which another one had by then. A Conn that was kept is refused by generation,
// also when its connection, at the same place, is lent again.
func TestCVE_2020_8231_AHandleIsOfOneLoanNotOfAPlaceInMemory(t *testing.T) {
	p, n := advPool(t)
	addr := Addr{Transport: TCP, Host: "db.example", Port: 1}
	var old []Conn
	for range 10 {
		_, err := tlWith(t, p, addr, func(c Conn) error {
			for _, o := range old {
				require.Same(t, c.c, o.c, "the test means nothing otherwise")
				require.Zero(t, o.Info().ID)
				require.ErrorIs(t, o.Close(), ErrReturned)
				_, err := o.Detach()
				require.ErrorIs(t, err, ErrReturned)
				_, err = o.Write([]byte("x"))
				require.ErrorIs(t, err, ErrReturned)
				require.ErrorIs(t, o.SetDeadline(aLongTimeAgo), ErrReturned)
			}
			old = append(old, c)
			require.EqualValues(t, 1, c.Info().ID)
			return nil
		})
		require.NoError(t, err)
	}
	require.Equal(t, 1, n.count())
	p.CloseIdle()
	require.EqualValues(t, 2, advID(t, p, addr), "numbers of connections are not used twice")
}

// HAProxy issue 2765: the hash of every Unix address was the same, and of equal
// hashes the addresses were not compared.
func TestHAProxy_2765_UnixSocketsAreToldApart(t *testing.T) {
	tlBaseline(t)
	dir, err := os.MkdirTemp("", "adv") // t.TempDir is too long a path for a socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := tlPool(t, true)
	const servers = 20
	var addrs []Addr
	for i := range servers {
		path := filepath.Join(dir, fmt.Sprint(i))
		ln, err := net.Listen("unix", path)
		require.NoError(t, err)
		var running tasks.Group
		t.Cleanup(func() { ln.Close(); running.Wait() })
		running.Go(func() {
			for {
				nc, err := ln.Accept()
				if err != nil {
					return
				}
				running.Go(func() {
					defer nc.Close()
					for b := make([]byte, 1); ; {
						if _, err := nc.Read(b); err != nil {
							return
						}
						fmt.Fprintf(nc, "%4d", i)
					}
				})
			}
		})
		addrs = append(addrs, Addr{Transport: Unix, Host: path})
	}
	t.Cleanup(p.CloseIdle) // so that the servers' ends end before the wait for them
	for range 3 {
		for i, addr := range addrs {
			_, err := tlWith(t, p, addr, func(c Conn) error {
				if _, err := c.Write([]byte("?")); err != nil {
					return err
				}
				return tlExpect(c, fmt.Sprintf("%4d", i))
			})
			require.NoError(t, err)
		}
	}
	require.EqualValues(t, servers, p.Stats().Dials)
}

// curl CVE-2016-5419, HAProxy issue 3195, Envoy CVE-2022-21654: a TLS session
// was resumed under another name, identity or set of rules than those it had
// been verified for.
func TestCVE_2022_21654_SessionsAreResumedByTheirOwnAddressOnly(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			tlBaseline(t)
			s := tlServe(t, tlVersion(version))
			// A cache that the caller shares among all is not used.
			p := tlPool(t, true, func(cfg *Config) { cfg.TLS.ClientSessionCache = tls.NewLRUClientSessionCache(100) })
			resumes := func(change func(*Addr)) (did bool) {
				addr := s.addr()
				change(&addr)
				_, err := tlWith(t, p, addr, func(c Conn) error {
					did = c.ConnectionState().DidResume
					return tlChat(c)
				})
				require.NoError(t, err)
				p.CloseIdle()
				return did
			}
			same := func(*Addr) {}
			require.False(t, resumes(same))
			require.True(t, resumes(same), "there is a session to be stolen")
			for name, other := range map[string]func(*Addr){
				"scope":       func(a *Addr) { a.Scope = "other" },
				"name one":    func(a *Addr) { a.ServerName = "one.test" },
				"name two":    func(a *Addr) { a.ServerName = "two.test" },
				"name itself": func(a *Addr) { a.ServerName = a.Host },
				"both":        func(a *Addr) { a.ServerName, a.Scope = "one.test", "other" },
				"QoS":         func(a *Addr) { a.QoS.KeepAlive = -1 },
			} {
				require.False(t, resumes(other), "%s: the session was another's", name)
				require.True(t, resumes(other), "%s", name)
			}
			require.True(t, resumes(same))
			p.Retire(s.addr())
			require.False(t, resumes(same), "retired")
		})
	}
}

// kitex: the key was made anew from the connection that came back, which called
// itself "tcp" when it had been asked for as "tcp4": it was never found again.
func TestKitex_TheKeyIsTheOneThatWasAskedFor(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, nil)
	for _, host := range []string{"127.0.0.1", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"} {
		t.Run(host, func(t *testing.T) {
			p := tlPool(t, true)
			addr := s.addr()
			addr.Host = host
			for range 10 {
				id, err := tlWith(t, p, addr, tlChat)
				require.NoError(t, err)
				require.EqualValues(t, 1, id)
			}
		})
	}
}

// --- dirty return: the next borrower got the last one's bytes ---

// redis-py CVE-2023-28858 and CVE-2023-28859: a request was cancelled when it
// had been sent and not been answered, and its reply went to the next.
func TestCVE_2023_28858_CancelledRequestsCostTheConnection(t *testing.T) {
	tlEach(t, []tlSecure{tlTransports[0], tlTransports[1], tlTransports[3]}, func(t *testing.T, how tlSecure, nth int) {
		tlBaseline(t)
		s := how.serve(t)
		p := tlPool(t, false, how.config)
		for range nth - 1 {
			_, err := tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err)
		}
		for name, end := range map[string]func(error) error{
			"error": func(err error) error { return err },
			"kept":  Keep,
			"nil":   func(error) error { return nil },
		} {
			ctx, cancel := context.WithCancel(context.Background())
			var id uint64
			p.With(ctx, s.addr(), func(c Conn) error {
				id = c.Info().ID
				err := tlSay(c, "ping stolen")
				require.NoError(t, err)
				cancel()
				return end(ctx.Err())
			})
			p.check(t)
			next, err := tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err, name)
			require.NotEqual(t, id, next, name)
		}
		require.EqualValues(t, 3, p.Stats().Closed[ClosedCanceled])
	})
}

// The oracle for all of this section: each reply must be the reply to one's own
// request. Borrowers cancel, time out, read too little or nothing, at random.
// CONNPOOL_STRESS=8 makes a million exchanges of it.
func TestNoReplyEverReachesAForeignBorrower(t *testing.T) {
	for _, how := range []tlSecure{tlTransports[0], tlTransports[3]} {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, true, how.config, func(cfg *Config) { cfg.MaxPerAddr = 4 })
			exchanges := short.Of(2_000, 400)
			if raceEnabled && how.version != 0 {
				exchanges = 300 // every second one costs a handshake
			}
			if stress() > 1 {
				exchanges = 62_500 * stress()
			}
			var clean, foreign atomic.Int64
			var wg tasks.Group
			for worker := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(worker), 28858))
					for n := range exchanges / 8 {
						ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
						err := p.With(ctx, s.addr(), func(c Conn) error {
							token := fmt.Sprintf("%d.%d.%d", worker, n, rng.Uint64())
							want := "pong " + token + "\n"
							if err := tlSay(c, "ping "+token); err != nil {
								return err
							}
							got := make([]byte, len(want))
							switch rng.IntN(8) {
							case 0:
								cancel()
								return nil
							case 1:
								c.SetReadDeadline(time.Now().Add(time.Duration(rng.IntN(100)) * time.Microsecond))
							case 2:
								got = got[:1+rng.IntN(len(got)-1)]
							case 3:
								// It may not go before the reply has come: nobody
								// can see bytes that are still on their way.
								return tlArrived(c)
							case 4:
								return errors.New("changed my mind")
							}
							read, err := io.ReadFull(c, got)
							if !strings.HasPrefix(want, string(got[:read])) {
								foreign.Add(1)
							}
							if err == nil && read == len(want) {
								clean.Add(1)
							}
							return nil // whatever happened: the pool must see for itself
						})
						cancel()
						var perr *Error
						if errors.As(err, &perr) && perr.Kind != KindCanceled {
							t.Errorf("%v", err)
						}
					}
				})
			}
			wg.Wait()
			p.check(t)
			require.Zero(t, foreign.Load())
			require.Greater(t, clean.Load(), int64(exchanges/4))
			st := p.Stats()
			require.Greater(t, st.Reused, uint64(exchanges/100), "%v", st)
			for _, reason := range []CloseReason{ClosedCanceled, ClosedDirty, ClosedTimeout, ClosedFnError} {
				require.Positive(t, st.Closed[reason], "%v never happened", reason)
			}
		})
	}
}

// Apache httpd CVE-2010-2068: after a read that timed out the connection was
// kept, and the late answer went to the next client.
func TestCVE_2010_2068_LateAnswersReachNobody(t *testing.T) {
	for _, end := range []func(error) error{func(err error) error { return err }, func(error) error { return nil }} {
		tlBaseline(t)
		late := make(chan struct{})
		s, err := faultnet.Start(faultnet.Options{Handler: func(p *faultnet.Peer) {
			in := bufio.NewReader(p)
			for {
				line, err := in.ReadString('\n')
				if err != nil {
					return
				}
				if line == "slow\n" {
					<-late
				}
				io.WriteString(p, "re: "+line)
			}
		}})
		require.NoError(t, err)
		t.Cleanup(s.Close)
		p := tlPool(t, false)
		addr := Addr{Transport: TCP, Host: s.Host(), Port: s.Port()}
		_, err = tlWith(t, p, addr, func(c Conn) error {
			require.NoError(t, errors.Join(tlSay(c, "slow"), c.SetReadDeadline(time.Now().Add(5*time.Millisecond))))
			_, err := c.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			return end(err)
		})
		close(late)
		if err != nil {
			require.Equal(t, KindTimeoutInTransfer, KindOf(err))
		}
		_, err = tlWith(t, p, addr, func(c Conn) error {
			return errors.Join(tlSay(c, "mine"), tlExpect(c, "re: mine\n"))
		})
		require.NoError(t, err)
		require.Equal(t, 2, s.Accepts())
	}
}

// undici CVE-2026-6733, Node CVE-2026-48931: what the server wrote while a
// connection was idle was taken for the reply to the next request.
func TestCVE_2026_6733_WhatCameWhileIdleIsNoReply(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, false, how.config)
			for n := range 5 {
				_, err := tlWith(t, p, s.addr(), tlChat) // which insists on its own reply
				require.NoError(t, err)
				io.WriteString(s.last().stream, "pong forged\n")
				tlSettle(t, p, s.addr())
				require.Equal(t, n+1, s.accepts())
			}
			closedSoon(t, p, map[CloseReason]uint64{ClosedDirty: 4})
		})
	}
}

// go-redis CVE-2025-29923: a command of the greeting failed by time-out, the
// failure was ignored, and its reply was the first one that the user got.
func TestCVE_2025_29923_FailedSetupLeavesNoConnection(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, nil)
	var setups atomic.Int32
	p := tlPool(t, false, func(cfg *Config) {
		cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			if _, err := io.WriteString(nc, "ping greeting\n"); err != nil {
				return nil, err
			}
			switch setups.Add(1) {
			case 1: // gives up and says so
				return nil, errors.New("the greeting failed")
			case 2: // gives up and says nothing
				nc.SetReadDeadline(aLongTimeAgo)
				nc.Read(make([]byte, 1))
				return nil, nil
			}
			return nil, tlExpect(nc, "pong greeting\n")
		}
	})
	for range 2 {
		_, err := tlWith(t, p, s.addr(), func(Conn) error { t.Error("lent"); return nil })
		var perr *Error
		require.ErrorAs(t, err, &perr)
		require.Equal(t, StageSetup, perr.Stage)
	}
	_, err := tlWith(t, p, s.addr(), tlChat)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return p.Stats().Closed[ClosedSetupFailed] == 2 }, time.Minute, time.Millisecond)
}

// nginx and HAProxy: the reply came before the request was out, and the
// connection was kept while the rest of the request was still being written.
func TestEarlyReply_AConnectionWithAWriteUnderWayIsNotKept(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, false, how.config)
			written := make(chan error, 1)
			_, err := tlWith(t, p, s.addr(), func(c Conn) error {
				if err := errors.Join(tlChat(c), tlSay(c, "deaf")); err != nil {
					return err
				}
				go func() {
					_, err := c.Write(make([]byte, 64<<20))
					written <- err
				}()
				for c.c.word.Load()&inFlight == 0 {
					time.Sleep(100 * time.Microsecond)
				}
				return nil
			})
			require.NoError(t, err)
			require.Error(t, <-written, "closing it ends the write")
			id, err := tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err)
			require.EqualValues(t, 2, id)
			closedSoon(t, p, map[CloseReason]uint64{ClosedInFlight: 1})
		})
	}
}

// gomemcache: the deferred release looked at the error variable, which a panic
// leaves nil.
func TestGomemcache_APanicIsNoSuccess(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, nil)
	p := tlPool(t, false)
	for n := range 3 {
		require.PanicsWithValue(t, "half way", func() {
			p.With(context.Background(), s.addr(), func(c Conn) error {
				require.NoError(t, tlSay(c, "ping stolen"))
				panic("half way")
			})
		})
		p.check(t)
		id, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		require.EqualValues(t, 2*n+2, id)
		p.CloseIdle()
	}
	require.EqualValues(t, 3, p.Stats().Closed[ClosedPanic])
}

// aiohttp, urllib3, nginx: a deadline, a paused reader or a timer outlived its
// request and struck the next.
func TestLeftOver_NothingOfOneLoanStrikesTheNext(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, false, how.config)
			for name, leave := range map[string]func(Conn){
				"deadline":       func(c Conn) { c.SetDeadline(aLongTimeAgo) },
				"read deadline":  func(c Conn) { c.SetReadDeadline(aLongTimeAgo) },
				"write deadline": func(c Conn) { c.SetWriteDeadline(aLongTimeAgo) },
				"soon":           func(c Conn) { c.SetDeadline(time.Now().Add(time.Millisecond)) },
			} {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // sets a deadline of its own
				var left Conn
				require.NoError(t, p.With(ctx, s.addr(), func(c Conn) error {
					err := tlChat(c)
					leave(c)
					left = c
					return err
				}), name)
				cancel() // after the loan: a watch that is left would cut the next one
				p.check(t)
				require.NoError(t, p.With(context.Background(), s.addr(), func(c Conn) error {
					if errors.Is(left.SetDeadline(aLongTimeAgo), nil) {
						return errors.New("the last borrower's handle still sets deadlines")
					}
					time.Sleep(2 * time.Millisecond)
					return tlChat(c)
				}), name)
			}
			require.Equal(t, 1, s.accepts())
		})
	}
}

// curl issue 10690: input that nobody had read was no hindrance to reuse.
// TestUnfitConnectionIsNeverLentAgain tries each place where it may be, under
// each version of TLS; this is the story in short.
func TestCurl_10690_UnreadInputIsNoBasisForReuse(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, tlVersion(tls.VersionTLS13))
	places := map[string]func(Conn) error{
		"kernel":         func(c Conn) error { return errors.Join(tlSay(c, "long"), tlArrived(c)) },
		"crypto/tls":     func(c Conn) error { return errors.Join(tlSay(c, "long"), tlExpect(c, "hello")) },
		"state's buffer": func(c Conn) error { _, err := State[*bufio.Reader](c).Peek(1); return err },
	}
	for place, loan := range places {
		p := tlPool(t, false, func(cfg *Config) {
			cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
		})
		_, err := tlWith(t, p, s.addr(), func(c Conn) error {
			if place == "state's buffer" {
				if err := tlSay(c, "two"); err != nil {
					return err
				}
			} else if err := tlChat(c); err != nil {
				return err
			}
			return loan(c)
		})
		require.NoError(t, err, place)
		id, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err, place)
		require.EqualValues(t, 2, id, place)
		require.Equal(t, map[CloseReason]uint64{ClosedDirty: 1}, p.Stats().Closed, place)
	}
}

// pgbouncer CVE-2021-3935: what a man in the middle had put before the
// handshake was taken as if it had come inside. TestBytesBeforeTheHandshakeFail-
// TheDial has the versions; here it is the man in the middle himself.
func TestCVE_2021_3935_NothingFromBeforeTheHandshakeIsBelieved(t *testing.T) {
	tlBaseline(t)
	s := tlServe(t, tlVersion(tls.VersionTLS13))
	for name, injected := range map[string]string{"a reply": "pong 1\n", "an alert that is passed over": "\x15\x03\x03\x00\x02\x01\x70"} {
		p := tlPool(t, false, func(cfg *Config) {
			cfg.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
				return advMiddle(ctx, a, injected)
			}}
		})
		_, err := tlWith(t, p, s.addr(), func(Conn) error { t.Error("lent: " + name); return nil })
		require.Equal(t, KindBadMessage, KindOf(err), "%s: %v", name, err)
		require.Zero(t, p.Stats().Open)
	}
}

// advMiddle dials through somebody who adds a few bytes before the server's.
func advMiddle(ctx context.Context, addr Addr, injected string) (net.Conn, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	at := ln.Addr().(*net.TCPAddr)
	client, err := dialSocket(ctx, Addr{Transport: TCP, Host: "127.0.0.1", Port: uint16(at.Port)})
	if err != nil {
		return nil, err
	}
	middle, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	server, err := dialSocket(ctx, addr)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(middle, injected); err != nil {
		return nil, err
	}
	for _, way := range [][2]net.Conn{{middle, server}, {server, middle}} {
		go func() {
			// Not as sockets: io.Copy would splice them, over pipes that
			// package net keeps for a while.
			io.Copy(struct{ io.Writer }{way[0]}, struct{ io.Reader }{way[1]})
			way[0].Close()
			way[1].Close()
		}()
	}
	raw, err := client.(*net.TCPConn).SyscallConn()
	if err == nil {
		err = tlSomething(raw)
	}
	return client, err
}

// --- and one that is no advisory ---

// Without pooling everything works as before, each use with a connection of
// its own. (That it compiles without sockets, for js/wasm, is for .ci/run.)
//
// TDBC-19
func TestWithoutPoolingEachLoanIsOneAcceptAndOneClose(t *testing.T) {
	for name, off := range map[string]func(*Config){
		"MaxIdle":        func(cfg *Config) { cfg.MaxIdle = -1 },
		"MaxIdlePerAddr": func(cfg *Config) { cfg.MaxIdlePerAddr = -1 },
		"MaxUses":        func(cfg *Config) { cfg.MaxUses = 1 },
	} {
		for _, how := range tlTransports {
			t.Run(name+"/"+how.name, func(t *testing.T) {
				tlBaseline(t)
				s := how.serve(t)
				p := tlPool(t, true, how.config, off, func(cfg *Config) { cfg.MaxPerAddr = 2 })
				const each = 3
				loans := short.Of(20, 3)
				for n := range loans {
					id, err := tlWith(t, p, s.addr(), func(c Conn) error {
						require.False(t, c.Info().Reused)
						return tlChat(c)
					})
					require.NoError(t, err)
					require.EqualValues(t, n+1, id)
				}
				// Nor is one handed from borrower to borrower past the idle ones.
				var wg tasks.Group
				for range loans {
					wg.Go(func() {
						for range each {
							if _, err := tlWith(t, p, s.addr(), func(c Conn) error {
								if c.Info().Reused {
									return errors.New("handed on")
								}
								return tlChat(c)
							}); err != nil {
								t.Error(err)
							}
						}
					})
				}
				wg.Wait()
				total := loans + loans*each
				require.Eventually(t, func() bool { return p.Stats().Open == 0 }, time.Minute, time.Millisecond)
				require.Equal(t, total, s.accepts())
				var closed uint64
				for _, n := range p.Stats().Closed {
					closed += n
				}
				require.EqualValues(t, total, closed)
				require.Zero(t, p.Stats().Reused)
				for _, c := range s.all() {
					select {
					case <-c.closed:
					case <-time.After(time.Minute):
						t.Fatal("the server never saw the close")
					}
				}
			})
		}
	}
}
