package connpool

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// What the tests over real sockets stand on: a server that tags its replies,
// the address and the Config that reach it, and the proof that nothing is left
// when the test is over.

// bounded is how long a test waits for what the system delivers when it likes.
const bounded = time.Minute

// soon waits for something that only the system can bring about.
func soon(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(bounded); !happened(); {
		if time.Now().After(end) {
			t.Fatal("still not: " + what)
		}
		<-time.After(500 * time.Microsecond)
	}
}

// quickOnce requires that f ends within a bound at least once. A busy machine may
// make any run of it slow; what breaks the bound makes each slow.
func quickOnce(t *testing.T, bound time.Duration, f func()) {
	t.Helper()
	for tries := 0; ; tries++ {
		start := time.Now()
		f()
		took := time.Since(start)
		if took < bound {
			return
		}
		if tries == 7 {
			t.Fatalf("%v, and %v at most are right, %d times in a row", took, bound, tries+1)
		}
	}
}

// inTime receives what should come soon.
func inTime[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(bounded):
		t.Fatal("nothing comes")
	}
	return v
}

var warmNet = sync.OnceFunc(func() { // the runtime's poller has descriptors of its own
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close()
	}
})

// nothingLeaks fails the test if, when everything that is cleaned up after this
// call has been, there are more descriptors or goroutines than now.
func nothingLeaks(t *testing.T) {
	t.Helper()
	warmNet()
	before, others := openDescriptors(), goleak.IgnoreCurrent()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		for end := time.Now().Add(bounded); ; { // goleak alone has less patience than a loaded machine needs
			if err := goleak.Find(others); err == nil {
				break
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		soon(t, "descriptors back at the baseline", func() bool { return openDescriptors() <= before })
	})
}

// openDescriptors counts those of the process; 0 where nobody tells.
func openDescriptors() int {
	if runtime.GOOS != "linux" {
		return 0
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		// Package net keeps the pipes that splice needs until the next GC. To
		// ask for one would hide a socket that nobody closed.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
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

// reply is what the server's Tokens answers.
type reply struct {
	serial, seq int
	token       string
}

var lastToken atomic.Uint64

func newToken() string { return fmt.Sprintf("t%d", lastToken.Add(1)) }

// ask sends a token and reads one reply to its end. What comes back under
// another token is the failure that all this is about.
func ask(c net.Conn, token string) (reply, error) {
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return reply{}, err
	}
	return hear(c, token)
}

var errForeign = errors.New("got somebody else's reply")

func hear(c net.Conn, token string) (r reply, err error) {
	var buf [256]byte
	n := 0
	for bytes.IndexByte(buf[:n], '\n') < 0 {
		k, err := c.Read(buf[n:])
		if n += k; err != nil && bytes.IndexByte(buf[:n], '\n') < 0 {
			return r, err
		}
	}
	line := string(buf[:n])
	if _, err := fmt.Sscanf(line, "%d %d %s\n", &r.serial, &r.seq, &r.token); err != nil ||
		r.token != token || strings.IndexByte(line, '\n') != n-1 {
		return r, fmt.Errorf("%w: %q for %q", errForeign, line, token)
	}
	return r, nil
}

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

// hearing reports whether the watcher is about to act on a hang-up: a connection
// is marked and still there.
func (p *Pool) hearing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.recency.all() {
		if c.word.Load()&(flagHungUp|flagLent) == flagHungUp {
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
