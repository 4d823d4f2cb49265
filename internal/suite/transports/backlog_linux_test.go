package transports

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// shortBacklog listens on a Unix socket that keeps next to nobody waiting.
func shortBacklog(t *testing.T) (net.Listener, connpool.Addr) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	raw, err := ln.(*net.UnixListener).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) }))
	require.NoError(t, err)
	return ln, connpool.Addr{Transport: connpool.Unix, Host: path}
}

// TRY-48
func TestAFullBacklogOfAUnixSocketIsWaitedFor(t *testing.T) {
	patience.NothingLeaks(t)
	ln, addr := shortBacklog(t)
	accept := make(chan struct{})
	var serving tasks.Group
	defer serving.Wait()
	serving.Go(func() {
		<-accept
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { io.Copy(nc, nc); nc.Close() })
		}
	})
	defer ln.Close()
	p, err := pooltest.New(connpool.Config{})
	require.NoError(t, err)
	defer p.Close()
	var borrowers tasks.Group
	const n = 20
	var served tasks.Group // so that no dial becomes surplus, and is given up
	served.Add(n)
	for range n {
		borrowers.Go(func() {
			if err := p.With(context.Background(), addr, func(c connpool.Conn) error {
				served.Done()
				served.Wait()
				return echo(c, "x")
			}); err != nil {
				t.Error(err)
			}
		})
	}
	patience.Soon(t, "all but those in the backlog are on their way", func() bool { return p.Stats().Dialing >= 10 })
	close(accept)
	borrowers.Wait()
	require.Zero(t, p.Stats().DialErrors)
	require.NoError(t, statsOf(p, addr).LastErr)
	pooltest.Check(t, p)
}

// TRY-48: a wait that is in vain names its reason, and is no failure of the peer's.
func TestABacklogThatStaysFullIsAWantOfRoom(t *testing.T) {
	patience.NothingLeaks(t)
	_, addr := shortBacklog(t)
	var d net.Dialer
	var waiting []net.Conn
	defer func() {
		for _, nc := range waiting {
			nc.Close()
		}
	}()
	for {
		nc, err := d.Dial("unix", addr.Host)
		if err != nil {
			require.ErrorIs(t, err, syscall.EAGAIN)
			break
		}
		waiting = append(waiting, nc)
	}
	p, err := pooltest.New(connpool.Config{DialTimeout: 30 * time.Millisecond})
	require.NoError(t, err)
	defer p.Close()
	for range failuresInARow + 1 {
		var pe *connpool.Error
		require.ErrorAs(t, p.With(context.Background(), addr, func(connpool.Conn) error { return nil }), &pe)
		require.Equal(t, connpool.StageDial, pe.Stage, pe)
		require.Equal(t, connpool.KindResource, pe.Kind, pe)
		require.ErrorIs(t, pe, syscall.EAGAIN)
		require.ErrorContains(t, pe, "backlog")
	}
	require.False(t, statsOf(p, addr).BackingOff)

	// So it is for a library's dials.
	_, err = p.DialContext(context.Background(), "unix", addr.Host)
	require.Equal(t, connpool.KindResource, connpool.KindOf(err), err)
	pooltest.Check(t, p)
}

func statsOf(p *connpool.Pool, addr connpool.Addr) connpool.AddrStats {
	for a, st := range p.Addrs() {
		if a == addr {
			return st
		}
	}
	return connpool.AddrStats{}
}

func echo(c net.Conn, text string) error {
	if _, err := c.Write([]byte(text)); err != nil {
		return err
	}
	b := make([]byte, len(text))
	for got := 0; got < len(b); {
		n, err := c.Read(b[got:])
		if err != nil {
			return err
		}
		got += n
	}
	if string(b) != text {
		return fmt.Errorf("sent %q, got %q", text, b)
	}
	return nil
}

// failuresInARow is how many an address backs off after.
const failuresInARow = 3
