package connpool

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// handshake makes a TLS connection over nc, with the identity and the trust that belong
// to the address. The attempt still closes nc if handshake fails.
func (a *attempt) handshake(ctx context.Context, nc net.Conn) (net.Conn, error) {
	env := a.c.site.env
	a.where = "Config.TLSFor"
	cfg, err := a.tlsConfig()
	if err != nil {
		return nil, err
	}
	a.where = "SyscallConn of the connection"
	under := &tlsSocket{Conn: nc, readNow: env.sys.readNow}
	if !a.wrap(under) {
		return nil, context.DeadlineExceeded
	}
	if sc, ok := nc.(syscall.Conn); ok && sock.CanPeek {
		raw, _ := sc.SyscallConn()
		under.raw = trusted(raw)
	}
	if under.raw != nil {
		// A TLS server does not speak first. Bytes that arrive before the handshake
		// were not encrypted, but would be read as if they were a part of it.
		early := false
		shown := false
		under.raw.Control(func(fd uintptr) { early, shown = env.sys.peek(fd).Bytes, true })
		switch {
		case early:
			return nil, tls.RecordHeaderError{Msg: "the peer sent bytes before the handshake", Conn: nc}
		case !shown: // SyscallConn promises a descriptor, but Control shows none
			under.raw = nil
		}
	}
	a.where = "a callback of tls.Config or the connection below"
	tc := tls.Client(under, cfg)
	var slot *certSlot
	if env.cfg.TLSExpiry {
		ctx, slot = withSlot(ctx)
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	// The pool does not know how much of the handshake's bytes crypto/tls still holds.
	// So the record tracking starts as lost, and the end of the first loan asks
	// crypto/tls.
	state := tc.ConnectionState()
	if slot != nil {
		now := time.Now
		if cfg.Time != nil {
			now = cfg.Time
		}
		end, err := certsLast(slot.presented, state, now())
		if err != nil {
			return nil, err
		}
		if a.cert = slot.presented; !end.IsZero() {
			a.lasts = max(1, end.Sub(now()))
		}
	}
	under.renegotiates = state.Version < tls.VersionTLS13 && cfg.Renegotiation != tls.RenegotiateNever
	if under.record.Lost(); !under.renegotiates {
		under.record.Start(state)
	}
	return tc, nil
}

var zeroTLS tls.Config // never changed, only cloned

// tlsConfig returns the tls.Config of the handshake, with the identity and the trust of
// the address.
func (a *attempt) tlsConfig() (*tls.Config, error) {
	env, addr := a.c.site.env, a.c.site.addr
	before := env.sessions.age()
	from, err := env.tlsSource(addr)
	if err != nil {
		return nil, err
	}
	return env.sessions.configFor(addr, from, before), nil
}

// tlsSource returns the tls.Config that the user has given for addr.
func (env *env) tlsSource(addr Addr) (*tls.Config, error) {
	cfg := env.cfg.TLS
	if env.cfg.TLSFor != nil {
		own, err := env.cfg.TLSFor(addr)
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
	return cfg, nil
}
