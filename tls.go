package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tlsrecord"
)

// handshake makes a TLS connection of nc, under the identity and trust that
// belong to the address. nc is a's to close, whatever happens here.
func (a *attempt) handshake(ctx context.Context, nc net.Conn) (net.Conn, error) {
	p := a.c.site.pool
	a.where = "Config.TLSFor"
	cfg, err := a.tlsConfig()
	if err != nil {
		return nil, err
	}
	a.where = "SyscallConn of the connection"
	under := &tlsSocket{Conn: nc, readNow: p.sys.readNow}
	if !a.wrap(under) {
		return nil, context.DeadlineExceeded
	}
	if sc, ok := nc.(syscall.Conn); ok && sock.CanPeek {
		raw, _ := sc.SyscallConn()
		under.raw = trusted(raw)
	}
	if under.raw != nil {
		// A TLS server does not speak first. What is there before the
		// handshake would be taken as if it had come inside.
		early := false
		shown := false
		under.raw.Control(func(fd uintptr) { early, shown = p.sys.peek(fd).Bytes, true })
		switch {
		case early:
			return nil, tls.RecordHeaderError{Msg: "the peer sent bytes before the handshake", Conn: nc}
		case !shown: // there is none, whatever SyscallConn says
			under.raw = nil
		}
	}
	a.where = "a callback of tls.Config or the connection below"
	tc := tls.Client(under, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	// Of what came with the handshake it is not known what is left, so the
	// first loan is followed by a question.
	state := tc.ConnectionState()
	under.renegotiates = state.Version < tls.VersionTLS13 && cfg.Renegotiation != tls.RenegotiateNever
	if under.record.Lost(); !under.renegotiates {
		under.record.Start(state)
	}
	return tc, nil
}

var zeroTLS tls.Config // only copied

// serverName is what TLS asks for and verifies at addr under cfg.
func serverName(addr Addr, cfg *tls.Config) string {
	if addr.ServerName != "" {
		return addr.ServerName
	}
	host, _, _ := strings.Cut(addr.Host, "%") // no certificate names a zone
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsLoopback() && isLocalhost(cfg.ServerName) {
		return "localhost"
	}
	return host
}

// isLocalhost reports whether name is the one that a tls.Config may give for many
// addresses at once: all those of the loopback interface.
func isLocalhost(name string) bool {
	return strings.EqualFold(strings.TrimSuffix(name, "."), "localhost")
}

// tlsConfig is what the handshake goes by: the identity and trust of the address.
func (a *attempt) tlsConfig() (*tls.Config, error) {
	p, addr := a.c.site.pool, a.c.site.addr
	cfg, before := p.cfg.TLS, p.sessions.age()
	if p.cfg.TLSFor != nil {
		own, err := p.cfg.TLSFor(addr)
		if err != nil {
			return nil, err
		}
		if own != nil {
			cfg = own
			if name := own.ServerName; name != "" && !strings.EqualFold(strings.TrimSuffix(name, "."), serverName(addr, own)) {
				return nil, fmt.Errorf("Config.TLSFor returned a ServerName, %q, that is not the address's: write it into Addr.ServerName (%w)", name, os.ErrInvalid)
			}
		}
	}
	if cfg == nil {
		cfg = &zeroTLS
	}
	return p.sessions.configFor(addr, cfg, before), nil
}

// tlsMode says what a tlsSocket does when crypto/tls reads.
type tlsMode uint8

const (
	tlsNormal tlsMode = iota
	tlsNoWait         // hand over what has arrived, do not wait for more
	tlsSealed         // hand over nothing
)

// tlsFlood bounds what one look may take out of the socket: far more than any
// number of session tickets that makes sense.
const tlsFlood = 64 << 10

var errRenegotiating = errors.New("a renegotiation of TLS was cut short")

var errStuck = errors.New("the peer asks for an answer and does not read it")

var errFlood = errors.New("the peer sends without end while the connection is idle")

// tlsGoodbye bounds the write of close_notify.
const tlsGoodbye = 250 * time.Millisecond

// tlsSocket is the socket under a tls.Conn. It can be told not to wait, so that
// crypto/tls can be asked what it holds without a deadline being set, and to
// bound the goodbye, for which crypto/tls would wait 5 seconds.
type tlsSocket struct {
	net.Conn
	raw          syscall.RawConn // nil: a foreign connection, on which tlsNoWait is not to be used
	readNow      func(fd uintptr, b []byte) (int, error)
	record       tlsrecord.Tracker // how far crypto/tls has read
	budget       int               // bytes that tlsNoWait may still read
	mode         tlsMode           // the owner's, and only between loans
	stuck        bool              // an answer to a key update could not be written
	renegotiates bool              // the peer may ask for another handshake, and so for another cipher
	leaving      atomic.Bool
	closed       atomic.Bool
}

// Close closes the socket below, once: crypto/tls does so behind a handshake that
// failed or a goodbye, and the pool, whatever crypto/tls does.
func (s *tlsSocket) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	return s.Conn.Close()
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
	if s.mode == tlsNormal {
		return s.Conn.Write(b)
	}
	if _, foreign := mannersOf(s.Conn, s.Conn, false); foreign { // which may not listen to a deadline
		s.stuck = true
		return 0, errStuck
	}
	s.Conn.SetWriteDeadline(time.Now().Add(probePatience))
	defer s.Conn.SetWriteDeadline(time.Time{})
	n, err := s.Conn.Write(b)
	if err != nil {
		s.stuck = true
	}
	return n, err
}

func (s *tlsSocket) enter(m tlsMode) { s.mode, s.budget = m, tlsFlood }

func (s *tlsSocket) Read(b []byte) (int, error) {
	if s.mode != tlsNormal {
		return s.readNoWait(b) // whose closure allocates
	}
	n, err := s.Conn.Read(b)
	s.record.Saw(b[:n])
	if err != nil {
		s.record.Lost()
	}
	return n, err
}

func (s *tlsSocket) readNoWait(b []byte) (n int, err error) {
	switch {
	case s.mode == tlsSealed || s.raw == nil:
		return 0, os.ErrDeadlineExceeded
	case s.budget <= 0:
		return 0, errFlood
	}
	if cerr := s.raw.Control(func(fd uintptr) { n, err = s.readNow(fd, b) }); cerr != nil {
		return 0, cerr
	}
	s.budget -= n
	s.record.Saw(b[:n])
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
// dialled last, in the tls.Config of the address. One for all would let a
// session be resumed under another name, scope or client certificate than it was
// made with; a tls.Config for each connection would be the largest part of it.
//
// A cache belongs to one identity: an address and the tls.Config that was given
// for it, known by its pointer. Another pointer is another identity with a cache
// of its own, and Retire makes another identity of the same pointer. The cache
// of an identity that is over is out of reach here, so what its connections
// still put into it (a ticket may come at any time) meets nobody.
type sessionCaches struct {
	mu      sync.Mutex // guards what follows; nothing else happens under it
	lru     *simplelru.LRU[Addr, tlsOfAddr]
	dropped uint64 // how often Retire was called
}

type tlsOfAddr struct {
	from, config *tls.Config // config is a copy of from, made for the address
}

func newSessionCaches() *sessionCaches {
	lru, err := simplelru.NewLRU[Addr, tlsOfAddr](1024, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &sessionCaches{lru: lru}
}

// age is for a dial that is about to ask what its tls.Config is.
func (s *sessionCaches) age() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// configFor is from with what belongs to addr. before is the age from before
// from was asked for: if there was a Retire meanwhile, from may be of the
// identity that is over, and what is made of it is for one dial only.
func (s *sessionCaches) configFor(addr Addr, from *tls.Config, before uint64) *tls.Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	late := before != s.dropped
	if have, known := s.lru.Get(addr); known && have.from == from && !late {
		return have.config
	}
	cfg := from.Clone()
	cfg.ServerName = serverName(addr, from)
	if cfg.ClientSessionCache = nil; resumes(from) {
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	}
	if !late {
		s.lru.Add(addr, tlsOfAddr{from, cfg})
	}
	return cfg
}

// resumes reports whether sessions made with cfg may be resumed. Who asks for a
// say in each handshake gets it: a resumed session would pass over these
// functions. A cache of the caller's own says that this is meant.
func resumes(cfg *tls.Config) bool {
	return cfg.ClientSessionCache != nil || cfg.VerifyPeerCertificate == nil && cfg.GetClientCertificate == nil
}

func (s *sessionCaches) drop(addr Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped++
	s.lru.Remove(addr)
}
