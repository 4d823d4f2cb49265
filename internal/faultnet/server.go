package faultnet

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Options shapes a [Server]. The zero Options serve [Tokens] over TCP.
type Options struct {
	// Network is "tcp" (127.0.0.1; the default), "tcp6" (::1), "tls" (over
	// "tcp"), "unix" or, on Linux, "unix-abstract".
	Network string

	// TLS is for the network "tls" and is cloned. Without a certificate in
	// it, or nil, the server has one of its own for 127.0.0.1, ::1,
	// localhost and server.test.
	TLS *tls.Config

	// Handler talks to one peer, on a goroutine of its own; when it
	// returns, the connection is closed. It must return soon after its
	// connection broke. nil: Tokens.
	Handler func(*Peer)

	// Dir is where the network "unix" puts its socket. "": a new temporary
	// directory, which Close removes.
	Dir string

	// ReplyDelay is how long Tokens holds back the reply to the request seq
	// of the connection serial. nil or <= 0: not at all.
	ReplyDelay func(serial, seq int) time.Duration

	// Chunk makes Tokens write replies in pieces of so many bytes.
	// 0: in one piece.
	Chunk int

	// Record keeps the lines that Tokens reads, for Lines.
	Record bool
}

// Server listens on loopback. Its methods may be called from any goroutine.
//
// What a client just did may not have reached the server yet: a count that
// should include a connection is exact once that connection has seen a reply,
// and a client's close is noticed a little later. What the server itself did
// (CutIdle, Stop and so on) is in all counts when the method returns.
type Server struct {
	o     Options
	addr  net.Addr
	tls   *tls.Config
	roots *x509.CertPool
	dir   string // made by Start, so removed by Close

	running sync.WaitGroup // accept loops and peers

	// mu guards what follows, and the books of every Peer. Under it: no
	// system call, and no wait but on settled.
	mu       sync.Mutex
	settled  sync.Cond     // a Peer stopped settling
	listener net.Listener  // nil: stopped
	stopped  chan struct{} // closed when listener is
	closed   bool          // for good: running only falls
	peers    []*Peer       // open ones, oldest first

	accepts, peak, handshakes, overlaps int

	lines map[int][]string // by serial
}

var sockets atomic.Int64 // numbers the Unix sockets of this process

// Start listens, on a port or path that the system or this package chose.
func Start(o Options) (*Server, error) {
	if o.Handler == nil {
		o.Handler = Tokens
	}
	s := &Server{o: o, lines: make(map[int][]string)}
	s.settled.L = &s.mu
	name := fmt.Sprintf("fn%d-%d", os.Getpid(), sockets.Add(1))
	switch o.Network {
	case "", "tcp":
		s.addr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	case "tcp6":
		s.addr = &net.TCPAddr{IP: net.IPv6loopback}
	case "tls":
		s.addr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
		if err := s.configureTLS(); err != nil {
			return nil, err
		}
	case "unix":
		dir := o.Dir
		if dir == "" {
			var err error
			if dir, err = os.MkdirTemp("", "faultnet"); err != nil {
				return nil, err
			}
			s.dir = dir
		}
		s.addr = &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, name)}
	case "unix-abstract":
		if runtime.GOOS != "linux" {
			return nil, errors.New("faultnet: abstract Unix sockets exist on Linux only")
		}
		s.addr = &net.UnixAddr{Net: "unix", Name: "@" + name}
	default:
		return nil, fmt.Errorf("faultnet: unknown network %q", o.Network)
	}
	if err := s.listen(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) configureTLS() error {
	s.tls = s.o.TLS.Clone()
	if s.tls == nil {
		s.tls = &tls.Config{}
	}
	if len(s.tls.Certificates) == 0 && s.tls.GetCertificate == nil && s.tls.GetConfigForClient == nil {
		ca := NewCA()
		s.tls.Certificates = []tls.Certificate{ca.Server("127.0.0.1", "::1", "localhost", "server.test")}
		s.roots = ca.Pool()
		return nil
	}
	s.roots = x509.NewCertPool()
	for _, chain := range s.tls.Certificates {
		for _, der := range chain.Certificate {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return fmt.Errorf("faultnet: Options.TLS: %w", err)
			}
			s.roots.AddCert(cert)
		}
	}
	return nil
}

// Addr is where the server listens, or listened before Stop.
func (s *Server) Addr() net.Addr { return s.addr }

// Host is the IP address, or the Unix socket's path or "@name".
func (s *Server) Host() string {
	if a, ok := s.addr.(*net.TCPAddr); ok {
		return a.IP.String()
	}
	return s.addr.String()
}

// Port is 0 for a Unix socket.
func (s *Server) Port() uint16 {
	if a, ok := s.addr.(*net.TCPAddr); ok {
		return uint16(a.Port)
	}
	return 0
}

// ClientTLS makes a configuration that trusts the server's certificate and,
// if it is one of Options.TLS, the others in its chain. nil without TLS.
func (s *Server) ClientTLS() *tls.Config {
	if s.tls == nil {
		return nil
	}
	return &tls.Config{RootCAs: s.roots}
}

// Accepts counts the connections accepted so far.
func (s *Server) Accepts() int { return s.count(&s.accepts) }

// Peak is the most connections that were ever open at once.
func (s *Server) Peak() int { return s.count(&s.peak) }

// Handshakes counts the TLS handshakes completed so far.
func (s *Server) Handshakes() int { return s.count(&s.handshakes) }

// Overlaps counts the lines that reached Tokens before the reply to an earlier
// one was out. A client that waits for each reply never adds to it.
func (s *Server) Overlaps() int { return s.count(&s.overlaps) }

func (s *Server) count(n *int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return *n
}

// Open counts the open connections.
func (s *Server) Open() int { return len(s.Peers()) }

// Peers gives the open connections, oldest first.
func (s *Server) Peers() []*Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.peers)
}

// Lines gives what Tokens read on the connection of that number, without the
// line ends; nil unless Options.Record is set.
func (s *Server) Lines(serial int) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[serial])
}

// Stop closes the listener and all connections, in the way of a process that
// dies: no farewell of TLS.
func (s *Server) Stop() {
	s.mu.Lock()
	listener, peers := s.listener, slices.Clone(s.peers)
	if listener != nil {
		s.listener = nil
		close(s.stopped)
	}
	s.mu.Unlock()
	if listener != nil {
		listener.Close()
	}
	for _, p := range peers {
		p.abandon()
	}
}

// Restart stops the server if need be and listens on the same address again.
// Connections are numbered and counted on.
func (s *Server) Restart() error {
	s.Stop()
	// Somebody else's connection may have been given the port meanwhile.
	// Most of those are gone in a moment.
	const tries, pause = 40, 25 * time.Millisecond
	var err error
	for range tries {
		if err = s.listen(); err == nil || errors.Is(err, net.ErrClosed) {
			return err
		}
		time.Sleep(pause)
	}
	return err
}

// Close stops the server for good, waits for all its goroutines, and removes
// its files. It may be called twice.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Stop()
	s.running.Wait()
	if s.dir != "" {
		os.RemoveAll(s.dir)
	}
}

// listen is the only place where running grows from outside, under mu and not
// after closed: so Close's wait is not overtaken.
func (s *Server) listen() error {
	network := s.addr.Network()
	if a, ok := s.addr.(*net.TCPAddr); ok {
		network = "tcp6"
		if a.IP.To4() != nil {
			network = "tcp4"
		}
	}
	errClosed := &net.OpError{Op: "listen", Net: network, Addr: s.addr, Err: net.ErrClosed}
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return errClosed
	}
	listener, err := net.Listen(network, s.addr.String())
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed { // meanwhile
		s.mu.Unlock()
		listener.Close()
		return errClosed
	}
	if s.stopped == nil {
		s.addr = listener.Addr() // Start's call: now the port is known, and nobody else has s yet
	}
	stopped := make(chan struct{})
	s.listener, s.stopped = listener, stopped
	s.running.Go(func() { s.accept(listener, stopped) })
	s.mu.Unlock()
	return nil
}

func (s *Server) accept(listener net.Listener, stopped <-chan struct{}) {
	for {
		raw, err := listener.Accept()
		switch {
		case err == nil:
			s.admit(listener, raw)
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		// Tests that use up the descriptors of the process do so to this
		// loop too. The connection waits in the backlog.
		select {
		case <-stopped:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *Server) admit(listener net.Listener, raw net.Conn) {
	s.mu.Lock()
	if s.listener != listener { // Stop has already collected what it closes
		s.mu.Unlock()
		raw.Close()
		return
	}
	s.accepts++
	p := &Peer{Conn: raw, raw: raw, server: s, serial: s.accepts, gone: make(chan struct{})}
	if s.tls != nil {
		p.Conn = tls.Server(raw, s.tls)
		p.owed++ // the handshake
	}
	s.peers = append(s.peers, p)
	s.peak = max(s.peak, len(s.peers))
	s.running.Go(p.serve)
	s.mu.Unlock()
}

// CutIdle cuts up to n connections that are between two requests, the oldest
// first, and returns how many it cut; n < 0 means all. A reply that is just
// being sent is waited for, so that a connection whose client has read its
// reply counts as idle. The client may still be sending a request: it loses
// that, as clients do.
func (s *Server) CutIdle(n int, how Cut) int { return s.cut(n, false, how) }

// CutBusy cuts up to n connections that are not between requests, in the same
// way.
func (s *Server) CutBusy(n int, how Cut) int { return s.cut(n, true, how) }

func (s *Server) cut(n int, busy bool, how Cut) int {
	s.mu.Lock()
	picked := s.pickLocked(n, busy, how == HalfClose)
	for _, p := range picked {
		if how == HalfClose {
			p.halfClosed = true
			continue
		}
		p.leaveLocked()
	}
	s.mu.Unlock()
	for _, p := range picked {
		p.sever(how)
	}
	return len(picked)
}

// PushIdle writes b, which nobody asked for, on up to n connections that are
// between two requests, the oldest first, and returns on how many it could;
// n < 0 means all. It blocks if b does not fit into the kernel's buffers.
func (s *Server) PushIdle(n int, b []byte) int {
	s.mu.Lock()
	picked := s.pickLocked(n, false, true)
	s.mu.Unlock()
	pushed := 0
	for _, p := range picked {
		if _, err := p.Write(b); err == nil {
			pushed++
		}
	}
	return pushed
}

// pickLocked finds up to n peers that are busy or not, writable ones only if
// asked to. It may release mu before it looks.
func (s *Server) pickLocked(n int, busy, writable bool) []*Peer {
	s.settleLocked()
	var picked []*Peer
	for _, p := range s.peers {
		if len(picked) == n {
			break
		}
		if p.busyLocked() == busy && !(writable && p.halfClosed) {
			picked = append(picked, p)
		}
	}
	return picked
}

// settleLocked waits until the replies that are being sent are out. Those that
// begin meanwhile do not count, or traffic could hold it up for ever; and a
// client that does not read holds it up for no more than a second.
func (s *Server) settleLocked() {
	sending := make(map[*Peer]int)
	for _, p := range s.peers {
		if p.settling {
			sending[p] = p.settlings
		}
	}
	if len(sending) == 0 {
		return
	}
	overdue := false
	timer := time.AfterFunc(time.Second, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		overdue = true
		s.settled.Broadcast()
	})
	defer timer.Stop()
	for p, nth := range sending {
		for p.settling && p.settlings == nth && !overdue {
			s.settled.Wait()
		}
	}
}
