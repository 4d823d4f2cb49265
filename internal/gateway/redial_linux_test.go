package gateway

import (
	"context"
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// The address says what the sockets are to be like, whoever dials.
func TestAnIntervalBetweenConnectionsKeepsTheOptionsOfTheAddress(t *testing.T) {
	t.Parallel()
	_, to := serve(t, faultnet.Options{Handler: faultnet.Tokens})
	addr, err := connpool.ParseAddr(to + "?delay=true&keepalive=77s&user-timeout=9s&dscp=10&send-buffer=4608&recv-buffer=2304")
	require.NoError(t, err)
	nc, err := new(redial).dial(context.Background(), addr)
	require.NoError(t, err)
	defer nc.Close()
	raw, err := nc.(*net.TCPConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		for _, o := range []struct{ level, name, want int }{
			{syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 0},
			{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 77},
			{syscall.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 9000},
			{syscall.IPPROTO_IP, syscall.IP_TOS, 10 << 2},
			{syscall.SOL_SOCKET, syscall.SO_SNDBUF, 2 * 4608}, // Linux doubles buffers
			{syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2 * 2304},
		} {
			got, err := syscall.GetsockoptInt(int(fd), o.level, o.name)
			require.NoError(t, err)
			require.Equal(t, o.want, got, "option %d", o.name)
		}
	}))
}
