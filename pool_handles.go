package connpool

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// The budget of file handles. MaxOpen 0 means the process's limit less a reserve for
// everything else in the process. But other code uses handles too, so the pool also looks
// at how many are really taken. A new descriptor gets the lowest free number, so a socket
// with number N proves that 0 to N are all in use, by the pool or by other code. Above the
// low mark the pool keeps no connection that nobody waits for. Above the high mark it closes
// one idle connection for each new one.
//
// An example: the limit is 1024. The reserve is 128, so the budget is 896 connections. The
// low mark is reached with fewer than 64 numbers above that of the new descriptor (960 and
// higher), the high mark with fewer than 32 (992 and higher).

type pressure uint8

const (
	handlesPlenty   pressure = iota
	handlesLow               // a connection that is given back is closed unless somebody waits for it
	handlesCritical          // and one idle connection is closed for each new one
)

// reserveOf is how many handles are left to the rest of the process.
func reserveOf(limit int) int { return min(max(16, limit/8), limit/2) }

// pressureAt is the pressure on file handles if a new descriptor got the number fd.
func pressureAt(fd uintptr, limit int) pressure {
	switch left := limit - 1 - int(fd); {
	case left < max(6, limit/32):
		return handlesCritical
	case left < max(10, limit/16):
		return handlesLow
	}
	return handlesPlenty
}

// handlePatience is how long a dial without a handle waits while no connection of the pool
// is given back.
const handlePatience = 250 * time.Millisecond

// handleBudget is how many connections the process's handle limit allows, as of the last
// refresh. It guards itself.
type handleBudget struct{ atomic.Int64 }

// refresh recomputes the budget. The limit may change while the program runs (Go itself
// raises it at start), so every dial reads it again, also while MaxOpen is set: MaxOpen may
// change too.
func (h *handleBudget) refresh(sys *system) {
	limit, ok := sys.handleLimit()
	if !ok {
		h.Store(math.MaxInt)
		return
	}
	h.Store(int64(max(1, limit-reserveOf(limit))))
}

// registerFD stores a connection that was just dialed under the number of its descriptor.
// If there is an older entry with that number, other code has closed that entry's
// descriptor. The number also says how many handles are taken.
func (c *conn) registerFD() {
	p := c.site.env.pool
	if c.sock.raw == nil {
		return
	}
	limit, limited := p.sys.handleLimit()
	now := p.clock.Now()
	var todo agenda
	p.mu.Lock()
	if c.phase == phaseNone { // given up in this moment, see abandon
		p.mu.Unlock()
		return
	}
	if old := p.byFD[c.sock.fd()]; old != nil {
		p.markStolenLocked(old, &todo)
	}
	p.byFD[c.sock.fd()] = c
	if limited && p.limits.MaxOpen < math.MaxInt {
		p.pressure, p.pressedAt = pressureAt(c.sock.fd(), limit), now
		if p.pressure == handlesCritical {
			if v := p.recency.oldestIdle(int(p.n[phaseIdle])); v != nil {
				p.evictLocked(v, ClosedLowHandles, nil, &todo)
			}
		}
	} else {
		p.pressure = handlesPlenty // there is no limit any more that could be short
	}
	p.mu.Unlock()
	c.watch()
	todo.run(p)
}

// doubtPressure is a part of the sweep. While handles are short the pool keeps no idle
// connections, so usually the next loan dials, and its descriptor sets the pressure anew.
// But connections without a descriptor do not, and a pool that dials no others would keep
// the old pressure forever.
func (p *Pool) doubtPressure(now clock.Instant) {
	old := func() bool { return p.pressure > handlesPlenty && now.Sub(p.pressedAt) >= p.sweepPeriod() }
	p.mu.Lock()
	doubted := old()
	p.mu.Unlock()
	if !doubted || p.sys.noHandleFree() {
		return
	}
	p.mu.Lock()
	if old() {
		p.pressure = handlesPlenty
	}
	p.mu.Unlock()
}

// mark sets flag: flagStolen, or flagBroken for a connection whose socket other code uses
// too. It sets nothing if the connection is known to be stolen or is no longer the pool's:
// it is being closed (seal), or its borrower has detached it. Each of these is one step on
// the state word, so there is always a first and a second.
//
// The mark is found by the owner of a loan at its end (verdict), and between loans, through
// condemned, by the function that probes the connection (probe) and by the one that releases
// it (whyUnwantedLocked).
func (c *conn) mark(flag uint64) bool {
	for {
		w := c.word.Load()
		if w&(flagStolen|flagShut|flagDetached) != 0 {
			return false
		}
		if c.word.CompareAndSwap(w, w|flag) {
			return true
		}
	}
}

// condemned says why c, which has no loan now, may not be lent again, whatever a probe
// would find: ClosedUnknown, or what mark has left. A failed operation sets the same flag as
// a mark, but a connection with that flag is not kept at the end of its loan.
func (c *conn) condemned() (CloseReason, error) {
	switch w := c.word.Load(); {
	case w&flagStolen != 0:
		return ClosedQuarantined, errStolen
	case w&flagBroken != 0:
		return ClosedMarkedDead, nil
	}
	return ClosedUnknown, nil
}

var errMarkedDead = &brokenContract{"MarkDead was told that the connection's socket is somebody else's too"}

// failureOf is the error of a hook or Setup that returned nil, after a loan in which it
// cannot have used the connection as it should: the operation that failed, a mark, or else
// what, which says what the hook did.
func (c *conn) failureOf(word uint64, what string) error {
	if err := c.failure(); err != nil {
		return err
	}
	if word&(flagGone|flagTimedOut|flagHalfClosed) == 0 {
		return errMarkedDead
	}
	return &brokenContract{what}
}

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
	for _, c := range p.byFD { // byFD, unlike recency, has the connections in Setup too
		same := known && c.sock.known && c.sock.who == who
		switch {
		case c == own, c.phase == phaseClosing:
		case c.sock.fd() == fd:
			// The same socket under the same number is the connection itself.
			if !same && p.markStolenLocked(c, &todo) {
				marked++
			}
		case same && c.mark(flagBroken):
			marked++
			if c.phase == phaseIdle {
				p.evictLocked(c, ClosedMarkedDead, nil, &todo)
			}
		}
	}
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

// socketOf is the descriptor of nc and, if it is known, the identity of its socket.
func (sys *system) socketOf(nc syscall.Conn) (fd uintptr, who sock.ID, known bool, err error) {
	raw, err := nc.SyscallConn()
	if err != nil {
		return 0, who, false, err
	}
	if raw == nil {
		return 0, who, false, errors.ErrUnsupported
	}
	shown := false
	err = raw.Control(func(n uintptr) {
		fd, shown = n, true
		who, known = sys.identify(n)
	})
	if err == nil && !shown { // it has none, and not the number 0
		err = errors.ErrUnsupported
	}
	return fd, who, known, err
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

// awaitHandle waits until something happens that may have freed a handle. The pool notices
// at once when it frees a handle itself, and such a wait does not reduce patience: as long
// as connections are given back there is hope, until the dial's time is up. The pool does
// not notice handles that other code frees, so the wait also ends after half of the rest of
// patience; that allows about six more tries. awaitHandle gives up at once if the pool has
// no connection that could be given back.
func (a *attempt) awaitHandle(ctx context.Context, patience *time.Duration) bool {
	p := a.c.site.env.pool
	if *patience <= 0 {
		return false
	}
	p.mu.Lock()
	if p.n[phaseIdle] > 0 { // given back since the caller looked
		p.mu.Unlock()
		return true
	}
	if p.n.open() <= 1 { // this dial itself
		p.mu.Unlock()
		return false
	}
	p.starving++
	freed := p.freed
	p.mu.Unlock()
	pause := max(*patience/2, 5*time.Millisecond)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-freed:
	case <-timer.C:
		*patience -= pause
	case <-ctx.Done():
	}
	p.mu.Lock()
	p.starving--
	p.mu.Unlock()
	return ctx.Err() == nil
}

// asFromSystem reports whether err is an errno, or package net's error for an errno: no
// code has kept the error to return it again, except as a whole.
func asFromSystem(err error) bool {
	for {
		switch e := err.(type) {
		case *net.OpError:
			err = e.Err
		case *os.SyscallError:
			err = e.Err
		case syscall.Errno:
			return true
		default:
			return false
		}
	}
}

// outOfHandles reports whether err says that no file handle was free. It also finds the case
// of a name that could not be looked up for want of a handle, where package net says "no
// such host".
func (sys *system) outOfHandles(err error) bool {
	var dns *net.DNSError
	return sock.OutOfFiles(err) || errors.As(err, &dns) && sys.noHandleFree()
}
