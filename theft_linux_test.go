package connpool

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The tests of this file close descriptors behind Go's back. A mistake in one
// would hit whatever the number belongs to, so each runs in a process of its
// own; its servers stay in the process that started it, where nobody steals,
// and so that the numbers of the child are taken by clients alone.

const (
	childVar = "CONNPOOL_TEST_CHILD"
	peersVar = "CONNPOOL_TEST_PEERS"
)

// inChild starts servers and has the calling test run again in a child process,
// where inChild returns their addresses and true. In the parent it returns false
// when the child has ended; the test fails if the child did.
func inChild(t *testing.T, serve func() map[string]Addr) (map[string]Addr, bool) {
	t.Helper()
	if os.Getenv(childVar) == t.Name() {
		var peers map[string]Addr
		require.NoError(t, json.Unmarshal([]byte(os.Getenv(peersVar)), &peers))
		return peers, true
	}
	peers, err := json.Marshal(serve())
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	limit := 5 * time.Minute
	if stress() > 1 {
		limit = time.Hour
	}
	if end, ok := t.Deadline(); ok { // the child must not outlive this process
		limit = min(limit, time.Until(end)*9/10)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	args := []string{"-test.v", "-test.count=1", "-test.run=^" + t.Name() + "$", "-test.cpu=" + strconv.Itoa(runtime.GOMAXPROCS(0)),
		"-test.timeout=" + (limit - limit/10).String()}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), childVar+"="+t.Name(), peersVar+"="+string(peers))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: "+t.Name(), "the child must have run the test")
	if testing.Verbose() {
		t.Logf("%s", out)
	}
	return nil, false
}

// namedServer answers each line with its own name, the number of the connection
// and the number of the line, so that a client sees who answered, and whether
// anybody else wrote to or read from its connection.
type namedServer struct {
	name string
	addr Addr
	tls  *tls.Config

	running tasks.Group
	mu      sync.Mutex // guards what follows
	ln      net.Listener
	open    map[net.Conn]int // number of each
	serial  int
	gone    []string // numbers of those that ended, in that order
}

func startNamed(t *testing.T, transport Transport, name, host string) *namedServer {
	t.Helper()
	s := &namedServer{name: name, addr: Addr{Transport: transport, Host: host}, open: make(map[net.Conn]int)}
	switch transport {
	case Unix:
		dir, err := os.MkdirTemp("", "cp") // t.TempDir may be too long for a socket
		require.NoError(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		s.addr.Host = filepath.Join(dir, "s")
	case TLS:
		s.tls = &tls.Config{Certificates: []tls.Certificate{namedCert()}}
	}
	require.NoError(t, s.start())
	t.Cleanup(func() { s.stop(); s.running.Wait() })
	return s
}

var namedCert = sync.OnceValue(func() tls.Certificate { return faultnet.NewCA().Server("localhost") })

// start listens, at the address of last time if there was one.
func (s *namedServer) start() error {
	network, at := "tcp4", net.JoinHostPort(s.addr.Host, strconv.Itoa(int(s.addr.Port)))
	if s.addr.Transport == Unix {
		network, at = "unix", s.addr.Host
	}
	ln, err := net.Listen(network, at)
	if err != nil {
		return err
	}
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		s.addr.Port = uint16(a.Port)
	}
	s.mu.Lock()
	s.ln = ln
	s.mu.Unlock()
	s.running.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			if s.ln != ln {
				s.mu.Unlock()
				nc.Close()
				continue
			}
			s.serial++
			serial := s.serial
			s.open[nc] = serial
			s.running.Go(func() { s.serve(nc, serial) })
			s.mu.Unlock()
		}
	})
	return nil
}

func (s *namedServer) serve(raw net.Conn, serial int) {
	defer func() {
		raw.Close()
		s.mu.Lock()
		delete(s.open, raw)
		s.gone = append(s.gone, strconv.Itoa(serial))
		s.mu.Unlock()
	}()
	nc := raw
	if s.tls != nil {
		nc = tls.Server(raw, s.tls)
	}
	r := bufio.NewReader(nc)
	for n := 1; ; n++ {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if line == "gone?\n" {
			s.mu.Lock()
			line = strings.Join(s.gone, ",") + "\n"
			s.mu.Unlock()
		}
		if _, err := fmt.Fprintf(nc, "%s %d %d %s", s.name, serial, n, line); err != nil {
			return
		}
	}
}

// cut ends all connections: by a reset, or in order.
func (s *namedServer) cut(reset bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for nc := range s.open {
		if tcp, ok := nc.(*net.TCPConn); ok && reset {
			tcp.SetLinger(0)
		}
		nc.Close()
	}
}

// stop ends the listener and all connections.
func (s *namedServer) stop() {
	s.mu.Lock()
	ln := s.ln
	s.ln = nil
	s.mu.Unlock()
	if ln != nil {
		ln.Close()
	}
	s.cut(false)
}

// enquire sends a line and returns the reply.
func enquire(rw io.ReadWriter, line string) (string, error) {
	if _, err := io.WriteString(rw, line+"\n"); err != nil {
		return "", err
	}
	var reply []byte
	for b := make([]byte, 512); ; {
		n, err := rw.Read(b)
		reply = append(reply, b[:n]...)
		switch {
		case n > 0 && reply[len(reply)-1] == '\n':
			return string(reply[:len(reply)-1]), nil
		case err != nil:
			return "", err
		case n == 0:
			return "", io.ErrNoProgress
		}
	}
}

// askNamed is a borrower that makes sure of who answers.
func askNamed(c Conn, name string) error {
	reply, err := enquire(c, "x")
	if err == nil && !strings.HasPrefix(reply, name+" ") {
		return fmt.Errorf("%w: %q in the place of %s", errWrongPeer, reply, name)
	}
	return err
}

var errWrongPeer = errors.New("somebody else answered")

// rawSock is a socket by its number alone, with no Go object that knows it.
type rawSock int

func (s rawSock) Read(b []byte) (int, error)  { return unix.Read(int(s), b) }
func (s rawSock) Write(b []byte) (int, error) { return unix.Write(int(s), b) }
func (s rawSock) Close() error                { return unix.Close(int(s)) }

// dialRaw connects to a TCP server of this machine.
func dialRaw(to Addr) (rawSock, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	tv := unix.Timeval{Sec: 10}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	sa := &unix.SockaddrInet4{Port: int(to.Port)}
	copy(sa.Addr[:], net.ParseIP(to.Host).To4())
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return rawSock(fd), nil
}

// stranger is a connection that is none of the pool's business.
type stranger struct {
	rwc    io.ReadWriteCloser
	fd     int
	who    sock.ID
	serial int // 0: not known yet
	lines  int
}

func newStranger(rwc io.ReadWriteCloser, fd int) *stranger {
	who, _ := sock.Identify(uintptr(fd))
	return &stranger{rwc: rwc, fd: fd, who: who}
}

// dialStranger opens one in the ordinary way.
func dialStranger(to Addr) (*stranger, error) {
	nc, err := net.Dial("tcp4", net.JoinHostPort(to.Host, strconv.Itoa(int(to.Port))))
	if err != nil {
		return nil, err
	}
	return newStranger(nc, numberOf(nc.(syscall.Conn))), nil
}

func numberOf(sc syscall.Conn) (n int) {
	raw, err := sc.SyscallConn()
	if err != nil {
		return -1
	}
	raw.Control(func(fd uintptr) { n = int(fd) })
	return n
}

// check fails if anybody but its owner has read from, written to, or closed the
// connection.
func (s *stranger) check() error {
	if nc, ok := s.rwc.(net.Conn); ok {
		nc.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if !sock.Still(uintptr(s.fd), s.who) {
		return fmt.Errorf("the stranger's descriptor %d was closed", s.fd)
	}
	token := strconv.FormatUint(rand.Uint64(), 36)
	reply, err := enquire(s.rwc, token)
	if err != nil {
		return fmt.Errorf("the stranger's connection fails: %w", err)
	}
	s.lines++
	var serial, line int
	if _, err := fmt.Sscanf(reply, "stranger %d %d "+token, &serial, &line); err != nil {
		return fmt.Errorf("the stranger asked %s and read %q", token, reply)
	}
	if s.serial == 0 {
		s.serial = serial
	}
	if serial != s.serial || line != s.lines {
		return fmt.Errorf("the stranger's line %d of connection %d arrived as line %d of %d", s.lines, s.serial, line, serial)
	}
	return nil
}

// leave is the end of a stranger, who closes what he owns.
func (s *stranger) leave() error {
	if err := s.check(); err != nil {
		return err
	}
	return s.rwc.Close()
}

// errorLog counts the records of level Error that name a reason.
type errorLog struct {
	slog.Handler
	quarantined atomic.Int64
}

func (l *errorLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *errorLog) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if r.Level == slog.LevelError && a.Key == "reason" && a.Value.String() == ClosedQuarantined.String() {
			l.quarantined.Add(1)
		}
		return true
	})
	return nil
}

// watched is a pool whose quarantine is observed in all three ways.
type watched struct {
	*Pool
	log  errorLog
	told atomic.Int64
	with atomic.Int64 // other closes
}

func newWatched(t testing.TB, cfg Config) *watched {
	t.Helper()
	w := &watched{}
	cfg.TLS = &tls.Config{InsecureSkipVerify: true} // who answers is seen in the reply
	cfg.Logger = slog.New(&w.log)
	cfg.Trace = &Trace{Closed: func(i CloseInfo) {
		if i.Reason == ClosedQuarantined {
			w.told.Add(1)
		} else {
			w.with.Add(1)
		}
	}}
	var err error
	w.Pool, err = New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { w.Close() })
	return w
}

func (w *watched) quarantined() error {
	n, told, logged := int64(w.Stats().Closed[ClosedQuarantined]), w.told.Load(), w.log.quarantined.Load()
	if n != told || n != logged {
		return fmt.Errorf("%d in quarantine, %d told to Trace, %d logged as errors", n, told, logged)
	}
	return nil
}

// The thefts: each takes the descriptor fd away from its owner behind Go's back
// and gives the number to a stranger. In company somebody else may be quicker to
// get it.
var thefts = map[string]func(to Addr, fd int, company bool) (*stranger, error){
	"close": func(to Addr, fd int, company bool) (*stranger, error) {
		if err := syscall.Close(fd); err != nil {
			return nil, err
		}
		return takeNumber(to, fd, company)
	},
	"dup3": func(to Addr, fd int, _ bool) (*stranger, error) {
		s, err := dialRaw(to)
		if err != nil {
			return nil, err
		}
		if err := unix.Dup3(int(s), fd, unix.O_CLOEXEC); err != nil {
			return nil, err
		}
		if err := s.Close(); err != nil {
			return nil, err
		}
		return newStranger(rawSock(fd), fd), nil
	},
	"collected": func(to Addr, fd int, company bool) (*stranger, error) {
		who, _ := sock.Identify(uintptr(fd))
		func() { runtime.KeepAlive(os.NewFile(uintptr(fd), "a slip")) }()
		for range 1000 {
			runtime.GC()
			if !sock.Still(uintptr(fd), who) {
				return takeNumber(to, fd, company)
			}
			runtime.Gosched()
		}
		return nil, errors.New("os.File's clean-up did not close the descriptor")
	},
}

// takeNumber opens strangers until one has the number fd, which is free.
func takeNumber(to Addr, fd int, company bool) (*stranger, error) {
	var others []*stranger
	defer func() {
		for _, o := range others {
			o.rwc.Close()
		}
	}()
	for range 256 {
		s, err := dialStranger(to)
		if err != nil || s.fd == fd || company {
			return s, err
		}
		others = append(others, s)
	}
	return nil, fmt.Errorf("nobody got the number %d", fd)
}

// theftServers starts one server of each transport, and the strangers'.
func theftServers(t *testing.T) map[string]Addr {
	return map[string]Addr{
		"tcp":      startNamed(t, TCP, "tcp", "127.0.0.1").addr,
		"tls":      startNamed(t, TLS, "tls", "127.0.0.1").addr,
		"unix":     startNamed(t, Unix, "unix", "").addr,
		"other":    startNamed(t, TCP, "other", "127.0.0.1").addr,
		"stranger": startNamed(t, TCP, "stranger", "127.0.0.1").addr,
	}
}

// fell is how the borrower ends that the theft happened to.
var errFell = errors.New("fell")

// stealing is one round: a connection is stolen at some stage of its life, and
// then something happens to it.
type stealing struct {
	peers     map[string]Addr
	transport string
	theft     string
	stage     string // idle, borrowed, setup
	end       string
	company   bool // others open and close sockets meanwhile
}

func (s stealing) String() string {
	return s.transport + " by " + s.theft + " while " + s.stage + ", then " + s.end
}

var stealingEnds = map[string][]string{
	"idle":     {"lend", "evict", "sweep", "CloseIdle", "Retire", "Close", "make room", "MarkDead"},
	"borrowed": {"lend", "evict", "sweep", "CloseIdle", "Retire", "Close", "make room", "MarkDead", "error", "panic", "Conn.Close", "waiter", "reset"},
	"setup":    {"lend", "setup error"},
}

// run returns the stranger that has the number now.
func (s stealing) run(t *testing.T) (*stranger, error) {
	addr := s.peers[s.transport]
	steal := thefts[s.theft]
	var thief *stranger
	var failed error
	resets := 0
	cfg := Config{MaxPerAddr: 1, MaxOpen: 1}
	if s.stage == "setup" {
		cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			if thief != nil || failed != nil {
				return nil, nil
			}
			thief, failed = steal(s.peers["stranger"], numberOf(nc.(syscall.Conn)), s.company)
			if s.end == "setup error" {
				return nil, errFell
			}
			return nil, failed
		}
	}
	if s.end == "reset" {
		cfg.Reset = func(_ context.Context, c Conn) error {
			resets++
			return askNamed(c, s.transport)
		}
	}
	p := newWatched(t, cfg)
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	good := func(name string) error {
		return p.With(ctx, s.peers[name], func(c Conn) error { return askNamed(c, name) })
	}
	waited := make(chan error, 1)
	fd := -1
	err := func() (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = v.(error)
			}
		}()
		return p.With(ctx, addr, func(c Conn) error {
			if err := askNamed(c, s.transport); err != nil {
				return err
			}
			fd = numberOf(c)
			if s.end == "waiter" {
				go func() { waited <- good(s.transport) }()
				for p.Stats().Waiting == 0 && ctx.Err() == nil {
					runtime.Gosched()
				}
			}
			if s.stage != "borrowed" {
				return nil
			}
			if thief, failed = steal(s.peers["stranger"], fd, s.company); failed != nil {
				return failed
			}
			switch s.end {
			case "error":
				return errFell
			case "panic":
				panic(errFell)
			case "Conn.Close":
				return c.Close()
			}
			return nil
		})
	}()
	if errors.Is(err, errFell) || s.stage == "setup" && errors.Is(err, errStolen) {
		err = nil
	}
	if err == nil && s.stage == "idle" {
		thief, failed = steal(s.peers["stranger"], fd, s.company)
	}
	if err = errors.Join(err, failed); err != nil {
		return thief, fmt.Errorf("the theft: %w", err)
	}
	p.check(t)
	switch s.end {
	case "lend":
		err = good(s.transport)
	case "waiter":
		err = <-waited
	case "make room":
		err = good("other")
	case "evict":
		p.EvictLRU()
	case "sweep":
		sweepAll(p.Pool)
	case "CloseIdle":
		p.CloseIdle()
	case "Retire":
		p.Retire(addr)
	case "MarkDead":
		if !s.company {
			marked := 0
			if nc, ok := thief.rwc.(syscall.Conn); ok {
				marked = p.MarkDead(nc)
			} else {
				marked = p.MarkDead(numbered(thief.fd))
			}
			if marked != 1 {
				err = fmt.Errorf("MarkDead found %d", marked)
			}
		} else {
			p.CloseIdle()
		}
	case "Close":
		err = p.Close()
	}
	if err != nil {
		return thief, err
	}
	p.check(t)
	for { // a failed Setup is told to its borrower before it is cleared away
		err := p.quarantined()
		n := p.Stats().Closed[ClosedQuarantined]
		if err == nil && n == 1 {
			break
		}
		if n > 1 || ctx.Err() != nil {
			return thief, fmt.Errorf("%d in quarantine (%v)", n, err)
		}
		runtime.Gosched()
	}
	if resets > 0 {
		return thief, errors.New("Reset ran over a stolen descriptor")
	}
	if s.end != "Close" { // the slot is free, and the pool works
		if err := good(s.transport); err != nil {
			return thief, fmt.Errorf("afterwards: %w", err)
		}
	}
	return thief, p.Close()
}

// numbered lets a bare descriptor be shown to the pool.
type numbered int

func (n numbered) SyscallConn() (syscall.RawConn, error) { return n, nil }
func (n numbered) Control(f func(uintptr)) error         { f(uintptr(n)); return nil }
func (n numbered) Read(func(uintptr) bool) error         { return errors.ErrUnsupported }
func (n numbered) Write(func(uintptr) bool) error        { return errors.ErrUnsupported }

// every lists each way of stealing once.
func everyStealing(peers map[string]Addr) (all []stealing) {
	for _, transport := range []string{"tcp", "tls", "unix"} {
		for _, theft := range []string{"close", "dup3", "collected"} {
			for _, stage := range []string{"idle", "borrowed", "setup"} {
				for _, end := range stealingEnds[stage] {
					all = append(all, stealing{peers: peers, transport: transport, theft: theft, stage: stage, end: end})
				}
			}
		}
	}
	return all
}

func theftRounds() int {
	if stress() > 1 {
		return 100_000
	}
	return short.Of(300, 60)
}

// stealAll runs rounds of every kind. The strangers stay for a while, through
// collections of garbage, and each must find its connection untouched.
func stealAll(t *testing.T, peers map[string]Addr, company bool) {
	t.Helper()
	kinds := everyStealing(peers)
	rand.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	var staying []*stranger
	farewell := func() {
		for range 5 {
			runtime.GC()
		}
		for _, s := range staying {
			require.NoError(t, s.leave())
		}
		staying = nil
	}
	for i := range theftRounds() {
		s := kinds[i%len(kinds)]
		s.company = company
		if s.theft == "collected" && i >= len(kinds) && i%16 != 0 {
			s.theft = "close" // a collection costs more than all the rest
		}
		thief, err := s.run(t)
		require.NoError(t, err, "%v", s)
		require.NoError(t, thief.check(), "%v", s)
		if staying = append(staying, thief); len(staying) == 64 {
			farewell()
		}
	}
	farewell()
}

// BETA-25, BETA-26, G-01, G-02
func TestAStolenConnectionIsNeverLentNorTouched(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	stealAll(t, peers, false)
}

// BETA-25, BETA-26, G-01
func TestThievesAndThePoolNeverHurtInnocentOpeners(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	stop := make(chan struct{})
	var innocent tasks.Group
	opened := 0
	wrong := make(chan error, 1)
	innocent.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			s, err := dialStranger(peers["stranger"])
			if err == nil {
				err = s.check()
			}
			if err == nil {
				err = s.leave()
			}
			if err != nil {
				select {
				case wrong <- err:
				default:
				}
				return
			}
			opened++
		}
	})
	stealAll(t, peers, true)
	close(stop)
	innocent.Wait()
	select {
	case err := <-wrong:
		t.Fatal("an innocent opener: ", err)
	default:
	}
	require.Greater(t, opened, 10)
}

// fillBelow takes every free number below n, so that the next to be opened is
// n, which must be free.
func fillBelow(t *testing.T, n int) {
	t.Helper()
	for range 4096 {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		if fd >= n {
			unix.Close(fd)
			return
		}
		t.Cleanup(func() { unix.Close(fd) })
	}
	t.Fatal("the numbers do not end")
}

// BETA-28
func TestThePoolsOwnNextDialProvesTheOlderEntryDead(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	for _, transport := range []string{"tcp", "tls", "unix"} {
		for _, check := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s,identity=%v", transport, check), func(t *testing.T) {
				p := newWatched(t, Config{SweepInterval: -1, NoFDCheck: !check})
				ctx := context.Background()
				var fd, next int
				require.NoError(t, p.With(ctx, peers[transport], func(c Conn) error {
					fd = numberOf(c)
					return askNamed(c, transport)
				}))
				require.NoError(t, syscall.Close(fd))
				fillBelow(t, fd)
				require.NoError(t, p.With(ctx, peers["other"], func(c Conn) error {
					next = numberOf(c)
					// Before anybody asks for it, the stale entry is gone.
					for a := range p.Addrs() {
						if a == peers[transport] {
							return errors.New("the stale entry is still there")
						}
					}
					return askNamed(c, "other")
				}))
				require.Equal(t, fd, next)
				closedSoon(t, p.Pool, map[CloseReason]uint64{ClosedQuarantined: 1})
				require.NoError(t, p.quarantined())
				p.check(t)

				for range 5 {
					runtime.GC()
				}
				// Neither is hurt, and nobody talks across.
				for _, name := range []string{transport, "other", transport, "other"} {
					require.NoError(t, p.With(ctx, peers[name], func(c Conn) error { return askNamed(c, name) }))
				}
				require.Equal(t, uint64(3), p.Stats().Dials)
				p.check(t)
			})
		}
	}
}

// BETA-28
func TestABorrowerWhoseNumberWasDialledAgainIsStoppedAtOnce(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	for _, transport := range []string{"tcp", "tls", "unix"} {
		t.Run(transport, func(t *testing.T) {
			p := newWatched(t, Config{SweepInterval: -1})
			ctx := context.Background()
			other := func() error {
				return p.With(ctx, peers["other"], func(c Conn) error { return askNamed(c, "other") })
			}
			err := p.With(ctx, peers[transport], func(c Conn) error {
				fd := numberOf(c)
				require.NoError(t, syscall.Close(fd))
				fillBelow(t, fd)
				require.NoError(t, other())
				_, err := c.Write([]byte("to a stranger\n"))
				require.Error(t, err)
				_, err = c.Read(make([]byte, 1))
				require.Error(t, err)
				_, err = c.SyscallConn()
				require.Error(t, err)
				require.Error(t, c.CloseWrite())
				require.NotErrorIs(t, err, ErrReturned)
				p.check(t)
				return nil
			})
			require.NoError(t, err)
			require.Equal(t, map[CloseReason]uint64{ClosedQuarantined: 1}, p.Stats().Closed)
			require.NoError(t, p.quarantined())
			require.NoError(t, other())
			require.Equal(t, uint64(2), p.Stats().Dials)
			p.check(t)
		})
	}
}

// BETA-23, BETA-27
func TestMarkDeadOfASocketMadeOutsideRemovesWhatHasItsNumber(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	p := newWatched(t, Config{SweepInterval: -1})
	ctx := context.Background()
	numbers := make(map[string]int)
	visit := func(names ...string) {
		t.Helper()
		for _, name := range names {
			require.NoError(t, p.With(ctx, peers[name], func(c Conn) error {
				numbers[name] = numberOf(c)
				return askNamed(c, name)
			}))
		}
	}
	visit("tcp", "tls", "unix", "other")

	thief, err := thefts["close"](peers["stranger"], numbers["tls"], false)
	require.NoError(t, err)
	outside := thief.rwc.(syscall.Conn)
	require.Equal(t, 1, p.MarkDead(outside))
	require.Equal(t, map[CloseReason]uint64{ClosedQuarantined: 1}, p.Stats().Closed)
	require.Equal(t, 3, p.Stats().Idle, "unrelated ones are untouched")
	require.Equal(t, 0, p.MarkDead(outside), "it is gone")
	p.check(t)

	// One that is borrowed leaves when it is given back, and cannot be used
	// meanwhile.
	var second *stranger
	require.NoError(t, p.With(ctx, peers["tcp"], func(c Conn) error {
		second, err = thefts["close"](peers["stranger"], numbers["tcp"], false)
		require.NoError(t, err)
		require.Equal(t, 1, p.MarkDead(second.rwc.(syscall.Conn)))
		require.Equal(t, 0, p.MarkDead(second.rwc.(syscall.Conn)))
		_, err := c.Write([]byte("x"))
		require.Error(t, err)
		return nil
	}))
	require.Equal(t, map[CloseReason]uint64{ClosedQuarantined: 2}, p.Stats().Closed)
	require.NoError(t, p.quarantined())
	p.check(t)
	visit("unix", "other")
	require.Equal(t, uint64(4), p.Stats().Dials)
	visit("tcp", "tls")
	require.Equal(t, uint64(6), p.Stats().Dials)
	require.NoError(t, p.Close())
	require.Equal(t, 0, p.MarkDead(outside))
	for range 5 {
		runtime.GC()
	}
	require.NoError(t, thief.leave())
	require.NoError(t, second.leave())
}

// BETA-30, G-02: a connection that was robbed is the same as the thief.
func TestSameConnTellsThatAStaleConnectionIsTheThiefs(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	for name, steal := range thefts {
		t.Run(name, func(t *testing.T) {
			stale, err := net.Dial("tcp4", net.JoinHostPort(peers["tcp"].Host, strconv.Itoa(int(peers["tcp"].Port))))
			require.NoError(t, err)
			quarantine.add(stale) // for the test is a pool here
			thief, err := steal(peers["stranger"], numberOf(stale.(syscall.Conn)), false)
			require.NoError(t, err)
			same, err := SameConn(stale.(syscall.Conn), numbered(thief.fd))
			require.NoError(t, err)
			require.True(t, same)
			other, err := dialStranger(peers["stranger"])
			require.NoError(t, err)
			same, err = SameConn(stale.(syscall.Conn), other.rwc.(syscall.Conn))
			require.NoError(t, err)
			require.False(t, same)
			require.NoError(t, other.leave())
			require.NoError(t, thief.leave())
		})
	}
}

// BETA-25, G-01: the defence can be switched off, and then it is missed. That
// is also the proof that the tests above would notice.
func TestWithoutTheIdentityCheckTheHazardIsReal(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr { return theftServers(t) })
	if !child {
		return
	}
	p := newWatched(t, Config{NoFDCheck: true})
	ctx := context.Background()
	fd := -1
	require.NoError(t, p.With(ctx, peers["tcp"], func(c Conn) error {
		fd = numberOf(c)
		return askNamed(c, "tcp")
	}))
	thief, err := thefts["close"](peers["stranger"], fd, false)
	require.NoError(t, err)
	require.NoError(t, thief.check())
	quarantine.add(thief.rwc.(net.Conn)) // it will not own its number any more
	require.NoError(t, p.With(ctx, peers["tcp"], func(c Conn) error {
		// What is written reaches the stranger's server, and its reply,
		// which is the stranger's, is read here. (The runtime's poller does
		// not know that the stale connection has the socket, so the reply
		// must be there before anybody waits for it.)
		if _, err := io.WriteString(c, "x\n"); err != nil {
			return err
		}
		arrived := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(arrived, 10_000); err != nil {
			return err
		}
		reply := make([]byte, 64)
		n, err := c.Read(reply)
		require.NoError(t, err)
		require.Regexp(t, "^stranger 1 2 x", string(reply[:n]))
		return nil
	}))
	require.Equal(t, 1, p.Stats().Idle)
	p.CloseIdle()
	require.ErrorContains(t, thief.check(), "was closed")
}

// BETA-29
func TestNobodyIsAnsweredByAWrongPeerInARestlessTopology(t *testing.T) {
	const servers = 200
	peers, child := inChild(t, func() map[string]Addr {
		peers := map[string]Addr{"stranger": startNamed(t, TCP, "stranger", "127.0.0.1").addr}
		var all []*namedServer
		for i := range servers {
			transport := TCP
			switch i % 8 {
			case 0:
				transport = TLS
			case 1:
				transport = Unix
			}
			name := "s" + strconv.Itoa(i)
			// Not 127.0.0.1, where the client's ends get their ports: one
			// could get that of a server which is down.
			s := startNamed(t, transport, name, "127.0.1."+strconv.Itoa(i+1))
			all = append(all, s)
			peers[name] = s.addr
		}
		ctx, cancel := context.WithCancel(context.Background())
		var chaos tasks.Group
		chaos.Go(func() {
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				s := all[rand.N(len(all))]
				switch rand.N(4) {
				case 0:
					s.cut(true)
				case 1:
					s.cut(false)
				case 2:
					s.stop()
				case 3:
					s.mu.Lock()
					down := s.ln == nil
					s.mu.Unlock()
					if down {
						s.start()
					}
				}
			}
		})
		t.Cleanup(func() { cancel(); chaos.Wait() }) // before the servers' own
		return peers
	})
	if !child {
		return
	}
	span := short.Of(5*time.Second, 400*time.Millisecond)
	if stress() > 1 {
		span = time.Minute
	}
	p := newWatched(t, Config{MaxOpen: 100, MaxPerAddr: 3, SweepInterval: 50 * time.Millisecond, DialTimeout: 2 * time.Second})
	var (
		ctx, cancel = context.WithTimeout(context.Background(), span+bounded)
		workers     tasks.Group
		keepers     tasks.Group
		strangers   = make(chan *stranger, 256)
		served      atomic.Int64
		stolen      atomic.Int64
		failed      = make(chan error, 1)
	)
	defer cancel()
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
		cancel()
	}
	for range 4 {
		keepers.Go(func() {
			var here []*stranger
			for s := range strangers {
				if err := s.check(); err != nil {
					fail(err)
				}
				if here = append(here, s); len(here) == 32 {
					for _, s := range here {
						if err := s.leave(); err != nil {
							fail(err)
						}
					}
					here = nil
				}
			}
			for _, s := range here {
				if err := s.leave(); err != nil {
					fail(err)
				}
			}
		})
	}
	// A busy machine may need more time until there is something to judge.
	over := time.Now().Add(span)
	more := func() bool {
		return ctx.Err() == nil && (time.Now().Before(over) || served.Load() <= 100 || stolen.Load() == 0)
	}
	for range 64 {
		workers.Go(func() {
			defer cancel() // the others end in the midst of what they do
			for more() {
				name := "s" + strconv.Itoa(rand.N(servers))
				one, done := context.WithTimeout(ctx, time.Second)
				err := p.With(one, peers[name], func(c Conn) error {
					for range 1 + rand.N(3) {
						if err := askNamed(c, name); err != nil {
							return err
						}
					}
					served.Add(1)
					if rand.N(20) > 0 {
						return nil
					}
					how := "close"
					if rand.N(2) == 0 {
						how = "dup3"
					}
					thief, err := thefts[how](peers["stranger"], numberOf(c), true)
					if err != nil {
						fail(fmt.Errorf("the theft: %w", err))
						return err
					}
					stolen.Add(1)
					if sc, ok := thief.rwc.(syscall.Conn); ok && rand.N(4) == 0 {
						p.MarkDead(sc)
					}
					strangers <- thief
					if rand.N(4) == 0 {
						return errFell
					}
					return nil
				})
				done()
				if errors.Is(err, errWrongPeer) {
					fail(err)
				}
			}
		})
	}
	workers.Wait()
	require.NoError(t, p.Close())
	close(strangers)
	keepers.Wait()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
	p.check(t)
	st := p.Stats()
	t.Logf("%d loans, %d stolen, %v", served.Load(), stolen.Load(), st.Closed)
	require.NoError(t, p.quarantined())
	require.Equal(t, stolen.Load(), int64(st.Closed[ClosedQuarantined]), "every theft is found, and nothing else taken for one")
	require.Greater(t, served.Load(), int64(100))
	require.Positive(t, stolen.Load())
	require.Equal(t, 0, st.Open)
}
