package connpool

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
)

// The same against the other implementation of TLS that everybody runs: its
// tickets, alerts and key updates are its own. `openssl s_server` serves one
// connection after the other; what is typed goes to the client, but for a few
// letters at the start of a line that are commands.

// opensslServer is one process of it.
type opensslServer struct {
	t     *testing.T
	addr  Addr
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan struct{} // its output

	mu     sync.Mutex // guards output
	output bytes.Buffer
	grown  sync.Cond
}

func openssl(t *testing.T, args ...string) *opensslServer {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed, or not in PATH")
	}
	dir := t.TempDir()
	id := tlAuthority().Certificates[0]
	var chain bytes.Buffer
	for _, der := range id.Certificate {
		require.NoError(t, pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	key, err := x509.MarshalPKCS8PrivateKey(id.PrivateKey)
	require.NoError(t, err)
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certFile, chain.Bytes(), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))

	s := &opensslServer{t: t, ended: make(chan struct{})}
	s.grown.L = &s.mu
	s.cmd = exec.Command(path, append([]string{"s_server", "-accept", "127.0.0.1:0", "-cert", certFile, "-key", keyFile, "-msg"}, args...)...)
	s.stdin, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	out, in, err := os.Pipe()
	require.NoError(t, err)
	s.cmd.Stdout, s.cmd.Stderr = in, in
	err = s.cmd.Start()
	in.Close()
	if err != nil {
		out.Close()
	}
	require.NoError(t, err)
	go func() {
		defer close(s.ended)
		defer out.Close()
		b := make([]byte, 4096)
		for {
			n, err := out.Read(b)
			s.mu.Lock()
			s.output.Write(b[:n])
			s.mu.Unlock()
			s.grown.Broadcast()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		s.kill()
		s.cmd.Wait()
	})
	if !s.saidWithin(5*time.Second, "ACCEPT ") {
		s.kill()
		<-s.ended
		s.mu.Lock()
		defer s.mu.Unlock()
		t.Skipf("this openssl does not do s_server %q on a port of its own choice: %s", args, s.output.String())
	}
	s.mu.Lock()
	_, at, _ := strings.Cut(s.output.String(), "ACCEPT ")
	at, _, _ = strings.Cut(at, "\n")
	s.mu.Unlock()
	host, port, err := net.SplitHostPort(strings.TrimSpace(at))
	require.NoError(t, err, at)
	n, err := strconv.ParseUint(port, 10, 16)
	require.NoError(t, err)
	s.addr = Addr{Transport: TLS, Host: host, Port: uint16(n)}
	return s
}

func (s *opensslServer) kill() {
	s.stdin.Close()
	s.cmd.Process.Kill()
	<-s.ended
}

// saidWithin waits until text stands in the output n times.
func (s *opensslServer) saidWithin(limit time.Duration, text string) bool {
	return s.saidTimes(limit, text, 1)
}

func (s *opensslServer) saidTimes(limit time.Duration, text string, n int) bool {
	late := time.AfterFunc(limit, s.grown.Broadcast)
	defer late.Stop()
	deadline := time.Now().Add(limit)
	s.mu.Lock()
	defer s.mu.Unlock()
	for bytes.Count(s.output.Bytes(), []byte(text)) < n {
		if !time.Now().Before(deadline) {
			return false
		}
		s.grown.Wait()
	}
	return true
}

func (s *opensslServer) said(text string) error {
	if s.saidWithin(10*time.Second, text) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Errorf("the server never said %q, but %q", text, s.output.String())
}

// enter types b.
func (s *opensslServer) enter(b string) error {
	_, err := io.WriteString(s.stdin, b)
	return err
}

// chat is one exchange: we write, the test reads it at the server's side and
// types the reply.
func (s *opensslServer) chat(c Conn) error {
	token := fmt.Sprintf("token-%d.", tlTokens.Add(1))
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return err
	}
	if err := errors.Join(s.said(token), s.enter("reply to "+token+"\n")); err != nil {
		return err
	}
	return tlExpect(c, "reply to "+token+"\n")
}

// opensslFaults is what befalls a connection to it while it is idle, or what
// the borrower leaves behind.
var opensslFaults = []struct {
	name   string
	fault  func(s *opensslServer) error
	loan   func(s *opensslServer, c Conn) error
	reason []CloseReason
	over   bool // there is no server after it
}{
	{name: "close_notify", reason: []CloseReason{ClosedStale}, fault: func(s *opensslServer) error { return s.enter("q\n") }},
	{name: "killed", reason: []CloseReason{ClosedStale}, over: true, fault: func(s *opensslServer) error { s.kill(); return nil }},
	{name: "pushed", reason: []CloseReason{ClosedDirty}, fault: func(s *opensslServer) error { return s.enter("nobody asked\n") }},
	{name: "plaintext below TLS", reason: []CloseReason{ClosedStale, ClosedDirty}, fault: func(s *opensslServer) error { return s.enter("P\n") }},
	{name: "reply left in the kernel", reason: []CloseReason{ClosedDirty}, loan: func(s *opensslServer, c Conn) error {
		if _, err := io.WriteString(c, "and?\n"); err != nil {
			return err
		}
		return errors.Join(s.said("and?"), s.enter("so.\n"), tlArrived(c)) // the tickets have been read by now
	}},
	{name: "1 of 11 bytes read", reason: []CloseReason{ClosedDirty}, loan: func(s *opensslServer, c Conn) error {
		return errors.Join(s.enter("hello world"), tlExpect(c, "h"))
	}},
	{name: "poisoned write, kept", reason: []CloseReason{ClosedBroken}, loan: func(s *opensslServer, c Conn) error {
		return errors.Join(tlPoison(c), Keep(errTLKept))
	}},
}

var opensslWays = []struct {
	name  string
	args  []string
	cache bool
}{
	{"tls12", []string{"-tls1_2"}, true},
	{"tls12_nocache", []string{"-tls1_2"}, false},
	{"tls13", []string{"-tls1_3"}, true},
	{"tls13_nocache", []string{"-tls1_3"}, false},
	{"tls13_12_tickets", []string{"-tls1_3", "-num_tickets", "12"}, true},
	{"tls13_no_ticket", []string{"-tls1_3", "-no_ticket", "-num_tickets", "0"}, true},
}

// BETA-24, TDBC-X06, ORA-75, G-04
func TestUnfitConnectionToOpenSSLIsNeverLentAgain(t *testing.T) {
	for _, way := range short.Of(opensslWays[:4], opensslWays[2:3]) {
		loans := []int{1, 2, 100}
		if raceEnabled || !way.cache || testing.Short() {
			loans = loans[1:2] // each is a process
		}
		for _, f := range opensslFaults {
			for _, nth := range loans {
				t.Run(fmt.Sprintf("%s/%s/loan%d", way.name, f.name, nth), func(t *testing.T) {
					tlBaseline(t)
					s := openssl(t, way.args...)
					p := tlPool(t, false, func(cfg *Config) { cfg.TLS.SessionTicketsDisabled = !way.cache })
					for n := range nth {
						id, err := tlWith(t, p, s.addr, func(c Conn) error {
							err := s.chat(c)
							if err == nil && n == nth-1 && f.loan != nil {
								err = f.loan(s, c)
							}
							return err
						})
						if !errors.Is(err, errTLKept) {
							require.NoError(t, err)
						}
						require.EqualValues(t, 1, id)
					}
					if f.fault != nil {
						require.NoError(t, f.fault(s))
						tlSettle(t, p, s.addr)
					}
					id, err := tlWith(t, p, s.addr, func(c Conn) error { return s.chat(c) })
					if f.over {
						require.Equal(t, KindRefused, KindOf(err), "%v", err)
					} else {
						require.NoError(t, err)
						require.EqualValues(t, 2, id)
					}
					closed := p.Stats().Closed
					require.Len(t, closed, 1)
					var n uint64
					for _, reason := range f.reason {
						n += closed[reason]
					}
					require.EqualValues(t, 1, n, "%v", closed)
				})
			}
		}
	}
}

// Tickets, and key updates while idle, are signs of life.
//
// G-04
func TestHealthyConnectionToOpenSSLServesAHundredLoans(t *testing.T) {
	for _, way := range opensslWays[:short.Of(len(opensslWays), 2)] {
		for _, idle := range []string{"", "k\n", "K\n"} {
			if idle != "" && strings.HasPrefix(way.name, "tls12") {
				continue
			}
			t.Run(way.name+"/"+map[string]string{"": "quiet", "k\n": "key_updates", "K\n": "key_updates_both_ways"}[idle], func(t *testing.T) {
				tlBaseline(t)
				s := openssl(t, way.args...)
				p := tlPool(t, false, func(cfg *Config) { cfg.TLS.SessionTicketsDisabled = !way.cache })
				const newKeys = "KeyUpdate"
				updates := 0
				for n := range 100 {
					loan := tlNothing // at first: what came with the handshake stays unread
					if n > 10 {
						loan = s.chat
					}
					id, err := tlWith(t, p, s.addr, loan)
					require.NoError(t, err)
					require.EqualValues(t, 1, id, "loan %d: closed %v", n+1, p.Stats().Closed)
					if idle != "" && n%30 == 29 {
						require.NoError(t, s.enter(idle))
						updates++
						require.True(t, s.saidTimes(10*time.Second, newKeys, updates), "%s", s.output.String())
						tlSettle(t, p, s.addr)
						if idle == "K\n" {
							updates++ // ours, which the server sees when the next look or loan has sent it
						}
					}
				}
				require.Empty(t, p.Stats().Closed)
				require.EqualValues(t, 1, p.Stats().Dials)
			})
		}
	}
}

// With a session cache the second connection resumes what the first one got in
// its tickets, though nobody but the look has read those.
//
// G-04
func TestTicketsEatenByALookAreGoodForResumption(t *testing.T) {
	for _, way := range short.Of(opensslWays[:4], opensslWays[2:4]) {
		t.Run(way.name, func(t *testing.T) {
			tlBaseline(t)
			s := openssl(t, way.args...)
			p := tlPool(t, false, func(cfg *Config) { cfg.TLS.SessionTicketsDisabled = !way.cache })
			_, err := tlWith(t, p, s.addr, tlNothing)
			require.NoError(t, err)
			if strings.HasPrefix(way.name, "tls13") {
				tlSettle(t, p, s.addr)
			}
			_, err = tlWith(t, p, s.addr, tlNothing) // the look before it
			require.NoError(t, err)
			p.CloseIdle()
			var state tls.ConnectionState
			_, err = tlWith(t, p, s.addr, func(c Conn) error {
				state = c.ConnectionState()
				return s.chat(c)
			})
			require.NoError(t, err)
			require.Equal(t, way.cache, state.DidResume)
			require.EqualValues(t, 2, p.Stats().Dials)
		})
	}
}

// A thousand tickets at once are more than anybody needs. crypto/tls refuses
// them; what matters is that a borrower gets an answer in time, and the pool no
// trouble.
//
// G-04
func TestTicketFloodOfOpenSSLIsBounded(t *testing.T) {
	tlBaseline(t)
	s := openssl(t, "-tls1_3", "-num_tickets", "1000")
	p := tlPool(t, false, func(cfg *Config) { cfg.TLS.SessionTicketsDisabled = true }) // a resumed session gets one ticket only
	for range 3 {
		began := time.Now()
		_, err := tlWith(t, p, s.addr, tlNothing)
		require.NoError(t, err)
		require.Less(t, time.Since(began), bounded/2)
		tlSettle(t, p, s.addr)
	}
	require.LessOrEqual(t, p.Stats().Dials, uint64(3))
	require.Equal(t, 1, p.Stats().Open)
}
