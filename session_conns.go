package connpool

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// sessionConns are the connections of a session.
type sessionConns struct {
	p     *Pool
	ctx   context.Context // carries the values of Session's ctx, for what happens between uses
	trace *Trace          // of Session's ctx, including the pool's; it observes what happens between uses

	mu     sync.Mutex // guards what follows, and the fields of sessionConn that say so; nothing that can block or is foreign, and no other lock, under it
	ended  bool
	inUse  int // session connections that a use has
	byAddr map[Addr]*sessionConn
}

// sessionConn is the session connection of one address: the place of a session's
// connection, with the use that has it and the uses that wait for it. One use has it at
// a time. A use that ends in good order leaves its connection here for the next use.
//
//	free --acquire--> in use --endUse--> free, or in use by the oldest waiter
//
// While the session connection is free, c belongs to the session, and endSession takes
// it. While it is in use, the fields that sessionConns.mu does not guard belong to the
// goroutine of that use. A session that has ended keeps no connection: endSession takes
// those of the session connections that are free at that moment, and endUse returns the
// connection of one that becomes free later. For this reason a use stores its
// connection and ends in one critical section.
type sessionConn struct {
	addr  Addr
	owner uint64           // number of the use that has it, see newUse; 0 if it is free; sessionConns.mu
	queue []*sessionWaiter // uses that wait for it, oldest first; sessionConns.mu
	c     *conn            // connection kept between two uses; nil if there is none

	usedAt clock.Instant // when the last use of c ended
	loan   Conn          // loan of the use under way
	frames int           // how many stack frames spell the number of the use, see underway

	// Why the pool must close the connection after the use under way: a use nested in
	// it failed. ClosedUnknown: none did.
	spoiled CloseReason
	why     error
}

// sessionWaiter is a use that waits for a session connection.
type sessionWaiter struct {
	owner  uint64        // number of the use
	served bool          // ready is closed: the use has the session connection, or the session has ended
	ready  chan struct{} // closed when served
}

// endSession ends the session. Uses that wait for a session connection go on without
// the session, and the caller becomes the owner of the connections that no use has.
func (b *sessionConns) endSession() (held []*conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.endSessionLocked()
}

// endSessionLocked is endSession for a caller that holds mu. A second call returns
// nothing.
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

// uncountLocked takes the session out of the pool's count of sessions once it has ended
// and none of its uses is under way.
func (b *sessionConns) uncountLocked() {
	if b.ended && b.inUse == 0 {
		b.p.inSession.Add(-1)
	}
}

// releaseAll gives back all the connections in held, even if Reset panics for one of
// them.
func (b *sessionConns) releaseAll(held []*conn) {
	if len(held) == 0 {
		return
	}
	defer b.releaseAll(held[1:])
	b.releaseOne(held[0])
}

// releaseOne runs Reset on a connection of the session and gives it back. The caller
// owns it. kept is false if the pool closed the connection instead.
func (b *sessionConns) releaseOne(c *conn) (kept bool) {
	k := checkout{p: b.p, c: c, owned: true}
	defer k.rescue()
	return k.reset(b.ctx) && k.release()
}

// releaseQuietly is releaseAll for a goroutine of the pool's own: it logs a panic of
// Reset, since no caller could recover it.
func (b *sessionConns) releaseQuietly(held ...*conn) {
	defer func() {
		if v := recover(); v != nil {
			b.p.report.log(slog.LevelError, "the end of a session panicked", "panic", v)
		}
	}()
	b.releaseAll(held)
}

// acquire gives the session connection of addr to the use with the number me. If
// another use has it, acquire waits, unless the caller runs inside that use: then
// nested is true. A nil st without an error means that the session has ended.
func (b *sessionConns) acquire(ctx context.Context, addr Addr, me uint64) (st *sessionConn, nested bool, _ error) {
	b.mu.Lock()
	st = b.byAddr[addr]
	if st != nil && st.owner != 0 {
		by := st.owner
		b.mu.Unlock()
		if underway(by) { // the caller is inside fn, so that use stays the owner, even if the session has ended
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

// giveUp ends the wait of a use whose ctx is done, or whose pool is closed.
func (b *sessionConns) giveUp(st *sessionConn, w *sessionWaiter) {
	var left *conn
	b.mu.Lock()
	switch {
	case st.owner == w.owner: // the use was served at the last moment
		left = b.endUseLocked(st, st.c)
	case !w.served:
		st.leaveQueue(w)
	}
	b.mu.Unlock()
	if left != nil {
		go b.releaseQuietly(left) // the caller's ctx is done, so the caller must not wait for Reset
	}
}

// leaveQueue takes w out of the queue. The caller holds sessionConns.mu.
func (st *sessionConn) leaveQueue(w *sessionWaiter) {
	for i, o := range st.queue {
		if o == w {
			st.queue = append(st.queue[:i], st.queue[i+1:]...)
			return
		}
	}
}

// serve wakes the waiter. The caller holds sessionConns.mu.
func (w *sessionWaiter) serve() {
	w.served = true
	close(w.ready)
}

// endUse ends a use of st, which leaves the connection c behind; nil if it leaves none.
// The session connection goes to the oldest waiter, or becomes free. If the session has
// ended and no use waits, endUse returns c: the caller owns c then, and must give it
// back.
func (b *sessionConns) endUse(st *sessionConn, c *conn) (left *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.endUseLocked(st, c)
}

// endUseLocked is endUse for a caller that holds mu.
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
