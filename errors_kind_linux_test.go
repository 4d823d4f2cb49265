package connpool

import (
	"context"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// BETA-X05 (access)
func TestASocketThatMayNotBeOpenedIsAnAccessError(t *testing.T) {
	n := startSock(t, "unix", faultnet.Options{})
	require.NoError(t, os.Chmod(n.srv.Host(), 0))
	p := n.pool(t, func(c *Config) {
		c.Dialers = map[Transport]DialFunc{Unix: func(ctx context.Context, a Addr) (net.Conn, error) {
			// To root every file is open; so this thread, while it dials, is
			// somebody else where files are concerned.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if os.Getuid() == 0 {
				unix.Setfsuid(65534)
				defer unix.Setfsuid(0)
			}
			return dialSocket(ctx, a)
		}}
	})
	err := p.With(t.Context(), n.addr, notRun(t))
	failsWith(t, err, StageDial, KindAccess)
	require.ErrorIs(t, err, syscall.EACCES)
}

// BETA-X05 (address): TCP has no broadcast, and on loopback that needs no
// packet to find out.
func TestAnAddressWithoutARouteIsAnAddressError(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	a := n.addr
	a.Host = "127.255.255.255"
	err := p.With(t.Context(), a, notRun(t))
	failsWith(t, err, StageDial, KindAddress)
	require.ErrorIs(t, err, syscall.ENETUNREACH)
}

// TRY-20, by the kernel itself: the peer's window is shut, so that what was sent
// stays unacknowledged beyond QoS.UserTimeout.
func TestAPeerThatTakesNothingIsGivenUp(t *testing.T) {
	nothingLeaks(t)
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2048) })
	}}
	ln, err := lc.Listen(bg, "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close() // nobody accepts, and nobody reads
	addr := Addr{Transport: TCP, Host: "127.0.0.1", Port: uint16(ln.Addr().(*net.TCPAddr).Port), QoS: QoS{UserTimeout: 300 * time.Millisecond}}
	p, err := New(Config{})
	require.NoError(t, err)
	defer p.Close()
	var inside error
	err = p.With(bg, addr, func(c Conn) error {
		raw, err := c.SyscallConn()
		require.NoError(t, err)
		raw.Write(func(fd uintptr) bool { // as much as the kernel takes
			for b := make([]byte, 64<<10); ; {
				if _, err := unix.Write(int(fd), b); err != nil {
					return true
				}
			}
		})
		c.SetReadDeadline(time.Now().Add(bounded))
		_, inside = c.Read(make([]byte, 1))
		return Keep(inside)
	})
	require.ErrorIs(t, err, syscall.ETIMEDOUT)
	require.Equal(t, KindBroken, KindOf(inside))
	closedSoon(t, p, reasons{ClosedBroken: 1})
}
