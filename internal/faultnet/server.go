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

	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// Options shapes a [Server]. The zero Options serve [Tokens] over TCP.
type Options struct {
	// Network is "tcp" (127.0.0.1; the default), "tcp6" (::1), "tls" (over
	// "tcp"), "unix" or, on Linux, "unix-abstract".
	Network string

	// TLS is for the network "tls" and is cloned. If it is nil or has no certificate, the
	// server makes one for 127.0.0.1, ::1, localhost and server.test.
	TLS *tls.Config

	// Handler serves one peer, on a goroutine of its own. When Handler returns, the
	// connection is closed. Handler must return soon after its connection broke. nil:
	// Tokens.
	Handler func(*Peer)

	// Dir is where the network "unix" puts its socket. "": a new temporary
	// directory, which Close removes.
	Dir string

	// ReplyDelay returns how long Tokens holds back the reply to request seq of
	// connection serial. nil or <= 0: not at all.
	ReplyDelay func(serial, seq int) time.Duration

	// Chunk makes Tokens write replies in pieces of Chunk bytes. 0: in one piece.
	Chunk int

	// Record keeps the lines that Tokens reads, for Lines.
	Record bool
}

// Server listens on loopback. Its methods may be called from any goroutine.
//
// The counts may lag behind the clients: a connection is certainly counted once it has
// seen a reply, and a client's close is noticed a little later. The server's own actions
// (CutIdle, Stop and so on) are in all counts when the method returns.
type Server struct {
	o     Options
	addr  net.Addr
	tls   *tls.Config
	roots *x509.CertPool
	dir   string // made by Start, so Close removes it

	running tasks.Group // accept loops and peers

	// mu guards the fields below, and the counts of every Peer. Under mu there is no
	// system call, and no wait except on settled.
	mu       sync.Mutex
	settled  sync.Cond     // a Peer stopped settling
	listener net.Listener  // nil: stopped
	stopped  chan struct{} // closed when listener is
	closed   bool          // closed for good: running only falls
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

// Addr is the address on which the server listens, or listened before Stop.
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

// ClientTLS returns a configuration that trusts the server's certificate and, if that
// came with Options.TLS, the other certificates in its chain. nil without TLS.
func (s *Server) ClientTLS() *tls.Config {
	if s.tls == nil {
		return nil
	}
	return &tls.Config{RootCAs: s.roots}
}

// Accepts counts the connections accepted so far.
func (s *Server) Accepts() int { return s.count(&s.accepts) }

// Peak is the largest number of connections that were ever open at once.
func (s *Server) Peak() int { return s.count(&s.peak) }

// Handshakes counts the TLS handshakes completed so far.
func (s *Server) Handshakes() int { return s.count(&s.handshakes) }

// Overlaps counts the lines that reached Tokens before the reply to an earlier line was
// sent. A client that waits for each reply adds nothing to it.
func (s *Server) Overlaps() int { return s.count(&s.overlaps) }

func (s *Server) count(n *int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return *n
}

// Open counts the open connections.
func (s *Server) Open() int { return len(s.Peers()) }

// Peers returns the open connections, oldest first.
func (s *Server) Peers() []*Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.peers)
}

// Lines returns the lines that Tokens read on the connection of that number, without line
// ends; nil unless Options.Record is set.
func (s *Server) Lines(serial int) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[serial])
}

// Stop closes the listener and all connections as the death of a process does: without
// TLS close_notify.
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

// Restart stops the server if it runs, and listens on the same address again. Numbers and
// counts go on.
func (s *Server) Restart() error {
	s.Stop()
	// Another connection may have been given the port meanwhile. Most of those end within
	// a moment.
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

// listen is the only place where running grows from outside. It does so under mu and not
// after closed, so that Close's Wait cannot miss it.
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
	if s.closed { // the server was closed meanwhile
		s.mu.Unlock()
		listener.Close()
		return errClosed
	}
	if s.stopped == nil {
		s.addr = listener.Addr() // called by Start: now the port is known, and no other goroutine has s yet
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
		// A test that uses up the process's descriptors leaves none for this loop either.
		// The connection waits in the backlog.
		select {
		case <-stopped:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *Server) admit(listener net.Listener, raw net.Conn) {
	s.mu.Lock()
	if s.listener != listener { // Stop has already collected the peers that it closes
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

// CutIdle cuts up to n connections that have no request in flight, the oldest first, and
// returns how many it cut; n < 0 means all. It waits for a reply that is being sent, so
// that a connection whose client has read its reply counts as idle. A request that a
// client is just sending is lost.
func (s *Server) CutIdle(n int, how Cut) int { return s.cut(n, false, how) }

// CutBusy cuts up to n connections that have a request in flight, in the same way.
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

// PushIdle writes b, unrequested, on up to n connections that have no request in flight,
// the oldest first, and returns on how many it could; n < 0 means all. It blocks if b
// does not fit into the kernel's buffers.
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

// pickLocked finds up to n peers that are busy, or not busy; with writable, only writable
// ones. It may release mu before it looks.
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

// settleLocked waits until the replies that are being sent are out. Replies that begin
// later do not count, or traffic could delay it for ever; and a client that does not read
// delays it for a second at most.
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
