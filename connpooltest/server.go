package connpooltest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// Memory is the transport in the address of a server in memory.
const Memory connpool.Transport = "memory"

// Server is a peer whose mistakes are scripted. Its methods may be called from any
// goroutine.
type Server struct {
	protocol Protocol
	addr     connpool.Addr
	dialNet  connpool.DialFunc
	takeDown func()

	moment   time.Duration // between the pieces of a reply
	patience time.Duration // how long a borrower waits, as far as the server knows
	turnOf   func(request []byte) *turn
	note     func(t *turn, format string, args ...any) // nil: nobody keeps a log

	stopped chan struct{} // closed when the server is taken down

	// mu guards the fields below, and busy and closed of every peer. Nothing blocks under
	// it.
	mu      sync.Mutex
	script  Script  // of Play
	refused []error // of FailNextDial
	hangUps int     // of HangUpNext
	peers   []*peer // open, oldest first
	accepts int
	before  []byte // the last reply
}

// NewServer starts a server in memory, for tests inside a bubble of testing/synctest and
// outside. Its connections are a [connpool.Prober]. Bytes need no time. The server is
// taken down when the test ends.
func NewServer(t testing.TB, p Protocol) *Server {
	t.Helper()
	s := newMemory(p)
	t.Cleanup(s.close)
	return s
}

// NewLoopback starts a server on a TCP port of 127.0.0.1 that the system chooses. It
// cannot be used in a bubble of testing/synctest. The server is taken down when the test
// ends.
func NewLoopback(t testing.TB, p Protocol) *Server {
	t.Helper()
	s, err := newLoopback(p)
	if err != nil {
		t.Fatal("connpooltest: ", err)
	}
	t.Cleanup(s.close)
	return s
}

var servers atomic.Int64 // numbers the servers in memory, so that several fit into one pool

func newServer(p Protocol) *Server {
	s := &Server{protocol: p, moment: time.Millisecond, patience: time.Second, stopped: make(chan struct{})}
	s.turnOf = s.nextTurn
	return s
}

func newMemory(p Protocol) *Server {
	s := newServer(p)
	s.addr = connpool.Addr{Transport: Memory, Host: "server" + strconv.FormatInt(servers.Add(1), 10)}
	network := faultnet.NewMem()
	network.Shared(true)
	network.Host(s.addr.Host).Serve(func(c *faultnet.Conn) {
		s.serve(&peer{Conn: c, serial: c.Serial(), reset: c.Reset})
	})
	s.takeDown = network.Close
	s.dialNet = func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
		nc, err := network.Dial(ctx, a.Host)
		if err != nil {
			return nil, err
		}
		return &memoryConn{nc.(*faultnet.Conn)}, nil
	}
	return s
}

func newLoopback(p Protocol) (*Server, error) {
	s := newServer(p)
	listener, err := faultnet.Start(faultnet.Options{Handler: func(c *faultnet.Peer) {
		s.serve(&peer{Conn: c, serial: c.Serial(), reset: func() { c.Cut(faultnet.RST) }})
	}})
	if err != nil {
		return nil, err
	}
	s.addr = connpool.Addr{Transport: connpool.TCP, Host: listener.Host(), Port: listener.Port()}
	s.takeDown = listener.Close
	s.dialNet = dialTCP
	return s, nil
}

func dialTCP(ctx context.Context, a connpool.Addr) (net.Conn, error) {
	d := net.Dialer{Control: a.QoS.Control}
	return d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))))
}

// memoryConn is a connection in memory as the pool wants it: a Prober.
type memoryConn struct{ *faultnet.Conn }

// Probe implements [connpool.Prober].
func (c *memoryConn) Probe() error {
	err := c.Conn.Probe()
	if errors.Is(err, faultnet.ErrUnread) {
		return connpool.ErrUnread
	}
	return err
}

// close takes the server down and waits for its goroutines.
func (s *Server) close() {
	close(s.stopped)
	s.takeDown()
}

// Addr is the address of the server, for With, Lease and Warm of a pool that has the
// server's dialer (see [Server.Config]).
func (s *Server) Addr() connpool.Addr { return s.addr }

// Config returns cfg with a dialer that reaches the server, in place of the dialer that
// cfg has for the server's transport. Addresses of other servers go to the dialer that
// was there before. So a pool can reach several servers: a.Config(b.Config(cfg)).
func (s *Server) Config(cfg connpool.Config) connpool.Config {
	others := cfg.Dialers[s.addr.Transport]
	if others == nil && s.addr.Transport == connpool.TCP {
		others = dialTCP
	}
	dialers := maps.Clone(cfg.Dialers)
	if dialers == nil {
		dialers = make(map[connpool.Transport]connpool.DialFunc)
	}
	dialers[s.addr.Transport] = func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
		if a.Host == s.addr.Host && a.Port == s.addr.Port {
			return s.dial(ctx, a)
		}
		if others == nil {
			return nil, fmt.Errorf("connpooltest: there is no server %v: the pool knows %v", a, s.addr)
		}
		return others(ctx, a)
	}
	cfg.Dialers = dialers
	return cfg
}

func (s *Server) dial(ctx context.Context, a connpool.Addr) (net.Conn, error) {
	s.mu.Lock()
	var err error
	if len(s.refused) > 0 {
		err, s.refused = s.refused[0], s.refused[1:]
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return s.dialNet(ctx, a)
}

// FailNextDial makes the next n dials fail with err, after those of earlier calls. A nil
// err is a refused connection, as package net reports it.
func (s *Server) FailNextDial(n int, err error) {
	if err == nil {
		err = &net.OpError{Op: "dial", Net: string(s.addr.Transport), Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused = append(s.refused, slices.Repeat([]error{err}, n)...)
}

// HangUpNext makes the server accept the next n connections and close them at once,
// without the greeting.
func (s *Server) HangUpNext(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangUps += n
}

// Play makes the next replies have the faults of the script, one reply for each step, in
// the order in which the requests arrive on any connection. It comes after the scripts of
// earlier calls. Overlap has no meaning here. With Late and Cancel the rest of a reply
// comes when the client sends something more on the connection, at the latest after a
// second. Wrong is the reply to the request before this one, or Protocol.Unasked.
//
// Play panics if the script has one of the faults from CutIdle to HangUp, for which
// Server has methods.
func (s *Server) Play(script Script) {
	for _, step := range script {
		if step.Fault.isBetween() {
			panic(fmt.Sprintf("connpooltest: Play: %v happens between exchanges: call the method of Server", step.Fault))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.script = append(slices.Clip(s.script), script...)
}

// nextTurn is turnOf for a server without a harness.
func (s *Server) nextTurn([]byte) *turn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.script) == 0 {
		return &turn{}
	}
	t := &turn{step: s.script[0]}
	s.script = s.script[1:]
	return t
}

// CutIdle closes the connections on which the server owes no reply, and returns how many
// these were. When CutIdle returns, the pool's probe finds them closed. A reply that a
// client has read is no longer owed; a request that a client is just sending is lost.
func (s *Server) CutIdle() int {
	return s.eachIdle(s.closePeer)
}

// SendUnasked sends Protocol.Unasked on each connection on which the server owes no
// reply, and returns how many these were. If Protocol.Unasked is empty, it sends the line
// "unasked".
func (s *Server) SendUnasked() int {
	return s.eachIdle(func(p *peer) { p.Write(s.protocol.unasked()) })
}

// eachIdle calls do for each idle connection, and waits for a reply that is being sent.
func (s *Server) eachIdle(do func(*peer)) (n int) {
	s.mu.Lock()
	peers := slices.Clone(s.peers)
	s.mu.Unlock()
	for _, p := range peers {
		if s.isBusy(p) {
			continue
		}
		p.sending <- struct{}{}
		if !s.isBusy(p) {
			do(p)
			n++
		}
		<-p.sending
	}
	return n
}

func (s *Server) isBusy(p *peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.busy || p.closed
}

// Open counts the connections that neither side has closed, as far as the server knows.
// It hears of a close by the client a moment later.
func (s *Server) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, p := range s.peers {
		if !p.closed {
			n++
		}
	}
	return n
}

// Accepts counts the connections that the server has accepted.
func (s *Server) Accepts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepts
}

// peer is the server's end of a connection.
type peer struct {
	net.Conn
	serial  int
	reset   func()
	in      *bufio.Reader
	sending chan struct{} // full while the last part of a reply is being sent; a channel, since a bubble's time stands still while a goroutine waits for a mutex

	// Guarded by Server.mu.
	busy   bool // the server owes a greeting or a reply
	closed bool // by the server
}
