//go:build unix

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/url"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// server repeats lines, and is told when to do something else.
type server struct {
	mu   sync.Mutex // guards open
	open []net.Conn
}

func (s *server) serve(nc net.Conn) {
	s.mu.Lock()
	s.open = append(s.open, nc)
	s.mu.Unlock()
	repeat(nc)
}

// each calls f with each connection since the last call.
func (s *server) each(f func(nc net.Conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, nc := range s.open {
		f(nc)
	}
	s.open = nil
}

// waiting reports whether bytes wait to be read from nc.
func waiting(t *testing.T, nc net.Conn) (yes bool) {
	raw, err := nc.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		n, _, _ := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		yes = n > 0
	}))
	return yes
}

// prove shows that connections to addr, which s serves, are as good as direct ones. T is what the
// dialer returns.
func prove[T net.Conn](t *testing.T, proxy *url.URL, addr connpool.Addr, s *server) {
	p := openPool(t, proxy, nil)
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for i := range 25 {
				line := fmt.Sprintf("%d/%d", w, i)
				if got, err := ask(t.Context(), p, addr, line); err != nil || got != line {
					t.Errorf("sent %q, got %q, %v", line, got, err)
				}
			}
		})
	}
	all.Wait()
	var st connpool.Stats
	eventually(t, "no dial is under way", func() bool { // for those who no longer needed it
		st = p.Stats()
		return st.Dialing == 0
	})
	require.LessOrEqual(t, st.Dials, uint64(4))
	require.Empty(t, st.Closed)
	require.Zero(t, st.Unprobed, "the pool sees the socket")

	// The server hangs up.
	s.each(func(nc net.Conn) { nc.Close() })
	if runtime.GOOS == "linux" {
		eventually(t, "the ends are heard", func() bool {
			now := p.Stats()
			return now.Open == 0 && now.Closed[connpool.ClosedStale] == uint64(st.Open)
		})
		_, err := ask(t.Context(), p, addr, "again")
		require.NoError(t, err)
	}
	p.Close()
	s.each(func(net.Conn) {})

	// The server sends what nobody asked for.
	p = openPool(t, proxy, nil)
	var under T
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		if _, err := fmt.Fprintln(c, "first"); err != nil {
			return err
		}
		var ok bool
		if under, ok = connpool.Under[T](c); !ok {
			return fmt.Errorf("this is no %T", under)
		}
		_, err := connpool.State[*bufio.Reader](c).ReadString('\n')
		return err
	}))
	s.each(func(nc net.Conn) { io.WriteString(nc, "unasked\n") })
	eventually(t, "it has come", func() bool { return waiting(t, under) })
	got, err := ask(t.Context(), p, addr, "next")
	require.NoError(t, err)
	require.Equal(t, "next", got)
	require.EqualValues(t, 2, p.Stats().Dials)
	eventually(t, "the reason", func() bool { return p.Stats().Closed[connpool.ClosedDirty] == 1 })

	// A ctx ends in an exchange.
	ctx, cancel := context.WithCancel(t.Context())
	require.ErrorIs(t, p.With(ctx, addr, func(c connpool.Conn) error {
		time.AfterFunc(10*time.Millisecond, cancel)
		_, err := c.Read(make([]byte, 1))
		return err
	}), context.Canceled)
}

// kinds are the proxies of the distribution, with and without a log-in.
var kinds = []struct {
	name  string
	kind  realserver.Kind
	proxy url.URL
	wrong string // what the dial says if the log-in is wrong; "": there is none
	none  string // what the dial says without a log-in
	shut  string // what the dial says if nobody listens at the server
}{
	{"SOCKS5", realserver.MicroSOCKS("", ""), url.URL{Scheme: "socks5"}, "", "", "connection refused"},
	{"SOCKS5 with a log-in", realserver.MicroSOCKS("me", "secret"), url.URL{Scheme: "socks5", User: url.UserPassword("me", "secret")}, "username/password authentication failed", "no acceptable authentication methods", "connection refused"},
	{"CONNECT", realserver.Tinyproxy(), url.URL{Scheme: "http"}, "", "", "refuses CONNECT"},
	{"CONNECT with a log-in", realserver.Tinyproxy("BasicAuth me secret"), url.URL{Scheme: "http", User: url.UserPassword("me", "secret")}, "wants a user and a password, or other ones (401", "wants a user and a password, or other ones (407", "refuses CONNECT"},
}

// ADO-09: the pool over the proxies of the distribution.
func TestThroughARealProxy(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			srv := realserver.Start(t, k.kind)
			proxy := k.proxy
			proxy.Host = srv.Addr
			s := new(server)
			l, err := loopback.Start(s.serve)
			require.NoError(t, err)
			defer l.Close()
			prove[*net.TCPConn](t, &proxy, l.Addr(), s)

			// TLS is that of the pool, from end to end.
			secure, roots, err := loopback.StartTLS(repeat)
			require.NoError(t, err)
			defer secure.Close()
			p := openPool(t, &proxy, func(c *connpool.Config) { c.TLS = &tls.Config{RootCAs: roots} })
			for range 3 {
				got, err := ask(t.Context(), p, secure.Addr(), "secret")
				require.NoError(t, err)
				require.Equal(t, "secret", got)
			}
			require.EqualValues(t, 1, p.Stats().Dials)
			require.Zero(t, p.Stats().Unprobed)
			other := secure.Addr()
			other.ServerName = "another.example"
			var e *connpool.Error
			_, err = ask(t.Context(), p, other, "secret")
			require.ErrorAs(t, err, &e)
			require.Equal(t, connpool.StageHandshake, e.Stage)

			// What the proxy refuses.
			free, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			free.Close()
			shut := connpool.MustParseAddr("tcp://" + free.Addr().String())
			require.Contains(t, failedDial(t, openPool(t, &proxy, nil), shut).Error(), k.shut)
			if k.wrong != "" {
				wrong := proxy
				wrong.User = url.UserPassword("me", "guess")
				e := failedDial(t, openPool(t, &wrong, nil), l.Addr())
				require.Contains(t, e.Error(), k.wrong)
				require.NotContains(t, e.Error(), "guess")
				wrong.User = nil
				e = failedDial(t, openPool(t, &wrong, nil), l.Addr())
				require.Contains(t, e.Error(), k.none)
			}

			// The proxy itself comes back after its end.
			p = openPool(t, &proxy, nil)
			_, err = ask(t.Context(), p, l.Addr(), "x")
			require.NoError(t, err)
			srv.Restart(t)
			if runtime.GOOS == "linux" {
				eventually(t, "its end is heard", func() bool { return p.Stats().Open == 0 })
			}
			_, err = ask(t.Context(), p, l.Addr(), "y")
			require.NoError(t, err)
		})
	}
}

// ADO-09: a real proxy that may not connect to this port says so.
func TestARealProxyForbidsAPort(t *testing.T) {
	srv := realserver.Start(t, realserver.Tinyproxy("ConnectPort 443"))
	p := openPool(t, &url.URL{Scheme: "http", Host: srv.Addr}, nil)
	require.Contains(t, failedDial(t, p, connpool.MustParseAddr("tcp://127.0.0.1:9")).Error(), "refuses CONNECT 127.0.0.1:9: 403 ")
}

// ADO-09: vsock, over the loopback of the kernel (the module vsock_loopback).
func TestOverVsock(t *testing.T) {
	l, err := vsock.ListenContextID(vsock.Local, 0, nil)
	if err != nil {
		t.Skipf("this kernel has no loopback for vsock: %v", err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	port := l.Addr().(*vsock.Addr).Port
	nc, err := vsock.DialContext(ctx, vsock.Local, port, nil)
	if err != nil {
		t.Skipf("this kernel has no loopback for vsock: %v", err)
	}
	nc.Close()
	first, err := l.Accept()
	require.NoError(t, err)
	first.Close()
	s := new(server)
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(nc)
		}
	}()
	prove[*vsock.Conn](t, nil, vsockAddr(vsock.Local, port), s)
}
