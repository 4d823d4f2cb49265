package connpool

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// option asks the kernel about the socket of a loan.
func option(t *testing.T, c Conn, level, opt int) (v int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, opt) }))
	require.NoError(t, err)
	return v
}

// BETA-11
func TestQualityOfServiceIsPartOfTheAddressAndOnTheSocket(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		ipv6, unixSocket := n.name == "tcp6", n.addr.Transport == Unix
		tos := func(c Conn) int {
			if ipv6 {
				return option(t, c, unix.IPPROTO_IPV6, unix.IPV6_TCLASS)
			}
			return option(t, c, unix.IPPROTO_IP, unix.IP_TOS)
		}
		tcp := func(opt int) func(Conn) int {
			return func(c Conn) int { return option(t, c, unix.IPPROTO_TCP, opt) }
		}
		socket := func(opt int) func(Conn) int {
			return func(c Conn) int { return option(t, c, unix.SOL_SOCKET, opt) }
		}
		p := n.pool(t, nil)
		plain := loan(t, p, n.addr)
		for _, c := range []struct {
			qos  QoS
			ask  func(Conn) int
			want int
		}{
			{QoS{DSCP: 46}, tos, 46 << 2},
			{QoS{DSCP: 10}, tos, 10 << 2},
			{QoS{Delay: true}, tcp(unix.TCP_NODELAY), 0},
			{QoS{KeepAlive: 42 * time.Second}, tcp(unix.TCP_KEEPIDLE), 42},
			{QoS{KeepAlive: 43 * time.Second}, tcp(unix.TCP_KEEPINTVL), 43},
			{QoS{KeepAlive: -1}, socket(unix.SO_KEEPALIVE), 0},
			{QoS{UserTimeout: 7 * time.Second}, tcp(unix.TCP_USER_TIMEOUT), 7000},
			{QoS{SendBuffer: 16 << 10}, socket(unix.SO_SNDBUF), 32 << 10}, // the kernel doubles both
			{QoS{RecvBuffer: 24 << 10}, socket(unix.SO_RCVBUF), 48 << 10},
		} {
			if unixSocket && c.qos.SendBuffer+c.qos.RecvBuffer == 0 {
				continue
			}
			a := n.addr
			a.QoS = c.qos
			special := loan(t, p, a)
			require.NotEqual(t, plain.serial, special.serial, "%+v", c.qos)
			require.NoError(t, p.With(t.Context(), a, func(h Conn) error {
				require.Equal(t, c.want, c.ask(h), "%+v", c.qos)
				return nil
			}))
			require.NoError(t, p.With(t.Context(), n.addr, func(h Conn) error {
				require.NotEqual(t, c.want, c.ask(h), "%+v reached a socket that has none", c.qos)
				return nil
			}))
			require.Equal(t, plain.serial, loan(t, p, n.addr).serial)
			require.Equal(t, special.serial, loan(t, p, a).serial)
		}
	})
}
