package connpool

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/race"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// What the tests over real sockets stand on: a server that tags its replies,
// the address and the Config that reach it, and the proof that nothing is left
// when the test is over.

const (
	bounded     = patience.Bounded
	raceEnabled = race.Enabled
)

var (
	soon         = patience.Soon
	quickOnce    = patience.QuickOnce
	nothingLeaks = patience.NothingLeaks
	warmNet      = patience.WarmNet
	stress       = patience.Stress
)

func inTime[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	return patience.InTime(t, from)
}

// A sockNet is a server on real sockets, and what a pool needs to reach it.
type sockNet struct {
	name   string
	srv    *faultnet.Server
	addr   Addr
	cfg    Config
	tls    bool
	probed bool // the pool can look into the connection
}

// bare is a net.Conn and nothing else: no descriptor, no CloseWrite.
type bare struct{ net.Conn }

const bareTransport Transport = "bare"

var sockNets = []string{"tcp", "tcp6", "tls12", "tls13", "unix", "unix-abstract", "custom"}

// eachSockNet runs f over every transport that this machine has.
func eachSockNet(t *testing.T, o faultnet.Options, f func(t *testing.T, n *sockNet)) {
	for _, name := range sockNets {
		t.Run(name, func(t *testing.T) { f(t, startSock(t, name, o)) })
	}
}

// startSock starts a server for one of sockNets, and the watch over leaks.
func startSock(t *testing.T, name string, o faultnet.Options) *sockNet {
	t.Helper()
	nothingLeaks(t)
	n := &sockNet{name: name, probed: sock.CanPeek}
	n.addr.Transport = TCP
	switch o.Network = name; name {
	case "tcp6":
		ln, err := net.Listen("tcp6", "[::1]:0")
		if err != nil {
			t.Skip("no IPv6 on loopback here: ", err)
		}
		ln.Close()
	case "tls12", "tls13":
		o.Network, n.tls, n.addr.Transport = "tls", true, TLS
		if o.TLS = o.TLS.Clone(); o.TLS == nil {
			o.TLS = new(tls.Config)
		}
		o.TLS.MinVersion, o.TLS.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
		if name == "tls12" {
			o.TLS.MinVersion, o.TLS.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		}
	case "unix", "unix-abstract":
		if name == "unix-abstract" && runtime.GOOS != "linux" {
			t.Skip("abstract Unix sockets exist on Linux only")
		}
		n.addr.Transport = Unix
	case "custom":
		o.Network, n.probed, n.addr.Transport = "tcp", false, bareTransport
		n.cfg.Dialers = map[Transport]DialFunc{bareTransport: func(ctx context.Context, a Addr) (net.Conn, error) {
			var d net.Dialer
			nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
			if err != nil {
				return nil, err
			}
			return bare{nc}, nil
		}}
	}
	srv, err := faultnet.Start(o)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	n.srv, n.cfg.TLS = srv, srv.ClientTLS()
	n.addr.Host, n.addr.Port = srv.Host(), srv.Port()
	return n
}

// pool makes a pool that reaches n, with what change adds to its Config. When
// the test ends the books must be in order, and Close must work.
func (n *sockNet) pool(t *testing.T, change func(*Config)) *Pool {
	t.Helper()
	cfg := n.cfg
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		p.check(t)
		require.NoError(t, p.Close())
		p.check(t)
	})
	return p
}

// scoped is a with another scope, and so another address of the same server.
func scoped(a Addr, scope any) Addr {
	a.Scope = fmt.Sprint(scope)
	return a
}

// What package faultnet's servers answer, in the words of the tests here.

type reply struct {
	serial, seq int
	token       string
}

func ask(c net.Conn, token string) (reply, error)  { return replied(faultnet.Ask(c, token)) }
func hear(c net.Conn, token string) (reply, error) { return replied(faultnet.Hear(c, token)) }

func replied(r faultnet.Reply, err error) (reply, error) {
	return reply{serial: r.Serial, seq: r.Seq, token: r.Token}, err
}

var (
	newToken = faultnet.NewToken
)

// loan is one complete exchange on a connection to addr.
func loan(t *testing.T, p *Pool, addr Addr) (r reply) {
	t.Helper()
	err := p.With(t.Context(), addr, func(c Conn) (err error) {
		r, err = ask(c, newToken())
		return err
	})
	require.NoError(t, err)
	p.check(t)
	return r
}

// held is a loan that lasts until it is told to end.
type held struct {
	Conn
	verdict chan error
	result  chan error
}

// hold borrows and keeps the connection.
func hold(t *testing.T, p *Pool, addr Addr) held {
	t.Helper()
	h := held{verdict: make(chan error, 1), result: make(chan error, 1)}
	got := make(chan Conn, 1)
	go func() {
		h.result <- p.With(context.Background(), addr, func(c Conn) error {
			got <- c
			return <-h.verdict
		})
	}()
	select {
	case h.Conn = <-got:
	case err := <-h.result:
		t.Fatal("no loan: ", err)
	case <-time.After(bounded):
		t.Fatal("no loan in time")
	}
	return h
}

// end ends the loan with fn's verdict, and gives what With returned.
func (h held) end(verdict error) error {
	h.verdict <- verdict
	return <-h.result
}

// queued waits until so many borrowers wait.
func queued(t *testing.T, p *Pool, n int) {
	t.Helper()
	soon(t, fmt.Sprintf("%d waiting", n), func() bool { return p.Stats().Waiting == n })
}

// settled waits until nothing is being opened or closed.
func settled(t *testing.T, p *Pool) Stats {
	t.Helper()
	soon(t, "dials and closes at their end", func() bool {
		st := p.Stats()
		return st.Dialing+st.Closing == 0 && !p.hearing()
	})
	p.check(t)
	return p.Stats()
}

// stirs waits until the connection that addr would lend next has something to
// tell: bytes, an end, an error.
func stirs(t *testing.T, p *Pool, addr Addr) {
	t.Helper()
	addr, err := addr.canonical()
	require.NoError(t, err)
	soon(t, "news at the socket", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		s := p.sites.find(addr)
		if s == nil || s.top == nil {
			return true
		}
		seen := sock.Seen{}
		s.top.sock.raw.Control(func(fd uintptr) { seen = sock.Peek(fd) })
		return seen != sock.Seen{}
	})
}

// hearing reports whether the watcher is about to act on a hang-up, or acts on it: a connection
// is marked and still there, or being examined, which takes the mark away first.
func (p *Pool) hearing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.recency.all() {
		if c.word.Load()&(flagHungUp|flagLent) == flagHungUp {
			return true
		}
		if e := c.cold.Load(); e != nil && e.checking {
			return true
		}
	}
	return false
}

// closedSoon waits until the pool has counted these closes and no others: a watcher, or
// a goodbye of TLS, may still be at one when its borrower goes on.
func closedSoon(t *testing.T, p *Pool, want map[CloseReason]uint64) {
	t.Helper()
	soon(t, fmt.Sprintf("closes %v", want), func() bool { return maps.Equal(want, p.Stats().Closed) })
}
