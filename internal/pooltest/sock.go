package pooltest

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

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// What the tests over real sockets stand on: a server that tags its replies,
// the address and the Config that reach it, and the proof that nothing is left
// when the test is over.

// A SockNet is a server on real sockets, and what a pool needs to reach it.
type SockNet struct {
	Name   string
	Server *faultnet.Server
	Addr   connpool.Addr
	Config connpool.Config
	TLS    bool
	Probed bool // the pool can look into the connection
}

// bare is a net.Conn and nothing else: no descriptor, no CloseWrite.
type bare struct{ net.Conn }

// BareTransport has connections of which the pool sees no descriptor.
const BareTransport connpool.Transport = "bare"

// SockNets are the transports that EachSockNet tries.
var SockNets = []string{"tcp", "tcp6", "tls12", "tls13", "unix", "unix-abstract", "custom"}

// EachSockNet runs f over every transport that this machine has.
func EachSockNet(t *testing.T, o faultnet.Options, f func(t *testing.T, n *SockNet)) {
	for _, name := range SockNets {
		t.Run(name, func(t *testing.T) { f(t, StartSock(t, name, o)) })
	}
}

// StartSock starts a server for one of SockNets, and the watch over leaks.
func StartSock(t *testing.T, name string, o faultnet.Options) *SockNet {
	t.Helper()
	patience.NothingLeaks(t)
	n := &SockNet{Name: name, Probed: sock.CanPeek}
	n.Addr.Transport = connpool.TCP
	switch o.Network = name; name {
	case "tcp6":
		ln, err := net.Listen("tcp6", "[::1]:0")
		if err != nil {
			t.Skip("no IPv6 on loopback here: ", err)
		}
		ln.Close()
	case "tls12", "tls13":
		o.Network, n.TLS, n.Addr.Transport = "tls", true, connpool.TLS
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
		n.Addr.Transport = connpool.Unix
	case "custom":
		o.Network, n.Probed, n.Addr.Transport = "tcp", false, BareTransport
		n.Config.Dialers = map[connpool.Transport]connpool.DialFunc{BareTransport: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
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
	n.Server, n.Config.TLS = srv, srv.ClientTLS()
	n.Addr.Host, n.Addr.Port = srv.Host(), srv.Port()
	return n
}

// Pool makes a pool that reaches n, with what change adds to its Config. When
// the test ends the books must be in order, and Close must work.
func (n *SockNet) Pool(t *testing.T, change func(*connpool.Config)) *connpool.Pool {
	t.Helper()
	cfg := n.Config
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		Check(t, p)
		require.NoError(t, p.Close())
		Check(t, p)
	})
	return p
}

// Scoped is a with another scope, and so another address of the same server.
func Scoped(a connpool.Addr, scope any) connpool.Addr {
	a.Scope = fmt.Sprint(scope)
	return a
}

// Loan is one complete exchange on a connection to addr.
func Loan(t *testing.T, p *connpool.Pool, addr connpool.Addr) (r faultnet.Reply) {
	t.Helper()
	err := p.With(t.Context(), addr, func(c connpool.Conn) (err error) {
		r, err = faultnet.Ask(c, faultnet.NewToken())
		return err
	})
	require.NoError(t, err)
	Check(t, p)
	return r
}

// Held is a loan that lasts until it is told to end.
type Held struct {
	connpool.Conn
	verdict chan error
	result  chan error
}

// Hold borrows and keeps the connection.
func Hold(t *testing.T, p *connpool.Pool, addr connpool.Addr) Held {
	t.Helper()
	h := Held{verdict: make(chan error, 1), result: make(chan error, 1)}
	got := make(chan connpool.Conn, 1)
	go func() {
		h.result <- p.With(context.Background(), addr, func(c connpool.Conn) error {
			got <- c
			return <-h.verdict
		})
	}()
	select {
	case h.Conn = <-got:
	case err := <-h.result:
		t.Fatal("no loan: ", err)
	case <-time.After(patience.Bounded):
		t.Fatal("no loan in time")
	}
	return h
}

// End ends the loan with fn's verdict, and gives what With returned.
func (h Held) End(verdict error) error {
	h.verdict <- verdict
	return <-h.result
}

// Queued waits until so many borrowers wait.
func Queued(t *testing.T, p *connpool.Pool, n int) {
	t.Helper()
	patience.Soon(t, fmt.Sprintf("%d waiting", n), func() bool { return p.Stats().Waiting == n })
}

// Settled waits until nothing is being opened or closed. That the watcher may have
// heard of a hang-up on which the pool has not acted yet is not seen from outside: where
// a server hangs up, see ClosedSoon.
func Settled(t *testing.T, p *connpool.Pool) connpool.Stats {
	t.Helper()
	patience.Soon(t, "dials and closes at their end", func() bool {
		st := p.Stats()
		return st.Dialing+st.Closing == 0
	})
	Check(t, p)
	return p.Stats()
}

// ClosedSoon waits until the pool has counted these closes and no others: a watcher, or
// a goodbye of TLS, may still be at one when its borrower goes on.
func ClosedSoon(t *testing.T, p *connpool.Pool, want map[connpool.CloseReason]uint64) {
	t.Helper()
	patience.Soon(t, fmt.Sprintf("closes %v", want), func() bool { return maps.Equal(want, p.Stats().Closed) })
}
