//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package gateway

import (
	"context"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// fifo is a file that opens only when somebody writes to it, which happens at the end of
// the test.
func fifo(t *testing.T, name string) string {
	t.Helper()
	os.Remove(name)
	require.NoError(t, syscall.Mkfifo(name, 0o600))
	t.Cleanup(func() {
		soon(t, "nobody opens it any more", func() bool {
			f, err := os.OpenFile(name, os.O_WRONLY|syscall.O_NONBLOCK, 0)
			if err != nil {
				return true // nobody reads
			}
			f.Close()
			return false
		})
	})
	return name
}

// TRY-09
func TestAFileThatDoesNotOpenHoldsUpNeitherStartNorEnd(t *testing.T) {
	dir := t.TempDir()
	k := writeKeys(t, dir, "k", faultnet.NewCA().Server("127.0.0.1"))
	_, to := serve(t, faultnet.Options{})
	cfg := Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}, ReloadEvery: time.Millisecond}
	g := begin(t, cfg)
	fifo(t, k.cert)
	soon(t, "it is at the file", func() bool {
		g.certs.mu.Lock()
		defer g.certs.mu.Unlock()
		return g.certs.reading != nil && g.certs.reading.at.Load() != nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	reloaded := make(chan error, 1)
	go func() { reloaded <- g.reload(ctx) }()
	cancel()
	require.ErrorIs(t, <-reloaded, context.Canceled)
	g.end()
	require.NoError(t, g.wait(), "the end does not wait for the file")

	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := NewContext(ctx, cfg)
	require.ErrorIs(t, err, context.DeadlineExceeded, "nor does the start when it is told to end")
}

// TRY-09
func TestALockOnTheDirectoryIsWaitedForWithinBounds(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	unlock, err := lockDirectoryOf(t.Context(), filepath.Join(dir, "s"), func(string) {})
	require.NoError(t, err)
	_, to := serve(t, faultnet.Options{})
	g, err := New(Config{Framing: "line", To: to, Listen: "unix:" + filepath.Join(dir, "s")})
	require.NoError(t, err)
	defer g.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	told := make(chan string, 2)
	_, err = lockDirectoryOf(ctx, filepath.Join(dir, "s"), func(dir string) { told <- dir })
	require.ErrorContains(t, err, "somebody holds a lock on the directory")
	require.Equal(t, dir, <-told, "after a second it is said what is waited for")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorContains(t, g.ListenContext(ended), "lock")
	unlock()

	// At the end the file stays, and the next gateway finds that it is stale.
	h := begin(t, Config{Framing: "line", To: to, Listen: "unix:" + filepath.Join(dir, "s"), Drain: 10 * time.Second})
	h.call().token("x")
	unlock, err = lockDirectoryOf(t.Context(), filepath.Join(dir, "s"), func(string) {})
	require.NoError(t, err)
	h.end()
	select {
	case err := <-h.ended:
		require.NoError(t, err)
		h.ended <- err
	case <-time.After(forever):
		t.Fatal("it waits for the lock")
	}
	require.FileExists(t, filepath.Join(dir, "s"))
	unlock()
	next := begin(t, Config{Framing: "line", To: to, Listen: "unix:" + filepath.Join(dir, "s")})
	next.call().token("y")
	next.end()
	require.NoError(t, next.wait())
}

// TRY-30
func TestASocketHasItsModeBeforeAnybodyCanConnect(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(shortDir(t), "s")
	was := bound
	defer func() { bound = was }()
	looked := false
	bound = func(path string) {
		looked = true
		info, err := os.Lstat(path)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o640), info.Mode().Perm())
		_, err = net.Dial("unix", path)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	}
	s, err := listenUnix(t.Context(), path, 0o640, func(string) {})
	require.NoError(t, err)
	require.True(t, looked)
	require.Equal(t, path, s.Addr().String())
	nc, err := net.Dial("unix", path)
	require.NoError(t, err)
	nc.Close()
	require.NoError(t, s.Close())
	require.NoFileExists(t, path)
}

// TRY-30
func TestOnlyItsOwnSocketFileIsRemoved(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	dir := shortDir(t)
	for _, how := range []string{"removed", "renamed", "replaced by a file"} {
		path, status := filepath.Join(dir, "s"), filepath.Join(dir, "t")
		cfg := Config{Framing: "line", To: to, Listen: "unix:" + path, StatusListen: "unix:" + status}
		a := begin(t, cfg)
		for _, p := range []string{path, status} {
			if how == "renamed" {
				require.NoError(t, os.Rename(p, p+".old"))
			} else {
				require.NoError(t, os.Remove(p))
			}
		}
		if how == "replaced by a file" {
			require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
			a.end()
			<-a.ended
			a.ended <- nil
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, "precious", string(content))
			require.NoError(t, os.Remove(path))
			continue
		}
		b := begin(t, cfg)
		a.end()
		select {
		case <-a.ended:
			a.ended <- nil
		case <-time.After(forever):
			t.Fatal("it does not end")
		}
		require.FileExists(t, path)
		require.FileExists(t, status)
		b.call().token(how[:3])
		b.end()
		require.NoError(t, b.wait())
		require.NoFileExists(t, path)
		require.NoFileExists(t, status)
	}
}

// TRY-30
func TestASuccessorStartsWhileItsPredecessorDrains(t *testing.T) {
	arrived, proceed := make(chan bool, 1), make(chan bool)
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		b := make([]byte, 100)
		n, _ := p.Read(b)
		if string(b[:n]) == "slow\n" {
			arrived <- true
			<-proceed
		}
		p.Write(b[:n])
	}})
	dir := shortDir(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	free.Close()
	for _, status := range []string{"unix:" + filepath.Join(dir, "t"), "tcp://" + free.Addr().String()} {
		cfg := Config{Framing: "line", To: to, Listen: "unix:" + filepath.Join(dir, "s"), StatusListen: status}
		a := begin(t, cfg)
		busy := a.call()
		busy.say("slow\n")
		<-arrived
		a.end()
		soon(t, "it drains", func() bool { return a.Status().Drains })
		b := begin(t, cfg)
		c := b.call()
		c.say("quick\n")
		require.Equal(t, "quick", c.hear())
		nc, err := net.Dial(b.StatusAddr().Network(), b.StatusAddr().String())
		require.NoError(t, err)
		nc.Close()
		proceed <- true
		require.Equal(t, "slow", busy.hear(), "and the request under way is answered")
		select {
		case <-a.ended:
			a.ended <- nil
		case <-time.After(forever):
			t.Fatal("it does not end")
		}
		require.FileExists(t, filepath.Join(dir, "s"), "the file is the successor's")
		b.end()
		require.NoError(t, b.wait())
	}
}
