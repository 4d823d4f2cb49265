package connpool

import (
	"io"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// shortBacklog listens on a Unix socket that keeps next to nobody waiting.
func shortBacklog(t *testing.T) (net.Listener, Addr) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	raw, err := ln.(*net.UnixListener).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) }))
	require.NoError(t, err)
	return ln, Addr{Transport: Unix, Host: path}
}

// TRY-48
func TestAFullBacklogOfAUnixSocketIsWaitedFor(t *testing.T) {
	nothingLeaks(t)
	ln, addr := shortBacklog(t)
	accept := make(chan struct{})
	var serving sync.WaitGroup
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
	p, err := New(Config{})
	require.NoError(t, err)
	defer p.Close()
	var borrowers sync.WaitGroup
	const n = 20
	var served sync.WaitGroup // so that no dial becomes surplus, and is given up
	served.Add(n)
	for range n {
		borrowers.Go(func() {
			if err := p.With(bg, addr, func(c Conn) error {
				served.Done()
				served.Wait()
				return echo(c, "x")
			}); err != nil {
				t.Error(err)
			}
		})
	}
	soon(t, "all but those in the backlog are on their way", func() bool { return p.Stats().Dialing >= 10 })
	close(accept)
	borrowers.Wait()
	require.Zero(t, p.Stats().DialErrors)
	require.NoError(t, statsOf(p, addr).LastErr)
	p.check(t)
}

// TRY-48: a wait that is in vain names its reason, and is no failure of the peer's.
func TestABacklogThatStaysFullIsAWantOfRoom(t *testing.T) {
	nothingLeaks(t)
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
	p, err := New(Config{DialTimeout: 30 * time.Millisecond})
	require.NoError(t, err)
	defer p.Close()
	for range backoffAfter + 1 {
		var pe *Error
		require.ErrorAs(t, p.With(bg, addr, func(Conn) error { return nil }), &pe)
		require.Equal(t, StageDial, pe.Stage, pe)
		require.Equal(t, KindResource, pe.Kind, pe)
		require.ErrorIs(t, pe, syscall.EAGAIN)
		require.ErrorContains(t, pe, "backlog")
	}
	require.False(t, statsOf(p, addr).BackingOff)

	// So it is for a library's dials.
	_, err = p.DialContext(bg, "unix", addr.Host)
	require.Equal(t, KindResource, KindOf(err), err)
	p.check(t)
}
