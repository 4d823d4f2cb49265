package transports

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// option asks the kernel about the socket of a loan.
func option(t *testing.T, c connpool.Conn, level, opt int) (v int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, opt) }))
	require.NoError(t, err)
	return v
}

// BETA-11
func TestQualityOfServiceIsPartOfTheAddressAndOnTheSocket(t *testing.T) {
	eachProbed(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		ipv6, unixSocket := n.Name == "tcp6", n.Addr.Transport == connpool.Unix
		tos := func(c connpool.Conn) int {
			if ipv6 {
				return option(t, c, unix.IPPROTO_IPV6, unix.IPV6_TCLASS)
			}
			return option(t, c, unix.IPPROTO_IP, unix.IP_TOS)
		}
		tcp := func(opt int) func(connpool.Conn) int {
			return func(c connpool.Conn) int { return option(t, c, unix.IPPROTO_TCP, opt) }
		}
		socket := func(opt int) func(connpool.Conn) int {
			return func(c connpool.Conn) int { return option(t, c, unix.SOL_SOCKET, opt) }
		}
		p := n.Pool(t, nil)
		plain := pooltest.Loan(t, p, n.Addr)
		for _, c := range []struct {
			qos  connpool.QoS
			ask  func(connpool.Conn) int
			want int
		}{
			{connpool.QoS{DSCP: 46}, tos, 46 << 2},
			{connpool.QoS{DSCP: 10}, tos, 10 << 2},
			{connpool.QoS{Delay: true}, tcp(unix.TCP_NODELAY), 0},
			{connpool.QoS{KeepAlive: 42 * time.Second}, tcp(unix.TCP_KEEPIDLE), 42},
			{connpool.QoS{KeepAlive: 43 * time.Second}, tcp(unix.TCP_KEEPINTVL), 43},
			{connpool.QoS{KeepAlive: -1}, socket(unix.SO_KEEPALIVE), 0},
			{connpool.QoS{UserTimeout: 7 * time.Second}, tcp(unix.TCP_USER_TIMEOUT), 7000},
			{connpool.QoS{SendBuffer: 16 << 10}, socket(unix.SO_SNDBUF), 32 << 10}, // the kernel doubles both
			{connpool.QoS{RecvBuffer: 24 << 10}, socket(unix.SO_RCVBUF), 48 << 10},
		} {
			if unixSocket && c.qos.SendBuffer+c.qos.RecvBuffer == 0 {
				continue
			}
			a := n.Addr
			a.QoS = c.qos
			special := pooltest.Loan(t, p, a)
			require.NotEqual(t, plain.Serial, special.Serial, "%+v", c.qos)
			require.NoError(t, p.With(t.Context(), a, func(h connpool.Conn) error {
				require.Equal(t, c.want, c.ask(h), "%+v", c.qos)
				return nil
			}))
			require.NoError(t, p.With(t.Context(), n.Addr, func(h connpool.Conn) error {
				require.NotEqual(t, c.want, c.ask(h), "%+v reached a socket that has none", c.qos)
				return nil
			}))
			require.Equal(t, plain.Serial, pooltest.Loan(t, p, n.Addr).Serial)
			require.Equal(t, special.Serial, pooltest.Loan(t, p, a).Serial)
		}
	})
}

func eachProbed(t *testing.T, o faultnet.Options, f func(t *testing.T, n *pooltest.SockNet)) {
	for _, name := range pooltest.SockNets {
		if name == "custom" {
			continue
		}
		t.Run(name, func(t *testing.T) { f(t, pooltest.StartSock(t, name, o)) })
	}
}
