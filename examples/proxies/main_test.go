package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, "one\ntwo\nthree\nconnections through the proxy: 1\n", out.String())
	require.ErrorContains(t, run(&out, []string{"nowhere"}), "give a proxy and a server")
	require.ErrorContains(t, run(&out, []string{"ftp://me:secret@127.0.0.1:1", "tcp://127.0.0.1:1"}), "proxy ftp://me:xxxxx@127.0.0.1:1: the scheme is")
}

func eventually(t *testing.T, what string, yes func() bool) {
	t.Helper()
	require.Eventually(t, yes, time.Minute, time.Millisecond, what)
}

// openPool opens a pool whose connections go through one proxy.
func openPool(t *testing.T, proxy *url.URL, change func(*connpool.Config)) *connpool.Pool {
	t.Helper()
	cfg := connpool.Config{
		MaxPerAddr:    4,
		SweepInterval: -1, // no sweep: what is found is found without one
		Dialers: map[connpool.Transport]connpool.DialFunc{
			connpool.TCP: through(func(connpool.Addr) *url.URL { return proxy }),
			"vsock":      dialVsock,
		},
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil },
	}
	if change != nil {
		change(&cfg)
	}
	p, err := connpool.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// failedDial is the error of a borrower whose dial failed.
func failedDial(t *testing.T, p *connpool.Pool, addr connpool.Addr) *connpool.Error {
	t.Helper()
	var e *connpool.Error
	require.ErrorAs(t, p.With(t.Context(), addr, func(connpool.Conn) error { return errors.New("lent") }), &e)
	require.Equal(t, connpool.StageDial, e.Stage)
	require.NotContains(t, e.Error(), "\n")
	return e
}

// scripted is a proxy that does what answer does.
func scripted(t *testing.T, answer func(nc net.Conn)) *url.URL {
	t.Helper()
	s, err := loopback.Start(answer)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	return &url.URL{Scheme: "http", Host: target(s.Addr())}
}

// request reads what the client sends to the proxy, and returns its first line.
func request(nc net.Conn) (first string) {
	in := bufio.NewReader(nc)
	for {
		line, err := in.ReadString('\n')
		if first == "" {
			first = strings.TrimSpace(line)
		}
		if err != nil || line == "\r\n" {
			return first
		}
	}
}

var far = connpool.MustParseAddr("tcp://server.example:7")

// ADO-09: the first bytes of the server come in the same segment as the proxy's reply. They are
// the borrower's.
func TestWhatComesTogetherWithTheProxysReplyIsNotLost(t *testing.T) {
	for _, reply := range []string{
		"HTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.0 200 Connection established\r\nProxy-agent: x\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", // without a meaning after CONNECT
		"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
	} {
		asked := make(chan string, 1)
		proxy := scripted(t, func(nc net.Conn) {
			asked <- request(nc)
			io.WriteString(nc, reply+"220 ready\n")
			repeat(nc)
		})
		greeting := ""
		p := openPool(t, proxy, func(c *connpool.Config) {
			c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
				in := bufio.NewReader(nc)
				var err error
				greeting, err = in.ReadString('\n')
				return in, err
			}
		})
		got, err := ask(t.Context(), p, far, "hello")
		require.NoError(t, err, "%q", reply)
		require.Equal(t, "hello", got)
		require.Equal(t, "220 ready\n", greeting)
		require.Equal(t, "CONNECT server.example:7 HTTP/1.1", <-asked)

		// A Setup that leaves them in the socket: the pool finds them.
		p = openPool(t, proxy, nil)
		require.ErrorIs(t, p.With(t.Context(), far, func(connpool.Conn) error { return nil }), connpool.ErrUnread)
	}
}

// ADO-09: a proxy that does not do its part is an error of the dial, in one line that names it.
func TestAProxyThatFailsIsAnErrorOfTheDial(t *testing.T) {
	for _, c := range []struct{ reply, want string }{
		{"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno way", "refuses CONNECT server.example:7: 403 Forbidden"},
		{"HTTP/1.1 502 Bad Gateway\r\n\r\n", "refuses CONNECT server.example:7: 502 Bad Gateway"},
		{"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n", `wants a user and a password, or other ones (407 Proxy Authentication Required, "Basic realm=\"x\"")`},
		{"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "refuses CONNECT server.example:7: 302 Found"},
		{"", "hung up before it answered CONNECT server.example:7"},
		{"HTTP/1.1 200", "hung up before it answered CONNECT server.example:7"},
		{"HTTP/1.1 200 OK\r\nVia: x\r\n", "hung up before it answered CONNECT server.example:7"},
		{"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxReply), "hung up"},
		{"SSH-2.0-x\r\n", "in its answer to CONNECT server.example:7: malformed HTTP"},
	} {
		gone := make(chan struct{})
		proxy := scripted(t, func(nc net.Conn) {
			request(nc)
			io.WriteString(nc, c.reply)
			if len(c.reply) > maxReply || strings.HasSuffix(c.reply, "\r\n\r\n") {
				io.Copy(io.Discard, nc) // until the client hangs up
			}
			close(gone)
		})
		p := openPool(t, proxy, nil)
		e := failedDial(t, p, far)
		require.Contains(t, e.Error(), "proxy "+proxy.Host, "%.50q", c.reply)
		require.Contains(t, e.Error(), c.want)
		<-gone
		require.Zero(t, p.Stats().Open)
	}
	e := failedDial(t, openPool(t, &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, nil), far)
	require.Contains(t, e.Error(), "proxy 127.0.0.1:1: ")
	require.Equal(t, connpool.KindRefused, e.Kind)
}

// ADO-09: a proxy that is silent holds a dial no longer than its ctx.
func TestAProxyThatIsSilentHoldsNoDial(t *testing.T) {
	for scheme, begins := range map[string][]string{
		"http":   {"", "HTTP/1.1 200 OK\r\n"},
		"socks5": {"", "\x05", "\x05\x00\x05"},
	} {
		for _, said := range begins {
			ended := make(chan struct{}, 10)
			proxy := scripted(t, func(nc net.Conn) {
				io.WriteString(nc, said)
				io.Copy(io.Discard, nc)
				ended <- struct{}{}
			})
			proxy.Scheme = scheme
			p := openPool(t, proxy, func(c *connpool.Config) { c.DialTimeout = 30 * time.Millisecond })
			require.Equal(t, connpool.KindTimeout, failedDial(t, p, far).Kind)
			<-ended // the connection to the proxy is closed

			p = openPool(t, proxy, nil)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
			require.ErrorIs(t, p.With(ctx, far, func(connpool.Conn) error { return nil }), context.Canceled)
			p.Close() // ends the dial that nobody waits for
			<-ended
			require.Zero(t, p.Stats().AbandonedCalls)
		}
	}
}

// ADO-09: each address has its proxy, or none.
func TestAnAddressHasItsProxy(t *testing.T) {
	s, err := loopback.Start(repeat)
	require.NoError(t, err)
	defer s.Close()
	count := func(used *int) *url.URL {
		return scripted(t, func(nc net.Conn) { *used++; serveConnect(nc) })
	}
	var a, b int
	proxies := map[string]*url.URL{"a": count(&a), "b": count(&b)}
	p, err := newPool(func(addr connpool.Addr) *url.URL { return proxies[addr.Scope] })
	require.NoError(t, err)
	for _, scope := range []string{"a", "b", "a", "", "b", ""} {
		addr := s.Addr()
		addr.Scope = scope
		got, err := ask(t.Context(), p, addr, "x"+scope)
		require.NoError(t, err)
		require.Equal(t, "x"+scope, got)
	}
	require.EqualValues(t, 3, p.Stats().Dials)
	p.Close()
	require.Equal(t, []int{1, 1}, []int{a, b})
}

// ADO-09: what vsock's dialer says where it cannot dial is one clear line.
func TestAVsockAddressIsRead(t *testing.T) {
	addr, err := connpool.ParseAddr("vsock://[3:70000]")
	require.NoError(t, err)
	require.Equal(t, vsockAddr(3, 70000), addr)
	require.Equal(t, "vsock://[3:70000]", addr.String())
	p := openPool(t, nil, nil)
	for host, want := range map[string]string{
		"x:1":          `"x" is no context id: write vsock://[3:1024]`,
		"3":            `"" is no port: write vsock://[3:1024]`,
		"3:4294967296": `"4294967296" is no port`,
	} {
		require.Contains(t, failedDial(t, p, connpool.Addr{Transport: "vsock", Host: host}).Error(), want)
	}
	addr.QoS.DSCP = 10
	require.ErrorIs(t, failedDial(t, p, addr), errors.ErrUnsupported)
	p = openPool(t, nil, func(c *connpool.Config) { c.DialTimeout = 50 * time.Millisecond })
	e := failedDial(t, p, vsockAddr(1, 4294967294)) // nobody listens there, or there is no vsock
	require.Contains(t, fmt.Sprint(e), "vsock")
}
