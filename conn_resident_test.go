package connpool

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// ADO-01: a client's read that began in Setup has the deadline of the dial. The socket may meet
// that deadline a moment before the ctx of Setup is done; then the dial has failed.
func TestAClientThatMayHaveTimedOutInSetupIsNotLent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var n *testnet
		n = open(t, Config{DialTimeout: time.Second, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			err := nc.SetReadDeadline(time.Time{}) // the deadline of the dial is on the socket from now on
			n.p.clock.Read = func() time.Time { return time.Now().Add(time.Second) }
			return Resident(nc, nil), err
		}})
		require.ErrorIs(t, n.fail(bg, at("a")), context.DeadlineExceeded)
		n.p.clock.Read = time.Now
		n.closed(reasons{ClosedSetupFailed: 1})
	})
}
