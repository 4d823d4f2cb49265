package connpool

import (
	"crypto/tls"
	"net"
	"time"
)

// ConnInfo describes the connection of a borrower. [Conn.Info] and [Lease.Info] return
// it. It is a copy, which does not change when the loan ends.
type ConnInfo struct {
	Addr       Addr          // address that was borrowed, in its canonical form
	ID         uint64        // number of the connection in its pool, from 1, unique in the pool; 0 in Config.Setup, where the connection has none yet
	Uses       int           // loans of the connection, this one included; a lease counts as one; 0 in Config.Setup
	Reused     bool          // the connection was lent before: Uses is more than 1
	Age        time.Duration // since the connection was opened
	IdleFor    time.Duration // how long the connection had been unused before this loan, as a rule to within 10 ms, less exactly on a machine whose processors are all busy; above 0 if Reused, else 0
	LocalAddr  net.Addr      // address of the local end
	RemoteAddr net.Addr      // address of the peer's end
	TLSVersion uint16        // such as tls.VersionTLS13; 0 without TLS, or if a dialer's own *tls.Conn has not done its handshake
}

// Info returns what the pool and the socket know about the connection. Several
// goroutines may call it at once, also in [Config.Setup], Reset, Check and Push.
//
// After the loan, and after Close or Detach, every field but Addr has its zero value. Only
// the Conn that Setup got goes on telling of a connection that was detached.
// The zero Conn returns the zero ConnInfo.
//
// On a socket of package net Info allocates nothing and does no I/O. Under crypto/tls
// it waits for a handshake that a Read or Write of another goroutine has under way (a
// renegotiation, or the first handshake of a dialer's own *tls.Conn), and starts none.
// On any other connection of a dialer, Info calls the connection's methods LocalAddr,
// RemoteAddr and, if there is one, ConnectionState. If these methods block, Info blocks
// as long as they do, but for a second at most after the ctx of the loan is done. If
// they have not returned by then, these three fields have their zero values.
func (h Conn) Info() ConnInfo {
	info := ConnInfo{Addr: h.Addr()}
	if h.c.enter(h.gen) != nil {
		return info
	}
	defer h.c.leave(0, nil)
	c := h.c
	info.ID, info.Uses, info.Reused = c.id, c.uses, c.uses > 1
	info.Age = c.site.env.clock.Exactly().Sub(c.born)
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

// Info is [Conn.Info] for the lease's connection. Every field but Addr has its zero
// value after the end of the lease, when its connection is lost, and during Do, whose
// fn has a Conn of its own. A lease has no ctx whose end would bound Info if the
// methods of a dialer's connection block.
func (l *Lease) Info() ConnInfo {
	info := ofLease(l, Conn.Info)
	info.Addr = l.Addr()
	return info
}

// ends holds the answers of the connection's own methods.
type ends struct {
	local, remote net.Addr
	tls           uint16
}

// endsOf calls the methods of nc, which may block if nc is foreign.
func endsOf(nc net.Conn) (at ends) {
	at.local, at.remote = nc.LocalAddr(), nc.RemoteAddr()
	if t, ok := nc.(interface{ ConnectionState() tls.ConnectionState }); ok {
		at.tls = t.ConnectionState().Version
	}
	return at
}

// Under returns the first of the connections below h that is a T: what the dialer returned or, for
// an address of the transport TLS, the *tls.Conn that the pool made; then what lies below that, as
// far as methods NetConn lead. It reports false if none is a T, and after the loan.
//
// Under is for clients that look at the type of their connection, as net/smtp does for a *tls.Conn,
// and for questions that only the connection itself can answer, such as the credentials of the peer
// of a *net.UnixConn. The pool does not see I/O through the result: it cannot tell that an operation
// is still running at the end of the loan, and does not keep the result from being used after it. So
// use the result in loans only (the state that Setup returns may keep it), leave its deadlines to the
// ctx of the loan, and discard the connection with Conn.Close.
func Under[T any](h Conn) (under T, ok bool) {
	if h.c.enter(h.gen) != nil {
		return under, false
	}
	defer h.c.leave(0, nil)
	nc := h.c.nc
	for range wrappings {
		if own, yes := nc.(*tlsSocket); yes {
			nc = own.Conn
		}
		if under, ok = nc.(T); ok {
			return under, true
		}
		above, yes := nc.(interface{ NetConn() net.Conn })
		if !yes {
			break
		}
		if nc = above.NetConn(); isNil(nc) {
			break
		}
	}
	return under, false
}
