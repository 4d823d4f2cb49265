package connpool

import (
	"io"
	"log/slog"
	"net"
	"sync"
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
func (c *conn) leftovers(word uint64) bool {
	in := c.held()
	if in.unflushed > 0 {
		return true
	}
	left := in.unread > 0
	if !left {
		var err error
		left, err = c.probe.leftovers(word&moved != 0)
		c.keepAhead(err)
	}
	if left && c.probe.keep {
		c.extra().unread = true
		return false
	}
	return left
}

// buffered counts what the state has read and not used.
func (c *conn) buffered() int { return c.held().unread }

func (c *conn) unprobed() bool { return c.nc != nil && !c.probe.can() }

// closesAtOnce reports whether closing for this reason cannot block and runs
// no foreign code, so that it may happen in a borrower's path.
func (c *conn) closesAtOnce(reason CloseReason) bool {
	if _, ok := c.state.(io.Closer); ok {
		return false
	}
	return c.probe.plain && (c.probe.tls == nil || !reason.clean())
}

// seal is the last step before the socket is closed: it finds out whether the
// descriptor is still the connection's own. If it is not, the connection goes
// into quarantine, and must not be closed.
func (c *conn) seal() bool {
	for {
		w := c.word.Load()
		if w&stolen != 0 || c.probe.isStolen() {
			break
		}
		if c.word.CompareAndSwap(w, w|shut) { // or it was marked stolen just now
			return true
		}
	}
	quarantine.add(c.nc)
	// Wakes who is blocked in it: a deadline does not touch the descriptor.
	defer func() { _ = recover() }()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	c.nc.SetDeadline(past)
	return false
}

// quarantine holds the connections whose descriptor has become somebody
// else's, for as long as the process lives. They are never touched again, and
// never garbage either: the finalizer of package net would close the number.
var quarantine strays

type strays struct {
	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func (s *strays) add(nc net.Conn) {
	s.mu.Lock()
	s.conns = append(s.conns, nc)
	s.mu.Unlock()
}

// closeAbruptly closes the socket without a farewell.
func (c *conn) closeAbruptly() {
	if sock := c.probe.sock(); sock != nil {
		sock.Close()
		return
	}
	c.nc.Close()
}

// closeTimeout bounds a close that runs foreign code or says goodbye.
const closeTimeout = 5 * time.Second

// closeFully closes the connection and what Setup built on it. It may block.
func (c *conn) closeFully(reason CloseReason) {
	defer func() {
		if v := recover(); v != nil {
			c.site.pool.log(slog.LevelError, "closing panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	if s, ok := c.state.(io.Closer); ok {
		defer s.Close()
	}
	if c.probe.tls != nil && !reason.clean() {
		c.probe.tls.NetConn().Close() // crypto/tls would say goodbye
		return
	}
	if sock := c.probe.sock(); sock != nil {
		sock.sayGoodbye()
	}
	c.nc.Close()
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
