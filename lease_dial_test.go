package connpool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// A library that dials for each exchange and closes after it, such as a Modbus client.
type dialsEachTime struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
}

func (l dialsEachTime) exchange(ctx context.Context, network, address, token string) (r reply, err error) {
	nc, err := l.dial(ctx, network, address)
	if err != nil {
		return r, err
	}
	defer nc.Close()
	if end, ok := ctx.Deadline(); ok {
		nc.SetDeadline(end)
	}
	return ask(nc, token)
}

// ADO-08: a library that closes between exchanges works over warm connections.
func TestALibraryThatClosesBetweenExchangesGetsWarmConnections(t *testing.T) {
	for _, name := range []string{"tcp", "unix"} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, func(c *Config) { c.MaxOpen = 4 })
			network, address := n.target()
			lib := dialsEachTime{p.LeaseContext}
			var all sync.WaitGroup
			for range 16 {
				all.Add(1)
				go func() {
					defer all.Done()
					for range 1000 / 16 {
						token := newToken()
						r, err := lib.exchange(context.Background(), network, address, token)
						if err != nil || r.token != token {
							t.Error(r, err)
						}
					}
				}()
			}
			all.Wait()
			require.LessOrEqual(t, p.Stats().Dials, uint64(4))
			n.srv.CutIdle(-1, faultnet.FIN)
			r, err := lib.exchange(t.Context(), network, address, "later")
			require.NoError(t, err)
			require.Equal(t, "later", r.token)
		})
	}
}

// ADO-08: TLS, Scope and QoS come from the Addr.
func TestLeaseDialerLendsWhatItsAddrSays(t *testing.T) {
	n := startSock(t, "tls13", faultnet.Options{})
	p := n.pool(t, nil)
	address := n.addr.HostPort()
	r, err := dialsEachTime{p.LeaseDialer(Addr{Transport: TLS, Scope: "blue"})}.exchange(t.Context(), "tcp", address, "x")
	require.NoError(t, err)
	require.Equal(t, "x", r.token)
	at := n.addr
	at.Scope = "blue"
	again := loan(t, p, at)
	require.Equal(t, r.serial, again.serial, "one connection for the address")
	fixed := p.LeaseDialer(at)
	r, err = dialsEachTime{fixed}.exchange(t.Context(), "tcp", strings.ToUpper(address), "y")
	require.NoError(t, err)
	require.Equal(t, again.serial, r.serial)
	_, err = fixed(t.Context(), "tcp", "elsewhere:1")
	require.ErrorContains(t, err, "LeaseDialer was made for "+address, "never to another peer than the one that was dialed")
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, KindUsage, KindOf(err))
}

func TestALeaseInTheShapeOfADialRefusesWhatItCannotMean(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for _, c := range []struct {
			addr             Addr
			network, address string
			want             string
		}{
			{Addr{Transport: TCP}, "udp", "a:1", `"tcp", "tcp4", "tcp6" or "unix"`},
			{Addr{Transport: TCP}, "tcp4", "a:1", "cannot say tcp4"},
			{Addr{Transport: TCP}, "tcp", "a", "missing port"},
			{Addr{Transport: TCP, Port: 7}, "tcp", "a:1", "a Port and no Host"},
			{Addr{Transport: TCP, Host: "a", Port: 7}, "tcp", "a:1", "made for a:7"},
			{Addr{Transport: TCP, Host: "a", Port: 7}, "unix", "/run/x", "made for transport tcp"},
			{Addr{Transport: Unix, Host: "/run/y"}, "unix", "/run/x", "made for /run/y"},
			{Addr{Transport: Unix}, "tcp", "a:1", "made for transport unix"},
			{Addr{}, "tcp", "a:1", "transport"},
		} {
			nc, err := n.p.LeaseDialer(c.addr)(bg, c.network, c.address)
			require.Nil(t, nc)
			require.ErrorContains(t, err, c.want)
			require.NotContains(t, err.Error(), "\n")
			require.Equal(t, KindUsage, KindOf(err), err)
		}
		_, err := n.p.LeaseContext(nil, "tcp", "a:1") //lint:ignore SA1012 the test is about it
		require.ErrorContains(t, err, "ctx is nil")
		_, err = new(Pool).LeaseContext(bg, "tcp", "a:1")
		require.ErrorIs(t, err, ErrClosed)
		require.NotErrorIs(t, err, fs.ErrInvalid)
		n.gauges(0, 0, 0)
		n.check()
	})
}

// ADO-08: a library cannot say that an exchange failed. It only closes.
func TestAReplyThatMayStillComeIsNotTheNextBorrowers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for name, c := range map[string]struct {
			library func(nc net.Conn)
			kept    bool
		}{
			"an exchange": {func(nc net.Conn) { askLine(nc, "x") }, true},
			"nothing":     {func(nc net.Conn) {}, true},
			"it wrote, and gave up": {func(nc net.Conn) {
				nc.Write([]byte("slow\n"))
			}, false},
			"an exchange, and half of another": {func(nc net.Conn) {
				askLine(nc, "x")
				fmt.Fprintln(nc, "slow")
			}, false},
			"by ReadFrom": {func(nc net.Conn) { nc.(io.ReaderFrom).ReadFrom(strings.NewReader("slow\n")) }, false},
			"it wrote, and its read timed out": {func(nc net.Conn) {
				nc.SetReadDeadline(time.Now().Add(time.Millisecond))
				fmt.Fprintln(nc, "slow")
				nc.Read(make([]byte, 8))
			}, false},
			"two replies, one read": {func(nc net.Conn) {
				fmt.Fprint(nc, "x\ny\n")
				time.Sleep(time.Minute)
				nc.Read(make([]byte, 4)) // "1 x\n"
			}, false},
			"it closes during a read": {func(nc net.Conn) {
				go nc.Read(make([]byte, 8))
				synctest.Wait()
			}, false},
			"it goes on after the end": {func(nc net.Conn) {
				askLine(nc, "x")
				nc.Close()
				_, err := nc.Write([]byte("z\n"))
				require.ErrorIs(t, err, net.ErrClosed)
				_, err = nc.Read(make([]byte, 1))
				require.ErrorIs(t, err, net.ErrClosed)
			}, true},
		} {
			n := newTestnet(t)
			n.open(Config{Dialers: map[Transport]DialFunc{TCP: n.dial}})
			n.Host("h").Serve(func(c *faultnet.Conn) {
				in := bufio.NewScanner(c)
				for i := 1; in.Scan(); i++ {
					if in.Text() == "slow" {
						time.Sleep(time.Second)
					}
					fmt.Fprintf(c, "%d %s\n", i, in.Text())
				}
			})
			nc, err := n.p.LeaseContext(bg, "tcp", "h:1")
			require.NoError(t, err)
			c.library(nc)
			nc.Close()
			require.ErrorIs(t, nc.Close(), net.ErrClosed)
			synctest.Wait()
			nc, err = n.p.LeaseContext(bg, "tcp", "h:1")
			require.NoError(t, err)
			answer, err := askLine(nc, "mine")
			require.NoError(t, err)
			require.Contains(t, answer, " mine", name)
			require.Equal(t, c.kept, n.p.Stats().Dials == 1, name)
			require.NoError(t, nc.Close())
			n.check()
			require.NoError(t, n.p.Close())
		}
	})
}

// ADO-08: the raw socket is no way around.
func TestARawWriteIsAWrite(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	nc, err := p.LeaseContext(t.Context(), "tcp", n.addr.HostPort())
	require.NoError(t, err)
	rc, err := nc.(*dialedLease).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Control(func(uintptr) {}), "as a library does that looks at its socket")
	require.NoError(t, nc.Close())
	require.Equal(t, 1, settled(t, p).Idle)
	nc, err = p.LeaseContext(t.Context(), "tcp", n.addr.HostPort())
	require.NoError(t, err)
	rc, err = nc.(*dialedLease).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Write(func(uintptr) bool { return true }))
	require.NoError(t, nc.Close())
	require.Zero(t, settled(t, p).Open)
}

// ADO-08: a library that drops its connection loses no slot, and the report names the caller of
// the dial function.
func TestADialedLeaseThatIsDroppedIsFound(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	for name, dial := range map[string]func(p *Pool) func(context.Context, string, string) (net.Conn, error){
		"LeaseContext": func(p *Pool) func(context.Context, string, string) (net.Conn, error) { return p.LeaseContext },
		"LeaseDialer": func(p *Pool) func(context.Context, string, string) (net.Conn, error) {
			return p.LeaseDialer(Addr{Transport: TCP})
		},
	} {
		leaks := make(chan HeldInfo, 1)
		p := n.pool(t, func(c *Config) { c.Trace = &Trace{Leaked: func(i HeldInfo) { leaks <- i }} })
		func() {
			_, err := dial(p)(t.Context(), "tcp", n.addr.HostPort())
			require.NoError(t, err)
		}()
		soon(t, "the slot is free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
		require.Contains(t, inTime(t, leaks).Place, "TestADialedLeaseThatIsDroppedIsFound", name)
	}
}

// ADO-08: the ctx bounds the wait, and the error is that of a dialer.
func TestALeaseInTheShapeOfADialWaitsLikeALease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 1, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		n.Host("h").Serve(echoLines)
		first, err := n.p.LeaseContext(bg, "tcp", "h:1")
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		_, err = n.p.LeaseContext(ctx, "tcp", "h:1")
		var op *net.OpError
		require.ErrorAs(t, err, &op)
		require.Equal(t, "dial", op.Op)
		require.Equal(t, "h:1", op.Addr.String())
		require.True(t, op.Timeout())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		var pe *Error
		require.True(t, errors.As(err, &pe))
		require.Equal(t, StageWait, pe.Stage)
		require.NoError(t, first.Close())
	})
}
