package connpool

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// What a connection looks like to the pool when it is alive, dead or dirty,
// under TLS 1.2 and 1.3, with and without a session cache, and for comparison
// over plain TCP. The servers here are crypto/tls over a tap, so that a test
// decides byte for byte what is on the wire; those of OpenSSL are in
// liveness_openssl_test.go.

// tlAuthority is a server's identity and the trust in it, made once, as keys
// take time.
var tlAuthority = sync.OnceValue(func() *tls.Config {
	ca := faultnet.NewCA()
	return &tls.Config{
		RootCAs:      ca.Pool(),
		Certificates: []tls.Certificate{ca.Server("127.0.0.1", "localhost", "one.test", "two.test")},
	}
})

// tlBaseline checks, when the test and its other cleanups are over, that
// goroutines and descriptors are as many as before.
func tlBaseline(t *testing.T) {
	t.Helper()
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close() // the runtime's poller has descriptors of its own, from the first use on
	}
	goroutines, files := runtime.NumGoroutine(), tlFiles()
	t.Cleanup(func() {
		deadline := time.Now().Add(time.Minute)
		for runtime.NumGoroutine() > goroutines || tlFiles() > files {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Errorf("%d goroutines of %d and %d descriptors of %d are left\n%s", runtime.NumGoroutine(), goroutines,
					tlFiles(), files, buf[:runtime.Stack(buf, true)])
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// tlFiles counts the descriptors of the process, 0 where the system does not
// tell.
func tlFiles() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(entries)
}

// tlServer accepts on loopback and talks to each connection by script.
type tlServer struct {
	t       testing.TB
	ln      net.Listener
	tls     *tls.Config // nil: plain TCP
	early   []byte      // sent before the handshake
	running tasks.Group

	mu    sync.Mutex // guards conns
	conns []*tlConn
}

// tlConn is the server's end of a connection.
type tlConn struct {
	net.Conn               // the socket
	stream   net.Conn      // what the script talks over
	ready    atomic.Bool   // the handshake is over
	closed   chan struct{} // by us
	once     sync.Once
	keyLog   bytes.Buffer

	mu      sync.Mutex // guards what follows
	hold    bool
	held    []byte
	records uint64 // written since ready
	forged  *tlForger
}

// Write is where the bytes of crypto/tls pass.
func (c *tlConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ready.Load() {
		for rest := b; len(rest) >= 5; c.records++ {
			rest = rest[min(len(rest), 5+int(rest[3])<<8+int(rest[4])):]
		}
	}
	if c.hold {
		c.held = append(c.held, b...)
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// record is what writing b puts on the wire, which stays here.
func (c *tlConn) record(b string) []byte {
	c.mu.Lock()
	c.hold = true
	c.mu.Unlock()
	io.WriteString(c.stream, b)
	c.mu.Lock()
	defer c.mu.Unlock()
	held := c.held
	c.hold, c.held = false, nil
	return held
}

func (c *tlConn) reset() {
	c.once.Do(func() { close(c.closed) })
	c.Conn.(*net.TCPConn).SetLinger(0)
	c.Conn.Close()
}

func tlServe(t testing.TB, cfg *tls.Config, change ...func(*tlServer)) *tlServer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &tlServer{t: t, ln: ln, tls: cfg}
	for _, f := range change {
		f(s)
	}
	s.running.Go(s.accept)
	t.Cleanup(s.close)
	return s
}

// tlVersion is a server's configuration for one version of TLS only.
func tlVersion(version uint16) *tls.Config {
	cfg := &tls.Config{Certificates: tlAuthority().Certificates, MinVersion: version, MaxVersion: version}
	cfg.SetSessionTicketKeys([][32]byte{{1}}) // the copies for each connection would have their own
	return cfg
}

func (s *tlServer) accept() {
	for {
		raw, err := s.ln.Accept()
		if err != nil {
			return
		}
		c := &tlConn{Conn: raw, closed: make(chan struct{})}
		c.stream = c
		if s.tls != nil {
			cfg := s.tls.Clone()
			cfg.KeyLogWriter = &c.keyLog
			c.stream = tls.Server(c, cfg)
		}
		s.mu.Lock()
		s.conns = append(s.conns, c)
		s.mu.Unlock()
		s.running.Go(func() {
			defer c.reset() // no TIME_WAIT is left of thousands of connections
			if len(s.early) > 0 {
				c.Conn.Write(s.early)
			}
			if tc, ok := c.stream.(*tls.Conn); ok && tc.Handshake() != nil {
				return
			}
			c.ready.Store(true)
			c.serve()
		})
	}
}

// serve answers lines.
func (c *tlConn) serve() {
	in := bufio.NewReader(c.stream)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch what, arg, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " "); what {
		case "ping":
			io.WriteString(c.stream, "pong "+arg+"\n")
		case "long":
			io.WriteString(c.stream, "hello world")
		case "two":
			io.WriteString(c.stream, "one\ntwo\n")
		case "half":
			whole, part := c.record("half\n"), c.record("the secret of the last borrower\n")
			c.Conn.Write(append(whole, part[:len(part)/2]...))
		case "mute":
		case "deaf":
			<-c.closed
			return
		case "rst":
			c.reset()
			return
		}
	}
}

func (s *tlServer) close() {
	s.ln.Close()
	for _, c := range s.all() {
		c.reset()
	}
	s.running.Wait()
}

func (s *tlServer) all() []*tlConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*tlConn(nil), s.conns...)
}

func (s *tlServer) accepts() int { return len(s.all()) }

// last is the connection accepted last; a client may be a moment ahead of the
// server's first accept.
func (s *tlServer) last() *tlConn {
	require.Eventually(s.t, func() bool { return s.accepts() > 0 }, time.Minute, time.Millisecond)
	all := s.all()
	return all[len(all)-1]
}

func (s *tlServer) addr() Addr {
	at := s.ln.Addr().(*net.TCPAddr)
	a := Addr{Transport: TCP, Host: at.IP.String(), Port: uint16(at.Port)}
	if s.tls != nil {
		a.Transport = TLS
	}
	return a
}

// tlPool makes a pool without a sweep. watched says whether it may hear of
// hang-ups at once; otherwise the look before a loan is all there is.
func tlPool(t testing.TB, watched bool, change ...func(*Config)) *Pool {
	t.Helper()
	cfg := Config{SweepInterval: -1, MaxOpen: 100, TLS: &tls.Config{RootCAs: tlAuthority().RootCAs}}
	for _, f := range change {
		f(&cfg)
	}
	p, err := New(cfg)
	require.NoError(t, err)
	if !watched {
		p.watching.off = true
	}
	t.Cleanup(func() {
		require.NoError(t, p.Close())
		p.check(t)
		require.Zero(t, p.Stats().Open)
	})
	return p
}

// tlWith borrows within a time that only a hang exceeds. Its ctx has no deadline,
// which would take the place of one that the last loan left behind.
func tlWith(t testing.TB, p *Pool, addr Addr, fn func(Conn) error) (id uint64, err error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	late := time.AfterFunc(20*time.Second, cancel)
	defer late.Stop()
	err = p.With(ctx, addr, func(c Conn) error {
		id = c.Info().ID
		return fn(c)
	})
	p.check(t)
	return id, err
}

var tlTokens atomic.Int64

// tlChat is one exchange in good order: the reply must be our own.
func tlChat(c Conn) error {
	token := fmt.Sprint(tlTokens.Add(1))
	if _, err := io.WriteString(c, "ping "+token+"\n"); err != nil {
		return err
	}
	return tlExpect(c, "pong "+token+"\n")
}

func tlExpect(r io.Reader, want string) error {
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil {
		return fmt.Errorf("%w after %q", err, got[:n])
	}
	if string(got) != want {
		return fmt.Errorf("got %q instead of %q: somebody else's bytes", got, want)
	}
	return nil
}

func tlNothing(Conn) error { return nil }

// tlSay sends a line and waits for no reply.
func tlSay(c Conn, line string) error {
	_, err := io.WriteString(c, line+"\n")
	return err
}

// tlArrived waits until something waits in the kernel for c.
func tlArrived(c Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return tlSomething(raw)
}

func tlSomething(raw syscall.RawConn) error {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); runtime.Gosched() {
		seen := sock.Seen{}
		if err := raw.Control(func(fd uintptr) { seen = sock.Peek(fd) }); err != nil {
			return err
		}
		if seen != (sock.Seen{}) {
			return nil
		}
	}
	return errors.New("nothing arrived")
}

// tlSettle waits until what the server did has reached the idle connection of
// addr, or has made the pool give it up.
func tlSettle(t testing.TB, p *Pool, addr Addr) {
	t.Helper()
	addr, err := addr.canonical()
	require.NoError(t, err)
	p.mu.Lock()
	var c *conn
	if s := p.sites.find(addr); s != nil {
		c = s.top
	}
	p.mu.Unlock()
	if c == nil {
		return
	}
	if err := tlSomething(c.sock.raw); err != nil {
		require.ErrorIs(t, err, net.ErrClosed)
	}
}

// tlSecure is one way to speak TLS, or TCP.
type tlSecure struct {
	name    string
	version uint16 // 0: plain
	tickets bool
}

var tlTransports = []tlSecure{
	{"tcp", 0, false},
	{"tls12", tls.VersionTLS12, true}, {"tls12_nocache", tls.VersionTLS12, false},
	{"tls13", tls.VersionTLS13, true}, {"tls13_nocache", tls.VersionTLS13, false},
}

// tlBrief is what stands for all of them where each costs much.
var tlBrief = []tlSecure{tlTransports[0], tlTransports[3]}

// index is the place of s among tlTransports.
func (s tlSecure) index() int { return slices.Index(tlTransports, s) }

func (s tlSecure) serve(t testing.TB, change ...func(*tlServer)) *tlServer {
	t.Helper()
	if s.version == 0 {
		return tlServe(t, nil, change...)
	}
	return tlServe(t, tlVersion(s.version), change...)
}

func (s tlSecure) config(cfg *Config) { cfg.TLS.SessionTicketsDisabled = !s.tickets }

// tlEach runs a test for each transport, and for the first, second and
// hundredth loan.
func tlEach(t *testing.T, transports []tlSecure, test func(t *testing.T, how tlSecure, nth int)) {
	t.Helper()
	for _, how := range transports {
		for _, nth := range short.Of([]int{1, 2, 100}, []int{2}) {
			t.Run(fmt.Sprintf("%s/loan%d", how.name, nth), func(t *testing.T) { test(t, how, nth) })
		}
	}
}

// tlFault is how a connection becomes unfit: by what the borrower does in the
// n-th loan, or by what the server does afterwards.
type tlFault struct {
	name    string
	loan    func(Conn) error // nil: an exchange in good order
	idle    func(c *tlConn)  // nil: nothing happens
	reason  CloseReason
	kept    bool // loan returns an error that Keep wraps
	onlyTLS bool
	setup   func(*Config)
	also    CloseReason // where what the kernel delivers first decides
}

var errTLKept = errors.New("the exchange went wrong for its own reasons")

func tlPoison(c Conn) error {
	if err := c.SetWriteDeadline(aLongTimeAgo); err != nil {
		return err
	}
	if n, err := c.Write(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("wrote %d bytes in the past: %w", n, err)
	}
	return c.SetWriteDeadline(time.Time{})
}

func tlPoisonHalfway(c Conn) error {
	if err := errors.Join(tlSay(c, "deaf"), c.SetWriteDeadline(time.Now().Add(20*time.Millisecond))); err != nil {
		return err
	}
	if _, err := c.Write(make([]byte, 32<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("32 MiB went to a peer that does not read: %w", err)
	}
	return c.SetWriteDeadline(time.Time{})
}

var tlFaults = []tlFault{
	{name: "close_notify alone", onlyTLS: true, reason: ClosedStale,
		idle: func(c *tlConn) { c.stream.(*tls.Conn).CloseWrite() }},
	{name: "close_notify behind what nobody read", onlyTLS: true, reason: ClosedStale, loan: tlNothing,
		idle: func(c *tlConn) { c.stream.(*tls.Conn).CloseWrite() }},
	{name: "close_notify and FIN", onlyTLS: true, reason: ClosedStale,
		idle: func(c *tlConn) { c.stream.(*tls.Conn).CloseWrite(); c.Conn.(*net.TCPConn).CloseWrite() }},
	{name: "half-close", reason: ClosedStale,
		idle: func(c *tlConn) { c.Conn.(*net.TCPConn).CloseWrite() }},
	{name: "FIN", reason: ClosedStale,
		idle: func(c *tlConn) { c.Conn.Close() }},
	{name: "RST", reason: ClosedStale,
		idle: func(c *tlConn) { c.reset() }},
	{name: "pushed byte", reason: ClosedDirty,
		idle: func(c *tlConn) { io.WriteString(c.stream, "x") }},
	{name: "pushed byte after a loan without I/O", reason: ClosedDirty, loan: tlNothing,
		idle: func(c *tlConn) { io.WriteString(c.stream, "x") }},
	{name: "pushed byte and FIN", reason: ClosedDirty,
		idle: func(c *tlConn) { io.WriteString(c.stream, "x"); c.Conn.(*net.TCPConn).CloseWrite() }},
	{name: "half a record pushed", onlyTLS: true, reason: ClosedDirty,
		idle: func(c *tlConn) { r := c.record("secret"); c.Conn.Write(r[:len(r)/2]) }},
	{name: "half a header pushed", onlyTLS: true, reason: ClosedDirty,
		idle: func(c *tlConn) { c.Conn.Write(c.record("secret")[:3]) }},
	{name: "plaintext pushed below TLS", onlyTLS: true, reason: ClosedStale, also: ClosedDirty,
		idle: func(c *tlConn) { c.Conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n")) }},

	{name: "reply left in the kernel", reason: ClosedDirty,
		loan: func(c Conn) error { return errors.Join(tlSay(c, "ping 1"), tlArrived(c)) }},
	{name: "1 of 11 bytes read", reason: ClosedDirty,
		loan: func(c Conn) error { return errors.Join(tlSay(c, "long"), tlExpect(c, "h")) }},
	{name: "half a record in crypto/tls", onlyTLS: true, reason: ClosedDirty,
		loan: func(c Conn) error { return errors.Join(tlSay(c, "half"), tlExpect(c, "half\n")) }},
	{name: "reply left in the state's buffer", reason: ClosedDirty,
		setup: func(cfg *Config) {
			cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
		},
		loan: func(c Conn) error { return errors.Join(tlSay(c, "two"), tlExpect(State[*bufio.Reader](c), "one\n")) }},

	{name: "poisoned write", reason: ClosedBroken, loan: tlPoison},
	{name: "poisoned write, kept", reason: ClosedBroken, kept: true,
		loan: func(c Conn) error { return errors.Join(tlPoison(c), Keep(errTLKept)) }},
	{name: "half a write, kept", reason: ClosedBroken, kept: true,
		loan: func(c Conn) error { return errors.Join(tlPoisonHalfway(c), Keep(errTLKept)) }},
	{name: "RST in the loan, error swallowed", reason: ClosedBroken,
		loan: func(c Conn) error {
			if err := tlSay(c, "rst"); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 1)); err == nil {
				return errors.New("read from a connection that was reset")
			}
			return nil
		}},
	{name: "half-closed by the borrower", reason: ClosedHalfClosed,
		loan: func(c Conn) error { return errors.Join(tlChat(c), c.CloseWrite()) }},
	{name: "read that timed out", reason: ClosedTimeout,
		loan: func(c Conn) error {
			err := errors.Join(tlSay(c, "mute"), c.SetReadDeadline(time.Now().Add(time.Millisecond)))
			if _, rerr := c.Read(make([]byte, 1)); err == nil && !errors.Is(rerr, os.ErrDeadlineExceeded) {
				return fmt.Errorf("read: %w", rerr)
			}
			return err
		}},
}

// Whatever made a connection unfit, after one loan or after a hundred, the next
// borrower gets another one and does not notice; and each is closed for the
// right reason.
//
// BETA-20, BETA-24, TDBC-X06, ORA-75, ORA-X02, G-04
func TestUnfitConnectionIsNeverLentAgain(t *testing.T) {
	for i, f := range tlFaults { // the brief run has each either watched or not, and others in each way
		t.Run(f.name, func(t *testing.T) {
			tlEach(t, tlTransports, func(t *testing.T, how tlSecure, nth int) {
				if f.onlyTLS && how.version == 0 {
					return
				}
				for _, watched := range short.Of([]bool{false, true}, []bool{(i+how.index())%2 == 0}) {
					t.Run(fmt.Sprintf("watched=%v", watched), func(t *testing.T) { f.run(t, how, nth, watched) })
				}
			})
		})
	}
}

func (f tlFault) run(t *testing.T, how tlSecure, nth int, watched bool) {
	tlBaseline(t)
	s := how.serve(t)
	p := tlPool(t, watched, how.config, func(cfg *Config) {
		if f.setup != nil {
			f.setup(cfg)
		}
	})
	for range nth - 1 {
		id, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		require.EqualValues(t, 1, id)
	}
	loan := f.loan
	if loan == nil {
		loan = tlChat
	}
	id, err := tlWith(t, p, s.addr(), loan)
	require.EqualValues(t, 1, id)
	if f.kept {
		require.ErrorIs(t, err, errTLKept)
	} else {
		require.NoError(t, err)
	}
	if f.idle != nil {
		tlReady(t, s.last())
		f.idle(s.last())
		tlSettle(t, p, s.addr())
	}
	for range 2 {
		id, err = tlWith(t, p, s.addr(), func(c Conn) error {
			if State[*bufio.Reader](c) == nil || c.Info().Uses > 1 {
				return tlChat(c)
			}
			return errors.Join(tlSay(c, "two"), tlExpect(State[*bufio.Reader](c), "one\ntwo\n"))
		})
		require.NoError(t, err)
		require.EqualValues(t, 2, id)
		if f.setup != nil {
			break // tlChat reads past the state's buffer
		}
	}
	require.Equal(t, 2, s.accepts())
	want := map[CloseReason]uint64{f.reason: 1}
	var closed map[CloseReason]uint64
	for deadline := time.Now().Add(time.Minute); len(closed) == 0 && time.Now().Before(deadline); runtime.Gosched() {
		closed = p.Stats().Closed // a foreign connection is closed in the background
	}
	if f.also != ClosedUnknown && closed[f.also] > 0 {
		want = map[CloseReason]uint64{f.also: 1}
	}
	require.Equal(t, want, closed)
}

// tlHarmless is what a healthy connection may go through.
var tlHarmless = []struct {
	name    string
	loan    func(Conn) error
	version uint16 // 0: any
	idle    func(t *testing.T, c *tlConn)
	wantErr error
}{
	{name: "exchanges", loan: tlChat},
	{name: "loans without I/O", loan: tlNothing}, // TLS 1.3: the tickets stay unread
	{name: "bytes written and read one by one", loan: func(c Conn) error {
		for _, b := range []byte("ping 7\n") {
			if _, err := c.Write([]byte{b}); err != nil {
				return err
			}
		}
		for range len("pong 7\n") {
			if _, err := c.Read(make([]byte, 1)); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: "past deadlines left behind", loan: func(c Conn) error {
		return errors.Join(tlChat(c), c.SetDeadline(aLongTimeAgo))
	}},
	{name: "past deadlines left behind without I/O", loan: func(c Conn) error { return c.SetDeadline(aLongTimeAgo) }},
	{name: "read that timed out, kept", loan: func(c Conn) error {
		err := c.SetReadDeadline(aLongTimeAgo)
		if _, rerr := c.Read(make([]byte, 1)); !errors.Is(rerr, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read in the past: %w", rerr)
		}
		return errors.Join(err, Keep(errTLKept))
	}, wantErr: errTLKept},
	{name: "tickets pushed while idle", loan: tlNothing, version: tls.VersionTLS13, idle: func(t *testing.T, c *tlConn) {
		f := tlForge(t, c)
		for range 3 {
			f.send(f.ticket(64))
		}
	}},
	{name: "key updates while idle", loan: tlNothing, version: tls.VersionTLS13, idle: func(t *testing.T, c *tlConn) {
		f := tlForge(t, c)
		f.send(f.keyUpdate(false))
		f.send(f.ticket(64))
		f.send(f.keyUpdate(true))
	}},
}

// A look that takes health for death makes a pool dial for every loan, which
// nobody notices but the server.
//
// G-03, G-04
func TestHealthyConnectionServesAHundredLoans(t *testing.T) {
	for _, h := range tlHarmless {
		t.Run(h.name, func(t *testing.T) {
			for _, how := range tlTransports {
				if h.version != 0 && how.version != h.version {
					continue
				}
				t.Run(how.name, func(t *testing.T) {
					tlBaseline(t)
					s := how.serve(t, func(s *tlServer) {
						if h.idle != nil {
							s.tls.SessionTicketsDisabled = true // those that come are ours
						}
					})
					p := tlPool(t, false, how.config)
					for n := range 100 {
						id, err := tlWith(t, p, s.addr(), h.loan)
						require.ErrorIs(t, err, h.wantErr)
						require.EqualValues(t, 1, id, "loan %d: closed %v", n+1, p.Stats().Closed)
						if h.idle != nil && n%50 == 1 {
							tlReady(t, s.last())
							h.idle(t, s.last())
							tlSettle(t, p, s.addr())
						}
					}
					s.last() // of them all
					require.Equal(t, 1, s.accepts())
					require.Empty(t, p.Stats().Closed)
				})
			}
		})
	}
}

func tlReady(t *testing.T, c *tlConn) {
	t.Helper()
	require.Eventually(t, c.ready.Load, time.Minute, time.Millisecond)
}

// G-03: a deadline left in the past neither makes a live connection look dead
// (above) nor a dead one alive.
func TestPastDeadlineDoesNotHideAnEnd(t *testing.T) {
	tlEach(t, tlTransports, func(t *testing.T, how tlSecure, nth int) {
		tlBaseline(t)
		s := how.serve(t)
		p := tlPool(t, false, how.config)
		for range nth {
			_, err := tlWith(t, p, s.addr(), func(c Conn) error { return errors.Join(tlChat(c), c.SetDeadline(aLongTimeAgo)) })
			require.NoError(t, err)
		}
		s.last().Conn.Close()
		tlSettle(t, p, s.addr())
		id, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		require.EqualValues(t, 2, id)
		closedSoon(t, p, map[CloseReason]uint64{ClosedStale: 1})
	})
}

// Five connections die while they are parked, each kind of death in its turn:
// the next borrowers, all at once, are served at the first attempt.
//
// BETA-24, TDBC-X06
func TestDeathOfAllParkedConnectionsCostsNobodyAnError(t *testing.T) {
	for _, how := range short.Of(tlTransports, tlBrief) {
		for name, kill := range map[string]func(*tlConn){
			"FIN":   func(c *tlConn) { c.Conn.Close() },
			"RST":   (*tlConn).reset,
			"close": func(c *tlConn) { c.stream.Close() }, // under TLS with close_notify; the socket goes too
		} {
			for _, watched := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/watched=%v", how.name, name, watched), func(t *testing.T) {
					tlBaseline(t)
					s := how.serve(t)
					p := tlPool(t, watched, how.config)
					const parked = 5
					together := func() {
						var wg tasks.Group
						all := make(chan struct{})
						var in atomic.Int32
						for range parked {
							wg.Go(func() {
								_, err := tlWith(t, p, s.addr(), func(c Conn) error {
									if in.Add(1) == parked {
										close(all)
									}
									<-all
									return tlChat(c)
								})
								if err != nil {
									t.Error(err)
								}
							})
						}
						wg.Wait()
					}
					together()
					require.Equal(t, parked, s.accepts())
					p.mu.Lock()
					idles := p.recency.all()
					p.mu.Unlock()
					for _, c := range s.all() {
						kill(c)
					}
					for _, c := range idles {
						if err := tlSomething(c.sock.raw); err != nil {
							require.ErrorIs(t, err, net.ErrClosed)
						}
					}
					together()
					require.Equal(t, 2*parked, s.accepts())
					closedSoon(t, p, map[CloseReason]uint64{ClosedStale: parked})
				})
			}
		}
	}
}

// A ticket flood takes neither the time nor the memory of a borrower: one look
// takes a bounded number of bytes out of the socket, and then the connection is
// given up. Of small tickets crypto/tls itself has enough before long, of large
// ones it would swallow four times what we let it.
//
// G-04
func TestFloodOfTicketsIsBounded(t *testing.T) {
	for size, least := range map[int]int{64: 1, 16 << 10: tlsFlood} {
		for _, nth := range short.Of([]int{1, 2, 100}, []int{2}) {
			for _, tickets := range []bool{true, false} {
				t.Run(fmt.Sprintf("%d_bytes/loan%d/cache=%v", size, nth, tickets), func(t *testing.T) {
					tlBaseline(t)
					cfg := tlVersion(tls.VersionTLS13)
					cfg.SessionTicketsDisabled = true
					s := tlServe(t, cfg)
					p := tlPool(t, false, func(cfg *Config) { cfg.TLS.SessionTicketsDisabled = !tickets })
					var taken atomic.Int64
					sys := *p.sys
					sys.readNow = func(fd uintptr, b []byte) (int, error) {
						n, err := sock.ReadNow(fd, b)
						taken.Add(int64(n))
						return n, err
					}
					p.sys = &sys
					addr := s.addr()
					addr.QoS.RecvBuffer = 2 * tlsFlood // so much waits, however the kernel feels today
					for range nth {
						_, err := tlWith(t, p, addr, tlChat)
						require.NoError(t, err)
					}
					f := tlForge(t, s.last())
					var sent atomic.Int64
					stopped := make(chan struct{})
					go func() {
						defer close(stopped)
						for f.send(f.ticket(size)) == nil {
							sent.Add(int64(size))
						}
					}()
					tlStalls(&sent)
					began := time.Now()
					id, err := tlWith(t, p, addr, tlChat)
					took := time.Since(began)
					require.NoError(t, err)
					require.EqualValues(t, 2, id)
					require.Less(t, took, bounded/2)
					require.LessOrEqual(t, taken.Load(), int64(tlsFlood+32<<10), "the budget, and one read that began within it")
					require.GreaterOrEqual(t, taken.Load(), int64(least), "it was something else that ended the look")
					closed := p.Stats().Closed // the look may have ended between two tickets, or in one
					require.EqualValues(t, 1, closed[ClosedStale]+closed[ClosedDirty], "%v", closed)
					<-stopped
				})
			}
		}
	}
}

// tlStalls waits until a writer that counts has not come on for a while: what
// lies between it and its reader is full.
func tlStalls(sent *atomic.Int64) {
	for was, quiet := int64(-1), 0; quiet < 20; quiet++ {
		if n := sent.Load(); n != was {
			was, quiet = n, 0
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Data without end is found dirty at its first byte.
func TestFloodOfDataIsBounded(t *testing.T) {
	tlEach(t, tlTransports, func(t *testing.T, how tlSecure, nth int) {
		tlBaseline(t)
		s := how.serve(t)
		p := tlPool(t, false, how.config)
		for range nth {
			_, err := tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err)
		}
		stopped := make(chan struct{})
		flooded := s.last()
		go func() {
			defer close(stopped)
			for {
				if _, err := flooded.stream.Write(make([]byte, 16<<10)); err != nil {
					return
				}
			}
		}()
		tlSettle(t, p, s.addr())
		id, err := tlWith(t, p, s.addr(), tlChat)
		require.NoError(t, err)
		require.EqualValues(t, 2, id)
		closedSoon(t, p, map[CloseReason]uint64{ClosedDirty: 1})
		<-stopped
	})
}

// TDBC-17, ORA-X12: the peer's kernel answers, its program does not.
func TestSilentPeerIsDroppedWithinTheTimeOfTheCheck(t *testing.T) {
	how := short.Of(tlTransports, tlBrief) // each has its own time-out to wait for
	tlEach(t, how, func(t *testing.T, how tlSecure, nth int) {
		tlBaseline(t)
		s := how.serve(t)
		p := tlPool(t, false, how.config, func(cfg *Config) {
			cfg.Check = func(_ context.Context, c Conn) error { return tlChat(c) }
			cfg.CheckAfterIdle, cfg.HookTimeout = -1, 200*time.Millisecond
		})
		for range nth - 1 {
			id, err := tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err)
			require.EqualValues(t, 1, id)
		}
		_, err := tlWith(t, p, s.addr(), func(c Conn) error { return errors.Join(tlChat(c), tlSay(c, "deaf")) })
		require.NoError(t, err)

		began := time.Now()
		id, err := tlWith(t, p, s.addr(), tlChat)
		took := time.Since(began)
		require.NoError(t, err)
		require.EqualValues(t, 2, id)
		require.GreaterOrEqual(t, took, 200*time.Millisecond)
		require.Less(t, took, bounded/2)
		closedSoon(t, p, map[CloseReason]uint64{ClosedCheckFailed: 1})
		require.Equal(t, 2, s.accepts())
	})
}

// ORA-X12
func TestCheckIsLeftOutWhileAConnectionIsTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := faultnet.NewMem()
		defer mem.Close()
		mem.Host("db").Serve(func(c *faultnet.Conn) { io.Copy(io.Discard, c) })
		var checks []time.Duration
		began := time.Now()
		p, err := New(Config{
			CheckAfterIdle: time.Second, SweepInterval: -1,
			Check: func(context.Context, Conn) error { checks = append(checks, time.Since(began)); return nil },
			Dialers: map[Transport]DialFunc{"mem": func(ctx context.Context, a Addr) (net.Conn, error) {
				return mem.Dial(ctx, a.Host)
			}},
		})
		require.NoError(t, err)
		defer p.Close()
		addr := Addr{Transport: "mem", Host: "db"}
		for _, pause := range []time.Duration{0, time.Second - 1, time.Second, time.Second - 1, 2 * time.Second, 0} {
			time.Sleep(pause)
			require.NoError(t, p.With(t.Context(), addr, tlNothing))
			p.check(t)
		}
		require.Equal(t, []time.Duration{2*time.Second - 1, 5*time.Second - 2}, checks)
		require.EqualValues(t, 1, p.Stats().Dials)
	})
}

// What fails its check is gone with all it had, ten thousand times over.
//
// TDBC-X11
func TestTenThousandFailedChecksLeaveNoDescriptorBehind(t *testing.T) {
	tlBaseline(t)
	// Or the garbage collector would close what the pool forgets.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	rounds := short.Of(10_000, 1_000)
	if raceEnabled {
		rounds = short.Of(2_000, 500) * stress()
	}
	s, err := faultnet.Start(faultnet.Options{Network: "unix"})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	failed := errors.New("no")
	p := tlPool(t, true, func(cfg *Config) {
		cfg.Check, cfg.CheckAfterIdle = func(context.Context, Conn) error { return failed }, -1
	})
	addr := Addr{Transport: Unix, Host: s.Host()}
	_, err = tlWith(t, p, addr, tlNothing)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return s.Open() == 1 }, time.Minute, time.Millisecond)
	files := tlFiles()
	for range rounds {
		_, err := tlWith(t, p, addr, tlNothing)
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return s.Open() == 1 && tlFiles() <= files }, time.Minute, time.Millisecond,
		"%d descriptors after %d failed checks, %d before", tlFiles(), rounds, files)
	st := p.Stats()
	require.Equal(t, map[CloseReason]uint64{ClosedCheckFailed: uint64(rounds)}, st.Closed)
	require.Equal(t, 1, st.Open)
}

// The peer sends something before the handshake that crypto/tls passes over in
// silence, as if it had been said inside.
func TestBytesBeforeTheHandshakeFailTheDial(t *testing.T) {
	for _, how := range tlTransports[1:] {
		for name, early := range map[string][]byte{
			"a warning": {21, 3, 3, 0, 2, 1, 112}, // unrecognized_name, which is dropped
			"plaintext": []byte("220 ready\r\n"),
		} {
			t.Run(how.name+"/"+name, func(t *testing.T) {
				tlBaseline(t)
				s := how.serve(t, func(s *tlServer) { s.early = early })
				p := tlPool(t, false, how.config, func(cfg *Config) {
					// The socket comes with the bytes in it, whatever
					// the scheduler does.
					cfg.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
						nc, err := dialSocket(ctx, a)
						if err != nil {
							return nil, err
						}
						raw, err := nc.(syscall.Conn).SyscallConn()
						if err == nil {
							err = tlSomething(raw)
						}
						return nc, err
					}}
				})
				_, err := tlWith(t, p, s.addr(), func(Conn) error { t.Error("lent"); return nil })
				var perr *Error
				require.ErrorAs(t, err, &perr)
				require.Equal(t, StageHandshake, perr.Stage)
				require.Equal(t, KindBadMessage, perr.Kind, "%v", err)
				require.Zero(t, p.Stats().Open)
			})
		}
	}
}

// tlOwnTLS makes a dialer of TLS do the handshake itself, over a socket that
// the pool does not know.
func tlOwnTLS(cfg *Config) {
	trust := cfg.TLS.Clone()
	cfg.Dialers = map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
		own := trust.Clone()
		if !own.SessionTicketsDisabled {
			own.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		}
		d := tls.Dialer{Config: own}
		return d.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", a.Host, a.Port))
	}}
}

// A custom dialer's own *tls.Conn has a socket that cannot be switched. What
// can be said of it is said all the same, and within a bounded time.
//
// BETA-24, G-04
func TestTLSOfACustomDialerIsLookedInto(t *testing.T) {
	for _, how := range short.Of(tlTransports[1:], tlTransports[3:4]) {
		t.Run(how.name, func(t *testing.T) {
			t.Run("alive", func(t *testing.T) {
				tlBaseline(t)
				s := how.serve(t)
				p := tlPool(t, false, how.config, tlOwnTLS)
				began := time.Now()
				for n := range 100 {
					loan := tlChat
					if n < 50 {
						loan = tlNothing // tickets, if there are any, stay unread
					}
					_, err := tlWith(t, p, s.addr(), loan)
					require.NoError(t, err)
				}
				require.Less(t, time.Since(began), bounded/2)
				require.Equal(t, 1, s.accepts())
				require.Empty(t, p.Stats().Closed)
				require.Zero(t, p.Stats().Unprobed)
			})
			for _, f := range tlFaults {
				if f.name == "half a write, kept" {
					continue // its close takes the five seconds of crypto/tls
				}
				f.setup = tlChain(f.setup, tlOwnTLS)
				t.Run(f.name, func(t *testing.T) { f.run(t, how, 2, false) })
			}
			t.Run("a look does not wait for a peer that has nothing to say", func(t *testing.T) {
				tlBaseline(t)
				s := how.serve(t)
				p := tlPool(t, false, how.config, tlOwnTLS)
				_, err := tlWith(t, p, s.addr(), tlNothing)
				require.NoError(t, err)
				var longest time.Duration
				for range 20 {
					p.mu.Lock()
					c := p.sites.find(s.addr()).top
					p.mu.Unlock()
					began := time.Now()
					reason, err := c.sock.readThrough(tlsNoWait, time.Millisecond)
					longest = max(longest, time.Since(began))
					require.NoError(t, err)
					require.Equal(t, ClosedUnknown, reason)
				}
				require.Less(t, longest, bounded/2)
			})
		})
	}
}

func tlChain(fs ...func(*Config)) func(*Config) {
	return func(cfg *Config) {
		for _, f := range fs {
			if f != nil {
				f(cfg)
			}
		}
	}
}

// tlOwnGoroutines counts the goroutines that run code of the pool.
func tlOwnGoroutines() (n int) {
	buf := make([]byte, 4<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, "connpool.(*Pool)") || strings.Contains(stack, "connpool.(*conn)") || strings.Contains(stack, "connpool.(*probe)") {
			n++
		}
	}
	return n
}

// Keeping connections costs a descriptor each and nothing else: no goroutine,
// nothing to look with.
func TestConnectionsAndLooksNeedNoGoroutineAndNoDescriptor(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, true, how.config)
			open := func(n int) {
				var wg tasks.Group
				all := make(chan struct{})
				var in atomic.Int32
				for range n {
					wg.Go(func() {
						if err := p.With(context.Background(), s.addr(), func(c Conn) error {
							if in.Add(1) == int32(n) {
								close(all)
							}
							<-all
							return tlChat(c)
						}); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				p.check(t)
			}
			open(1)
			require.Eventually(t, func() bool { return tlOwnGoroutines() <= 1 }, time.Minute, time.Millisecond)
			files, goroutines := tlFiles(), tlOwnGoroutines()
			many := short.Of(40, 5)
			open(many)
			require.Equal(t, many, p.Stats().Idle)
			require.Eventually(t, func() bool { return tlOwnGoroutines() == goroutines }, time.Minute, time.Millisecond)
			if files > 0 {
				require.Equal(t, files+2*(many-1), tlFiles(), "two ends of each connection, and nothing else")
			}

			// Each is looked at, and what was needed for it is seen at the
			// moment of the look.
			sys := *p.sys
			looks := 0
			sys.peek = func(fd uintptr) sock.Seen {
				looks++
				if files > 0 {
					require.Equal(t, files+2*(many-1), tlFiles())
				}
				require.LessOrEqual(t, tlOwnGoroutines(), goroutines+1, "this one looks")
				return sock.Peek(fd)
			}
			p.mu.Lock()
			all := p.recency.all()
			p.mu.Unlock()
			for _, c := range all {
				c.sock.sys = &sys
				reason, err := c.sock.probe(&p.cfg, c.nc)
				require.NoError(t, err)
				require.Equal(t, ClosedUnknown, reason)
			}
			require.Equal(t, many, looks)
			if !raceEnabled {
				c := all[0]
				c.sock.sys = &realSystem
				require.Zero(t, patience.Allocs(100, func() { c.sock.probe(&p.cfg, c.nc) }), "a timer, a goroutine, a closure: all of them allocate")
			}
		})
	}
}

// tlLog gathers log lines.
type tlLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *tlLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *tlLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

//go:noinline
func tlBorrowsAndLeaks(p *Pool, addr Addr, leak *Conn) error {
	return p.With(context.Background(), addr, func(c Conn) error {
		*leak = c
		return nil
	})
}

//go:noinline
func tlUsesWhatWasLeaked(c Conn) error {
	_, err := c.Write([]byte("mine?"))
	return err
}

// Two goroutines use a Conn that the first of them leaked, while the connection
// is lent to a third: they are refused, the rightful borrower's exchange is
// untouched, and the log has the stacks of who borrowed and who used.
//
// ORA-49
func TestLeakedConnIsRefusedAndDebugModeNamesBothSides(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			var log tlLog
			p := tlPool(t, false, how.config, func(cfg *Config) {
				cfg.Debug, cfg.Logger = true, slog.New(slog.NewTextHandler(&log, nil))
			})
			var leaked Conn
			require.NoError(t, tlBorrowsAndLeaks(p, s.addr(), &leaked))
			_, err := tlWith(t, p, s.addr(), func(c Conn) error {
				var users tasks.Group
				for range 2 {
					users.Go(func() {
						if err := tlUsesWhatWasLeaked(leaked); !errors.Is(err, ErrReturned) {
							t.Errorf("%v", err)
						}
					})
				}
				defer users.Wait()
				return tlChat(c)
			})
			require.NoError(t, err)
			p.check(t)
			text := log.String()
			require.Equal(t, 2, strings.Count(text, "used after it was given back"), "%s", text)
			require.Contains(t, text, "level=ERROR")
			for line := range strings.SplitSeq(text, "\n") {
				if !strings.Contains(line, "used after it was given back") {
					continue
				}
				_, stacks, found := strings.Cut(line, `"borrowed by"=`)
				require.True(t, found, "%s", line)
				borrowed, used, found := strings.Cut(stacks, `"used by"=`)
				require.True(t, found, "%s", line)
				require.Contains(t, borrowed, "tlBorrowsAndLeaks")
				require.NotContains(t, borrowed, "tlUsesWhatWasLeaked")
				require.Contains(t, used, "tlUsesWhatWasLeaked")
				require.Contains(t, line, s.addr().String())
			}
			require.Equal(t, 1, s.accepts())
		})
	}
}
