package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"syscall"
	"time"
)

// Prober may be implemented by a net.Conn that has no descriptor, or knows
// better than a look at its descriptor. Probe is asked before each loan and in
// each sweep, by one goroutine at a time and never during a loan. nil means
// that the peer is there and nothing waits to be read. It must not block.
//
// A connection that is neither a Prober nor has a descriptor is lent by the
// rules of age alone; Stats.Unprobed counts them.
type Prober interface{ Probe() error }

// unfit says why an idle connection may not be lent, ClosedUnknown if it may.
// The caller owns it. Age comes first, because it is cheap; then one look into
// the socket; then, for one that has long been idle, the protocol's own ping.
func (p *Pool) unfit(ctx context.Context, c *conn) (CloseReason, error) {
	if reason := p.aged(c, c.idleFor, c.since); reason != ClosedUnknown {
		return reason, nil
	}
	if !p.cfg.NoProbe {
		if reason, err := c.probe.ask(); reason != ClosedUnknown {
			return reason, err
		}
	}
	if p.cfg.Check == nil {
		return ClosedUnknown, nil
	}
	unproven := c.idleFor
	if !c.checked.IsZero() {
		unproven = min(unproven, elapsed(c.checked, c.since))
	}
	if unproven < p.cfg.TrustIdle {
		return ClosedUnknown, nil
	}
	return p.ping(ctx, c)
}

func (p *Pool) ping(ctx context.Context, c *conn) (CloseReason, error) {
	if err := p.runHook(ctx, c, "Config.Check", p.cfg.Check); err != nil {
		if ctx.Err() != nil {
			return ClosedCanceled, err
		}
		return ClosedCheckFailed, err
	}
	c.checked = p.now()
	if p.cfg.NoProbe {
		return ClosedUnknown, nil
	}
	return c.probe.ask() // the answer may have been longer than Check read
}

// aged says whether a connection that has been idle for so long has outlived
// its time.
func (p *Pool) aged(c *conn, idleFor time.Duration, now time.Time) CloseReason {
	switch {
	case p.cfg.IdleTimeout > 0 && idleFor >= p.cfg.IdleTimeout:
		return ClosedIdleTimeout
	case c.life > 0 && elapsed(c.born, now) >= c.life:
		return ClosedLifetime
	}
	return ClosedUnknown
}

// probe is how a connection is asked whether it lives and is clean.
//
// One peek at the socket answers it for a plain connection: nothing there is
// good, bytes that nobody asked for are as bad as an end of stream. Under TLS
// bytes prove nothing: they may be session tickets, and an end may look like
// data. So if, and only if, the peek shows bytes, crypto/tls reads once, over a
// socket that does not wait: it eats tickets and finds nothing (alive), finds
// plaintext (dirty), or finds the end (stale).
type probe struct {
	prober Prober          // nil: the connection is not one
	raw    syscall.RawConn // nil: no descriptor
	plain  bool            // the descriptor is a socket whose close cannot block
	tls    *tls.Conn       // nil: no crypto/tls above
	sock   *tlsSocket      // what crypto/tls reads from; nil if a custom dialer made the TLS

	look    func(fd uintptr) // peeks into seen; made once, because a closure allocates
	seen    peeked
	scratch [1]byte
}

func (p *probe) init(nc net.Conn) {
	p.prober, _ = nc.(Prober)
	below := nc
	if t, ok := nc.(*tls.Conn); ok {
		p.tls = t
		below = t.NetConn()
		if p.sock, ok = below.(*tlsSocket); ok {
			below = p.sock.Conn
		}
	}
	switch below.(type) {
	case *net.TCPConn, *net.UnixConn:
		p.plain = p.tls == nil || p.sock != nil
	}
	for {
		u, ok := below.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		below = u.NetConn()
	}
	if sc, ok := below.(syscall.Conn); ok {
		p.raw, _ = sc.SyscallConn()
	}
	p.look = func(fd uintptr) { p.seen = peek(fd) }
}

// can reports whether there is anything to ask.
func (p *probe) can() bool { return p.prober != nil || p.raw != nil && canPeek }

// peeked is what a look into a socket found.
type peeked struct {
	bytes bool  // something waits to be read
	err   error // io.EOF, or why the socket is no good
}

// ask looks whether an idle connection lives and is clean. The caller owns it.
func (p *probe) ask() (CloseReason, error) {
	if p.prober != nil {
		if err := p.askProber(); err != nil {
			return ClosedStale, err
		}
		return ClosedUnknown, nil
	}
	if !p.can() {
		return ClosedUnknown, nil
	}
	if err := p.raw.Control(p.look); err != nil {
		return ClosedStale, err
	}
	switch {
	case p.seen.err != nil:
		return ClosedStale, p.seen.err
	case !p.seen.bytes:
		return ClosedUnknown, nil
	case p.tls == nil:
		return ClosedDirty, errUnread
	}
	return p.readThrough(noWait, time.Millisecond)
}

func (p *probe) askProber() (err error) {
	defer recoverInto(&err, "Probe")
	return p.prober.Probe()
}

var errUnread = errors.New("bytes were waiting that nobody had asked for")

// leftovers reports whether crypto/tls holds plaintext that was not read, or
// has seen the end.
func (p *probe) leftovers() bool {
	if p.tls == nil {
		return false
	}
	reason, _ := p.readThrough(sealed, -1)
	return reason != ClosedUnknown
}

// readThrough reads one byte through crypto/tls without waiting for the peer.
// Over a foreign socket, which cannot be switched, a deadline has to do: it
// waits for patience at most.
func (p *probe) readThrough(mode tlsMode, patience time.Duration) (reason CloseReason, err error) {
	defer func() {
		if err != nil && reason == ClosedUnknown {
			reason = ClosedStale
		}
	}()
	defer recoverInto(&err, "the connection under TLS")
	if p.sock != nil {
		p.sock.enter(mode)
		defer p.sock.enter(normal)
	} else {
		if !p.tls.ConnectionState().HandshakeComplete {
			return ClosedUnknown, nil
		}
		deadline := past
		if patience > 0 {
			deadline = time.Now().Add(patience)
		}
		p.tls.SetReadDeadline(deadline)
		defer p.tls.SetReadDeadline(time.Time{})
	}
	n, err := p.tls.Read(p.scratch[:])
	switch {
	case n > 0:
		return ClosedDirty, errUnread
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ClosedUnknown, nil
	case err == nil:
		err = io.ErrNoProgress
	}
	return ClosedStale, err
}

// isNil reports whether a dialer returned a nil pointer in an interface.
func isNil(nc net.Conn) bool {
	if nc == nil {
		return true
	}
	v := reflect.ValueOf(nc)
	return v.Kind() == reflect.Pointer && v.IsNil()
}
