package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// handshake makes a TLS connection of nc, under the identity and trust that
// belong to addr. It closes nc if it fails.
func (p *Pool) handshake(ctx context.Context, addr Addr, nc net.Conn) (net.Conn, error) {
	cfg, err := p.tlsConfig(addr)
	if err != nil {
		nc.Close()
		return nil, err
	}
	sock := &tlsSocket{Conn: nc, readNow: p.sys.readNow}
	if sc, ok := nc.(syscall.Conn); ok && canPeek {
		sock.raw, _ = sc.SyscallConn()
	}
	if sock.raw != nil {
		// A TLS server does not speak first. What is there before the
		// handshake would be taken as if it had come inside.
		early := peeked{}
		sock.raw.Control(func(fd uintptr) { early = p.sys.peek(fd) })
		if early.bytes {
			nc.Close()
			return nil, tls.RecordHeaderError{Msg: "the peer sent bytes before the handshake", Conn: nc}
		}
	}
	tc := tls.Client(sock, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, err
	}
	return tc, nil
}

func (p *Pool) tlsConfig(addr Addr) (*tls.Config, error) {
	cfg := p.cfg.TLS
	if p.cfg.TLSFor != nil {
		own, err := p.cfg.TLSFor(addr)
		if err != nil {
			return nil, err
		}
		if own != nil {
			cfg = own
		}
	}
	if cfg == nil {
		cfg = new(tls.Config)
	}
	cfg = cfg.Clone()
	if cfg.ServerName = addr.ServerName; cfg.ServerName == "" {
		cfg.ServerName, _, _ = strings.Cut(addr.Host, "%") // no certificate names a zone
	}
	cfg.ClientSessionCache = p.sessions.of(addr)
	return cfg, nil
}

// tlsMode says what a tlsSocket does when crypto/tls reads.
type tlsMode uint8

const (
	normal tlsMode = iota
	noWait         // hand over what has arrived, do not wait for more
	sealed         // hand over nothing
)

// tlsFlood bounds what one look may take out of the socket: far more than any
// number of session tickets that makes sense.
const tlsFlood = 64 << 10

var errStuck = errors.New("the peer asks for an answer and does not read it")

var errFlood = errors.New("the peer sends without end while the connection is idle")

// tlsGoodbye bounds the write of close_notify.
const tlsGoodbye = 250 * time.Millisecond

// tlsSocket is the socket under a tls.Conn. It can be told not to wait, so that
// crypto/tls can be asked what it holds without a deadline being set, and to
// bound the goodbye, for which crypto/tls would wait 5 seconds.
type tlsSocket struct {
	net.Conn
	raw     syscall.RawConn // nil: a foreign connection, on which noWait is not to be used
	readNow func(fd uintptr, b []byte) (int, error)
	record  records // how far crypto/tls has read
	mode    tlsMode // the owner's, and only between loans
	budget  int     // bytes that noWait may still read
	stuck   bool    // an answer to a key update could not be written
	leaving atomic.Bool
}

func (s *tlsSocket) NetConn() net.Conn { return s.Conn }

// SyscallConn is for whoever detached the connection.
func (s *tlsSocket) SyscallConn() (syscall.RawConn, error) {
	if s.raw == nil {
		return nil, errors.ErrUnsupported
	}
	return s.raw, nil
}

// Write does not wait for the peer while crypto/tls is only asked what it holds:
// a key update makes it write from within a read. It keeps the error to itself,
// so it is remembered here.
func (s *tlsSocket) Write(b []byte) (int, error) {
	if s.mode == normal {
		return s.Conn.Write(b)
	}
	s.Conn.SetWriteDeadline(time.Now().Add(lookPatience))
	defer s.Conn.SetWriteDeadline(time.Time{})
	n, err := s.Conn.Write(b)
	if err != nil {
		s.stuck = true
	}
	return n, err
}

func (s *tlsSocket) enter(m tlsMode) { s.mode, s.budget = m, tlsFlood }

func (s *tlsSocket) Read(b []byte) (n int, err error) {
	switch {
	case s.mode == normal:
		n, err = s.Conn.Read(b)
		s.record.advance(b[:n])
		return n, err
	case s.mode == sealed || s.raw == nil:
		return 0, os.ErrDeadlineExceeded
	case s.budget <= 0:
		return 0, errFlood
	}
	if cerr := s.raw.Control(func(fd uintptr) { n, err = s.readNow(fd, b) }); cerr != nil {
		return 0, cerr
	}
	s.budget -= n
	s.record.advance(b[:n])
	return n, err
}

// records follows the framing of TLS records (a header of 5 bytes, the last two
// of which count those that follow), because crypto/tls does not tell whether
// it has read a part of one. Such a part is data that the next borrower would
// get.
type records struct {
	header [5]byte
	have   int // bytes of the header
	body   int // bytes of the body still to come
}

func (r *records) advance(b []byte) {
	for len(b) > 0 {
		if r.have < len(r.header) {
			n := copy(r.header[r.have:], b)
			r.have += n
			b = b[n:]
			if r.have == len(r.header) {
				r.body = int(r.header[3])<<8 | int(r.header[4])
			}
		} else {
			n := min(r.body, len(b))
			r.body -= n
			b = b[n:]
		}
		if r.have == len(r.header) && r.body == 0 {
			r.have = 0
		}
	}
}

func (r *records) partial() bool { return r.have > 0 }

func (s *tlsSocket) sayGoodbye() { s.leaving.Store(true) }

// SetWriteDeadline is what tls.Conn.Close calls before it writes close_notify.
func (s *tlsSocket) SetWriteDeadline(t time.Time) error {
	if s.leaving.Load() {
		t = time.Now().Add(tlsGoodbye)
	}
	return s.Conn.SetWriteDeadline(t)
}

// sessionCaches holds a session cache for each of the addresses that were
// dialled last. One for all would let a session be resumed under another name,
// scope or client certificate than it was made with.
type sessionCaches struct {
	mu  sync.Mutex // guards lru; nothing else happens under it
	lru *simplelru.LRU[Addr, tls.ClientSessionCache]
}

func newSessionCaches() *sessionCaches {
	lru, err := simplelru.NewLRU[Addr, tls.ClientSessionCache](1024, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &sessionCaches{lru: lru}
}

func (s *sessionCaches) of(addr Addr) tls.ClientSessionCache {
	s.mu.Lock()
	defer s.mu.Unlock()
	cache, ok := s.lru.Get(addr)
	if !ok {
		cache = tls.NewLRUClientSessionCache(4)
		s.lru.Add(addr, cache)
	}
	return cache
}

func (s *sessionCaches) forget(addr Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lru.Remove(addr)
}
