package connpool

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// How a connection ends: what speaks against keeping it, whether its descriptor
// is still its own, and how it is closed.

// leftovers reports whether bytes are left that the borrower did not read, in
// the state's buffer or in crypto/tls, or did not flush. Those in the kernel are
// found by the look that precedes the next loan, together with those that come
// later.
//
// With a Push what is unread is for it, and no reason to give the connection up.
//
// The state is asked in the caller's own time.
func (c *conn) leftovers(word uint64) bool { return c.leftoversBeside(word, c.held()) }

// leftoversBeside is leftovers where it is known what the state holds.
func (c *conn) leftoversBeside(word uint64, in holdings) bool {
	if in.unflushed > 0 {
		return true
	}
	left := in.unread > 0
	var err error
	if !left {
		left, err = c.sock.leftovers(word&flagMoved != 0)
		c.keepPushback(err)
		c.site.pool.report.outlived(err, c.site.addr)
	}
	if left && c.sock.keep && !isLate(err) && !errors.Is(err, errUnproven) {
		c.ensureCold().unread = true
		return false
	}
	return left
}

func (c *conn) unprobed() bool {
	return c.nc != nil && !c.sock.canPeek() && c.sock.prober(c.nc) == nil
}

// closesAtOnce reports whether closing for this reason cannot block and runs
// no foreign code, so that it may happen in a borrower's path.
func (c *conn) closesAtOnce(reason CloseReason) bool {
	if _, ok := c.state.(io.Closer); ok {
		return false
	}
	return c.sock.plain && (c.sock.tls == nil || !reason.clean()) && !c.sock.lingers()
}

// seal is the last step before the socket is closed: it finds out whether the
// descriptor is still the connection's own. If it is not, the connection goes
// into quarantine, and must not be closed. The first who seals it closes the
// socket, and nobody else.
func (c *conn) seal() (first, own bool) {
	for {
		w := c.word.Load()
		if w&flagStolen != 0 || c.sock.isStolen() {
			break
		}
		if c.word.CompareAndSwap(w, w|flagShut) { // or it was marked stolen just now
			return w&flagShut == 0, true
		}
	}
	quarantine.add(c.nc)
	return false, false
}

// wake makes those return who are blocked in a connection that is not to be closed:
// a deadline does not touch the descriptor.
func (c *conn) wake() {
	if c.sock.foreign {
		c.tellDeadline(c.loanState(), false, func() error { return c.nc.SetDeadline(aLongTimeAgo) })
		return
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	c.nc.SetDeadline(aLongTimeAgo)
}

// strike closes the socket under a loan of a hook, whose caller remains the owner
// and frees the slot.
func (c *conn) strike() {
	e := c.ensureCold()
	c.dmu.Lock()
	if e.struck != nil {
		c.dmu.Unlock()
		return
	}
	struck := make(chan struct{})
	e.struck = struck
	c.dmu.Unlock()
	defer close(struck)
	switch first, own := c.seal(); {
	case first:
		c.closeAbruptly()
	case !own:
		c.wake()
	}
}

// awaitStrike is for the owner who finds that the socket is somebody else's to
// close: it waits until that has been done.
func (c *conn) awaitStrike() {
	e := c.cold.Load()
	if e == nil {
		return
	}
	c.dmu.Lock()
	struck := e.struck
	c.dmu.Unlock()
	if struck != nil {
		<-struck
	}
}

// quarantine holds the connections whose descriptor has become somebody
// else's, for as long as the process lives. They are never touched again, and
// never garbage either: the finalizer of package net would close the number.
var quarantine quarantined

type quarantined struct {
	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func (s *quarantined) add(nc net.Conn) {
	s.mu.Lock()
	s.conns = append(s.conns, nc)
	s.mu.Unlock()
}

// closeAbruptly closes the socket without a farewell.
func (c *conn) closeAbruptly() {
	if t := c.sock.tls; t != nil {
		t.NetConn().Close() // crypto/tls would say goodbye
		return
	}
	c.nc.Close()
}

const (
	// closeTimeout bounds a close that runs foreign code or says goodbye.
	closeTimeout = 5 * time.Second

	// closePatience is how long a close is counted on to free its slot soon.
	// After that an idle connection is evicted in its place.
	closePatience = 10 * time.Millisecond

	// evictionPatience bounds the close of a connection that made room for a
	// waiter, from then on, if the waiter is still there: where every close
	// hangs, there is no use in evicting all that is idle, one after another.
	evictionPatience = 500 * time.Millisecond
)

// closeFully closes the connection, if that is the caller's to do, and what Setup
// built on it. It may block; at says in what. Whatever the one does, the other is
// closed too.
func (c *conn) closeFully(reason CloseReason, first bool, at *atomic.Value) {
	if s, ok := c.state.(io.Closer); ok {
		defer c.closeOne(at, "Close of the state", func() { s.Close() })
	}
	if !first {
		at.Store("Close of the connection")
		c.awaitStrike()
		return
	}
	closed := false
	defer func() {
		if !closed { // it panicked, or ended the goroutine
			go c.closeBelow()
		}
	}()
	c.closeOne(at, "Close of the connection", func() {
		c.closeSocket(reason)
		closed = true
	})
}

// closeOne runs one part of a close. It stops a panic and tells of it, and of a
// Goexit, which cannot be stopped.
func (c *conn) closeOne(at *atomic.Value, what string, f func()) {
	at.Store(what)
	returned := false
	defer func() {
		if returned {
			return
		}
		c.site.pool.report.outlived(panicOf(what, recover()), c.site.addr)
	}()
	f()
	returned = true
}

// closeSocket closes what carries the connection, after a farewell if the peer is
// in step.
func (c *conn) closeSocket(reason CloseReason) {
	t := c.sock.tls
	switch {
	case t == nil:
		c.nc.Close()
	case !reason.clean():
		c.closeAbruptly()
	case c.sock.plain && c.sock.belowTLS() != nil:
		c.sock.belowTLS().sayGoodbye()
		c.nc.Close()
	default:
		// Whatever becomes of the goodbye, the socket is closed, and once.
		err := briefly("the goodbye of TLS", tlsGoodbye, t.CloseWrite)
		if pan, ok := err.(*PanicError); ok {
			c.site.pool.report.outlived(pan, c.site.addr)
		}
		t.NetConn().Close()
	}
}

// closeBelow closes the socket of a connection whose own Close did not get there,
// if the connection says what its socket is.
func (c *conn) closeBelow() {
	defer func() { _ = recover() }()
	nc := c.nc
	if c.sock.tls != nil {
		nc = c.sock.tls.NetConn()
	}
	if sock, ok := nc.(*tlsSocket); ok {
		nc = sock.Conn
	}
	if u, ok := nc.(interface{ NetConn() net.Conn }); ok {
		if below := u.NetConn(); !isNil(below) {
			below.Close()
		}
	}
}

// clean reports whether the peer is in step, so that TLS may say goodbye.
func (r CloseReason) clean() bool {
	switch r {
	case ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus,
		ClosedByBorrower, ClosedRetired, ClosedOnRequest, ClosedWithPool:
		return true
	}
	return false
}
