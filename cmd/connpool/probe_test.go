package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// startServer serves each connection on a free port of the loopback. Everything ends with
// the test.
func startServer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var (
		running tasks.Group
		mu      sync.Mutex // guards open
		open    = make(map[net.Conn]bool)
	)
	running.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[nc] = true
			mu.Unlock()
			running.Go(func() {
				serve(nc)
				nc.Close()
				mu.Lock()
				delete(open, nc)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for nc := range open {
			nc.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return l.Addr().String()
}

func startEcho(t *testing.T) string {
	return startServer(t, func(nc net.Conn) { echo(nc, noWork) })
}

// replies answers each request of n bytes with the next of the replies, repeats the last
// one for ever, and ends the connection for "".
func replies(n int, all ...string) func(net.Conn) {
	return func(nc net.Conn) {
		request := make([]byte, n)
		for i := 0; ; i++ {
			if _, err := io.ReadFull(nc, request); err != nil {
				return
			}
			reply := all[min(i, len(all)-1)]
			if _, err := io.WriteString(nc, reply); err != nil || reply == "" {
				return
			}
		}
	}
}

func ownTo(t *testing.T, address, probe string) (*own, error) {
	t.Helper()
	p, err := parseProbe(probe)
	require.NoError(t, err)
	tgt := &target{addr: connpool.MustParseAddr("tcp://" + address), probe: p, timeout: 5 * time.Second}
	o, err := tgt.dial(t.Context(), nil)
	if err == nil {
		t.Cleanup(func() { o.nc.Close() })
	}
	return o, err
}

const ping = "*1\r\n$4\r\nPING\r\n"

func TestProbesTellAnswersFromNonsense(t *testing.T) {
	t.Setenv("REDISCLI_AUTH", "")
	long := strings.Repeat("x", 10_000)
	for name, c := range map[string]struct {
		probe string
		serve func(net.Conn)
		more  bool
		says  string // the expected error, if any
	}{
		"line":               {"line:a", replies(2, "whatever\n"), true, ""},
		"long line":          {"line:a", replies(2, long+"\n"), true, ""},
		"line cut short":     {"line:a", replies(2, ""), false, "EOF"},
		"redis":              {"redis", replies(len(ping), "+PONG\r\n"), true, ""},
		"redis, no password": {"redis", replies(len(ping), "-NOAUTH Authentication required.\r\n"), false, "REDISCLI_AUTH"},
		"redis, not redis":   {"redis", replies(len(ping), "HTTP/1.1 400 Bad Request\r\n"), false, "+PONG"},
		"hex, length":        {"hex:0102,len=5000", replies(2, long[:5000]), true, ""},
		"hex, delimiter":     {"hex:0102,until=0d0a2e0d0a", replies(2, long+"\r\n.\n\r\n..\r\n.\r\n"), true, ""},
		"hex, cut short":     {"hex:0102,len=5", replies(2, "abc", ""), false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, err := ownTo(t, startServer(t, c.serve), c.probe)
			require.NoError(t, err)
			if name == "hex, cut short" {
				o.nc.SetDeadline(time.Now().Add(20 * time.Millisecond))
				_, err := o.exchange()
				require.ErrorContains(t, err, "timeout")
				return
			}
			for range 3 {
				more, err := o.ask(5 * time.Second)
				if c.says != "" {
					require.ErrorContains(t, err, c.says)
					return
				}
				require.NoError(t, err)
				require.Equal(t, c.more, more)
				require.Zero(t, o.Buffered(), "the whole answer was read, and nothing else")
			}
		})
	}
}

func TestHTTPProbeReadsWholePagesAndHeedsConnectionClose(t *testing.T) {
	var closing, failing bool
	var hosts []string
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hosts = append(hosts, r.Host+r.URL.Path)
		if closing {
			w.Header().Set("Connection", "close")
		}
		if failing {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		io.WriteString(w, strings.Repeat("page ", 5000)) // chunked
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })

	o, err := ownTo(t, l.Addr().String(), "http:/health")
	require.NoError(t, err)
	for range 3 {
		more, err := o.ask(5 * time.Second)
		require.NoError(t, err)
		require.True(t, more)
		require.Zero(t, o.Buffered())
	}
	closing = true
	more, err := o.ask(5 * time.Second)
	require.NoError(t, err)
	require.False(t, more, "the server said that it closes")
	assert.Equal(t, l.Addr().String()+"/health", hosts[0])

	closing, failing = false, true
	o, err = ownTo(t, l.Addr().String(), "http")
	require.NoError(t, err)
	_, err = o.ask(5 * time.Second)
	require.ErrorContains(t, err, "503")
}

func TestRedisProbeLogsInWithThePasswordOfRedisCLI(t *testing.T) {
	t.Setenv("REDISCLI_AUTH", "secret")
	const auth = "*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n"
	heard := make(chan string, 1)
	address := startServer(t, func(nc net.Conn) {
		b := make([]byte, len(auth))
		io.ReadFull(nc, b)
		heard <- string(b)
		io.WriteString(nc, "+OK\r\n")
		replies(len(ping), "+PONG\r\n")(nc)
	})
	o, err := ownTo(t, address, "redis")
	require.NoError(t, err)
	_, err = o.ask(5 * time.Second)
	require.NoError(t, err)
	require.Equal(t, auth, <-heard)

	_, err = ownTo(t, startServer(t, replies(len(auth), "-WRONGPASS invalid\r\n")), "redis")
	require.ErrorContains(t, err, "WRONGPASS")
	require.NotContains(t, err.Error(), "secret")
}

// The example of RFC 7677.
func TestSCRAMIsThatOfTheRFC(t *testing.T) {
	s := &scram{password: "pencil", nonce: "rOprNGfwEbeRWgbNEkqO", bare: "n=user,r=rOprNGfwEbeRWgbNEkqO"}
	const challenge = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
	reply, err := s.final(challenge)
	require.NoError(t, err)
	require.Equal(t, "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=", reply)
	require.NoError(t, s.verify("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="))
	require.True(t, s.verified)

	for _, last := range []string{"v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", "e=other-error", "", "v=", "v=%"} {
		require.Error(t, s.verify(last), last)
	}
	for _, bad := range []string{
		"", "r=another,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", // a nonce that is not ours
		"r=rOprNGfwEbeRWgbNEkqO,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", // nothing of the server in it
		"r=rOprNGfwEbeRWgbNEkqOx,s=?,i=4096", "r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=0",
		"r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=999999999", // would hang
	} {
		_, err := s.final(bad)
		require.ErrorContains(t, err, "not sound", bad)
	}
}

// pgFake answers the start-up message, and each message after it, with the next
// of the scripted messages.
func pgFake(script ...string) func(net.Conn) {
	return func(nc net.Conn) {
		in := bufio.NewReader(nc)
		for i := 0; ; i++ {
			if i > 0 {
				in.Discard(1) // the kind
			}
			var size [4]byte
			if _, err := io.ReadFull(in, size[:]); err != nil {
				return
			}
			n := int(size[0])<<24 | int(size[1])<<16 | int(size[2])<<8 | int(size[3])
			in.Discard(n - 4)
			if _, err := io.WriteString(nc, script[min(i, len(script)-1)]); err != nil {
				return
			}
		}
	}
}

func pg(kind byte, body string) string { return string(postgresMessage(kind, body)) }

const (
	pgOK    = "\x00\x00\x00\x00"
	pgReady = "I"
)

var pgOne = pg('T', "\x00\x00") + pg('D', "\x00\x01\x00\x00\x00\x011") + pg('C', "SELECT 1\x00") + pg('Z', pgReady)

func TestPostgresProbeSaysWhatTheServerWants(t *testing.T) {
	t.Setenv("PGUSER", "u")
	t.Setenv("PGPASSWORD", "")
	welcome := pg('R', pgOK) + pg('S', "a\x00b\x00") + pg('K', "12345678") + pg('Z', pgReady)
	for name, c := range map[string]struct {
		password string
		script   []string
		login    string // error, if there is to be one
		query    string
	}{
		"trust":               {"", []string{welcome, pgOne}, "", ""},
		"refused":             {"", []string{pg('E', "SFATAL\x00C53300\x00Msorry, too many clients already\x00\x00")}, "too many clients already (53300)", ""},
		"no password":         {"", []string{pg('R', "\x00\x00\x00\x03")}, "PGPASSWORD", ""},
		"clear":               {"p", []string{pg('R', "\x00\x00\x00\x03"), welcome, pgOne}, "", ""},
		"md5":                 {"p", []string{pg('R', "\x00\x00\x00\x05salt"), welcome, pgOne}, "", ""},
		"kerberos":            {"p", []string{pg('R', "\x00\x00\x00\x07")}, "kind 7", ""},
		"no proof":            {"p", []string{pg('R', "\x00\x00\x00\x0aSCRAM-SHA-256\x00\x00"), welcome}, "did not prove", ""},
		"proof before demand": {"p", []string{pg('R', "\x00\x00\x00\x0cv=abc")}, "kind 12", ""},
		"not postgres":        {"", []string{"HTTP/1.1 400 Bad Request"}, "not PostgreSQL", ""},
		"bad query":           {"", []string{welcome, pg('E', "SERROR\x00C42601\x00Msyntax error\x00\x00") + pg('Z', pgReady)}, "", "syntax error (42601)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PGPASSWORD", c.password)
			o, err := ownTo(t, startServer(t, pgFake(c.script...)), "postgres")
			if c.login != "" {
				require.ErrorContains(t, err, c.login)
				return
			}
			require.NoError(t, err)
			for range 3 {
				more, err := o.ask(5 * time.Second)
				if c.query != "" {
					require.ErrorContains(t, err, c.query)
					continue
				}
				require.NoError(t, err)
				require.True(t, more)
				require.Zero(t, o.Buffered())
			}
		})
	}
}

// APR-18: peers of five protocols behind one mechanism; only Setup and the borrowing
// function differ.
func TestOnePoolServesPeersOfEveryProtocol(t *testing.T) {
	t.Setenv("PGPASSWORD", "")
	t.Setenv("REDISCLI_AUTH", "")
	page := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	probes := make(map[connpool.Addr]probe)
	serve := func(text string, handle func(net.Conn)) {
		p, err := parseProbe(text)
		require.NoError(t, err)
		probes[connpool.MustParseAddr("tcp://"+startServer(t, handle))] = p
	}
	serve("line", func(nc net.Conn) { echo(nc, noWork) })
	serve("redis", replies(len(ping), "+PONG\r\n"))
	serve("postgres", pgFake(pg('R', pgOK)+pg('Z', pgReady), pgOne))
	serve("hex:000100000006010300000001,len=11", replies(12, "\x00\x01\x00\x00\x00\x05\x01\x03\x02\x00\x2a"))
	serve("http", func(nc net.Conn) {
		in := bufio.NewReader(nc)
		for {
			if _, err := http.ReadRequest(in); err != nil {
				return
			}
			io.WriteString(nc, page)
		}
	})
	pool, err := connpool.New(connpool.Config{
		Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			return probes[addr].begin(ctx, addr, nc)
		},
	})
	require.NoError(t, err)
	defer pool.Close()
	for range 20 {
		for addr, p := range probes {
			require.NoError(t, pool.With(t.Context(), addr, func(c connpool.Conn) error {
				_, err := connpool.State[session](c).exchange()
				return err
			}), p.name)
		}
	}
	assert.EqualValues(t, len(probes), pool.Stats().Dials)
	assert.EqualValues(t, 20*len(probes), pool.Stats().Loans)
}

func TestProbesAndTargetsThatCannotBeMeantAreRefused(t *testing.T) {
	for text, says := range map[string]string{
		"ping":                 "is not known",
		"line:a\nb":            "one line",
		"redis:GET":            "no text",
		"http:health":          "slash",
		"http:/a b":            "slash",
		"postgres:":            "empty",
		"hex:":                 "no bytes in hex",
		"hex:0g,len=1":         "no bytes in hex",
		"hex:00":               "the end of the answer",
		"hex:00,len=0":         "length",
		"hex:00,len=999999999": "length",
		"hex:00,until=":        "no bytes in hex",
		"hex:00,after=1":       "the end of the answer",
	} {
		_, err := parseProbe(text)
		assert.ErrorContains(t, err, says, text)
	}
	for says, f := range map[string]targetFlags{
		"-to":          {to: "localhost", probe: "line", timeout: 1},
		"transport":    {to: "quic://h:1", probe: "line", timeout: 1},
		"-timeout":     {to: "tcp://h:1", probe: "line"},
		"tls:// addr":  {to: "tcp://h:1", probe: "line", timeout: 1, trustAnyone: true},
		"contradict":   {to: "tls://h:1", probe: "line", timeout: 1, trustAnyone: true, ca: "x"},
		"no such file": {to: "tls://h:1", probe: "line", timeout: 1, ca: "/nonexistent"},
		"PEM":          {to: "tls://h:1", probe: "line", timeout: 1, ca: "probe_test.go"},
	} {
		_, err := f.target()
		assert.ErrorContains(t, err, says)
	}
}

func TestArgumentsOfAdviceSurviveAShell(t *testing.T) {
	for in, want := range map[string]string{
		"tcp://127.0.0.1:6379":                                 "tcp://127.0.0.1:6379",
		"tls://h:1?scope=a&dscp=46":                            "'tls://h:1?scope=a&dscp=46'",
		"postgres:SELECT 'x'":                                  `'postgres:SELECT '\''x'\'''`,
		"hex:0102,until=" + hex.EncodeToString([]byte("\r\n")): "hex:0102,until=0d0a",
	} {
		assert.Equal(t, want, quoted(in))
	}
	f := targetFlags{to: "tls://h:1?scope=a", probe: "line:x y", ca: "ca.pem"}
	assert.Equal(t, "-to 'tls://h:1?scope=a' -probe 'line:x y' -tls-ca ca.pem", f.flags())
}

// greetsUnlessAsked is a server that answers each line with the same line, and after a
// while also sends a greeting. It sets asked if the first question is there before the
// greeting is sent: a busy machine may delay the greeting that much.
func greetsUnlessAsked(after time.Duration, greeting string, asked *atomic.Bool) func(net.Conn) {
	return func(nc net.Conn) {
		if after <= 0 {
			io.WriteString(nc, greeting)
			echo(nc, noWork)
			return
		}
		// Like a server that looks up a name before it reads from its client.
		time.Sleep(after)
		in := bufio.NewReader(nc)
		nc.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := in.Peek(1); err == nil {
			asked.Store(true)
		}
		nc.SetReadDeadline(time.Time{})
		io.WriteString(nc, greeting)
		echo(readAhead{nc, in}, noWork)
	}
}

// readAhead is a connection of which a reader has read something already.
type readAhead struct {
	net.Conn
	in *bufio.Reader
}

func (c readAhead) Read(b []byte) (int, error) { return c.in.Read(b) }

// TRY-05
func TestAServerThatSpeaksFirstIsNotMeasured(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]time.Duration{
		"at once":                  0,
		"a little later":           60 * time.Millisecond,
		"after the first question": 600 * time.Millisecond,
	} {
		for _, probe := range []string{"line:ping", "hex:70696e670a,len=5", "hex:70696e670a,until=670a"} {
			// A late greeting does not end like an answer to this one: it is read as
			// the beginning of one.
			blind := probe == "hex:70696e670a,until=670a"
			if name == "after the first question" && blind {
				continue
			}
			t.Run(name+", "+probe, func(t *testing.T) {
				t.Parallel()
				var asked atomic.Bool
				to := "tcp://" + startServer(t, greetsUnlessAsked(after, "220 mail.example ESMTP\n", &asked))
				for _, args := range [][]string{
					{"load", "-to", to, "-probe", probe, "-n", "30", "-rounds", "1", "-workers", "1", "-quiet", "-timeout", "5s"},
					{"size", "-to", to, "-probe", probe, "-step", "100ms", "-max-clients", "1", "-quiet", "-timeout", "5s"},
				} {
					var out, errs bytes.Buffer
					code := run(t.Context(), args, &out, &errs)
					for tries := 0; blind && code != exitBroken && asked.Swap(false) && tries < 20; tries++ {
						out.Reset() // the machine made the greeting late
						errs.Reset()
						code = run(t.Context(), args, &out, &errs)
					}
					assert.Equal(t, exitBroken, code, "%v: %s", args, out.String())
					assert.Contains(t, errs.String(), "without being asked", args)
				}
			})
		}
	}
	for name, serve := range map[string]func(net.Conn){"echo": func(nc net.Conn) { echo(nc, noWork) }, "two lines for one": func(nc net.Conn) {
		in := bufio.NewReader(nc)
		for i := 0; ; i++ {
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
			fmt.Fprintf(nc, "%d\nof two\n", i)
		}
	}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out, errs bytes.Buffer
			assert.Equal(t, exitOK, run(t.Context(), []string{"load", "-to", "tcp://" + startServer(t, serve), "-n", "9", "-quiet"}, &out, &errs), errs.String())
		})
	}
}

// TRY-05
func TestInformationalAnswersAreReadOver(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	const hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
	for name, c := range map[string]struct{ answer, says string }{
		"hints":            {hints + ok, ""},
		"three of them":    {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + hints + ok, ""},
		"no end of them":   {strings.Repeat(hints, maxInterim+1) + ok, "no final one"},
		"an error page":    {hints + "HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno", "error page: 500"},
		"another protocol": {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "101"},
		"no web server":    {"220 mail.example ESMTP\r\n", "220 mail.example"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, err := ownTo(t, startServer(t, func(nc net.Conn) {
				in := bufio.NewReader(nc)
				for {
					if _, err := http.ReadRequest(in); err != nil {
						return
					}
					io.WriteString(nc, c.answer)
				}
			}), "http")
			require.NoError(t, err)
			for range 3 {
				more, err := o.ask(5 * time.Second)
				if c.says != "" {
					require.ErrorContains(t, err, c.says)
					return
				}
				require.NoError(t, err)
				require.True(t, more)
				require.Zero(t, o.Buffered(), "the answer was read to its end")
			}
		})
	}
}

// TRY-05
func TestWhatAServerSaidBeforeItHungUpIsTold(t *testing.T) {
	t.Setenv("REDISCLI_AUTH", "")
	t.Setenv("PGUSER", "u")
	t.Setenv("PGPASSWORD", "")
	welcome := pg('R', pgOK) + pg('Z', pgReady)
	fatal := pg('E', "SFATAL\x00C57P01\x00Mterminating connection due to administrator command\x00\x00")
	once := func(request int, words string) func(net.Conn) {
		return func(nc net.Conn) {
			io.ReadFull(nc, make([]byte, request))
			io.WriteString(nc, words)
		}
	}
	for probe, c := range map[string]struct {
		serve func(net.Conn)
		says  string
	}{
		"line:a":              {once(2, "421 too many"), "421 too many"},
		"hex:0102,len=50":     {once(2, "busy"), "busy"},
		"hex:0102,until=0d0a": {once(2, "busy"), "busy"},
		"redis":               {once(len(ping), "-ERR max num"), "-ERR max num"},
		"http":                {once(1, "HTTP/1.1 503 Ser"), "503 Ser"},
		"postgres": {func(nc net.Conn) {
			pgFake(welcome, fatal)(&hangsUp{Conn: nc, writes: 2})
		}, "57P01"},
		"postgres:select 1": {func(nc net.Conn) { // the end came before the query
			pgFake(welcome + fatal)(&hangsUp{Conn: nc, writes: 1})
		}, "57P01"},
	} {
		t.Run(probe, func(t *testing.T) {
			o, err := ownTo(t, startServer(t, c.serve), probe)
			require.NoError(t, err)
			_, err = o.ask(5 * time.Second)
			require.ErrorContains(t, err, c.says)
			require.NotErrorIs(t, err, io.ErrNoProgress)
		})
	}
}

// hangsUp is closed after some writes.
type hangsUp struct {
	net.Conn
	writes int
}

func (h *hangsUp) Write(b []byte) (int, error) {
	n, err := h.Conn.Write(b)
	if h.writes--; h.writes == 0 {
		h.Conn.(*net.TCPConn).CloseWrite()
	}
	return n, err
}

// TRY-31
func TestTheFieldHostHasNoZoneAndOnlyPortsThatAreNotTheSchemesOwn(t *testing.T) {
	for addr, want := range map[string]string{
		"tcp://h:80": "h", "tcp://h:443": "h:443", "tls://h:443": "h", "tls://h:80": "h:80", "tcp://h:8080": "h:8080",
		"tcp://[fe80::1%25eth0]:80": "[fe80::1]", "tls://[fe80::1%25eth0]:8443": "[fe80::1]:8443",
		"tls://10.0.0.1:443?server-name=www.example": "www.example", "unix:/run/s": "localhost",
	} {
		assert.Equal(t, want, httpHost(connpool.MustParseAddr(addr)), addr)
	}
}

func TestDialGivesUpOnALogInThatNeverEnds(t *testing.T) {
	t.Setenv("PGUSER", "u")
	address := startServer(t, func(nc net.Conn) { io.Copy(io.Discard, nc) })
	p, err := parseProbe("postgres")
	require.NoError(t, err)
	tgt := &target{addr: connpool.MustParseAddr("tcp://" + address), probe: p, timeout: 30 * time.Millisecond}
	_, err = tgt.dial(t.Context(), nil) // otherwise it would wait for ever
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestTimesAreWrittenWithThreeDigits(t *testing.T) {
	for s, want := range map[float64]string{0: "0", 1e-7: "100 ns", 5.44e-6: "5.4 µs", 0.000123: "123 µs", 0.00432: "4.32 ms",
		0.0438: "43.8 ms", 0.144: "144 ms", 0.9996: "1.00 s", 2.4: "2.40 s", 12.34: "12.3 s", 1234: "1234 s"} {
		assert.Equal(t, want, seconds(s), strconv.FormatFloat(s, 'g', -1, 64))
	}
	for r, want := range map[float64]string{9.99: "9.99", 9.996: "10.0", 99.94: "99.9", 99.99: "100", 12345.6: "12,346"} {
		assert.Equal(t, want, rate(r), fmt.Sprint(r))
	}
}
