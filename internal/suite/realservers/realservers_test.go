//go:build linux

package realservers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// What servers do to idle connections, shown with real ones: each is the
// distribution's, and its client is written by hand over a Conn.

// realKind is one make of server.
type realKind struct {
	name     string
	programs []string
	prepare  func(*testing.T, *realServer)
	argv     func(*realServer) [][]string // of each process
	login    func(io.Writer, *bufio.Reader) error

	// ask has one conversation and returns the server's name for the
	// connection, "" if it has none.
	ask func(io.Writer, *bufio.Reader) (string, error)

	// conns is how many connections the server says it has.
	conns func(*realAdmin) (int, error)

	// kill makes the server close the connection of that name, killAll all
	// that are idle. At most one is set.
	kill    func(*realAdmin, string) error
	killAll func(*realServer) error

	// unixNeverIdle: its idle time-out spares Unix sockets.
	unixNeverIdle bool

	stop, crash syscall.Signal
}

var realKinds = []*realKind{
	{
		name: "redis", programs: []string{"redis-server"},
		argv: func(s *realServer) [][]string {
			return [][]string{{"redis-server", "--bind", "127.0.0.1", "--port", strconv.Itoa(s.port), "--unixsocket", s.socket(),
				"--dir", s.dir, "--save", "", "--appendonly", "no", "--timeout", strconv.Itoa(int(s.idle / time.Second))}}
		},
		ask:   askRedis,
		conns: func(a *realAdmin) (int, error) { return a.redisClients() },
		kill: func(a *realAdmin, id string) error {
			reply, err := redisDo(a, a.r, "CLIENT", "KILL", "ID", id)
			if err == nil && reply != "1" {
				err = fmt.Errorf("CLIENT KILL ID %s: %s", id, reply)
			}
			return err
		},
		stop: syscall.SIGTERM, crash: syscall.SIGKILL,
	},
	{
		name: "postgresql", programs: []string{"postgres", "initdb"},
		prepare: func(t *testing.T, s *realServer) {
			s.run(t, "initdb", "-D", s.file("data"), "-U", "postgres", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8", "--wal-segsize=1")
		},
		argv: func(s *realServer) [][]string {
			return [][]string{{"postgres", "-D", s.file("data"), "-p", strconv.Itoa(s.port), "-c", "listen_addresses=127.0.0.1",
				"-c", "unix_socket_directories=" + s.dir, "-c", "fsync=off", "-c", "max_connections=50", "-c", "shared_buffers=2MB",
				"-c", "max_wal_size=8MB", "-c", "min_wal_size=2MB",
				"-c", "autovacuum=off", "-c", "idle_session_timeout=" + strconv.Itoa(int(s.idle/time.Millisecond))}}
		},
		login: pgLogin,
		ask: func(w io.Writer, r *bufio.Reader) (string, error) {
			return pgQuery(w, r, "select pg_backend_pid()")
		},
		conns: func(a *realAdmin) (int, error) {
			n, err := pgQuery(a, a.r, "select count(*) from pg_stat_activity where backend_type = 'client backend'")
			if err != nil {
				return 0, err
			}
			return strconv.Atoi(n)
		},
		kill: func(a *realAdmin, id string) error {
			gone, err := pgQuery(a, a.r, "select pg_terminate_backend("+id+", 5000)")
			if err == nil && gone != "t" {
				err = fmt.Errorf("pg_terminate_backend(%s): %s", id, gone)
			}
			return err
		},
		stop: syscall.SIGINT, crash: syscall.SIGQUIT, // fast shutdown, immediate shutdown
	},
	{
		name: "memcached", programs: []string{"memcached"},
		argv: func(s *realServer) [][]string {
			common := []string{"memcached", "-m", "64", "-t", "1", "-U", "0"}
			if s.idle > 0 {
				common = append(common, "-o", "idle_timeout="+strconv.Itoa(int(s.idle/time.Second)))
			}
			common = common[:len(common):len(common)]
			return [][]string{ // it listens either here or there
				append(common, "-l", "127.0.0.1", "-p", strconv.Itoa(s.port)),
				append(common, "-s", s.socket()),
			}
		},
		ask: askMemcached,
		conns: func(a *realAdmin) (int, error) {
			if err := say(a, "stats\r\n"); err != nil {
				return 0, err
			}
			n := 0
			for {
				line, err := hear(a.r)
				if err != nil || line == "END" {
					return n, err
				}
				if v, ok := strings.CutPrefix(line, "STAT curr_connections "); ok {
					n, _ = strconv.Atoi(v)
				}
			}
		},
		unixNeverIdle: true,
		stop:          syscall.SIGTERM, crash: syscall.SIGKILL,
	},
	{
		name: "nginx", programs: []string{"nginx"},
		prepare: func(t *testing.T, s *realServer) {
			require.NoError(t, os.Mkdir(s.file("tmp"), 0o777))
			os.Chmod(s.file("tmp"), 0o777)
		},
		argv: func(s *realServer) [][]string {
			keep := "1h"
			if s.idle > 0 {
				keep = strconv.Itoa(int(s.idle/time.Millisecond)) + "ms"
			}
			conf := `daemon off; worker_processes 1; pid ` + s.file("pid") + `; error_log stderr;
events { worker_connections 64; }
http {
	access_log off; keepalive_timeout ` + keep + `; keepalive_requests 100000;
	client_body_temp_path tmp/a; proxy_temp_path tmp/b; fastcgi_temp_path tmp/c; uwsgi_temp_path tmp/d; scgi_temp_path tmp/e;
	server {
		listen 127.0.0.1:` + strconv.Itoa(s.port) + `; listen unix:` + s.socket() + `;
		location / { return 200 "$connection"; }
		location /status { stub_status; }
	}
}
`
			os.WriteFile(s.file("conf"), []byte(conf), 0o644)
			os.Remove(s.socket()) // a crash leaves it behind, and nginx will not bind over it
			return [][]string{{"nginx", "-p", s.dir, "-e", "stderr", "-c", s.file("conf")}}
		},
		ask: func(w io.Writer, r *bufio.Reader) (string, error) { return httpGet(w, r, "/") },
		conns: func(a *realAdmin) (int, error) {
			page, err := httpGet(a, a.r, "/status")
			if err != nil {
				return 0, err
			}
			n := 0
			_, err = fmt.Sscanf(page, "Active connections: %d", &n)
			return n, err
		},
		// A reload: the old worker closes its idle connections.
		killAll: func(s *realServer) error {
			return s.procs[0].cmd.Process.Signal(syscall.SIGHUP)
		},
		stop: syscall.SIGTERM, crash: syscall.SIGINT, // which is as fast; SIGKILL would leave the worker alone
	},
}

// --- the clients ---

func say(w io.Writer, s string) error { _, err := io.WriteString(w, s); return err }

func hear(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	return strings.TrimRight(line, "\r\n"), err
}

// redisDo sends a command and reads a reply that is a status, a number, an
// error or one string.
func redisDo(w io.Writer, r *bufio.Reader, args ...string) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	if err := say(w, b.String()); err != nil {
		return "", err
	}
	line, err := hear(r)
	switch {
	case err != nil:
		return "", err
	case line == "":
		return "", errors.New("redis: an empty reply")
	case line[0] == '-':
		return "", errors.New("redis: " + line[1:])
	case line[0] != '$':
		return line[1:], nil
	}
	n, err := strconv.Atoi(line[1:])
	if err != nil || n < 0 {
		return "", fmt.Errorf("redis: %q", line)
	}
	text := make([]byte, n+2)
	_, err = io.ReadFull(r, text)
	return string(text[:n]), err
}

func askRedis(w io.Writer, r *bufio.Reader) (string, error) {
	if pong, err := redisDo(w, r, "PING"); err != nil || pong != "PONG" {
		return "", fmt.Errorf("PING: %q, %w", pong, err)
	}
	return redisDo(w, r, "CLIENT", "ID")
}

func (a *realAdmin) redisClients() (n int, err error) {
	info, err := redisDo(a, a.r, "INFO", "clients")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(info, "connected_clients:")
	_, err = fmt.Sscan(after, &n)
	return n, err
}

// askMemcached stores what nobody else stores and reads it back.
func askMemcached(w io.Writer, r *bufio.Reader) (string, error) {
	key := "k" + strconv.FormatInt(time.Now().UnixNano(), 36)
	for _, step := range []struct{ say, hear string }{
		{"version\r\n", "VERSION "},
		{fmt.Sprintf("set %s 0 0 %d\r\n%s\r\n", key, len(key), key), "STORED"},
		{"get " + key + "\r\n", fmt.Sprintf("VALUE %s 0 %d", key, len(key))},
		{"", key},
		{"", "END"},
	} {
		if err := say(w, step.say); err != nil {
			return "", err
		}
		line, err := hear(r)
		if err != nil {
			return "", err
		}
		if !strings.HasPrefix(line, step.hear) {
			return "", fmt.Errorf("memcached: %q to %q", line, step.say)
		}
	}
	return "", nil
}

func httpGet(w io.Writer, r *bufio.Reader, path string) (string, error) {
	if err := say(w, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != 200 || resp.Close || resp.ContentLength < 0) {
		err = fmt.Errorf("GET %s: %s, close %v, length %d", path, resp.Status, resp.Close, resp.ContentLength)
	}
	return string(body), err
}

func pgSend(w io.Writer, kind byte, body string) error {
	var b bytes.Buffer
	if kind != 0 { // the first message of all has none
		b.WriteByte(kind)
	}
	binary.Write(&b, binary.BigEndian, int32(len(body)+4))
	b.WriteString(body)
	_, err := w.Write(b.Bytes())
	return err
}

// pgAwaitReady reads up to "ready for query" and returns the first column of
// the last row.
func pgAwaitReady(r *bufio.Reader) (value string, err error) {
	for {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return "", err
		}
		body := make([]byte, int(binary.BigEndian.Uint32(head[1:]))-4)
		if _, err := io.ReadFull(r, body); err != nil {
			return "", err
		}
		switch head[0] {
		case 'R': // the log-in's progress
			if how := binary.BigEndian.Uint32(body); how != 0 {
				return "", fmt.Errorf("postgresql wants authentication of kind %d", how)
			}
		case 'D': // a row: number of columns, then length and bytes of each
			value = string(body[6 : 6+binary.BigEndian.Uint32(body[2:])])
		case 'E':
			err = fmt.Errorf("postgresql: %q", bytes.ReplaceAll(body, []byte{0}, []byte{' '}))
			if bytes.Contains(body, []byte("FATAL")) {
				return "", err
			}
		case 'Z':
			return value, err
		}
	}
}

func pgLogin(w io.Writer, r *bufio.Reader) error {
	if err := pgSend(w, 0, "\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"); err != nil {
		return err
	}
	_, err := pgAwaitReady(r)
	return err
}

func pgQuery(w io.Writer, r *bufio.Reader, query string) (string, error) {
	if err := pgSend(w, 'Q', query+"\x00"); err != nil {
		return "", err
	}
	return pgAwaitReady(r)
}

// --- the pool's side, and the operator's ---

// realAdmin is a connection of the operator's, outside the pool.
type realAdmin struct {
	net.Conn
	r *bufio.Reader
}

func (s *realServer) asAdmin(addr connpool.Addr, do func(*realAdmin) error) error {
	network, where := "tcp4", net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port)))
	if addr.Transport == connpool.Unix {
		network, where = "unix", addr.Host
	}
	nc, err := net.DialTimeout(network, where, 5*time.Second)
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	a := &realAdmin{nc, bufio.NewReader(nc)}
	if s.kind.login != nil {
		if err := s.kind.login(a, a.r); err != nil {
			return err
		}
	}
	return do(a)
}

// awaitAlone waits until the server has no connection left but the operator's.
// (Those that the operator had before may take it a moment, too. All of these
// servers, once they have closed a connection, have told the client.)
func (s *realServer) awaitAlone(t *testing.T, addr connpool.Addr) {
	t.Helper()
	var have int
	var err error
	for began := time.Now(); time.Since(began) < realStartTime; time.Sleep(realPoll) {
		err = s.asAdmin(addr, func(a *realAdmin) (err error) { have, err = s.kind.conns(a); return err })
		if err == nil && have == 1 {
			return
		}
	}
	require.Failf(t, "connections remain", "%s has %d (%v)", s.kind.name, have, err)
}

// pool is a pool that finds nothing by itself: what is dead at a loan was not
// swept before.
func (s *realServer) pool(t *testing.T, cfg connpool.Config) *connpool.Pool {
	t.Helper()
	cfg.SweepInterval, cfg.IdleTimeout = -1, time.Hour
	cfg.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		r := bufio.NewReader(nc)
		if s.kind.login == nil {
			return r, nil
		}
		return r, s.kind.login(nc, r)
	}
	p, err := connpool.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		assert.NoError(t, p.Shutdown(ctx))
		assert.Zero(t, p.Stats().Open)
		assert.Zero(t, p.Stats().AbandonedCalls)
	})
	return p
}

// ask borrows a connection for one conversation.
func (s *realServer) ask(p *connpool.Pool, addr connpool.Addr, hold func()) (name string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), realStartTime)
	defer cancel()
	err = p.With(ctx, addr, func(c connpool.Conn) (err error) {
		name, err = s.kind.ask(c, connpool.State[*bufio.Reader](c))
		if hold != nil {
			hold()
		}
		return err
	})
	return name, err
}

// askAll has n conversations over n connections at once, after which there are
// n idle ones.
func (s *realServer) askAll(t *testing.T, p *connpool.Pool, addr connpool.Addr, n int) (names []string) {
	t.Helper()
	var all, asked tasks.Group
	var mu sync.Mutex
	asked.Add(n)
	for range n {
		all.Go(func() {
			arrive := sync.OnceFunc(asked.Done)
			defer arrive() // also if fn never ran
			name, err := s.ask(p, addr, func() { arrive(); asked.Wait() })
			assert.NoError(t, err)
			mu.Lock()
			defer mu.Unlock()
			names = append(names, name)
		})
	}
	all.Wait()
	require.False(t, t.Failed(), "a With failed")
	return names
}

// diedIdle is how many connections the pool found dead. Postgres says why
// before it hangs up, so that some of them hold bytes that nobody asked for.
func diedIdle(p *connpool.Pool) uint64 {
	closed := p.Stats().Closed
	return closed[connpool.ClosedStale] + closed[connpool.ClosedDirty]
}

// onRealServers runs a test on every make of server, over TCP and over a Unix
// socket. Nothing may be left of it.
func onRealServers(t *testing.T, idle time.Duration, test func(*testing.T, *realServer, connpool.Addr)) {
	if l, err := net.Listen("tcp4", "127.0.0.1:0"); err == nil {
		l.Close() // the first socket opens what the runtime waits with, for good
	}
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors(t)
	t.Cleanup(func() {
		assert.Eventually(t, func() bool {
			return runtime.NumGoroutine() <= goroutines+1 && openDescriptors(t) <= descriptors // assert.Eventually has one itself
		}, time.Minute, 10*time.Millisecond, "goroutines or descriptors were left behind")
	})
	for _, kind := range realKinds[:short.Of(len(realKinds), 1)] { // each has its own time-outs to wait for
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel() // among these alone: most of it is waiting for servers
			s := startReal(t, kind, idle)
			for _, addr := range s.addrs() {
				t.Run(string(addr.Transport), func(t *testing.T) { test(t, s, addr) })
			}
		})
	}
}

func openDescriptors(t *testing.T) int {
	open, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(open)
}

// Ten connections are idle while the server is stopped, or dies, and is started
// again. No borrower learns of it.
//
// APR-X20, BETA-24, APR-X25
func TestARestartOfARealServerCostsNoBorrower(t *testing.T) {
	onRealServers(t, 0, func(t *testing.T, s *realServer, addr connpool.Addr) {
		const idle = 10
		for _, how := range []syscall.Signal{s.kind.stop, s.kind.crash} {
			p := s.pool(t, connpool.Config{})
			s.askAll(t, p, addr, idle)
			require.Equal(t, idle, p.Stats().Idle)
			s.restart(t, how)
			for range 3 { // one after the other
				_, err := s.ask(p, addr, nil)
				require.NoError(t, err, "after %v", how)
			}
			s.askAll(t, p, addr, idle) // and all at once
			require.EqualValues(t, idle, diedIdle(p), "%v", p.Stats())
			require.Zero(t, p.Stats().DialErrors)
		}

		// The proof that something was prevented: with the look switched
		// off, borrowers pay.
		p := s.pool(t, connpool.Config{NoProbe: true})
		s.askAll(t, p, addr, idle)
		s.restart(t, s.kind.stop)
		failed := 0
		for range idle {
			if _, err := s.ask(p, addr, nil); err != nil {
				failed++
			}
		}
		require.Equal(t, idle, failed, "without the probe")
	})
}

// The server closes what is idle for a second, the pool would keep it for an
// hour.
//
// BETA-24, TDBC-X06
func TestTheIdleTimeOutOfARealServerCostsNoBorrower(t *testing.T) {
	if testing.Short() {
		t.Skip("a server counts its idle time-out in seconds, and some need several to notice")
	}
	onRealServers(t, time.Second, func(t *testing.T, s *realServer, addr connpool.Addr) {
		if s.kind.unixNeverIdle && addr.Transport == connpool.Unix {
			t.Skip("memcached's idle_timeout is for TCP only")
		}
		p := s.pool(t, connpool.Config{})
		const idle = 5
		for round := range 2 {
			s.askAll(t, p, addr, idle)
			s.awaitAlone(t, addr)
			_, err := s.ask(p, addr, nil)
			require.NoError(t, err, "round %d", round)
		}
		s.askAll(t, p, addr, idle)
		require.GreaterOrEqual(t, diedIdle(p), uint64(2*idle), "%v", p.Stats())
		require.Zero(t, p.Stats().DialErrors)
	})
}

// An operator kills idle connections: CLIENT KILL, pg_terminate_backend, a
// reload. The next borrow comes at once, or after the pool had time to notice.
//
// BETA-24, TDBC-X06, APR-X20
func TestAConnectionKilledAtARealServerCostsNoBorrower(t *testing.T) {
	onRealServers(t, 0, func(t *testing.T, s *realServer, addr connpool.Addr) {
		if s.kind.kill == nil && s.kind.killAll == nil {
			t.Skip("memcached cannot be told to close a connection")
		}
		p := s.pool(t, connpool.Config{})
		rounds := 100
		if s.kind.name != "redis" {
			rounds = 10 // a process is forked for each
		}
		kill := func(names ...string) {
			t.Helper()
			if s.kind.killAll != nil {
				require.NoError(t, s.kind.killAll(s))
				s.awaitAlone(t, addr) // a signal says nothing of its effect
				return
			}
			require.NoError(t, s.asAdmin(addr, func(a *realAdmin) error {
				for _, name := range names {
					if err := s.kind.kill(a, name); err != nil {
						return err
					}
				}
				return nil
			}))
		}
		for round := range rounds {
			name, err := s.ask(p, addr, nil)
			require.NoError(t, err, "round %d", round)
			kill(name)
			again, err := s.ask(p, addr, nil)
			require.NoError(t, err, "round %d", round)
			require.NotEqual(t, name, again)
		}
		p.CloseIdle()
		s.awaitAlone(t, addr)

		const idle = 10
		died := diedIdle(p)
		names := s.askAll(t, p, addr, idle)
		kill(names...)
		s.askAll(t, p, addr, idle)
		require.Eventually(t, func() bool { // the watcher's goroutines may still be at one of them
			return diedIdle(p)-died == idle
		}, time.Minute, time.Millisecond, "%v", p.Stats())
		require.Zero(t, p.Stats().DialErrors)
	})
}
