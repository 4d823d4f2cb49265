package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// How a connection ends: which findings forbid keeping it, whether its descriptor is
// still its own, and how the pool closes it.

// leftovers reports whether the borrower left bytes unread, in a buffer of the state or
// in crypto/tls, or unflushed. Unread bytes in the kernel are found by the probe before
// the next loan, together with bytes that arrive later.
//
// With Config.Push, unread bytes are for Push and no reason to close the connection.
//
// leftovers calls methods of the state on the caller's goroutine and without a bound.
func (c *conn) leftovers(word uint64) bool { return c.leftoversBeside(word, c.held()) }

// leftoversBeside is leftovers for a caller that has already counted the bytes in the
// state.
func (c *conn) leftoversBeside(word uint64, in holdings) bool {
	if word&flagResident != 0 {
		return false
	}
	if in.unflushed > 0 {
		return true
	}
	left := in.unread > 0
	var err error
	if !left {
		left, err = c.sock.leftovers(word&flagMoved != 0)
		c.keepPushback(err)
		c.site.env.report.outlived(err, c.site.addr)
	}
	if left && c.sock.keep && !isLate(err) && !errors.Is(err, errUnproven) {
		c.ensureCold().unread = true
		return false
	}
	return left
}

// unprobed reports whether the connection can only be judged by its age: it has no
// descriptor to probe and is no Prober.
func (c *conn) unprobed() bool {
	if r := c.resident(); r != nil {
		return c.isCarried() && r.alive == nil && c.sock.raw == nil
	}
	return c.nc != nil && !c.sock.canPeek() && c.sock.prober(c.nc) == nil
}

// closesAtOnce reports whether a close for this reason cannot block and calls no
// foreign code, so that it may run on a borrower's goroutine.
func (c *conn) closesAtOnce(reason CloseReason) bool {
	if _, ok := c.state.(io.Closer); ok {
		return false
	}
	return c.sock.plain && (c.sock.tls == nil || !reason.clean()) && !c.sock.lingers()
}

// seal is the last step before the socket is closed. It checks that the descriptor is
// still the connection's own. If another socket has the descriptor (own is false), seal
// puts the connection into quarantine, and nobody may close it. Only the first caller
// (first is true) closes the socket.
func (c *conn) seal() (first, own bool) {
	for {
		w := c.word.Load()
		if w&flagStolen != 0 || c.sock.isStolen() {
			break
		}
		if c.word.CompareAndSwap(w, w|flagShut) { // it fails if flagStolen was set in between
			return w&flagShut == 0, true
		}
	}
	c.disown()
	return false, false
}

// disown puts c, whose descriptor is another socket's, into quarantine.
func (c *conn) disown() {
	c.word.Or(flagStolen) // the guard of a client must not go on
	quarantine.add(c.nc)
}

// wake makes operations return that are blocked in a connection that must not be
// closed. It sets a deadline in the past, which does not touch the descriptor.
func (c *conn) wake() {
	if c.sock.foreign {
		c.tellDeadline(c.loanState(), false, func() error { return c.nc.SetDeadline(aLongTimeAgo) })
		return
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	c.nc.SetDeadline(aLongTimeAgo)
}

// closeUnderHook closes the socket during a loan of a hook. The hook's caller remains the owner
// and frees the slot.
func (c *conn) closeUnderHook() {
	e := c.ensureCold()
	c.dmu.Lock()
	bye, done := e.goodbye, make(chan struct{})
	begun := e.earlyClose != nil
	if bye == nil && !begun {
		e.earlyClose = done
	}
	c.dmu.Unlock()
	switch {
	case bye != nil:
		bye.closeSocket(c)
		return
	case begun:
		return
	}
	defer close(done)
	switch first, own := c.seal(); {
	case first:
		c.closeAbruptly()
	case !own:
		c.wake()
	}
}

// awaitCloseUnderHook is called by an owner that was not the first to seal the connection. It
// waits until closeUnderHook, if it is running, has closed the socket.
func (c *conn) awaitCloseUnderHook() {
	e := c.cold.Load()
	if e == nil {
		return
	}
	c.dmu.Lock()
	done := e.earlyClose
	c.dmu.Unlock()
	if done != nil {
		<-done
	}
}

// quarantine holds the connections whose descriptor has become another socket's, for as
// long as the process lives. They are never used again. They must not become garbage,
// because the finalizer of package net would close the descriptor number.
var quarantine quarantined

// quarantined is a list of connections that is never emptied.
type quarantined struct {
	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func (s *quarantined) add(nc net.Conn) {
	s.mu.Lock()
	s.conns = append(s.conns, nc)
	s.mu.Unlock()
}

// closeAbruptly closes the socket without a close_notify of TLS.
func (c *conn) closeAbruptly() {
	if k, ok := c.nc.(*carrier); ok {
		k.end(false)
		return
	}
	if t := c.sock.tls; t != nil {
		t.NetConn().Close() // Close of the tls.Conn would send close_notify
		return
	}
	c.nc.Close()
}

const (
	// closeTimeout bounds a close that calls foreign code or sends close_notify.
	closeTimeout = 5 * time.Second

	// closePatience is how long the pool expects a close to free its slot soon. After
	// that it evicts an idle connection for the waiter instead.
	closePatience = 10 * time.Millisecond

	// evictionPatience bounds the close of a connection that was evicted for a waiter.
	// It counts from the moment when closePatience is over and somebody still waits for
	// a slot. Where every close hangs, evicting all idle connections one after another
	// would not help.
	evictionPatience = 500 * time.Millisecond
)

// closeFully closes the connection, if first says that this is the caller's task, and the state
// that Setup returned, if it is an io.Closer. Before a close that is in step with the peer, the
// state is closed first, and may say goodbye over the connection; otherwise it is closed last.
// closeFully may block; at names the call it is in. Each is closed even if closing the other one
// panics.
func (c *conn) closeFully(reason CloseReason, first bool, at *atomic.Value) {
	if s, ok := c.state.(io.Closer); ok {
		end := func() { s.Close() }
		if first && reason.inStep() {
			defer c.closeSocketFully(reason, at)
			c.sayGoodbye(reason, func() { c.closeOne(at, "Close of the state", end) })
			return
		}
		defer c.closeOne(at, "Close of the state", end)
	}
	if !first {
		at.Store("Close of the connection")
		c.awaitCloseUnderHook()
		return
	}
	c.closeSocketFully(reason, at)
}

// closeSocketFully closes the socket, after a goodbye or without one.
func (c *conn) closeSocketFully(reason CloseReason, at *atomic.Value) {
	c.closeOne(at, "Close of the connection", func() {
		if bye := c.farewell(); bye != nil {
			bye.closeSocket(c)
		} else {
			c.closeSocket(reason)
		}
	})
}

// farewell returns the goodbye of c; nil before it, and if there is none.
func (c *conn) farewell() *goodbye {
	e := c.cold.Load()
	if e == nil {
		return nil
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	return e.goodbye
}

// goodbyePatience is how long the I/O of a goodbye may take. It is far below closeGrace, the time
// that Close of the pool gives to all closes.
const goodbyePatience = 250 * time.Millisecond

// closeSocket closes the socket of c: when the goodbye is over, or when the state closes its
// connection in the middle of it. A goodbye takes its time, so the descriptor is checked again.
func (g *goodbye) closeSocket(c *conn) {
	if g.begun.Swap(true) {
		<-g.closed
		return
	}
	defer close(g.closed)
	if c.sock.isStolen() {
		c.disown()
		c.wake()
		return
	}
	c.closeSocket(g.reason)
}

// sayGoodbye runs end, the Close of the state, in a loan of its own, so that the net.Conn that
// Setup got works. The caller has sealed c.
func (c *conn) sayGoodbye(reason CloseReason, end func()) {
	e := c.ensureCold()
	c.dmu.Lock()
	bye := &goodbye{reason: reason, closed: make(chan struct{})}
	e.goodbye = bye
	early := e.earlyClose != nil
	c.dmu.Unlock()
	if early { // the client has closed its connection after the caller had sealed c
		bye.closeSocket(c)
	}
	ctx, cancel := context.WithTimeout(context.Background(), goodbyePatience)
	defer cancel()
	c.begin(ctx, flagHooked)
	defer c.abort()
	end()
}

// closeOne runs one step of a close, which is foreign code. It recovers a panic of f
// and reports it; it also reports a runtime.Goexit, which cannot be stopped.
func (c *conn) closeOne(at *atomic.Value, what string, f func()) {
	at.Store(what)
	returned := false
	defer func() {
		if returned {
			return
		}
		c.site.env.report.outlived(panicOf(what, recover()), c.site.addr)
	}()
	f()
	returned = true
}

// closeSocket closes the socket. Before that it sends close_notify if there is TLS and
// the reason says that the peer is in step. If the Close of a foreign connection does not return
// as a Close should, the socket below is closed.
func (c *conn) closeSocket(reason CloseReason) {
	closed := false
	defer func() {
		if !closed { // Close panicked, or ended the goroutine
			go c.closeBelow()
		}
	}()
	t := c.sock.tls
	k, carried := c.nc.(*carrier)
	switch {
	case carried:
		k.end(reason.inStep())
	case t == nil:
		c.nc.Close()
	case !reason.clean():
		c.closeAbruptly()
	case c.sock.plain && c.sock.belowTLS() != nil:
		c.sock.belowTLS().sayGoodbye()
		c.nc.Close()
	default:
		// However the close_notify ends, the socket is closed, and only once.
		err := briefly("the goodbye of TLS", tlsGoodbye, t.CloseWrite)
		if pan, ok := err.(*PanicError); ok {
			c.site.env.report.outlived(pan, c.site.addr)
		}
		t.NetConn().Close()
	}
	closed = true
}

// closeBelow closes the innermost socket of a connection whose own Close failed to
// reach it, as far as the connection's NetConn methods lead there.
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

// endLife ends the ctx of a connection that has left the pool.
func (c *conn) endLife(reason CloseReason) {
	e := c.cold.Load()
	if e == nil {
		return // nobody has called Context; a later call finds flagShut, flagStolen or flagDetached
	}
	c.dmu.Lock()
	e.ctx.cause = leftPool(reason)
	end := e.ctx.end
	c.dmu.Unlock()
	if end != nil {
		end(leftPool(reason))
	}
}

// leftPool is the error that says why a connection has left the pool. ClosedUnknown
// stands for Detach.
type leftPool CloseReason

func (r leftPool) Error() string {
	if CloseReason(r) == ClosedUnknown {
		return "connpool: the connection was detached"
	}
	return fmt.Sprintf("connpool: the connection was closed: %v", CloseReason(r))
}
