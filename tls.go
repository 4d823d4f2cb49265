package connpool

import (
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/seed-ecb488c9/connpool/internal/tlsrecord"
)

// serverName returns the name that TLS requests and verifies at addr under cfg.
func serverName(addr Addr, cfg *tls.Config) string {
	if addr.ServerName != "" {
		return addr.ServerName
	}
	host, _, _ := strings.Cut(addr.Host, "%") // certificates name no IPv6 zone
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsLoopback() && isLocalhost(cfg.ServerName) {
		return "localhost"
	}
	return host
}

// tlsMode says how Read of a tlsSocket works. crypto/tls calls it.
type tlsMode uint8

const (
	tlsNormal tlsMode = iota // wait for the peer
	tlsNoWait                // return the bytes that have arrived, and do not wait for more
	tlsSealed                // return no bytes
)

// tlsFlood bounds, in bytes, how much one probe reads from the socket: far more than
// any reasonable number of session tickets.
const tlsFlood = 64 << 10

var errRenegotiating = errors.New("a renegotiation of TLS was cut short")

var errStuck = errors.New("the peer asks for an answer and does not read it")

var errFlood = errors.New("the peer sends without end while the connection is idle")

// tlsGoodbye bounds the write of close_notify.
const tlsGoodbye = 250 * time.Millisecond

// tlsSocket is the socket under a tls.Conn of the pool's own. Its mode lets a probe ask
// crypto/tls for the bytes it holds without setting a deadline. It also bounds the
// write of close_notify, for which crypto/tls alone would wait 5 seconds.
type tlsSocket struct {
	net.Conn
	raw          syscall.RawConn // nil: a connection without a usable descriptor, which has no tlsNoWait
	readNow      func(fd uintptr, b []byte) (int, error)
	record       tlsrecord.Tracker // which bytes crypto/tls has read, and which it has returned
	budget       int               // bytes that tlsNoWait may still read
	mode         tlsMode           // only the owner uses it, between loans
	stuck        bool              // the answer to a key update could not be written
	renegotiates bool              // the peer may ask for another handshake, which may choose another cipher
	leaving      atomic.Bool       // sayGoodbye was called: bound the write of close_notify
	closed       atomic.Bool
}

// Close closes the socket below, only once. Both crypto/tls (after a failed handshake
// or a close_notify) and the pool close it.
func (s *tlsSocket) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	return s.Conn.Close()
}

func (s *tlsSocket) NetConn() net.Conn { return s.Conn }

// SyscallConn serves a borrower that has detached the connection.
func (s *tlsSocket) SyscallConn() (syscall.RawConn, error) {
	if s.raw == nil {
		return nil, errors.ErrUnsupported
	}
	return s.raw, nil
}

// Write waits for the peer, except during a probe, when it waits for probePatience at
// most: on a key update crypto/tls writes from within a Read. crypto/tls does not
// return the error of that write, so stuck records it.
func (s *tlsSocket) Write(b []byte) (int, error) {
	if s.mode == tlsNormal {
		return s.Conn.Write(b)
	}
	if _, foreign := classifyNetConn(s.Conn, s.Conn, false); foreign { // a foreign connection may ignore deadlines
		s.stuck = true
		return 0, errStuck
	}
	defer s.Conn.SetWriteDeadline(time.Time{})
	var n int
	var err error
	for range 3 { // on a busy machine the deadline may have passed before the first attempt to write
		s.Conn.SetWriteDeadline(time.Now().Add(probePatience))
		if n, err = s.Conn.Write(b); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	if err != nil {
		s.stuck = true
	}
	return n, err
}

// enter sets the mode, and the budget for tlsNoWait.
func (s *tlsSocket) enter(m tlsMode) { s.mode, s.budget = m, tlsFlood }

// Read is called by crypto/tls. It tells record which bytes crypto/tls has got.
func (s *tlsSocket) Read(b []byte) (int, error) {
	if s.mode != tlsNormal {
		return s.readNoWait(b) // a method of its own, because its closure allocates
	}
	n, err := s.Conn.Read(b)
	s.record.Saw(b[:n])
	if err != nil {
		s.record.Lost()
	}
	return n, err
}

// readNoWait is Read in the modes tlsNoWait and tlsSealed.
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

// sayGoodbye bounds the write of close_notify by tlsGoodbye. It is called before the
// tls.Conn is closed.
func (s *tlsSocket) sayGoodbye() { s.leaving.Store(true) }

// SetWriteDeadline replaces the deadline that tls.Conn.Close sets before it writes
// close_notify.
func (s *tlsSocket) SetWriteDeadline(t time.Time) error {
	if s.leaving.Load() {
		t = time.Now().Add(tlsGoodbye)
	}
	return s.Conn.SetWriteDeadline(t)
}

// sessionCaches holds a TLS session cache for each of the addresses that were dialled
// most recently, in a tls.Config made for the address. With one cache for all
// addresses, a session could be resumed under another name, scope or client certificate
// than the one it was made with. A tls.Config for each connection would be the largest
// part of the connection's memory.
//
// A cache belongs to one identity: an address, and the tls.Config that was given for
// it, compared by pointer. Another pointer is another identity with a cache of its own.
// After Retire the same pointer counts as a new identity. The cache of an old identity
// is no longer in here, so a ticket that one of its connections still receives is never
// used.
type sessionCaches struct {
	mu      sync.Mutex // guards what follows; nothing else happens under it
	lru     *simplelru.LRU[Addr, tlsOfAddr]
	dropped uint64 // how often addresses were retired

	expiry bool // the configs record which client certificate a handshake presents, see tls_cert.go; never changes
}

// tlsOfAddr is the tls.Config of one identity.
type tlsOfAddr struct {
	from, config *tls.Config // from is what the user gave; config is a copy of it, made for the address
}

// newSessionCaches returns caches for 1024 addresses; the least recently dialled one
// gives way.
func newSessionCaches() *sessionCaches {
	lru, err := simplelru.NewLRU[Addr, tlsOfAddr](1024, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &sessionCaches{lru: lru}
}

// age returns how often addresses were retired so far. A dial reads it before it asks for its
// tls.Config, see configFor.
func (s *sessionCaches) age() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// configFor returns a copy of from with the name and the session cache of addr. before
// is the age that was read before from was asked for. If Retire was called in the
// meantime, from may belong to the old identity, so the copy serves one dial only.
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
	if s.expiry && presents(from) {
		recorded(cfg, from)
	}
	if !late {
		s.lru.Add(addr, tlsOfAddr{from, cfg})
	}
	return cfg
}

// resumes reports whether sessions made with cfg may be resumed. A resumed session
// skips VerifyPeerCertificate and GetClientCertificate. So if one of these functions is
// set, sessions are resumed only if the caller has also set a cache, which says that
// skipping is intended.
func resumes(cfg *tls.Config) bool {
	return cfg.ClientSessionCache != nil || cfg.VerifyPeerCertificate == nil && cfg.GetClientCertificate == nil
}

// drop ends the identities of addrs: they are retired.
func (s *sessionCaches) drop(addrs ...Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped++
	for _, addr := range addrs {
		s.lru.Remove(addr)
	}
}

// addrs returns the addresses that have a session cache.
func (s *sessionCaches) addrs() map[Addr]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[Addr]struct{}, s.lru.Len())
	for _, addr := range s.lru.Keys() {
		all[addr] = struct{}{}
	}
	return all
}
