package main

import (
	"bufio"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, `colour: "blue", <nil>
shape of water: "shape of water" is no key: 1 to 250 bytes without spaces
no-such-key: no such key: no-such-key
connections opened: 1
`, out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

// Of many callers, each gets its own value, whatever the others do.
func share(t *testing.T, m *cache) {
	var all sync.WaitGroup
	for worker := range 16 {
		all.Go(func() {
			for i := range 50 {
				key, value := fmt.Sprintf("key-%d", worker), strings.Repeat("x", i)+fmt.Sprint(worker)
				if err := m.set(t.Context(), key, value); err != nil {
					t.Error(err)
				}
				got, err := m.get(t.Context(), key)
				if err != nil || got != value {
					t.Errorf("%s: %q, %v", key, got, err)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, m.pool.Stats().PeakOpen, 8)
	require.Less(t, m.pool.Stats().Dials, uint64(40), "of 1,600 requests")
	require.Zero(t, m.pool.Stats().InUse)
}

func TestCallersShareConnectionsAndNotAnswers(t *testing.T) {
	s, err := loopback.Start(newStore().serve)
	require.NoError(t, err)
	defer s.Close()
	m, err := newCache(s.Addr())
	require.NoError(t, err)
	defer m.pool.Close()
	share(t, m)
}

// A caller that panics in the middle of an answer leaves half of it unread.
func TestPanicInAnAnswerHarmsNobodyElse(t *testing.T) {
	s, err := loopback.Start(newStore().serve)
	require.NoError(t, err)
	defer s.Close()
	m, err := newCache(s.Addr())
	require.NoError(t, err)
	defer m.pool.Close()
	require.NoError(t, m.set(t.Context(), "a", "secret of a"))
	require.NoError(t, m.set(t.Context(), "b", "value of b"))

	require.PanicsWithValue(t, "half way", func() {
		m.pool.With(t.Context(), m.addr, func(c connpool.Conn) error {
			k := connpool.State[*codec](c)
			fmt.Fprintf(k.w, "get a\r\n")
			k.line()
			panic("half way")
		})
	})
	got, err := m.get(t.Context(), "b")
	require.NoError(t, err)
	require.Equal(t, "value of b", got)
	require.Equal(t, 2, s.Accepted(), "the connection of the panic is gone")
}

func TestWithARealMemcached(t *testing.T) {
	path, err := exec.LookPath("memcached")
	if err != nil {
		t.Skip("there is no memcached on this machine")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	cmd := exec.CommandContext(t.Context(), path, "-u", "nobody", "-l", "127.0.0.1", "-p", port, "-U", "0")
	require.NoError(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	m, err := newCache(connpool.MustParseAddr("tcp://127.0.0.1:" + port))
	require.NoError(t, err)
	defer m.pool.Close()
	require.Eventually(t, func() bool { return m.set(t.Context(), "k", "v") == nil }, time.Minute, 10*time.Millisecond)
	dials := m.pool.Stats().Dials
	_, err = m.get(t.Context(), "none")
	require.ErrorIs(t, err, errMiss)
	require.Equal(t, dials, m.pool.Stats().Dials, "a miss costs no connection")
	require.NoError(t, m.pool.With(t.Context(), m.addr, func(c connpool.Conn) error { return connpool.State[*codec](c).ping() }))
}

// TRY-34: a server's error about itself is a whole answer, and no reason to close a
// connection at the moment when the server has the fewest resources.
func TestAServersErrorKeepsTheConnection(t *testing.T) {
	s, err := loopback.Start(func(nc net.Conn) {
		in := bufio.NewReader(nc)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			if strings.HasPrefix(line, "set") {
				in.ReadString('\n')
			}
			fmt.Fprint(nc, "SERVER_ERROR out of memory\r\n")
		}
	})
	require.NoError(t, err)
	defer s.Close()
	m, err := newCache(s.Addr())
	require.NoError(t, err)
	defer m.pool.Close()
	for range 5 {
		_, err := m.get(t.Context(), "k")
		require.ErrorContains(t, err, "SERVER_ERROR out of memory")
		require.ErrorContains(t, m.set(t.Context(), "k", "v"), "SERVER_ERROR out of memory")
	}
	require.EqualValues(t, 1, m.pool.Stats().Dials)
}

func TestNonsenseCostsTheConnection(t *testing.T) {
	for _, reply := range []string{"VALUE other 0 1\r\nx\r\nEND\r\n", "VALUE k 0 99999999999\r\n", "VALUE k 0 1\r\nxyEND\r\n", "CLIENT_ERROR bad command line format\r\n", "ERROR\r\n",
		"SERVER_ERROR out of memory\r\nERROR\r\n", "\r\n"} {
		s, err := loopback.Start(func(nc net.Conn) {
			bufio.NewReader(nc).ReadString('\n')
			fmt.Fprint(nc, reply)
			nc.Read(make([]byte, 1))
		})
		require.NoError(t, err)
		m, err := newCache(s.Addr())
		require.NoError(t, err)
		_, err = m.get(t.Context(), "k")
		require.Error(t, err, reply)
		require.Zero(t, m.pool.Stats().Idle, reply)
		m.pool.Close()
		s.Close()
	}
}
