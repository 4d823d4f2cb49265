package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tlsrecord"
)

// Prober may be implemented by a net.Conn that has no descriptor, or that knows better
// than a look at its descriptor. The pool calls Probe before each loan and in each
// sweep, from one goroutine at a time and never during a loan. Probe returns nil if the
// peer is there and no bytes wait to be read, and an error that is ErrUnread if bytes
// are waiting. After any other error the pool closes the connection. Probe must not
// block.
//
// A connection that is no Prober and has no descriptor is judged by its age only;
// Stats.Unprobed counts such connections.
type Prober interface{ Probe() error }

// system is the seam at which tests replace system calls of the pool.
type system struct {
	dial         func(context.Context, Addr) (net.Conn, error)
	identify     func(fd uintptr) (sock.ID, bool)
	stillIs      func(fd uintptr, id sock.ID) bool
	peek         func(fd uintptr) sock.Seen
	readNow      func(fd uintptr, b []byte) (int, error)
	handleLimit  func() (int, bool)
	noHandleFree func() bool
}

// socket is the descriptor side of a connection: it answers whether the connection is
// still the one that was dialled, is alive, and is clean.
//
// First, identity. The operating system gives the number of a closed descriptor to the
// next socket. If other code in the process closes a descriptor that the pool uses, the
// number may belong to another socket, and the pool would read from it, write to it or
// close it. So the pool records the identity of the socket when it is dialled, and
// compares it before it touches the descriptor again. Between the comparison and the
// use there is a gap: a descriptor that is stolen in the gap is noticed only at the
// next probe.
//
// Then one peek, which reads without taking. On a plain connection both findings are
// bad: unrequested bytes, and the end of the stream. Under TLS, bytes alone prove
// nothing: they may be session tickets, or an alert that ends the connection. So if,
// and only if, the peek shows bytes, crypto/tls reads once, over a socket that does not
// wait. It consumes tickets and finds nothing more (alive), finds plaintext (dirty), or
// finds the end (stale).
type socket struct {
	sys *system
	raw syscall.RawConn // nil: no descriptor
	tls *tls.Conn       // nil: no crypto/tls above

	who     sock.ID // identity of the descriptor's socket, valid if known
	number  uint32  // number of the descriptor; on Windows too 32 bits are enough
	known   bool    // who is valid
	plain   bool    // a socket of package net: its Close does not block, unless SO_LINGER is set
	foreign bool    // the connection is foreign code, see foreign.go
	keep    bool    // plaintext that a probe reads is kept for Config.Push
}

// fdVisit is one visit to a descriptor: the question and the result. It is used again
// and again, because a closure allocates.
type fdVisit struct {
	sock    *socket
	peek    bool          // peek, too; else only compare the identity
	visit   func(uintptr) // the closure, made once
	stolen  bool          // result: the descriptor has become another socket's
	seen    sock.Seen     // result of the peek
	scratch [1]byte       // for readThrough
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

// newFDVisit returns a visit to the descriptor of p; done gives it back.
func newFDVisit(p *socket, peek bool) *fdVisit {
	l := fdVisits.Get().(*fdVisit)
	l.sock, l.peek, l.stolen = p, peek, false
	return l
}

// done makes the visit available for another probe.
func (l *fdVisit) done() {
	l.sock, l.seen = nil, sock.Seen{}
	fdVisits.Put(l)
}

// init finds the descriptor of nc, under TLS and under wrappers, and records its
// identity.
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
	p.plain, p.foreign = classifyNetConn(nc, below, p.belowTLS() != nil)
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
		p.raw = nil // SyscallConn promises a descriptor, but Control shows none
	}
}

// wrappings bounds how many connections may wrap each other before the pool gives up
// the search for the innermost: a connection may name itself as the one it wraps.
const wrappings = 16

// belowTLS returns the socket that crypto/tls reads from; nil without TLS, or if a
// custom dialer made the tls.Conn.
func (p *socket) belowTLS() *tlsSocket {
	if p.tls == nil {
		return nil
	}
	s, _ := p.tls.NetConn().(*tlsSocket)
	return s
}

// canPeek reports whether there is a descriptor to peek at.
func (p *socket) canPeek() bool { return p.raw != nil && sock.CanPeek }

// prober returns nc as a Prober, nil if it is none. Only foreign connections can be.
func (p *socket) prober(nc net.Conn) Prober {
	if !p.foreign {
		return nil
	}
	pr, _ := nc.(Prober)
	return pr
}

// fd returns the number of the descriptor. It is valid if raw is not nil.
func (p *socket) fd() uintptr { return uintptr(p.number) }

// isStolen reports whether the descriptor has become another socket's.
func (p *socket) isStolen() (stolen bool) {
	if !p.known {
		return false
	}
	l := newFDVisit(p, false)
	p.raw.Control(l.visit)
	stolen = l.stolen
	l.done()
	return stolen
}

// lingers reports whether SO_LINGER makes Close of the socket wait. The dialer or a
// borrower may have set it.
func (p *socket) lingers() (yes bool) {
	if p.raw == nil {
		return false
	}
	p.raw.Control(func(fd uintptr) { yes = sock.Lingers(fd) })
	return yes
}

// probe is conn.probe without the flags of the state word: it visits the descriptor, or
// calls Probe of nc.
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

// askProber calls pr.Probe, for foreignPatience at most.
func askProber(pr Prober) error {
	k := newCall("Probe")
	k.prober = pr
	return k.await(foreignPatience)
}

// probePatience bounds how long a probe waits where it has to wait: for crypto/tls over
// a foreign connection, and for the write of the answer that TLS 1.3 requires to a key
// update.
const probePatience = time.Millisecond

var (
	errPartial  = fmt.Errorf("%w: a part of a TLS record", ErrUnread)
	errUnproven = errors.New("what crypto/tls holds cannot be asked without a deadline")
	errStolen   = errors.New("the descriptor has become another socket's: something closed it behind the pool's back")
)

// leftovers reports whether crypto/tls holds plaintext that was not read, holds a part
// of a record, or has seen the end. moved says that the loan has moved bytes. A loan
// that has moved none may still have made crypto/tls read: a read that timed out in the
// middle of a record, or of a renegotiation, returns no bytes. Over a tlsSocket the
// pool knows what crypto/tls has read. Of a dialer's own *tls.Conn it knows what the
// borrower did, and, if the version of crypto/tls is known, what crypto/tls holds.
func (p *socket) leftovers(moved bool) (bool, error) {
	switch sock := p.belowTLS(); {
	case p.tls == nil:
		return false, nil
	case sock == nil && (!moved || !p.foreign && tlsrecord.Quiet(p.tls)): // foreign code below may have a buffer of its own
		return false, nil
	case sock != nil && (sock.record.Untouched() || sock.record.Drained()):
		return false, nil
	}
	reason, err := p.readThrough(tlsSealed, -1)
	return reason != ClosedUnknown, err
}

// readThrough reads one byte through crypto/tls without waiting for the peer. A foreign
// connection cannot be told not to wait, so there a deadline bounds the read: it waits
// for patience at most.
//
// A foreign connection that accepts no deadline is not read: the pool cannot find out
// whether it is clean, so it closes the connection. If the pool's own TLS runs over
// such a connection, readThrough asks crypto/tls alone, and does not read from below.
func (p *socket) readThrough(mode tlsMode, patience time.Duration) (reason CloseReason, err error) {
	if !p.foreign || mode == tlsSealed && p.belowTLS() != nil {
		l := newFDVisit(p, false)
		defer l.done()
		var step string
		return p.readThroughNow(mode, patience, &l.scratch, &step)
	}
	// A call that is given up goes on using the byte that it reads into, so it gets one
	// of its own.
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

// readThroughNow does the work of readThrough on the calling goroutine. It writes to
// step which method of the connection it is about to call: foreign code may panic
// there, or end the goroutine.
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
				reason, err = ClosedStale, e // the deadline would end an operation of the next borrower
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
	case sock != nil && sock.record.Partial(), sock == nil && tlsrecord.Partial(p.tls):
		return ClosedDirty, errPartial
	case (sock == nil || sock.renegotiates) && !p.tls.ConnectionState().HandshakeComplete:
		// This read, or the borrower's last read, ran out of time in the middle of a
		// renegotiation. crypto/tls cannot resume it.
		return ClosedStale, errRenegotiating
	case sock == nil || sock.raw == nil:
		// An empty write returns the error of an answer that could not be written.
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

// aLongTimeAgo is a deadline that makes blocked operations return at once.
var aLongTimeAgo = time.Unix(1, 0)
