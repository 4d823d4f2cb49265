package connpool

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// What the pool does about file handles: each new descriptor is registered, and says how many
// are taken (books_handles.go); a dial without a handle makes room, or waits for one.

// handlePatience is how long a dial without a handle waits while no connection of the pool
// is given back.
const handlePatience = 250 * time.Millisecond

// carriedAndClosed returns the connection with this number of a descriptor whose carried client has
// closed the socket itself. That the number is another socket's then is no theft.
func (p *Pool) carriedAndClosed(fd uintptr) *conn {
	p.mu.Lock()
	c := p.byFD[fd]
	p.mu.Unlock()
	if c == nil || !c.clientClosedSocket() {
		return nil
	}
	return c
}

// sameSocket reports whether c and d have one socket: a dialer, or a client of Carry, may have
// dialled with DialContext.
func (c *conn) sameSocket(d *conn) bool {
	return c.sock.known && d.sock.known && c.sock.who == d.sock.who
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
	gone := p.carriedAndClosed(c.sock.fd())
	if gone != nil {
		defer gone.noteClientEnded()
	}
	p.mu.Lock()
	if c.phase == phaseNone { // given up in this moment, see abandon
		p.mu.Unlock()
		return
	}
	if old := p.byFD[c.sock.fd()]; old != nil && old == gone {
		old.word.Or(flagHungUp)
	} else if old != nil && !(old.site.unpooled() && old.sameSocket(c)) {
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

var errMarkedDead = &brokenContract{"MarkDead was told that the connection's socket is somebody else's too"}

// failureOf is the error of a hook or Setup that returned nil, after a loan in which it
// cannot have used the connection as it should: the operation that failed, what MarkDead left, or else
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

// awaitHandle waits until something happens that may have freed a handle. The pool notices
// at once when it frees a handle itself, and then patience begins anew: as long as
// connections are given back there is hope, until the dial's time is up. The pool does not
// notice handles that other code frees, so the wait also ends after half of the rest of
// patience; that allows about six tries while nothing is given back. awaitHandle gives up
// at once if the pool has no connection that could be given back.
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
		*patience = handlePatience
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
