package main

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

const whatItSays = "colour: blue, <nil>; asked the server 1 time\ncolour: green, after somebody else has changed it\nnone: no such key: connpool:none\n"

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, whatItSays, out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

func TestWithARealRedis(t *testing.T) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("there is no redis-server on this machine")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	cmd := exec.CommandContext(t.Context(), path, "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", t.TempDir())
	require.NoError(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	require.Eventually(t, func() bool {
		nc, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			nc.Close()
		}
		return err == nil
	}, time.Minute, 10*time.Millisecond)
	var out strings.Builder
	require.NoError(t, run(&out, []string{"tcp://127.0.0.1:" + port}))
	require.Equal(t, whatItSays, out.String())
}

func clientOn(t *testing.T, s *server) (*client, *loopback.Server) {
	t.Helper()
	l, err := loopback.Start(s.serve)
	require.NoError(t, err)
	t.Cleanup(l.Close)
	c, err := newClient(l.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { c.pool.Close() })
	return c, l
}

// Readers and writers use the same keys over the same few connections, with pushes at
// every moment: each reply belongs to its request, and no value is read that was never
// written.
func TestPushesNeverBecomeReplies(t *testing.T) {
	c, _ := clientOn(t, newServer())
	for key := range 4 {
		require.NoError(t, c.set(t.Context(), fmt.Sprint("key", key), fmt.Sprintf("%d:0", key)))
	}
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for i := range 200 {
				key := (worker + i) % 4
				if worker%4 == 0 {
					if err := c.set(t.Context(), fmt.Sprint("key", key), fmt.Sprintf("%d:%d", key, i)); err != nil {
						t.Error(err)
					}
					continue
				}
				value, err := c.get(t.Context(), fmt.Sprint("key", key))
				if err != nil || !strings.HasPrefix(value, fmt.Sprint(key, ":")) {
					t.Errorf("key %d: %q, %v", key, value, err)
				}
			}
		})
	}
	all.Wait()
	for key := range 4 {
		require.NoError(t, c.set(t.Context(), fmt.Sprint("key", key), "last"))
	}
	require.Eventually(t, func() bool {
		for key := range 4 {
			if value, err := c.get(t.Context(), fmt.Sprint("key", key)); err != nil || value != "last" {
				return false
			}
		}
		return true
	}, time.Minute, time.Millisecond, "what was cached is not stale for ever")
}

// When the connection that tracks a key ends, nobody would learn of a change.
func TestCacheForgetsWithTheConnectionThatTracks(t *testing.T) {
	s := newServer()
	c, _ := clientOn(t, s)
	require.NoError(t, c.set(t.Context(), "a", "1"))
	_, err := c.get(t.Context(), "a")
	require.NoError(t, err)
	_, cached := c.cache.look("a")
	require.True(t, cached)
	require.Eventually(t, func() bool {
		c.pool.CloseIdle() // more than once: a connection that is being examined is not idle
		_, cached := c.cache.look("a")
		return !cached
	}, time.Minute, time.Millisecond)
}

// A push to an idle connection is read; the connection stays, and no reply is lost.
func TestPushWhileIdleIsHeard(t *testing.T) {
	s := newServer()
	mine, l := clientOn(t, s)
	theirs, err := newClient(l.Addr())
	require.NoError(t, err)
	defer theirs.pool.Close()
	require.NoError(t, theirs.set(t.Context(), "a", "1"))
	_, err = mine.get(t.Context(), "a")
	require.NoError(t, err)
	require.NoError(t, theirs.set(t.Context(), "a", "2")) // pushes to mine
	require.Eventually(t, func() bool {                   // a get during the Push would open another connection
		st := mine.pool.Stats()
		return st.Pushes == 1 && st.Idle == 1
	}, time.Minute, time.Millisecond)
	value, err := mine.get(t.Context(), "a")
	require.NoError(t, err)
	require.Equal(t, "2", value)
	st := mine.pool.Stats()
	require.EqualValues(t, 1, st.Pushes)
	require.Empty(t, st.Closed)
	require.EqualValues(t, 1, st.Dials)
}

func FuzzValue(f *testing.F) {
	f.Add([]byte(">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\na\r\n"))
	f.Add([]byte("%1\r\n+a\r\n:1\r\n"))
	f.Add([]byte("*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &codec{Reader: bufio.NewReader(bytes.NewReader(b)), cache: newCache()}
		for {
			v, err := c.value(maxDepth)
			if err != nil {
				return
			}
			if p, ok := v.(push); ok {
				c.invalidate(p)
			}
		}
	})
}
