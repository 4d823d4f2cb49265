package connpool

import (
	"context"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"

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
