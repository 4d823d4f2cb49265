package connpool

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// ADO-08: a net.Dialer keeps its settings, and the result what package net's connection can do.
func TestADialThroughTheCallersDialerKeepsItsSettings(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has 127.0.0.2 without being asked")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) {
		c.Dialer = &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
		c.Dialers = map[Transport]DialFunc{TCP: func(context.Context, Addr) (net.Conn, error) { return nil, errBoom }}
	})
	own := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	nc, err := p.DialThrough(own.DialContext, 0)(t.Context(), "tcp4", n.addr.HostPort())
	require.NoError(t, err)
	require.Equal(t, "127.0.0.2", nc.LocalAddr().(*net.TCPAddr).IP.String())
	tcp, ok := nc.(interface {
		SetKeepAlivePeriod(time.Duration) error
		SetNoDelay(bool) error
		CloseWrite() error
	})
	require.True(t, ok, "%T", nc)
	require.NoError(t, tcp.SetKeepAlivePeriod(time.Minute))
	require.Equal(t, 1, p.Stats().Tracked)
	r, err := ask(nc, "x")
	require.NoError(t, err)
	require.Equal(t, "x", r.token)
	require.NoError(t, nc.Close())
	require.ErrorIs(t, nc.Close(), net.ErrClosed)
	require.Zero(t, settled(t, p).Open)
}

// ADO-08: whatever the dial function does, no slot is lost and the error names the function.
func TestADialFunctionMayDoAnything(t *testing.T) {
	var missing *tls.Conn
	for name, c := range map[string]struct {
		dial func(context.Context, string, string) (net.Conn, error)
		want string
	}{
		"an error":  {func(context.Context, string, string) (net.Conn, error) { return nil, errBoom }, errBoom.Error()},
		"a panic":   {func(context.Context, string, string) (net.Conn, error) { panic(errBoom) }, "the dial function of DialThrough panicked"},
		"Goexit":    {func(context.Context, string, string) (net.Conn, error) { runtime.Goexit(); return nil, nil }, "the dial function of DialThrough"},
		"nothing":   {func(context.Context, string, string) (net.Conn, error) { return nil, nil }, "the dial function of DialThrough returned neither a connection nor an error"},
		"typed nil": {func(context.Context, string, string) (net.Conn, error) { return missing, nil }, "the dial function of DialThrough returned neither"},
		"a client":  {func(context.Context, string, string) (net.Conn, error) { return Carry(1, nil, nil), nil }, "the dial function of DialThrough returned a client of Carry"},
		"it hangs":  {func(context.Context, string, string) (net.Conn, error) { time.Sleep(time.Hour); return nil, errBoom }, "ignores its ctx"},
		"none":      {nil, "the dial function of DialThrough is nil"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxOpen: 1, DialTimeout: time.Second})
				nc, err := n.p.DialThrough(c.dial, 0)(bg, "tcp", "h:1")
				require.Nil(t, nc)
				require.ErrorContains(t, err, c.want)
				var op *net.OpError
				require.ErrorAs(t, err, &op)
				time.Sleep(2 * time.Hour)
				n.gauges(0, 0, 0)
				n.check()
				require.Equal(t, "a#1", n.use(at("a")), "the slot is there for others")
			})
		})
	}
}

// ADO-08: the function gets what the library said, and its ctx has the bounds of DialContext.
func TestADialFunctionGetsWhatTheLibrarySaid(t *testing.T) {
	bubble(t, func(t *testing.T) {
		type key struct{}
		n := newTestnet(t)
		n.open(Config{MaxOpen: 1, DialTimeout: time.Minute})
		n.Host("proxy").Serve(echoLines)
		var got []string
		dial := n.p.DialThrough(func(ctx context.Context, network, address string) (net.Conn, error) {
			got = []string{network, address, ctx.Value(key{}).(string)}
			end, ok := ctx.Deadline()
			require.True(t, ok)
			require.LessOrEqual(t, time.Until(end), time.Minute)
			return n.Dial(ctx, "proxy")
		}, 1)
		ctx := context.WithValue(bg, key{}, "value")
		first, err := dial(ctx, "tcp6", "Peer.example.:443")
		require.NoError(t, err)
		require.Equal(t, []string{"tcp6", "Peer.example.:443", "value"}, got)
		began := time.Now()
		second, err := dial(ctx, "tcp", "peer:443")
		require.NoError(t, err, "n is that of DialOverflow")
		require.Equal(t, ownPatience, time.Since(began))
		late, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = dial(late, "tcp", "peer:443")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, first.Close())
		require.NoError(t, second.Close())
		synctest.Wait()
		n.gauges(0, 0, 0)
		n.check()
	})
}

// A dialer that dials with the pool's own DialContext shares the socket with it: two
// connections in the books, one descriptor, which nobody has stolen.
func TestADialerMayUseTheDialContextOfThePool(t *testing.T) {
	for _, how := range []string{"Config.Dialers", "DialThrough"} {
		t.Run(how, func(t *testing.T) {
			n := startSock(t, "tcp", faultnet.Options{})
			var p *Pool
			var dials atomic.Int64
			through := func(ctx context.Context, address string) (net.Conn, error) {
				dials.Add(1)
				return p.DialContext(ctx, "tcp", address)
			}
			p = n.pool(t, func(c *Config) {
				c.Dialers = map[Transport]DialFunc{"proxied": func(ctx context.Context, a Addr) (net.Conn, error) {
					return through(ctx, a.HostPort())
				}}
			})
			for range 5 {
				if how == "DialThrough" {
					nc, err := p.DialThrough(func(ctx context.Context, _, address string) (net.Conn, error) {
						return through(ctx, address)
					}, 0)(t.Context(), "tcp", n.addr.HostPort())
					require.NoError(t, err)
					_, err = ask(nc, newToken())
					require.NoError(t, err)
					require.Equal(t, 2, p.Stats().Open)
					require.NoError(t, nc.Close())
				} else {
					at := n.addr
					at.Transport = "proxied"
					loan(t, p, at)
					require.Equal(t, 2, p.Stats().Open)
					p.CloseIdle()
				}
				require.Zero(t, settled(t, p).Open)
				soon(t, "it is closed", func() bool { return n.srv.Open() == 0 })
			}
			require.EqualValues(t, 5, dials.Load())
			require.Zero(t, p.Stats().Closed[ClosedQuarantined])
		})
	}
}
