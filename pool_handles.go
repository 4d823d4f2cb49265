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

// The budget of file handles. MaxOpen 0 means the process's limit less a
// reserve for everything else in it; but the pool is not alone, so it also
// looks at what is really taken. The number of a new descriptor is the lowest
// that is free, so a socket with number N proves that 0 to N are all in use,
// whoever holds them. Above the low mark nothing is kept that nobody waits for;
// above the high mark one idle connection dies for each new one.

type pressure uint8

const (
	handlesPlenty   pressure = iota
	handlesLow               // a connection that is given back is closed
	handlesCritical          // and so is one idle one for each that is opened
)

// reserveOf is what is left to the rest of the process.
func reserveOf(limit int) int { return min(max(16, limit/8), limit/2) }

func pressureAt(fd uintptr, limit int) pressure {
	switch left := limit - 1 - int(fd); {
	case left < max(6, limit/32):
		return handlesCritical
	case left < max(10, limit/16):
		return handlesLow
	}
	return handlesPlenty
}

// handlePatience is how long a dial without a handle waits while nothing of the
// pool's is given back.
const handlePatience = 250 * time.Millisecond

// handleBudget is what the process's handle limit leaves for connections, as of the
// last refresh. It guards itself.
type handleBudget struct{ atomic.Int64 }

// refresh brings the budget up to date. The limit may change while the program runs
// (Go itself raises it at start), so every dial looks again, also while a MaxOpen is
// set: that may change too.
func (h *handleBudget) refresh(sys *system) {
	limit, ok := sys.handleLimit()
	if !ok {
		h.Store(math.MaxInt)
		return
	}
	h.Store(int64(max(1, limit-reserveOf(limit))))
}

// enroll files a connection that was just dialled under the number of its
// descriptor. An older entry with that number must have been closed behind the
// pool's back; and the number says how many handles are taken.
func (c *conn) registerFD() {
	p := c.site.pool
	if c.sock.raw == nil {
		return
	}
	limit, limited := p.sys.handleLimit()
	now := p.clock.Now()
	var todo agenda
	p.mu.Lock()
	if c.phase == phaseNone { // given up in this very moment, see abandon
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

// doubtPressure is the sweep's part. While handles are short nothing is kept, so as a
// rule the next loan dials, and its descriptor tells how things stand. But dials of
// connections without one tell nothing, and a pool that makes no others would
// believe for ever what it was told once.
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

// mark sets stolen, or broken for a connection that is driven by two, unless the
// connection is known to be stolen, or is not the pool's any more: it is being
// closed (seal), or its borrower has detached it. Each of these is one step on
// the word, so of two at once it is known which was first.
//
// Who finds the mark: the owner of a loan at its end (verdict); between loans
// whoever looks at the connection (ask) and whoever parks it (whyUnwantedLocked),
// through condemned.
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

// condemned says why c, on which no loan stands, may not be lent again, whatever a
// look at it would show: ClosedUnknown, or what mark has left. An operation
// that failed leaves the same flag as a mark, but no connection without a loan.
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

// failureOf is the error of a hook or Setup that returned nil, after a loan in
// which it cannot have used the connection as it should: what failed, a mark,
// or else what it did.
func (c *conn) failureOf(word uint64, what string) error {
	if err := c.failure(); err != nil {
		return err
	}
	if word&(flagGone|flagTimedOut|flagHalfClosed) == 0 {
		return errMarkedDead
	}
	return &brokenContract{what}
}

// MarkDead is for a program that opens sockets beside the pool. The caller
// holds the socket nc, so every pooled connection with the number of its
// descriptor has died silently, and one that is the same socket under another
// number is driven by two. Both leave the pool, wherever they are: idle ones at
// once, borrowed ones when they are given back, and those between two uses of a
// session, in the pool's own hands or still in Setup as soon as that ends. The
// former are not touched, of the latter the pool's own descriptor is closed.
// MarkDead returns how many there were; 0 also if nc has no descriptor. What the
// pool itself has lent (a Conn, a Lease, what DialContext returned) is not
// harmed by being nc. The pool finds such connections by itself when it is about
// to lend or close them, or when it dials; MarkDead is quicker.
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
	for _, c := range p.byFD { // unlike the recency it has those in Setup, too
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

// connBehind is the connection of the pool's that nc is a handle of, nil if it
// is none. It is for where sockets have no identity.
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

// socketOf is the descriptor of nc, and whose socket it is, if that is known.
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

// SameConn reports whether a and b talk to one socket of the operating system:
// a connection and its duplicate do, two connections to one server do not, and
// a connection whose descriptor was closed behind its back is the same as
// whatever has the number now. The error is errors.ErrUnsupported where the
// system does not tell. A *tls.Conn is asked through its NetConn.
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

// awaitHandle waits until something happens that may have freed a handle. What
// the pool itself frees is heard at once, and costs no patience: as long as
// connections come back there is hope, until the dial's time is up. Handles that
// others give back are not heard of, so half of what is left of patience ends the
// wait too: about six more tries. It gives up at once if the pool has nothing
// that could come back.
func (a *attempt) awaitHandle(ctx context.Context, patience *time.Duration) bool {
	p := a.c.site.pool
	if *patience <= 0 {
		return false
	}
	p.mu.Lock()
	if p.n[phaseIdle] > 0 { // given back since the caller looked
		p.mu.Unlock()
		return true
	}
	if p.n.open() <= 1 { // this dial
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

// asFromSystem reports whether err is an errno, or package net's error for one:
// nobody has put it aside, unless as a whole.
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

// outOfHandles sees it also where it hides: without a free handle a name cannot
// be looked up, and package net says "no such host".
func (sys *system) outOfHandles(err error) bool {
	var dns *net.DNSError
	return sock.OutOfFiles(err) || errors.As(err, &dns) && sys.noHandleFree()
}
