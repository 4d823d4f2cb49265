package connpool

import (
	"errors"
	"maps"
	"syscall"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// MarkDead is for a program that opens sockets beside the pool. The caller holds the
// socket nc. So every pooled connection with the descriptor number of nc has lost its
// descriptor unnoticed, and a pooled connection with the same socket under another
// number is used by two parties. Both leave the pool: idle ones at once, borrowed ones
// when they are given back, and those between two uses of a session, being checked, in
// Push or still in Setup as soon as that ends. The pool does not touch the descriptors of
// the first kind, and closes its own descriptor of the second kind. MarkDead returns how many there were; 0 also if nc
// has no descriptor. If nc is what the pool itself has lent (a Conn, a Lease, a result of
// DialContext), nc is not affected. The pool finds such connections by itself when it is
// about to lend or close them, or when it dials; MarkDead is quicker.
func (p *Pool) MarkDead(nc syscall.Conn) int {
	if p.stop == nil || isNil(nc) {
		return 0
	}
	fd, who, known, err := p.sys.socketOf(nc)
	if err != nil {
		return 0
	}
	own := connBehind(nc)
	marked := 0
	var todo agenda
	p.mu.Lock()
	eachLocked(p, maps.Values(p.byFD), new(agenda), func(c *conn) { // byFD, unlike recency, has the connections in Setup too
		same := known && c.sock.known && c.sock.who == who
		switch {
		case c == own, c.phase == phaseClosing:
		case c.sock.fd() == fd:
			// The same socket under the same number is the connection itself.
			if !same && p.markStolenLocked(c, &todo) {
				marked++
			}
		case same && c.setFlag(flagBroken):
			marked++
			if c.phase == phaseIdle {
				p.evictLocked(c, ClosedMarkedDead, nil, &todo)
			}
		}
	})
	p.mu.Unlock()
	todo.run(p)
	return marked
}

// connBehind is the pool's connection behind the handle nc; nil if nc is none. It is needed
// where sockets have no identity.
func connBehind(nc syscall.Conn) *conn {
	switch nc := nc.(type) {
	case Conn:
		return nc.c
	case *Lease:
		return nc.c
	case *trackedTCP:
		return nc.t.c
	case *trackedUnix:
		return nc.t.c
	case *trackedConn:
		return nc.t.c
	}
	return nil
}

// SameConn reports whether a and b use one socket of the operating system. A
// connection and its duplicate do; two connections to one server do not. A connection
// whose descriptor was closed by other code is the same as whatever has the number
// now. The error is errors.ErrUnsupported where the system does not tell. For a
// *tls.Conn, SameConn asks its NetConn.
func SameConn(a, b syscall.Conn) (bool, error) {
	var who [2]sock.ID
	for i, nc := range []syscall.Conn{a, b} {
		if isNil(nc) {
			return false, errors.New("connpool: SameConn: a connection is nil")
		}
		raw, err := nc.SyscallConn()
		if err != nil {
			return false, err
		}
		if raw == nil {
			return false, errors.ErrUnsupported
		}
		known := false
		if err := raw.Control(func(fd uintptr) { who[i], known = sock.Identify(fd) }); err != nil {
			return false, err
		}
		if !known {
			return false, errors.ErrUnsupported
		}
	}
	return who[0] == who[1], nil
}
