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
	sock := &tlsSocket{Conn: nc}
	if sc, ok := nc.(syscall.Conn); ok && canPeek {
		sock.raw, _ = sc.SyscallConn()
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

var errFlood = errors.New("the peer sends without end while the connection is idle")

// tlsGoodbye bounds the write of close_notify.
const tlsGoodbye = 250 * time.Millisecond

// tlsSocket is the socket under a tls.Conn. It can be told not to wait, so that
// crypto/tls can be asked what it holds without a deadline being set, and to
// bound the goodbye, for which crypto/tls would wait 5 seconds.
type tlsSocket struct {
	net.Conn
	raw     syscall.RawConn // nil: noWait reads nothing
	mode    tlsMode         // the owner's, and only between loans
	budget  int             // bytes that noWait may still read
	leaving atomic.Bool
}

func (s *tlsSocket) enter(m tlsMode) { s.mode, s.budget = m, tlsFlood }

func (s *tlsSocket) Read(b []byte) (n int, err error) {
	switch {
	case s.mode == normal:
		return s.Conn.Read(b)
	case s.mode == sealed || s.raw == nil:
		return 0, os.ErrDeadlineExceeded
	case s.budget <= 0:
		return 0, errFlood
	}
	if cerr := s.raw.Control(func(fd uintptr) { n, err = readNow(fd, b) }); cerr != nil {
		return 0, cerr
	}
	s.budget -= n
	return n, err
}

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
