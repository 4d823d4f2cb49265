package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"sync"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// Prober may be implemented by a net.Conn that has no descriptor, or knows
// better than a look at its descriptor. Probe is asked before each loan and in
// each sweep, by one goroutine at a time and never during a loan. nil means
// that the peer is there and nothing waits to be read, an error that is ErrUnread
// that something does; after any other the connection is closed. It must not block.
//
// A connection that is neither a Prober nor has a descriptor is lent by the
// rules of age alone; Stats.Unprobed counts them.
type Prober interface{ Probe() error }

// unfit says why an idle connection may not be lent, ClosedUnknown if it may.
// The caller owns it. Age comes first, because it is cheap; then one look into
// the socket; then, for one that has long been idle, the protocol's own ping.
func (c *conn) whyUnfit(ctx context.Context) (CloseReason, error) {
	p := c.site.pool
	unproven := p.clock.Age(c.since-clock.Instant(c.idleFor), c.since)
	idleFor := unproven
	if e := c.cold.Load(); e != nil && e.fromReserve {
		idleFor = 0
	}
	if reason := p.aged(c, idleFor, c.since); reason != ClosedUnknown {
		return reason, nil
	}
	if reason, err := c.probe(); reason != ClosedUnknown {
		return reason, err
	}
	if p.cfg.Check == nil {
		return ClosedUnknown, nil
	}
	if c.checked != 0 {
		unproven = min(unproven, p.clock.Age(c.checked, c.since))
	}
	// c.since may be older than the latest answer of Check: the borrower's clock
	// was read before the lock. That is no reason to trust a peer where nothing is.
	if max(0, unproven) < p.cfg.CheckAfterIdle {
		return ClosedUnknown, nil
	}
	return c.ping(ctx)
}

func (c *conn) ping(ctx context.Context) (CloseReason, error) {
	p := c.site.pool
	asked := false
	defer func() {
		if !asked { // a ctx of the borrower's making panicked
			c.discard(ClosedCheckFailed, nil)
		}
	}()
	err := c.runHook(ctx, "Config.Check", p.cfg.Check)
	canceled := ctx.Err() != nil
	asked = true
	if err != nil {
		if canceled {
			return ClosedCanceled, err
		}
		return ClosedCheckFailed, err
	}
	c.checked = p.clock.Exactly()
	if p.cfg.Push != nil {
		if unread, err := c.unread(); err != nil {
			return ClosedCheckFailed, err
		} else if unread {
			return ClosedDirty, ErrUnread
		}
	}
	return c.probe() // the answer may have been longer than Check read
}

// system is the seam through which every system call of the pool's own passes.
// Tests put their own in its place.
type system struct {
	dial         func(context.Context, Addr) (net.Conn, error)
	identify     func(fd uintptr) (sock.ID, bool)
	stillIs      func(fd uintptr, id sock.ID) bool
	peek         func(fd uintptr) sock.Seen
	readNow      func(fd uintptr, b []byte) (int, error)
	handleLimit  func() (int, bool)
	noHandleFree func() bool
}

var realSystem = system{dialSocket, sock.Identify, sock.Still, sock.Peek, sock.ReadNow, sock.FileLimit, sock.NoFileFree}

// probe is how a connection is asked whether it is still itself, lives and is
// clean.
//
// First, identity. The operating system gives the number of a closed descriptor
// to the next socket, so a descriptor that was closed behind the pool's back may
// have become somebody else's: reading from it, writing to it and closing it
// would hit a stranger. What the socket was is recorded when it is dialled and
// compared before anything touches the descriptor again. It is check, then act:
// a theft between the two goes unnoticed until the next look.
//
// Then one peek. On a plain connection nothing there is good; bytes that nobody
// asked for are as bad as an end of stream. Under TLS bytes prove nothing: they
// may be session tickets, and an end may look like data. So if, and only if, the
// peek shows bytes, crypto/tls reads once, over a socket that does not wait: it
// eats tickets and finds nothing (alive), finds plaintext (dirty), or finds the
// end (stale).
type socket struct {
	sys *system
	raw syscall.RawConn // nil: no descriptor
	tls *tls.Conn       // nil: no crypto/tls above

	who     sock.ID // of the descriptor's socket, if raw is there
	number  uint32  // of the descriptor; those of Windows too have 32 bits that count
	known   bool    // who is
	plain   bool    // a socket of package net: its close does not block, unless it lingers
	foreign bool    // the connection is somebody else's code, which may do anything
	keep    bool    // plaintext that a look takes out is for Config.Push
}

// look is one visit to a descriptor: what it is to find out, and what it found.
// It is used again and again, because a closure allocates.
type fdVisit struct {
	sock    *socket
	peek    bool          // not only compare the identity
	visit   func(uintptr) // made once
	stolen  bool
	seen    sock.Seen
	scratch [1]byte // for readThrough
}

var fdVisits = sync.Pool{New: func() any {
	l := new(fdVisit)
	l.visit = func(fd uintptr) {
		p := l.sock
		l.stolen = p.known && !p.sys.stillIs(fd, p.who)
		if l.seen = (sock.Seen{}); l.peek && !l.stolen {
			l.seen = p.sys.peek(fd)
		}
	}
	return l
}}

func newFDVisit(p *socket, peek bool) *fdVisit {
	l := fdVisits.Get().(*fdVisit)
	l.sock, l.peek = p, peek
	return l
}

func (l *fdVisit) done() {
	l.sock, l.seen = nil, sock.Seen{}
	fdVisits.Put(l)
}

func (p *socket) init(nc net.Conn, sys *system, cfg *Config) {
	p.sys, p.keep = sys, cfg.Push != nil
	below := nc
	if t, ok := nc.(*tls.Conn); ok {
		p.tls = t
		below = t.NetConn()
		if sock := p.belowTLS(); sock != nil {
			below = sock.Conn
		}
	}
	p.plain, p.foreign = mannersOf(nc, below, p.belowTLS() != nil)
	for range wrappings {
		u, ok := below.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		below = u.NetConn()
	}
	sc, ok := below.(syscall.Conn)
	if !ok {
		return
	}
	if p.raw, _ = sc.SyscallConn(); p.raw == nil {
		return
	}
	p.raw = trusted(p.raw)
	shown := false
	p.raw.Control(func(fd uintptr) {
		p.number, shown = uint32(fd), true
		if !cfg.NoFDCheck {
			p.who, p.known = sys.identify(fd)
		}
	})
	if !shown && p.foreign {
		p.raw = nil // there is none, whatever SyscallConn says
	}
}

// wrappings is how many connections may be wrapped in each other before the pool
// gives up looking for the innermost: one may say that it wraps itself.
const wrappings = 16

// sock is what crypto/tls reads from; nil without TLS, or if a custom dialer made it.
func (p *socket) belowTLS() *tlsSocket {
	if p.tls == nil {
		return nil
	}
	s, _ := p.tls.NetConn().(*tlsSocket)
	return s
}

// can reports whether there is a descriptor to ask.
func (p *socket) canPeek() bool { return p.raw != nil && sock.CanPeek }

// prober is nc as a Prober, nil if it is none. Only foreign connections are.
func (p *socket) prober(nc net.Conn) Prober {
	if !p.foreign {
		return nil
	}
	pr, _ := nc.(Prober)
	return pr
}

// fd is the number of the descriptor, if raw is there.
func (p *socket) fd() uintptr { return uintptr(p.number) }

// isStolen reports whether the descriptor has become another socket's.
func (p *socket) isStolen() (stolen bool) {
	if !p.known {
		return false
	}
	p.raw.Control(func(fd uintptr) { stolen = !p.sys.stillIs(fd, p.who) })
	return stolen
}

// lingers reports whether the socket was told to wait in its close (SO_LINGER).
// Whoever made it, or had it on loan, may have done that.
func (p *socket) lingers() (yes bool) {
	if p.raw == nil {
		return false
	}
	p.raw.Control(func(fd uintptr) { yes = sock.Lingers(fd) })
	return yes
}

// ask looks whether the connection may be lent. The caller owns it.
func (c *conn) probe() (CloseReason, error) {
	if c.word.Load()&flagHungUp != 0 {
		c.word.And(^uint64(flagHungUp)) // before the look, so that the next one is not missed
		if e := c.cold.Load(); e != nil && e.end != nil {
			return ClosedStale, e.end
		}
	}
	if reason, err := c.condemned(); reason != ClosedUnknown {
		return reason, err
	}
	reason, err := c.sock.probe(&c.site.pool.cfg, c.nc)
	c.site.pool.report.outlived(err, c.site.addr)
	if reason == ClosedDirty && c.sock.keep {
		c.keepPushback(err)
	}
	return reason, err
}

func (p *socket) probe(cfg *Config, nc net.Conn) (CloseReason, error) {
	var seen sock.Seen
	if p.raw != nil && (p.known || !cfg.NoProbe) {
		l := newFDVisit(p, !cfg.NoProbe)
		err := p.raw.Control(l.visit)
		stolen := l.stolen
		seen = l.seen
		l.done()
		switch {
		case err != nil:
			return ClosedStale, err
		case stolen:
			return ClosedQuarantined, errStolen
		}
	}
	if cfg.NoProbe {
		return ClosedUnknown, nil
	}
	if pr := p.prober(nc); pr != nil {
		switch err := askProber(pr); {
		case err == nil:
			return ClosedUnknown, nil
		case errors.Is(err, ErrUnread):
			return ClosedDirty, err
		default:
			return ClosedStale, err
		}
	}
	switch {
	case seen.Err != nil:
		return ClosedStale, seen.Err
	case !seen.Bytes:
		return ClosedUnknown, nil
	case p.tls == nil:
		return ClosedDirty, ErrUnread
	}
	return p.readThrough(tlsNoWait, probePatience)
}

func askProber(pr Prober) error {
	k := newCall("Probe")
	k.prober = pr
	return k.await(foreignPatience)
}

// probePatience bounds what a look may wait for where it cannot do without
// waiting: for crypto/tls over a foreign connection, and for the answer that
// TLS 1.3 owes to a key update.
const probePatience = time.Millisecond

var (
	errPartial  = fmt.Errorf("%w: a part of a TLS record", ErrUnread)
	errUnproven = errors.New("what crypto/tls holds cannot be asked without a deadline")
	errStolen   = errors.New("the descriptor has become another socket's: something closed it behind the pool's back")
)

// leftovers reports whether crypto/tls holds plaintext that was not read, or a
// part of a record, or has seen the end. A loan that moved nothing may have
// made it read all the same: a read that timed out in the middle of a record, or
// of a renegotiation, moves nothing. Over a socket of the pool's own its reads
// are known; of a dialer's *tls.Conn only what the borrower did is.
func (p *socket) leftovers(moved bool) (bool, error) {
	switch sock := p.belowTLS(); {
	case p.tls == nil:
		return false, nil
	case sock == nil && !moved:
		return false, nil
	case sock != nil && (sock.record.Untouched() || sock.record.Drained()):
		return false, nil
	}
	reason, err := p.readThrough(tlsSealed, -1)
	return reason != ClosedUnknown, err
}

// readThrough reads one byte through crypto/tls without waiting for the peer.
// Over a foreign connection, which cannot be told not to wait, a deadline has to
// do: it waits for patience at most.
//
// A foreign connection that takes no deadline is not read: what nobody can ask is
// not proven clean. Of the pool's own TLS over it crypto/tls alone is asked.
func (p *socket) readThrough(mode tlsMode, patience time.Duration) (reason CloseReason, err error) {
	if !p.foreign || mode == tlsSealed && p.belowTLS() != nil {
		l := newFDVisit(p, false)
		defer l.done()
		var step string
		return p.readThroughNow(mode, patience, &l.scratch, &step)
	}
	// What is left behind keeps the byte that it reads into.
	found, scratch := make(chan CloseReason, 1), new([1]byte)
	k := newCall("the connection under TLS")
	k.f = func() error {
		reason, err := p.readThroughNow(mode, patience, scratch, &k.step)
		found <- reason
		return err
	}
	err = k.await(foreignPatience)
	select {
	case reason = <-found:
	default:
		reason = ClosedStale
	}
	return reason, err
}

// readThroughNow writes to step which method of the connection it is about to call:
// code that is not the pool's may panic in it, or end the goroutine.
func (p *socket) readThroughNow(mode tlsMode, patience time.Duration, scratch *[1]byte, step *string) (reason CloseReason, err error) {
	defer func() {
		if err != nil && reason == ClosedUnknown {
			reason = ClosedStale
		}
	}()
	*step = "the connection under TLS"
	defer recoverAt(&err, step)
	sock := p.belowTLS()
	switch {
	case sock != nil && (mode == tlsSealed || sock.raw != nil):
		sock.enter(mode)
		defer sock.enter(tlsNormal)
	case !p.tls.ConnectionState().HandshakeComplete:
		return ClosedUnknown, nil
	default:
		deadline := aLongTimeAgo
		if patience > 0 {
			deadline = time.Now().Add(patience)
		}
		*step = "SetDeadline of the connection under TLS"
		if err := p.tls.SetDeadline(deadline); err != nil && sock != nil {
			return p.readThroughNow(tlsSealed, patience, scratch, step)
		} else if err != nil {
			return ClosedStale, fmt.Errorf("%w: %w", errUnproven, err)
		}
		defer func() {
			before := *step // a panic may be under way
			*step = "SetDeadline of the connection under TLS"
			if e := p.tls.SetDeadline(time.Time{}); e != nil && reason == ClosedUnknown {
				reason, err = ClosedStale, e // it would strike the next borrower
			}
			*step = before
		}()
	}
	*step = "Read of the connection under TLS"
	n, err := p.tls.Read(scratch[:])
	switch {
	case n > 0:
		if p.keep {
			return ClosedDirty, p.wholeRecord(scratch[0])
		}
		return ClosedDirty, ErrUnread
	case err == nil:
		return ClosedStale, io.ErrNoProgress
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return ClosedStale, err
	case sock != nil && sock.stuck:
		return ClosedStale, errStuck
	case sock != nil && sock.record.Partial():
		return ClosedDirty, errPartial
	case (sock == nil || sock.renegotiates) && !p.tls.ConnectionState().HandshakeComplete:
		// This read, or the borrower's last, ran out of time in the middle of
		// a renegotiation, which crypto/tls never takes up again.
		return ClosedStale, errRenegotiating
	case sock == nil || sock.raw == nil:
		// A write of nothing shows whether an answer could not be written.
		*step = "Write of the connection under TLS"
		if _, err := p.tls.Write(nil); err != nil {
			return ClosedStale, err
		}
	}
	if sock != nil {
		sock.record.Reset()
	}
	return ClosedUnknown, nil
}

// isNil reports whether nc is nil, or a nil pointer in an interface.
func isNil(nc any) bool {
	if nc == nil {
		return true
	}
	v := reflect.ValueOf(nc)
	return v.Kind() == reflect.Pointer && v.IsNil()
}
