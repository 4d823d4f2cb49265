package faultnet

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// eachNetwork runs f on every network that this machine has.
func eachNetwork(t *testing.T, f func(t *testing.T, network string)) {
	for _, network := range []string{"tcp", "tcp6", "tls", "unix", "unix-abstract"} {
		t.Run(network, func(t *testing.T) {
			switch {
			case network == "unix-abstract" && runtime.GOOS != "linux":
				t.Skip("abstract Unix sockets exist on Linux only")
			case network == "tcp6":
				ln, err := net.Listen("tcp6", "[::1]:0")
				if err != nil {
					t.Skip("no IPv6 on loopback here: ", err)
				}
				ln.Close()
			}
			f(t, network)
		})
	}
}

func start(t *testing.T, o Options) *Server {
	t.Helper()
	s, err := Start(o)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	return s
}

// client is a connection to a server that serves Tokens.
type client struct {
	net.Conn
	r *bufio.Reader
}

func tryConnect(s *Server) (*client, error) {
	nc, err := net.Dial(s.Addr().Network(), s.Addr().String())
	if err != nil {
		return nil, err
	}
	if config := s.ClientTLS(); config != nil {
		config.ServerName = "server.test"
		nc = tls.Client(nc, config)
	}
	nc.SetDeadline(time.Now().Add(20 * time.Second)) // a test that hangs must show where
	return &client{nc, bufio.NewReader(nc)}, nil
}

func connect(t *testing.T, s *Server) *client {
	t.Helper()
	c, err := tryConnect(s)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func (c *client) ask(token string) (reply string, err error) {
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return "", err
	}
	return c.r.ReadString('\n')
}

func (c *client) exchange(t *testing.T, token, want string) {
	t.Helper()
	reply, err := c.ask(token)
	require.NoError(t, err)
	require.Equal(t, want+"\n", reply)
}

// settleDown waits for something that the server learns from the network.
func settleDown(t *testing.T, what string, done func() bool) {
	t.Helper()
	require.Eventually(t, done, time.Minute, time.Millisecond, what)
}

func TestTokensTellsConnectionAndRequest(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network, Record: true})
		a := connect(t, s)
		a.exchange(t, "x", "1 1 x")
		b := connect(t, s)
		b.exchange(t, "y", "2 1 y")
		a.exchange(t, "", "1 2 ")
		_, err := io.WriteString(a, "RESET\n")
		require.NoError(t, err)
		a.exchange(t, "z z", "1 3 z z")

		assert.Equal(t, []string{"x", "", "RESET", "z z"}, s.Lines(1))
		assert.Equal(t, []string{"y"}, s.Lines(2))
		assert.Equal(t, 2, s.Accepts())
		assert.Equal(t, 2, s.Open())
		assert.Equal(t, 2, s.Peak())
		assert.Zero(t, s.Overlaps())
		for i, p := range s.Peers() {
			assert.Equal(t, i+1, p.Serial())
		}
		if network == "tls" {
			assert.Equal(t, 2, s.Handshakes())
		} else {
			assert.Zero(t, s.Handshakes())
			assert.Nil(t, s.ClientTLS())
		}

		a.Close()
		settleDown(t, "the close is noticed", func() bool { return s.Open() == 1 })
		assert.Equal(t, 2, s.Peers()[0].Serial())
		assert.Equal(t, 2, s.Peak())
	})
}

func TestHostAndPortLeadToTheServer(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network})
		var nc net.Conn
		var err error
		if strings.HasPrefix(network, "unix") {
			assert.Zero(t, s.Port())
			nc, err = net.Dial("unix", s.Host())
		} else {
			nc, err = net.Dial("tcp", net.JoinHostPort(s.Host(), strconv.Itoa(int(s.Port()))))
		}
		require.NoError(t, err)
		require.NoError(t, nc.Close())
	})
}

func TestRestartKeepsTheAddressAndTheCounts(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network})
		addr := s.Addr()
		c := connect(t, s)
		c.exchange(t, "x", "1 1 x")
		for serial := 2; serial <= 4; serial++ {
			s.Stop()
			s.Stop()
			assert.Zero(t, s.Open())
			_, err := c.ask("y")
			require.Error(t, err)
			_, err = tryConnect(s)
			require.Error(t, err)

			require.NoError(t, s.Restart())
			assert.Equal(t, addr, s.Addr())
			c = connect(t, s)
			c.exchange(t, "x", fmt.Sprintf("%d 1 x", serial))
		}
		require.NoError(t, s.Restart(), "without a Stop before")
		assert.Zero(t, s.Open())
		s.Close()
		s.Close()
		assert.ErrorIs(t, s.Restart(), net.ErrClosed)
	})
}

// tap counts the bytes below TLS: crypto/tls itself reports io.EOF whether or not a
// close_notify came first.
type tap struct {
	net.Conn
	bytes int
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.bytes += n
	return n, err
}

func TestFINSaysFarewellInTLSAndStopDoesNot(t *testing.T) {
	for name, tc := range map[string]struct {
		end      func(*Server)
		farewell bool
	}{
		"FIN":       {func(s *Server) { s.CutIdle(1, FIN) }, true},
		"HalfClose": {func(s *Server) { s.CutIdle(1, HalfClose) }, true},
		"Stop":      {(*Server).Stop, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, Options{Network: "tls"})
			nc, err := net.Dial("tcp", s.Addr().String())
			require.NoError(t, err)
			defer nc.Close()
			below := &tap{Conn: nc}
			config := s.ClientTLS()
			config.ServerName = "localhost"
			above := tls.Client(below, config)
			c := &client{above, bufio.NewReader(above)}
			c.exchange(t, "x", "1 1 x")
			below.bytes = 0
			tc.end(s)
			_, err = c.Read(make([]byte, 1))
			assert.Equal(t, io.EOF, err)
			assert.Equal(t, tc.farewell, below.bytes > 0)
		})
	}
}

func TestCutsLookToTheClientAsNamed(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		for _, how := range []Cut{FIN, RST, HalfClose} {
			t.Run(how.String(), func(t *testing.T) {
				s := start(t, Options{Network: network, Record: true})
				c := connect(t, s)
				c.exchange(t, "x", "1 1 x")
				require.Equal(t, 0, s.CutBusy(-1, how))
				require.Equal(t, 0, s.CutIdle(0, how))
				require.Equal(t, 1, s.CutIdle(-1, how))

				_, err := c.Read(make([]byte, 1))
				if how == RST && !strings.HasPrefix(network, "unix") {
					assert.True(t, isReset(err), "%v", err)
				} else {
					assert.Equal(t, io.EOF, err, "and under TLS a clean one")
				}
				if how != HalfClose {
					assert.Zero(t, s.Open())
					assert.Zero(t, s.CutIdle(-1, how))
					return
				}
				assert.Equal(t, 1, s.Open())
				assert.Zero(t, s.CutIdle(-1, HalfClose), "it is already")
				assert.Zero(t, s.PushIdle(-1, []byte("x")))
				_, err = io.WriteString(c, "RESET\n")
				require.NoError(t, err)
				settleDown(t, "the server goes on reading", func() bool { return len(s.Lines(1)) == 2 })
				assert.Equal(t, 1, s.CutIdle(-1, RST))
			})
		}
	})
}

// Windows has numbers of its own for the errors of its sockets.
func isReset(err error) bool {
	const wsaeconnreset = syscall.Errno(10054)
	return errors.Is(err, syscall.ECONNRESET) || runtime.GOOS == "windows" && errors.Is(err, wsaeconnreset)
}

func TestCutIdleTakesTheOldestAndSparesTheBusy(t *testing.T) {
	held := make(chan struct{})
	s := start(t, Options{Handler: func(p *Peer) {
		if p.Serial() == 2 {
			p.SetBusy(true)
			<-held
			p.SetBusy(false)
		}
		Tokens(p)
	}})
	release := sync.OnceFunc(func() { close(held) })
	t.Cleanup(release) // runs before the server's Close, which waits for the goroutine
	var clients []*client
	for serial := 1; serial <= 4; serial++ {
		c := connect(t, s)
		settleDown(t, "accepted", func() bool { return s.Accepts() == serial })
		if serial != 2 {
			c.exchange(t, "x", fmt.Sprintf("%d 1 x", serial))
		}
		clients = append(clients, c)
	}
	settleDown(t, "the second is busy", func() bool { return s.Peers()[1].Busy() })

	assert.Equal(t, 2, s.CutIdle(2, FIN))
	var left []int
	for _, p := range s.Peers() {
		left = append(left, p.Serial())
	}
	assert.Equal(t, []int{2, 4}, left)
	assert.Equal(t, 1, s.CutIdle(-1, RST))
	release()
	clients[1].exchange(t, "x", "2 1 x")
}

func TestCutBusyEndsAHeldBackReply(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network, ReplyDelay: func(_, seq int) time.Duration {
			if seq == 2 {
				return time.Hour
			}
			return 0
		}})
		idle, busy := connect(t, s), connect(t, s)
		idle.exchange(t, "x", "1 1 x")
		busy.exchange(t, "x", "2 1 x")
		_, err := io.WriteString(busy, "y\n")
		require.NoError(t, err)
		settleDown(t, "the request is read", func() bool { return s.Peers()[1].Busy() })

		assert.Equal(t, 1, s.CutBusy(-1, FIN))
		_, err = busy.r.ReadByte()
		assert.Equal(t, io.EOF, err)
		reply, err := idle.r.Peek(0)
		assert.Empty(t, reply)
		assert.NoError(t, err)
		assert.Equal(t, 1, s.Open())
	})
}

func TestHalfARequestIsBusy(t *testing.T) {
	s := start(t, Options{})
	c := connect(t, s)
	c.exchange(t, "x", "1 1 x")
	_, err := io.WriteString(c, "y")
	require.NoError(t, err)
	settleDown(t, "its first byte counts", func() bool { return s.Peers()[0].Busy() })
	assert.Zero(t, s.CutIdle(-1, FIN))
}

func TestWhoHasReadTheReplyIsIdle(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			s := start(t, Options{Network: network, Chunk: 4})
			for serial := 1; serial <= short.Of(300, 60); serial++ {
				c := connect(t, s)
				c.exchange(t, "token", fmt.Sprintf("%d 1 token", serial))
				require.Equal(t, 1, s.CutIdle(-1, FIN), "connection %d", serial)
				require.NoError(t, c.Close())
			}
		})
	}
}

func TestPushIdleSendsWhatNobodyAskedFor(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network})
		a, b := connect(t, s), connect(t, s)
		a.exchange(t, "x", "1 1 x")
		b.exchange(t, "x", "2 1 x")
		require.Equal(t, 1, s.PushIdle(1, []byte("1 1 stale\n")))
		a.exchange(t, "y", "1 1 stale")
		b.exchange(t, "y", "2 2 y")
	})
}

func TestOverlapsCountsWhoDoesNotWaitForTheReply(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := start(t, Options{Network: network, ReplyDelay: func(_, seq int) time.Duration {
			return 20 * time.Millisecond
		}})
		c := connect(t, s)
		c.exchange(t, "x", "1 1 x")
		require.Zero(t, s.Overlaps())
		_, err := io.WriteString(c, "a\nb\nc\n")
		require.NoError(t, err)
		for _, want := range []string{"1 2 a\n", "1 3 b\n", "1 4 c\n"} {
			reply, err := c.r.ReadString('\n')
			require.NoError(t, err)
			assert.Equal(t, want, reply)
		}
		assert.Equal(t, 2, s.Overlaps())
	})
}

func TestOverlapsNeverCountsWhoWaitsForTheReply(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			s := start(t, Options{Network: network, Chunk: 3})
			var clients tasks.Group
			for range 4 {
				c := connect(t, s)
				clients.Go(func() {
					for i := range 500 {
						if _, err := c.ask(strconv.Itoa(i)); !assert.NoError(t, err) {
							return
						}
						if i%7 == 0 {
							io.WriteString(c, "RESET\n")
						}
					}
				})
			}
			clients.Wait()
			assert.Zero(t, s.Overlaps())
		})
	}
}

func TestAnOverlongLineEndsTheConnection(t *testing.T) {
	s := start(t, Options{})
	longest := strings.Repeat("x", maxLine-1)
	connect(t, s).exchange(t, longest, "1 1 "+longest)
	_, err := connect(t, s).ask(longest + "x")
	assert.Error(t, err)
}

func TestAClientThatEndsItsDirectionIsStillAnswered(t *testing.T) {
	s := start(t, Options{ReplyDelay: func(int, int) time.Duration { return 10 * time.Millisecond }})
	c := connect(t, s)
	_, err := io.WriteString(c, "x\n")
	require.NoError(t, err)
	require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
	b, err := io.ReadAll(c.r)
	require.NoError(t, err)
	assert.Equal(t, "1 1 x\n", string(b))
	settleDown(t, "and then the server closes too", func() bool { return s.Open() == 0 })
}

func TestOptionsTLSIsHonoured(t *testing.T) {
	ca, other := NewCA(), NewCA()
	given := &tls.Config{
		Certificates: []tls.Certificate{ca.Server("server.test")},
		MinVersion:   tls.VersionTLS12,
		MaxVersion:   tls.VersionTLS12,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca.Pool(),
	}
	s := start(t, Options{Network: "tls", TLS: given, Handler: func(p *Peer) {
		state := p.Conn.(*tls.Conn).ConnectionState()
		io.WriteString(p, state.PeerCertificates[0].Subject.CommonName)
	}})
	for _, tc := range []struct {
		issuer *CA
		fails  bool
	}{{ca, false}, {other, true}} {
		config := s.ClientTLS()
		config.ServerName = "server.test"
		config.Certificates = []tls.Certificate{tc.issuer.Client("alice")}
		c, err := tls.Dial("tcp", s.Addr().String(), config)
		if tc.fails {
			assert.Error(t, err)
			continue
		}
		require.NoError(t, err)
		b, err := io.ReadAll(c)
		c.Close()
		require.NoError(t, err)
		assert.Equal(t, "alice", string(b))
		assert.Equal(t, uint16(tls.VersionTLS12), c.ConnectionState().Version)
	}
	assert.Equal(t, 1, s.Handshakes(), "a refused client completes none")

	s = start(t, Options{Network: "tls", TLS: &tls.Config{MaxVersion: tls.VersionTLS12}})
	c := connect(t, s)
	c.exchange(t, "own certificate", "1 1 own certificate")
	assert.Equal(t, uint16(tls.VersionTLS12), c.Conn.(*tls.Conn).ConnectionState().Version)
}

func TestTheOwnCertificateHasItsNames(t *testing.T) {
	s := start(t, Options{Network: "tls"})
	for _, name := range []string{"127.0.0.1", "::1", "localhost", "server.test", "other.test"} {
		config := s.ClientTLS()
		config.ServerName = name
		c, err := tls.Dial("tcp", s.Addr().String(), config)
		if name == "other.test" {
			assert.Error(t, err)
			continue
		}
		require.NoError(t, err)
		c.Close()
	}
}

func TestAHandshakeThatNeverComesIsBusyAndEndsWithTheServer(t *testing.T) {
	s := start(t, Options{Network: "tls"})
	nc, err := net.Dial("tcp", s.Addr().String())
	require.NoError(t, err)
	defer nc.Close()
	settleDown(t, "accepted", func() bool { return s.Open() == 1 })
	assert.True(t, s.Peers()[0].Busy())
	s.Close()
	_, err = nc.Read(make([]byte, 1))
	assert.Error(t, err)
}

func TestAConnectionAcceptedWhileStoppingIsClosed(t *testing.T) {
	s := start(t, Options{})
	s.mu.Lock()
	listener := s.listener
	s.mu.Unlock()
	s.Stop()
	there, here := net.Pipe()
	s.admit(listener, here) // as accept does, had it been slower than Stop
	_, err := there.Read(make([]byte, 1))
	assert.Equal(t, io.EOF, err)
	assert.Zero(t, s.Open())
	assert.Zero(t, s.Accepts())
}

func TestCloseWaitsForEveryPeer(t *testing.T) {
	returned := 0 // no lock: Close's wait is what orders the accesses
	s := start(t, Options{Handler: func(p *Peer) {
		io.Copy(io.Discard, p)
		time.Sleep(20 * time.Millisecond) // slow to notice
		returned++
	}})
	connect(t, s)
	settleDown(t, "accepted", func() bool { return s.Open() == 1 })
	s.Close()
	assert.Equal(t, 1, returned)
}

func TestUnixSocketFilesAreRemoved(t *testing.T) {
	s := start(t, Options{Network: "unix"})
	dir := filepath.Dir(s.Host())
	require.FileExists(t, s.Host())
	s.Stop()
	require.NoFileExists(t, s.Host())
	require.NoError(t, s.Restart())
	require.FileExists(t, s.Host())
	s.Close()
	assert.NoDirExists(t, dir)

	dir, err := os.MkdirTemp("", "fn") // t.TempDir may be longer than a socket's path can be
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	a, b := start(t, Options{Network: "unix", Dir: dir}), start(t, Options{Network: "unix", Dir: dir})
	require.NotEqual(t, a.Host(), b.Host())
	a.Close()
	b.Close()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err, "a directory that was given stays")
	assert.Empty(t, entries)
}

func TestStartFailsCleanly(t *testing.T) {
	_, err := Start(Options{Network: "udp"})
	assert.ErrorContains(t, err, `"udp"`)
	_, err = Start(Options{Network: "unix", Dir: filepath.Join(t.TempDir(), "missing")})
	assert.Error(t, err)
	_, err = Start(Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{{1}}}}}})
	assert.ErrorContains(t, err, "Options.TLS")
}

func TestCloseLeavesNoDescriptor(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("counts the entries of /proc/self/fd")
	}
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(entries)
	}
	start(t, Options{}).Close() // opens what the runtime opens on first use
	eachNetwork(t, func(t *testing.T, network string) {
		before := descriptors()
		s := start(t, Options{Network: network})
		var clients []*client
		for i := range 12 {
			c := connect(t, s)
			c.exchange(t, "x", fmt.Sprintf("%d 1 x", i+1))
			clients = append(clients, c)
		}
		for _, how := range []Cut{FIN, RST, HalfClose} {
			require.Equal(t, 2, s.CutIdle(2, how))
		}
		require.NoError(t, s.Restart())
		connect(t, s).exchange(t, "x", "13 1 x")
		s.Close()
		for _, c := range clients {
			c.Close()
		}
		settleDown(t, "only the last client is left", func() bool { return descriptors() <= before+1 })
	})
}

// All faults at once, under the race detector: every token gets its answer or an error,
// never someone else's answer.
func TestFaultsUnderTraffic(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			s := start(t, Options{Network: network, Record: true, ReplyDelay: func(_, seq int) time.Duration {
				return time.Duration(seq%3) * 100 * time.Microsecond
			}})
			var clients, faults tasks.Group
			done := make(chan struct{})
			for id := range 4 {
				clients.Go(func() {
					for round := range 30 {
						c, err := tryConnect(s)
						if err != nil {
							continue // the server is stopped for the moment
						}
						for i := range 20 {
							token := fmt.Sprintf("%d-%d-%d", id, round, i)
							reply, err := c.ask(token)
							if err != nil || !strings.HasSuffix(reply, " "+token+"\n") {
								assert.True(t, err != nil || reply == "unasked\n", "%q for %q", reply, token)
								break
							}
						}
						c.Close()
					}
				})
			}
			faults.Go(func() {
				tick := time.NewTicker(2 * time.Millisecond)
				defer tick.Stop()
				for i := 0; ; i++ {
					select {
					case <-done:
						return
					case <-tick.C:
					}
					switch i % 8 {
					case 0, 1, 2:
						s.CutIdle(1, Cut(i%8))
					case 3, 4, 5:
						s.CutBusy(1, Cut(i%8-3))
					case 6:
						s.PushIdle(1, []byte("unasked\n"))
					case 7:
						if i%24 == 7 {
							assert.NoError(t, s.Restart())
						}
					}
				}
			})
			clients.Wait()
			close(done)
			faults.Wait()
			assert.Zero(t, s.Overlaps())
		})
	}
}
