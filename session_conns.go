package connpool

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// seats are the connections of a session.
type sessionConns struct {
	p     *Pool
	ctx   context.Context // the values of Session's ctx, for what happens between uses
	trace *Trace

	mu     sync.Mutex // guards what follows, and the fields of seat that say so; nothing that can block or is foreign, and no other lock, under it
	ended  bool
	inUse  int // seats in use
	byAddr map[Addr]*sessionConn
}

// seat is a session's place at one address. Whoever takes it has it alone until
// the use ends; what a use leaves behind in good order stays on the seat.
//
//	free --take--> taken --rise--> free, or the next in line's
//
// While it is free, c belongs to the session, and vacate takes it. While it is
// taken, what seats.mu does not guard belongs to the goroutine of the use that took it.
// A session that has ended has no connection on a free seat: vacate takes those
// of the seats that are free at that moment, rise that of a seat that becomes
// free later. So what a use leaves and the end of the use are one critical
// section.
type sessionConn struct {
	addr  Addr
	owner uint64           // the use that has it, see newUse; 0 if it is free; seats.mu
	queue []*sessionWaiter // those who wait for it, oldest first; seats.mu
	c     *conn            // kept between two uses; nil if there is none

	usedAt clock.Instant // when the last use of c ended
	loan   Conn          // of the use under way
	marks  int           // how many frames its number is, see underway

	// What a use nested in the one under way did to the connection.
	spoiled CloseReason
	why     error
}

// turn is a use that waits for a seat.
type sessionWaiter struct {
	owner  uint64
	served bool          // ready is closed: the seat is its own, or the session has ended
	ready  chan struct{} // closed when served
}

// vacate ends the session: those who wait for a seat go on without it, and the
// connections of free seats become the caller's.
func (b *sessionConns) endSession() (held []*conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.endSessionLocked()
}

func (b *sessionConns) endSessionLocked() (held []*conn) {
	if b.ended {
		return nil
	}
	b.ended = true
	for _, st := range b.byAddr {
		for _, w := range st.queue {
			w.serve()
		}
		st.queue = nil
		if st.owner == 0 && st.c != nil {
			held = append(held, st.c)
			st.c = nil
		}
	}
	b.uncountLocked()
	return held
}

// uncountLocked takes the session off the pool's count when it has ended and none
// of its uses is under way.
func (b *sessionConns) uncountLocked() {
	if b.ended && b.inUse == 0 {
		b.p.inSession.Add(-1)
	}
}

// release gives back connections, all of them even if Reset panics for one.
func (b *sessionConns) releaseAll(held []*conn) {
	if len(held) == 0 {
		return
	}
	defer b.releaseAll(held[1:])
	b.releaseOne(held[0])
}

// releaseOne gives back a connection that was on a seat. The caller owns it.
func (b *sessionConns) releaseOne(c *conn) (kept bool) {
	k := checkout{p: b.p, c: c, owned: true}
	defer k.rescue()
	return k.reset(b.ctx) && k.release()
}

// releaseQuietly is release on a goroutine of its own, where a panic of Reset
// would find nobody to reach.
func (b *sessionConns) releaseQuietly(held ...*conn) {
	defer func() {
		if v := recover(); v != nil {
			b.p.report.log(slog.LevelError, "the end of a session panicked", "panic", v)
		}
	}()
	b.releaseAll(held)
}

// take makes the use me the one that has the seat of addr, or finds that the caller is
// inside the one that has it. A nil seat means that the session has ended.
func (b *sessionConns) acquire(ctx context.Context, addr Addr, me uint64) (st *sessionConn, nested bool, _ error) {
	b.mu.Lock()
	st = b.byAddr[addr]
	if st != nil && st.owner != 0 {
		by := st.owner
		b.mu.Unlock()
		if underway(by) { // and nobody takes it from us; even if the session has ended: fn is still at it
			return st, true, nil
		}
		b.mu.Lock()
		st = b.byAddr[addr]
	}
	switch {
	case b.ended:
		b.mu.Unlock()
		return nil, false, nil
	case st == nil:
		st = &sessionConn{addr: addr}
		b.byAddr[addr] = st
		fallthrough
	case st.owner == 0:
		st.owner = me
		b.inUse++
		b.mu.Unlock()
		return st, false, nil
	}
	w := &sessionWaiter{owner: me, ready: make(chan struct{})}
	st.queue = append(st.queue, w)
	b.mu.Unlock()
	start := b.p.clock.Exactly()
	stays, line := false, st
	defer func() {
		if !stays { // also if a ctx of the caller's making panicked
			b.giveUp(line, w)
		}
	}()
	var err error
	select {
	case <-w.ready:
		stays = true
	case <-ctx.Done():
		err = fmt.Errorf("%w; another use of the session's connection was still under way (one that waits for this one should leave the session out of its ctx)", causeOf(ctx))
	case <-b.p.ctx.Done():
		err = ErrClosed
	}
	if err != nil {
		return nil, false, b.p.failed(addr, StageSession, err, start)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if st.owner != me {
		st = nil // the session has ended
	}
	return st, false, nil
}

// withdraw is for a use that waits no longer.
func (b *sessionConns) giveUp(st *sessionConn, w *sessionWaiter) {
	var left *conn
	b.mu.Lock()
	switch {
	case st.owner == w.owner: // served at the last moment
		left = b.endUseLocked(st, st.c)
	case !w.served:
		st.leaveQueue(w)
	}
	b.mu.Unlock()
	if left != nil {
		go b.releaseQuietly(left) // the caller's ctx is done: it does not wait for Reset
	}
}

// leave needs seats.mu.
func (st *sessionConn) leaveQueue(w *sessionWaiter) {
	for i, o := range st.queue {
		if o == w {
			st.queue = append(st.queue[:i], st.queue[i+1:]...)
			return
		}
	}
}

func (w *sessionWaiter) serve() {
	w.served = true
	close(w.ready)
}

// rise ends a use of st, on which it leaves c, nil for nothing: the seat is free, or
// that of the next in line. It returns c if the session has ended and the seat
// with it; the caller owns c then, and must give it back.
func (b *sessionConns) endUse(st *sessionConn, c *conn) (left *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.endUseLocked(st, c)
}

func (b *sessionConns) endUseLocked(st *sessionConn, c *conn) (left *conn) {
	st.c = c
	if len(st.queue) > 0 {
		w := st.queue[0]
		st.queue = st.queue[1:]
		st.owner = w.owner
		w.serve()
		return nil
	}
	st.owner = 0
	b.inUse--
	if b.ended {
		left, st.c = c, nil
	}
	if st.c == nil {
		delete(b.byAddr, st.addr)
	}
	b.uncountLocked()
	return left
}
