package faultnet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// dial connects to the host "a" and gives both ends.
func dial(t *testing.T, m *Mem) (client, server *Conn) {
	t.Helper()
	nc, err := m.Dial(t.Context(), "a")
	require.NoError(t, err)
	client = nc.(*Conn)
	t.Cleanup(func() { client.Close() })
	for _, server := range m.Host("a").Conns() {
		if server.Serial() == client.Serial() {
			return client, server
		}
	}
	t.Fatal("the server's end is not among the open ones")
	return nil, nil
}

func since(start time.Time) time.Duration { return time.Since(start) }

func requireOpError(t *testing.T, err error, op string, target error) {
	t.Helper()
	var oe *net.OpError
	require.ErrorAs(t, err, &oe)
	require.Equal(t, op, oe.Op)
	require.ErrorIs(t, err, target)
	require.Equal(t, errors.Is(target, os.ErrDeadlineExceeded), oe.Timeout())
}

func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	n, err := io.WriteString(c, s)
	require.NoError(t, err)
	require.Equal(t, len(s), n)
}

func read(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, want, string(b))
}

func TestDialTakesTheLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		m.Host("a").SetLatency(3 * time.Second)
		start := time.Now()
		dial(t, m)
		assert.Equal(t, 3*time.Second, since(start))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := m.Dial(ctx, "a")
		var oe *net.OpError
		require.ErrorAs(t, err, &oe)
		assert.True(t, oe.Timeout())
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 4*time.Second, since(start))
		assert.Equal(t, 1, m.Host("a").Accepts())
	})
}

func TestDownRefusesUntilUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		m.Host("a").Down()
		_, err := m.Dial(t.Context(), "a")
		requireOpError(t, err, "dial", syscall.ECONNREFUSED)
		write(t, client, "still there")
		read(t, server, "still there")

		_, err = m.Dial(t.Context(), "b")
		require.NoError(t, err, "the other host")

		m.Host("a").Up()
		dial(t, m)
	})
}

func TestDownMeetsADialOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		m.Host("a").SetLatency(time.Second)
		time.AfterFunc(time.Millisecond, m.Host("a").Down)
		_, err := m.Dial(t.Context(), "a")
		requireOpError(t, err, "dial", syscall.ECONNREFUSED)
	})
}

func TestBlackHoleSwallowsDialsUntilTheirContextIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		m.Host("a").BlackHole(true)
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, func() { m.Host("a").BlackHole(false) })
		time.AfterFunc(time.Hour, cancel)
		_, err := m.Dial(ctx, "a")
		requireOpError(t, err, "dial", context.Canceled)
		assert.Equal(t, time.Hour, since(start))
		dial(t, m)
	})
}

func TestDialWithADoneContextDoesNotArrive(t *testing.T) {
	m := NewMem()
	m.Host("a").FailNext(io.ErrNoProgress)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Dial(ctx, "a")
	requireOpError(t, err, "dial", context.Canceled)
	assert.Zero(t, m.Host("a").Accepts())
	_, err = m.Dial(t.Context(), "a")
	assert.Equal(t, io.ErrNoProgress, err, "the scripted failure is still due")
}

func TestFailNextFailsDialsInOrder(t *testing.T) {
	m := NewMem()
	own := errors.New("own")
	m.Host("a").FailNext(own, nil)
	m.Host("a").FailNext(syscall.EMFILE)
	_, err := m.Dial(t.Context(), "a")
	assert.Equal(t, own, err)
	dial(t, m)
	_, err = m.Dial(t.Context(), "a")
	requireOpError(t, err, "dial", syscall.EMFILE)
	dial(t, m)
	assert.Equal(t, 2, m.Host("a").Accepts())
}

func TestDelayHoldsBytesAndTheEndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		m.Host("a").SetDelay(time.Second)
		start := time.Now()
		write(t, client, "one")
		time.Sleep(100 * time.Millisecond)
		write(t, client, "two")
		time.Sleep(100 * time.Millisecond)
		require.NoError(t, client.Close())
		assert.NoError(t, server.Probe(), "nothing has arrived")

		b := make([]byte, 10)
		n, err := server.Read(b)
		require.NoError(t, err)
		assert.Equal(t, "one", string(b[:n]))
		assert.Equal(t, time.Second, since(start))
		n, err = server.Read(b)
		require.NoError(t, err)
		assert.Equal(t, "two", string(b[:n]))
		assert.Equal(t, 1100*time.Millisecond, since(start))
		assert.NoError(t, server.Probe(), "the end has not arrived")
		_, err = server.Read(b)
		assert.Equal(t, io.EOF, err)
		assert.Equal(t, 1200*time.Millisecond, since(start))
	})
}

func TestALowerDelayDoesNotReorder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		m.Host("a").SetDelay(time.Second)
		write(t, client, "first ")
		m.Host("a").SetDelay(0)
		write(t, client, "second")
		client.Close()
		b, err := io.ReadAll(server)
		require.NoError(t, err)
		assert.Equal(t, "first second", string(b))
	})
}

func TestDripGivesAFewBytesAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		m.Host("a").Drip(3, time.Second)
		start := time.Now()
		write(t, server, "abcdefgh")
		var got []string
		var when []time.Duration
		b := make([]byte, 100)
		for range 3 {
			n, err := client.Read(b)
			require.NoError(t, err)
			got, when = append(got, string(b[:n])), append(when, since(start))
		}
		assert.Equal(t, []string{"abc", "def", "gh"}, got)
		assert.Equal(t, []time.Duration{0, time.Second, 2 * time.Second}, when)

		write(t, client, "abcdef")
		time.Sleep(time.Minute)
		n, err := server.Read(b)
		require.NoError(t, err)
		assert.Equal(t, 3, n, "a late reader gets no more at a time")
		m.Host("a").Drip(0, 0)
		write(t, client, "ghi")
		n, err = server.Read(b)
		require.NoError(t, err)
		assert.Equal(t, 3, n, "nor what came whole behind it")
	})
}

func TestWriteBlocksOnAFullWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		big := bytes.Repeat([]byte("0123456789abcdef"), window/8)
		require.NoError(t, client.SetWriteDeadline(time.Now().Add(time.Second)))
		n, err := client.Write(big)
		requireOpError(t, err, "write", os.ErrDeadlineExceeded)
		assert.Equal(t, window, n)

		require.NoError(t, client.SetWriteDeadline(time.Time{}))
		go func() {
			client.Write(big[n:])
			client.Close()
		}()
		got, err := io.ReadAll(server)
		require.NoError(t, err)
		assert.True(t, bytes.Equal(big, got))
	})
}

func TestConcurrentWritesDoNotMix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		var writers tasks.Group
		for _, letter := range []byte("abc") {
			writers.Go(func() { server.Write(bytes.Repeat([]byte{letter}, 2*window)) })
		}
		go func() { writers.Wait(); server.Close() }()
		got, err := io.ReadAll(client)
		require.NoError(t, err)
		require.Len(t, got, 6*window)
		assert.Len(t, slices.Compact(got), 3)
	})
}

func TestChangingADeadlineWakesBlockedCalls(t *testing.T) {
	for _, tc := range []struct {
		name        string
		first, then time.Duration // from the start; set at the start and after one second; 0: none
		want        time.Duration
	}{
		{"none, then past", 0, -time.Hour, time.Second},
		{"none, then present", 0, time.Second, time.Second},
		{"none, then future", 0, 5 * time.Second, 5 * time.Second},
		{"later", 2 * time.Second, 5 * time.Second, 5 * time.Second},
		{"sooner", 5 * time.Second, 2 * time.Second, 2 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := NewMem()
				client, _ := dial(t, m)
				write(t, client, strings.Repeat("x", window))
				start := time.Now()
				if tc.first != 0 {
					require.NoError(t, client.SetDeadline(start.Add(tc.first)))
				}
				var blocked tasks.Group
				blocked.Go(func() {
					_, err := client.Read(make([]byte, 1))
					assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
					assert.Equal(t, tc.want, since(start))
				})
				blocked.Go(func() {
					_, err := client.Write(make([]byte, 1))
					assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
					assert.Equal(t, tc.want, since(start))
				})
				time.Sleep(time.Second)
				require.NoError(t, client.SetDeadline(start.Add(tc.then)))
				blocked.Wait()
			})
		})
	}
}

// The timer of the old deadline goes off in the same instant; the one of them
// that comes second must not undo the new one.
func TestADeadlineTakenBackAsItExpiresIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		client, server := dial(t, m)
		for range 500 {
			require.NoError(t, client.SetReadDeadline(time.Now().Add(time.Second)))
			time.Sleep(time.Second)
			require.NoError(t, client.SetReadDeadline(time.Time{}))
			synctest.Wait()
			write(t, server, "x")
			read(t, client, "x")
		}
	})
}

func TestAPastDeadlineHidesBytesUntilItIsTakenBack(t *testing.T) {
	m := NewMem()
	client, server := dial(t, m)
	write(t, server, "x")
	require.NoError(t, client.SetReadDeadline(time.Unix(1, 0)))
	_, err := client.Read(make([]byte, 1))
	requireOpError(t, err, "read", os.ErrDeadlineExceeded)
	assert.Equal(t, ErrUnread, client.Probe(), "a probe has no deadline")
	write(t, client, "the other direction has its own")
	require.NoError(t, client.SetReadDeadline(time.Time{}))
	read(t, client, "x")
}

func TestCloseLetsThePeerReadTheRestAndNotWrite(t *testing.T) {
	m := NewMem()
	client, server := dial(t, m)
	write(t, client, "rest")
	require.NoError(t, client.Close())

	_, err := server.Write([]byte("x"))
	requireOpError(t, err, "write", syscall.EPIPE)
	b, err := io.ReadAll(server)
	require.NoError(t, err)
	assert.Equal(t, "rest", string(b))

	b = make([]byte, 1)
	_, err = client.Read(b)
	requireOpError(t, err, "read", net.ErrClosed)
	_, err = client.Write(b)
	requireOpError(t, err, "write", net.ErrClosed)
	requireOpError(t, client.SetDeadline(time.Now()), "set", net.ErrClosed)
	requireOpError(t, client.CloseWrite(), "close", net.ErrClosed)
	requireOpError(t, client.Close(), "close", net.ErrClosed)
	assert.True(t, client.Closed())
	assert.False(t, server.Closed(), "the peer's close is not its own")
	require.NoError(t, server.Close())
}

func TestCloseWriteLeavesTheOtherDirection(t *testing.T) {
	m := NewMem()
	client, server := dial(t, m)
	write(t, client, "request")
	require.NoError(t, client.CloseWrite())
	require.NoError(t, client.CloseWrite(), "twice")
	_, err := client.Write([]byte("x"))
	requireOpError(t, err, "write", syscall.EPIPE)
	b, err := io.ReadAll(server)
	require.NoError(t, err)
	assert.Equal(t, "request", string(b))
	write(t, server, "reply")
	read(t, client, "reply")
	assert.Len(t, m.Host("a").Conns(), 1)
}

func TestResetFailsThePeerAtOnce(t *testing.T) {
	m := NewMem()
	client, server := dial(t, m)
	write(t, server, "lost")
	m.Host("a").SetDelay(time.Hour)
	server.Reset()
	for range 2 {
		b := make([]byte, 1)
		_, err := client.Read(b)
		requireOpError(t, err, "read", syscall.ECONNRESET)
		_, err = client.Write(b)
		requireOpError(t, err, "write", syscall.ECONNRESET)
		requireOpError(t, client.CloseWrite(), "close", syscall.ENOTCONN)
	}
	assert.True(t, server.Closed())
	assert.False(t, client.Closed(), "its owner still has to close it")
	assert.NoError(t, client.Close())
	_, err := server.Read(make([]byte, 1))
	requireOpError(t, err, "read", net.ErrClosed)
}

func TestEveryEndWakesBlockedCalls(t *testing.T) {
	for name, tc := range map[string]struct {
		end         func(client, server *Conn)
		read, write error
	}{
		"own close":     {func(c, _ *Conn) { c.Close() }, net.ErrClosed, net.ErrClosed},
		"own reset":     {func(c, _ *Conn) { c.Reset() }, net.ErrClosed, net.ErrClosed},
		"peer's close":  {func(_, s *Conn) { s.Close() }, io.EOF, syscall.EPIPE},
		"peer's reset":  {func(_, s *Conn) { s.Reset() }, syscall.ECONNRESET, syscall.ECONNRESET},
		"past deadline": {func(c, _ *Conn) { c.SetDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := NewMem()
				client, server := dial(t, m)
				write(t, client, strings.Repeat("x", window))
				var blocked tasks.Group
				blocked.Go(func() {
					_, err := client.Read(make([]byte, 1))
					assert.ErrorIs(t, err, tc.read)
				})
				blocked.Go(func() {
					_, err := client.Write(make([]byte, 1))
					assert.ErrorIs(t, err, tc.write)
				})
				synctest.Wait()
				tc.end(client, server)
				blocked.Wait()
			})
		})
	}
}

func TestProbeTellsWhatAReadWouldMeet(t *testing.T) {
	for name, tc := range map[string]struct {
		script func(client, server *Conn)
		want   error
	}{
		"quiet":                 {func(_, _ *Conn) {}, nil},
		"own bytes unread":      {func(c, _ *Conn) { c.Write([]byte("x")) }, nil},
		"bytes":                 {func(_, s *Conn) { s.Write([]byte("x")) }, ErrUnread},
		"bytes, then closed":    {func(_, s *Conn) { s.Write([]byte("x")); s.Close() }, ErrUnread},
		"closed":                {func(_, s *Conn) { s.Close() }, io.EOF},
		"half closed":           {func(_, s *Conn) { s.CloseWrite() }, io.EOF},
		"reset":                 {func(_, s *Conn) { s.Write([]byte("x")); s.Reset() }, syscall.ECONNRESET},
		"closed by itself":      {func(c, _ *Conn) { c.Close() }, net.ErrClosed},
		"past deadline":         {func(c, _ *Conn) { c.SetDeadline(time.Unix(1, 0)) }, nil},
		"read, then closed":     {func(c, s *Conn) { s.Write([]byte("x")); c.Read(make([]byte, 1)); s.Close() }, io.EOF},
		"half closed by itself": {func(c, _ *Conn) { c.CloseWrite() }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := NewMem()
			client, server := dial(t, m)
			tc.script(client, server)
			assert.ErrorIs(t, client.Probe(), tc.want)
			assert.ErrorIs(t, client.Probe(), tc.want, "it takes nothing")
		})
	}
}

func TestServeRunsOncePerConnectionAndClosesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		m.Host("a").Serve(func(c *Conn) { io.CopyN(c, c, 4) })
		for serial := 1; serial <= 3; serial++ {
			nc, err := m.Dial(t.Context(), "a")
			require.NoError(t, err)
			assert.Equal(t, serial, nc.(*Conn).Serial())
			write(t, nc, "ping")
			read(t, nc, "ping")
			_, err = nc.Read(make([]byte, 1))
			assert.Equal(t, io.EOF, err)
			nc.Close()
		}
		assert.Equal(t, 3, m.Host("a").Accepts())
		assert.Equal(t, 1, m.Host("a").Peak())
	})
}

func TestConnsAreThoseNeitherSideHasEnded(t *testing.T) {
	m := NewMem()
	var clients, servers []*Conn
	for range 5 {
		c, s := dial(t, m)
		clients, servers = append(clients, c), append(servers, s)
	}
	h := m.Host("a")
	require.Equal(t, servers, h.Conns())
	clients[0].Close()
	servers[1].Close()
	clients[2].Reset()
	servers[3].Reset()
	assert.Equal(t, servers[4:], h.Conns())
	c, s := dial(t, m)
	assert.Equal(t, 6, s.Serial())
	assert.Equal(t, s.LocalAddr(), c.RemoteAddr())
	assert.Equal(t, s.RemoteAddr(), c.LocalAddr())
	assert.Equal(t, 5, h.Peak())
	assert.Equal(t, 6, h.Accepts())
}

func TestMemCloseEndsEverythingAndWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMem()
		returned := 0
		m.Host("a").Serve(func(c *Conn) {
			io.Copy(io.Discard, c)
			time.Sleep(time.Minute)
			returned++
		})
		client, _ := dial(t, m)
		m.Close()
		assert.Equal(t, 1, returned)
		_, err := client.Read(make([]byte, 1))
		requireOpError(t, err, "read", syscall.ECONNRESET)
		assert.Empty(t, m.Host("a").Conns())
	})
}

func TestAMemMadeOutsideABubbleWorksInside(t *testing.T) {
	m := NewMem()
	m.Host("a").Serve(func(c *Conn) { io.Copy(c, c) })
	for range 2 {
		synctest.Test(t, func(t *testing.T) {
			client, _ := dial(t, m)
			require.NoError(t, client.SetDeadline(time.Now().Add(time.Hour)))
			write(t, client, "ping")
			read(t, client, "ping")
			m.Close()
		})
	}
}

func TestOneReaderOneWriterAndADeadlineAreOneOwner(t *testing.T) {
	m := NewMem()
	m.Host("a").Serve(func(c *Conn) { io.Copy(c, c) })
	client, _ := dial(t, m)
	var users tasks.Group
	users.Go(func() {
		for range 100 {
			client.Write([]byte("x"))
		}
	})
	users.Go(func() { io.ReadFull(client, make([]byte, 100)) })
	users.Go(func() { client.SetDeadline(time.Now().Add(time.Hour)) })
	users.Wait()
	m.Close()
}

// The claim is about the race detector, whose report ends a process with a
// failure. So the test runs itself in another one.
func TestTwoOwnersAreARace(t *testing.T) {
	const variable = "FAULTNET_TWO_OWNERS"
	uses := map[string]func(*Conn){
		"read":     func(c *Conn) { c.Read(nil) },
		"write":    func(c *Conn) { c.Write(nil) },
		"deadline": func(c *Conn) { c.SetDeadline(time.Time{}) },
		"probe":    func(c *Conn) { c.Probe() },
		"touch":    func(c *Conn) { c.Touch() },
	}
	if name := os.Getenv(variable); name != "" {
		m := NewMem()
		client, _ := dial(t, m)
		var owners tasks.Group
		for range 2 {
			owners.Go(func() { uses[name](client) })
		}
		owners.Wait()
		return
	}
	if !underRaceDetector() {
		t.Skip("needs the race detector: go test -race")
	}
	for name := range uses {
		t.Run(name, func(t *testing.T) {
			again := exec.Command(os.Args[0], "-test.run=^TestTwoOwnersAreARace$")
			again.Env = append(os.Environ(), variable+"="+name)
			out, err := again.CombinedOutput()
			assert.Error(t, err)
			assert.Contains(t, string(out), "DATA RACE")
		})
	}
}

func underRaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
