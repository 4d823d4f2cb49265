package bench

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Server is the peer. It repeats frames of FrameSize bytes, or does the equivalent in its
// protocol.
type Server struct {
	Addr     string
	Think    atomic.Int64 // nanoseconds between a request and its reply
	Accepted atomic.Int64
	Busy     atomic.Int64 // exchanges under way
	MostBusy atomic.Int64

	ln        net.Listener
	handshake time.Duration // extra time of each TLS handshake
	speak     func(net.Conn)

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}

	together struct {
		sync.Mutex
		waiting int
		all     chan struct{}
	}
}

// Protocols of a server.
const (
	Echo = "echo"
	RESP = "redis"
	HTTP = "http"
)

// ProtocolOf returns the protocol of the named rival.
func ProtocolOf(rival string) string {
	if rival == RESP || rival == HTTP {
		return rival
	}
	return Echo
}

// Serve starts a server on a port of the loopback interface.
func Serve(protocol string, overTLS bool, handshake time.Duration) (*Server, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &Server{Addr: ln.Addr().String(), ln: ln, handshake: handshake, conns: make(map[net.Conn]struct{})}
	s.together.all = make(chan struct{})
	switch protocol {
	case RESP:
		s.speak = s.resp
	case HTTP:
		requests := &connListener{addr: ln.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
		go http.Serve(requests, http.HandlerFunc(s.http))
		s.speak = requests.serve
	default:
		s.speak = s.echo
	}
	go s.accept(overTLS)
	return s, nil
}

func (s *Server) accept(overTLS bool) {
	for {
		nc, err := s.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor: connections that end will free some
			time.Sleep(time.Millisecond)
			continue
		}
		s.Accepted.Add(1)
		if overTLS {
			nc = tls.Server(nc, serverTLS())
		}
		s.mu.Lock()
		if s.conns == nil {
			s.mu.Unlock()
			nc.Close()
			return
		}
		s.conns[nc] = struct{}{}
		s.mu.Unlock()
		go func() {
			if s.handshake > 0 {
				time.Sleep(s.handshake)
			}
			s.speak(nc)
			nc.Close()
			s.mu.Lock()
			delete(s.conns, nc)
			s.mu.Unlock()
		}()
	}
}

// CutAll closes all connections, under TLS with close_notify, as a server does with
// connections that are idle for too long.
func (s *Server) CutAll() {
	s.mu.Lock()
	conns := s.conns
	s.conns = make(map[net.Conn]struct{})
	s.mu.Unlock()
	for nc := range conns {
		nc.Close()
	}
}

func (s *Server) Close() error {
	err := s.ln.Close()
	s.CutAll()
	s.mu.Lock()
	s.conns = nil
	s.mu.Unlock()
	return err
}

// think runs between a request and its reply.
func (s *Server) think() {
	busy := s.Busy.Add(1)
	defer s.Busy.Add(-1)
	for {
		most := s.MostBusy.Load()
		if busy <= most || s.MostBusy.CompareAndSwap(most, busy) {
			break
		}
	}
	if d := s.Think.Load(); d > 0 {
		time.Sleep(time.Duration(d))
	}
}

func (s *Server) echo(nc net.Conn) {
	frame := make([]byte, FrameSize)
	for {
		if _, err := io.ReadFull(nc, frame); err != nil {
			return
		}
		s.think()
		if _, err := nc.Write(frame); err != nil {
			return
		}
	}
}

// resp knows ECHO; any other command gets an error, which go-redis tolerates in its
// greeting.
func (s *Server) resp(nc net.Conn) {
	in := bufio.NewReaderSize(nc, 512)
	var args [][]byte
	var out []byte
	number := func(mark byte) (int, error) {
		l, err := in.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if len(l) < 4 || l[0] != mark {
			return 0, fmt.Errorf("not RESP: %q", l)
		}
		return strconv.Atoi(string(l[1 : len(l)-2]))
	}
	for {
		n, err := number('*')
		if err != nil {
			return
		}
		for len(args) < n {
			args = append(args, nil)
		}
		for i := range n {
			size, err := number('$')
			if err != nil {
				return
			}
			if cap(args[i]) < size+2 {
				args[i] = make([]byte, size+2)
			}
			args[i] = args[i][:size+2]
			if _, err := io.ReadFull(in, args[i]); err != nil {
				return
			}
			args[i] = args[i][:size]
		}
		if n == 2 && string(args[0]) == "echo" {
			s.think()
			out = fmt.Appendf(out[:0], "$%d\r\n%s\r\n", len(args[1]), args[1])
		} else {
			out = append(out[:0], "-ERR unknown command\r\n"...)
		}
		if _, err := nc.Write(out); err != nil {
			return
		}
	}
}

func (s *Server) http(w http.ResponseWriter, r *http.Request) {
	var frame [FrameSize]byte
	if _, err := io.ReadFull(r.Body, frame[:]); err != nil {
		return
	}
	if n, err := strconv.Atoi(r.URL.RawQuery[min(len(r.URL.RawQuery), len("together=")):]); err == nil {
		s.gather(n)
	}
	s.think()
	w.Header().Set("Content-Length", strconv.Itoa(FrameSize))
	w.Write(frame[:])
}

// gather holds its callers until there are n of them.
func (s *Server) gather(n int) {
	t := &s.together
	t.Lock()
	all := t.all
	if t.waiting++; t.waiting == n {
		t.waiting, t.all = 0, make(chan struct{})
		close(all)
	}
	t.Unlock()
	<-all
}

// connListener hands connections that were accepted elsewhere to net/http.
type connListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error   { close(l.done); return nil }
func (l *connListener) Addr() net.Addr { return l.addr }

// serve returns when net/http has closed the connection.
func (l *connListener) serve(nc net.Conn) {
	c := &watchedConn{Conn: nc, closed: make(chan struct{})}
	l.conns <- c
	<-c.closed
}

type watchedConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *watchedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// --- TLS ---

// identity is made once for a run; child processes get it from their parent.
var identity = sync.OnceValue(func() tls.Certificate {
	var made struct{ Cert, Key []byte }
	if json.Unmarshal([]byte(os.Getenv(identityEnv)), &made) != nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			IsCA:        true, BasicConstraintsValid: true,
		}
		if made.Cert, err = x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key); err != nil {
			panic(err)
		}
		if made.Key, err = x509.MarshalECPrivateKey(key); err != nil {
			panic(err)
		}
		text, err := json.Marshal(made)
		if err != nil {
			panic(err)
		}
		os.Setenv(identityEnv, string(text))
	}
	key, err := x509.ParseECPrivateKey(made.Key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(made.Cert)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{made.Cert}, PrivateKey: key, Leaf: leaf}
})

const identityEnv = "CONNPOOL_BENCH_IDENTITY"

var serverTLS = sync.OnceValue(func() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{identity()}}
})

// ClientTLS trusts the servers of this package, and no others.
var ClientTLS = sync.OnceValue(func() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(identity().Leaf)
	return &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13}
})

// --- child processes ---

const childEnv = "CONNPOOL_BENCH_CHILD"

// task is the work of a child process.
type task struct {
	Do       string // serve, memory or sweep
	Rival    string
	Protocol string
	TLS      bool
	Servers  []string
	N        int
	Sweep    time.Duration
	Window   time.Duration
}

// Child does the work that [run] or [serveElsewhere] started the process for, and reports
// whether there was any.
func Child() bool {
	text := os.Getenv(childEnv)
	if text == "" {
		return false
	}
	var t task
	err := json.Unmarshal([]byte(text), &t)
	var out any
	if err == nil {
		switch t.Do {
		case "serve":
			var s *Server
			if s, err = Serve(t.Protocol, t.TLS, 0); err == nil {
				fmt.Println(s.Addr)
				io.Copy(io.Discard, os.Stdin) // until the parent has ended
			}
			return true
		case "memory":
			out, err = measureMemory(t)
		case "sweep":
			out, err = measureSweep(t)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(out)
	return true
}

func (t task) command() (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	identity()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	return cmd, nil
}

// run does t in a process of its own and decodes its result.
func (t task) run(found any) error {
	cmd, err := t.command()
	if err != nil {
		return err
	}
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	return json.Unmarshal(out, found)
}

// serveElsewhere starts a server in a process of its own, so that its memory, descriptors
// and CPU time are not counted as ours.
func serveElsewhere(protocol string, overTLS bool) (addr string, stop func(), err error) {
	cmd, err := task{Do: "serve", Protocol: protocol, TLS: overTLS}.command()
	if err != nil {
		return "", nil, err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		in.Close()
		cmd.Wait()
	}
	addr, err = bufio.NewReader(out).ReadString('\n')
	if err != nil {
		stop()
		return "", nil, fmt.Errorf("the server did not start: %w", err)
	}
	return addr[:len(addr)-1], stop, nil
}
