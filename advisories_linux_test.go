package connpool

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// HAProxy has the type of service and the mark in its key, Chromium sets its
// tag anew whenever it hands a socket out. Here QoS is in the key, and what a
// borrower asked for is what the kernel says of the socket that it got.
func TestHAProxy_TOS_TheLentSocketHasTheQoSThatWasAskedFor(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, true, how.config)
			ask := func(q QoS, level, option, want int) {
				t.Helper()
				addr := s.addr()
				addr.QoS = q
				_, err := tlWith(t, p, addr, func(c Conn) error {
					raw, err := c.SyscallConn()
					if err != nil {
						return err
					}
					if cerr := raw.Control(func(fd uintptr) {
						var got int
						if got, err = syscall.GetsockoptInt(int(fd), level, option); err == nil && got != want {
							err = fmt.Errorf("%+v: option %d is %d instead of %d", q, option, got, want)
						}
					}); cerr != nil {
						return cerr
					}
					return err
				})
				require.NoError(t, err)
			}
			const userTimeout = 18 // TCP_USER_TIMEOUT
			for range 3 {
				ask(QoS{}, syscall.IPPROTO_IP, syscall.IP_TOS, 0)
				ask(QoS{DSCP: 46}, syscall.IPPROTO_IP, syscall.IP_TOS, 46<<2)
				ask(QoS{DSCP: 8}, syscall.IPPROTO_IP, syscall.IP_TOS, 8<<2)
				ask(QoS{}, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
				ask(QoS{Delay: true}, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 0)
				ask(QoS{KeepAlive: 7 * time.Second}, syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 7)
				ask(QoS{KeepAlive: -1}, syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 0)
				ask(QoS{UserTimeout: 1234 * time.Millisecond}, syscall.IPPROTO_TCP, userTimeout, 1234)
				ask(QoS{SendBuffer: 1 << 15}, syscall.SOL_SOCKET, syscall.SO_SNDBUF, 1<<16)
				ask(QoS{RecvBuffer: 1 << 15}, syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1<<16)
			}
			require.EqualValues(t, 9, p.Stats().Dials)
		})
	}
}
