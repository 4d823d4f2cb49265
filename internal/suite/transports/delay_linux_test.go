package transports

import (
	"context"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// TRY-47
func TestASlowTraceClosedDelaysNoDeath(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) {
		c.SweepInterval = -1 // the watcher alone
		c.Trace = &connpool.Trace{Closed: func(connpool.CloseInfo) { <-never }}
	})
	var out []pooltest.Held
	for range 5 {
		out = append(out, pooltest.Hold(t, p, n.Addr))
	}
	for _, h := range out {
		require.NoError(t, h.End(nil))
	}
	require.Equal(t, 5, p.Stats().Idle)
	n.Server.Close()
	patience.Soon(t, "all of them gone", func() bool { return p.Stats().Open == 0 })
}

// TRY-47: a close that lingers waits for the peer to read, in the system call. It
// happens in nobody's path: neither the borrower's, nor that of one who evicts, nor
// the sweep's, nor the watcher's.
func TestASocketThatLingersBlocksNobody(t *testing.T) {
	const linger = 60 * time.Second
	stop := make(chan struct{})
	n := pooltest.StartSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) { <-stop }}) // reads nothing
	dial := func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))))
		if err != nil {
			return nil, err
		}
		tc := nc.(*net.TCPConn)
		tc.SetWriteBuffer(64 << 10)
		return tc, tc.SetLinger(int(linger / time.Second))
	}
	p := n.Pool(t, func(c *connpool.Config) { c.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: dial} })
	fill := func(c connpool.Conn) error { // what is left in the buffers is lingered for
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				return nil
			}
		}
	}
	for name, drop := range map[string]func(){
		"give back": func() { require.NoError(t, p.With(t.Context(), n.Addr, fill)) },
		"Close": func() {
			require.NoError(t, p.With(t.Context(), n.Addr, func(c connpool.Conn) error { fill(c); return c.Close() }))
		},
		"discard": func() {
			require.ErrorIs(t, p.With(t.Context(), n.Addr, func(c connpool.Conn) error { fill(c); return pooltest.ErrBoom }), pooltest.ErrBoom)
		},
	} {
		start := time.Now()
		drop()
		require.Less(t, time.Since(start), linger/2, name)
	}
	close(stop)
}
