package gateway

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// install replaces the files of one certificate with those of another.
func install(t *testing.T, from, to keys) {
	t.Helper()
	for src, dst := range map[string]string{from.cert: to.cert, from.key: to.key, from.ca: to.ca} {
		b, err := os.ReadFile(src)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(dst, b, 0o600))
	}
}

func TestReloadedCertificatesServeNewClientsAndOldOnesStay(t *testing.T) {
	for _, how := range []string{"by Reload", "by a look at the files"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			oldCA, newCA := faultnet.NewCA(), faultnet.NewCA()
			inForce := writeKeys(t, dir, "k", oldCA.Server("127.0.0.1"))
			next := writeKeys(t, dir, "n", newCA.Server("127.0.0.1"))
			_, to := serve(t, faultnet.Options{})
			cfg := Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: inForce.cert, Key: inForce.key}, ReloadEvery: -1}
			if how != "by Reload" {
				cfg.ReloadEvery = 5 * time.Millisecond
			}
			g := begin(t, cfg)
			g.clientCA = oldCA.Pool()
			before := g.call()
			before.token("a")

			if how == "by Reload" { // half-written files change nothing
				require.NoError(t, os.WriteFile(inForce.cert, []byte("-----BEGIN CERT"), 0o600))
				require.Error(t, g.Reload())
				g.call().token("b")
				require.Equal(t, uint64(1), g.Status().ReloadsFailed)
			}
			install(t, next, inForce)
			if how == "by Reload" {
				require.NoError(t, g.Reload())
			}
			soon(t, "they are in force", func() bool { return g.Status().Reloads == 1 })
			_, err := g.dial()
			var unknown *tls.CertificateVerificationError
			require.ErrorAs(t, err, &unknown, "the old authority does not know the new certificate")
			g.clientCA = newCA.Pool()
			g.call().token("c")
			before.token("d")
		})
	}
}

func TestClientsNeedACertificateOfTheClientCA(t *testing.T) {
	dir := t.TempDir()
	ca, clients, strangers := faultnet.NewCA(), faultnet.NewCA(), faultnet.NewCA()
	k := writeKeys(t, dir, "k", ca.Server("127.0.0.1"))
	friend := clients.Client("friend")
	clientCA := writeKeys(t, dir, "c", friend).ca
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", ErrorReply: "ERR\n",
		Server: ServerFiles{Cert: k.cert, Key: k.key, ClientCA: clientCA}})
	ask := func(cache tls.ClientSessionCache, certs ...tls.Certificate) error {
		nc, err := tls.Dial("tcp", g.Addr().String(), &tls.Config{RootCAs: ca.Pool(), Certificates: certs, ClientSessionCache: cache})
		if err != nil {
			return err
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(forever))
		if _, err := nc.Write([]byte("x\n")); err != nil {
			return err
		}
		_, err = nc.Read(make([]byte, 100))
		return err
	}
	require.Error(t, ask(nil))
	require.Error(t, ask(nil, strangers.Client("friend")))
	require.Zero(t, srv.Accepts(), "not a byte of theirs reached the server")
	soon(t, "they are counted", func() bool { return g.Status().Handshake == 2 })
	cache := tls.NewLRUClientSessionCache(1)
	require.NoError(t, ask(cache, friend))

	// After a change of the authority, neither the old certificate nor an old session is
	// accepted.
	require.NoError(t, os.Rename(writeKeys(t, dir, "s", strangers.Client("x")).ca, clientCA))
	require.NoError(t, g.Reload())
	require.Error(t, ask(cache, friend))
	require.NoError(t, ask(nil, strangers.Client("x")))
}

func TestReloadReplacesTheConnectionsToTheServer(t *testing.T) {
	dir := t.TempDir()
	ca, clients := faultnet.NewCA(), faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	trust := writeKeys(t, dir, "server", cert).ca
	first, second := clients.Client("first"), clients.Client("second")
	ours := writeKeys(t, dir, "ours", first)
	next := writeKeys(t, dir, "next", second)
	var seen atomic.Pointer[string]
	srv, to := serve(t, faultnet.Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients.Pool(),
		VerifyConnection: func(st tls.ConnectionState) error {
			seen.Store(&st.PeerCertificates[0].Subject.CommonName)
			return nil
		}}})
	g := begin(t, Config{Framing: "line", To: to, Upstream: UpstreamFiles{CA: trust, Cert: ours.cert, Key: ours.key}, ReloadEvery: -1})
	c := g.call()
	c.token("a")
	require.Equal(t, "first", *seen.Load())
	require.NoError(t, g.Reload())
	c.token("b")
	require.Equal(t, 1, srv.Accepts(), "nothing had changed")
	install(t, next, ours)
	require.NoError(t, g.Reload())
	c.token("c")
	require.Equal(t, "second", *seen.Load())
	require.Equal(t, 2, srv.Accepts())
	soon(t, "the old one is closed", func() bool { return g.Status().Pool.Closed[connpool.ClosedRetired] == 1 })
}

func TestCertificatesTellTheirEnd(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1", "gw.example"))
	g, err := New(Config{Framing: "line", To: "tcp://127.0.0.1:1", Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}})
	require.NoError(t, err)
	defer g.Close()
	lines, expired := g.Certificates()
	require.False(t, expired)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "gw.example")
	require.Contains(t, lines[0], "2199")
	g.certs.forClients.Load().Certificates[0].Leaf = &x509.Certificate{NotAfter: time.Unix(0, 0)}
	lines, expired = g.Certificates()
	require.True(t, expired)
	require.Contains(t, lines[0], "EXPIRED on 1970-01-01")
	g.certs.forClients.Load().Certificates[0].Leaf = &x509.Certificate{NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)}
	lines, expired = g.Certificates()
	require.True(t, expired)
	require.Contains(t, lines[0], "NOT VALID before")
}

// TRY-38: the log reports that a certificate has expired, and not only the handshakes
// that fail because of it.
func TestTheLogTellsOfACertificateThatIsNotValid(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1"))
	_, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}, ReloadEvery: -1})
	require.NoError(t, g.Reload())
	old := g.certs.forClients.Load().Clone()
	old.Certificates = []tls.Certificate{{Leaf: &x509.Certificate{NotAfter: time.Unix(0, 0)}}}
	g.certs.forClients.Store(old)
	for range 5 {
		require.NoError(t, g.Reload())
	}
	require.Equal(t, 1, told(t, log, "a certificate is not valid now", "level=ERROR", "EXPIRED on 1970-01-01"))
}

// spoil replaces a file with bytes that are no certificate.
func spoil(t *testing.T, file string) {
	t.Helper()
	require.NoError(t, os.WriteFile(file, []byte("-----BEGIN CERT"), 0o600))
}

// demanding starts a TLS 1.3 server that demands a certificate that no client has.
func demanding(t *testing.T) (*faultnet.CA, keys, string) {
	t.Helper()
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	_, to := serve(t, faultnet.Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: faultnet.NewCA().Pool()}})
	return ca, writeKeys(t, t.TempDir(), "server", cert), to
}

// TRY-31
func TestBothSidesOfTLSSpeakOfTheirProtocol(t *testing.T) {
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	k := writeKeys(t, t.TempDir(), "k", cert)
	var heard atomic.Pointer[string]
	_, to := serve(t, faultnet.Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"postgresql"},
		VerifyConnection: func(st tls.ConnectionState) error {
			heard.Store(&st.NegotiatedProtocol)
			return nil
		}}})
	cfg := Config{Framing: "session", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}, Upstream: UpstreamFiles{CA: k.ca}}
	for alpn, want := range map[string]string{"": "", "postgresql": "postgresql", "other,postgresql": "postgresql"} {
		cfg.ALPN = alpn
		g := begin(t, cfg)
		nc, err := tls.Dial("tcp", g.Addr().String(), &tls.Config{RootCAs: ca.Pool(), NextProtos: []string{"postgresql"}})
		require.NoError(t, err)
		require.Equal(t, want, nc.ConnectionState().NegotiatedProtocol, alpn)
		nc.SetDeadline(time.Now().Add(forever))
		nc.Write([]byte("x\n"))
		_, err = nc.Read(make([]byte, 100))
		require.NoError(t, err)
		require.Equal(t, want, *heard.Load(), alpn)
		nc.Close()
	}
	for _, bad := range []string{",", "a,,b", "a,"} {
		cfg.ALPN = bad
		_, err := New(cfg)
		require.ErrorContains(t, err, "-alpn")
	}
	_, err := New(Config{Framing: "line", Listen: "127.0.0.1:0", To: "tcp://127.0.0.1:1", ALPN: "x"})
	require.ErrorContains(t, err, "-alpn is for TLS")
}

// TRY-31: an old ticket must not be valid for ever.
func TestKeysOfSessionTicketsAreForgottenAfterAWeek(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1"))
	for day, opens := range map[int]bool{1: true, 9: false, 60: false} {
		c := &certificates{server: ServerFiles{Cert: k.cert, Key: k.key}}
		_, err := c.load()
		require.NoError(t, err)
		cfg := c.forClients.Load()
		now := time.Now()
		cfg.Time = func() time.Time { return now }
		ticket, st := ticketOf(t, cfg)
		for range day { // somebody connects every day
			now = now.Add(24 * time.Hour)
			cfg.EncryptTicket(st, new(tls.SessionState))
		}
		got, err := cfg.DecryptTicket(ticket, st)
		require.NoError(t, err)
		require.Equal(t, opens, got != nil, "after %d days", day)
	}
}

// ticketOf returns a ticket that a listener with cfg gives to a client.
func ticketOf(t *testing.T, cfg *tls.Config) (ticket []byte, st tls.ConnectionState) {
	t.Helper()
	cfg.WrapSession = func(s tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		b, err := cfg.EncryptTicket(s, ss)
		ticket, st = b, s
		return b, err
	}
	defer func() { cfg.WrapSession = nil }()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() {
		tc := tls.Server(b, cfg)
		err := tc.Handshake()
		tc.Write([]byte("x"))
		done <- err
	}()
	client := tls.Client(a, &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1)})
	require.NoError(t, client.Handshake())
	client.Read(make([]byte, 1))
	require.NoError(t, <-done)
	require.NotEmpty(t, ticket)
	return ticket, st
}

// TRY-38: a drain does not wait for handshakes, and does not count them as failed.
func TestADrainDoesNotCountTheHandshakesThatItEnds(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1"))
	_, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}})
	nc, err := net.Dial("tcp", g.Addr().String())
	require.NoError(t, err)
	defer nc.Close()
	soon(t, "it is in", func() bool { return g.Status().Clients == 1 })
	g.end()
	require.NoError(t, g.wait())
	require.Zero(t, g.Status().Handshake)
	require.NotContains(t, log.String(), "handshakes of clients fail")
}
