package connpool

import (
	"crypto/tls"
	"net"
	"time"
)

// ConnInfo is what a borrower may want to know of its connection: what [Conn.Info] and
// [Lease.Info] return. It is a copy, which stays as it is when the loan is over.
type ConnInfo struct {
	Addr       Addr          // what was borrowed, in its canonical form
	ID         uint64        // number of the connection in its pool, from 1; no two have the same; 0 in Config.Setup, where it has none yet
	Uses       int           // loans of the connection, this one included; a lease is one; 0 in Config.Setup
	Reused     bool          // it was lent before: Uses is more than 1
	Age        time.Duration // since the connection was opened
	IdleFor    time.Duration // how long the connection had been unused before this loan, to within 10 ms as a rule, more on a machine whose processors are all busy; above 0 if it is Reused, 0 if not
	LocalAddr  net.Addr      // the local end
	RemoteAddr net.Addr      // the peer's end
	TLSVersion uint16        // as tls.VersionTLS13; 0 without TLS, or if a dialer's own *tls.Conn has not done its handshake
}

// Info tells what the pool and the socket know of the connection. It may be called by
// several goroutines at once, and in [Config.Setup], Reset, Check and Push too.
//
// After the loan, and after Close or Detach, every field but Addr has its zero value.
// That of the zero Conn is the zero ConnInfo.
//
// On a socket of package net Info allocates nothing and does no I/O. Under crypto/tls
// it waits for a handshake that a Read or Write of another goroutine has under way (a
// renegotiation, or the first one of a dialer's own *tls.Conn), and begins none. Any
// other connection of a dialer is asked by its methods LocalAddr, RemoteAddr and, if it
// has that, ConnectionState. They may block, and then Info does: for as long as they
// do, but for a second at most after the ctx of the loan is done. If they have not
// answered by then, these three fields have their zero values.
func (h Conn) Info() ConnInfo {
	info := ConnInfo{Addr: h.Addr()}
	if h.c.enter(h.gen) != nil {
		return info
	}
	defer h.c.leave(0, nil)
	c := h.c
	info.ID, info.Uses, info.Reused = c.id, c.uses, c.uses > 1
	info.Age = c.site.pool.clock.Exactly().Sub(c.born)
	if info.Reused {
		info.IdleFor = max(c.idleFor, 1) // the clock of a loan is coarse
	}
	var at ends
	if c.sock.foreign {
		at = answer(c, "LocalAddr, RemoteAddr or ConnectionState of the connection", func() ends { return endsOf(c.nc) })
	} else {
		at = endsOf(c.nc)
	}
	info.LocalAddr, info.RemoteAddr, info.TLSVersion = at.local, at.remote, at.tls
	return info
}

// Info is [Conn.Info] of the standing loan: every field but Addr has its zero value
// after the end of the lease, when its connection is lost, and during Do, whose fn has
// a Conn of its own. A lease has no ctx whose end could cut the wait for a connection
// short that does not answer.
func (l *Lease) Info() ConnInfo {
	info := ofLease(l, Conn.Info)
	info.Addr = l.Addr()
	return info
}

// ends is what a connection says of itself.
type ends struct {
	local, remote net.Addr
	tls           uint16
}

func endsOf(nc net.Conn) (at ends) {
	at.local, at.remote = nc.LocalAddr(), nc.RemoteAddr()
	if t, ok := nc.(interface{ ConnectionState() tls.ConnectionState }); ok {
		at.tls = t.ConnectionState().Version
	}
	return at
}
