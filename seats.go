package connpool

import (
	"context"
	"fmt"
	"sync"
)

// seats are the connections of a session.
type seats struct {
	p     *Pool
	ctx   context.Context // the values of Session's ctx, for what happens between uses
	trace *Trace

	mu     sync.Mutex // guards what follows, and the fields of seat that say so; nothing that can block or is foreign, and no other lock, under it
	ended  bool
	taken  int // seats in use
	byAddr map[Addr]*seat
}

// seat is a session's place at one address. Whoever takes it has it alone until
// the use ends; what a use leaves behind in good order stays on the seat.
//
//	free --take--> taken --rise--> free, or the next in line's
//
// While it is free, c belongs to the session, and vacate takes it. While it is
// taken, what seats.mu does not guard belongs to the goroutine of the use that took it.
type seat struct {
	addr Addr
	by   uint64  // the use that has it, see newUse; 0 if it is free; seats.mu
	line []*turn // those who wait for it, oldest first; seats.mu
	c    *conn   // kept between two uses; nil if there is none

	usedAt instant // when the last use of c ended
	loan   Conn    // of the use under way
	marks  int     // how many frames its number is, see underway

	// What a use nested in the one under way did to the connection.
	spoiled CloseReason
	why     error
}

// turn is a use that waits for a seat.
type turn struct {
	by     uint64
	served bool          // ready is closed: the seat is its own, or the session has ended
	ready  chan struct{} // closed when served
}

// vacate ends the session: those who wait for a seat go on without it, and the
// connections of free seats become the caller's.
func (b *seats) vacate() (held []*conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return nil
	}
	b.ended = true
	for _, st := range b.byAddr {
		for _, w := range st.line {
			w.serve()
		}
		st.line = nil
		if st.by == 0 && st.c != nil {
			held = append(held, st.c)
			st.c = nil
		}
	}
	b.leaveLocked()
	return held
}

// leaveLocked takes the session off the pool's count when it has ended and none
// of its uses is under way.
func (b *seats) leaveLocked() {
	if b.ended && b.taken == 0 {
		b.p.inSession.Add(-1)
	}
}

// giveBack gives back connections, all of them even if Reset panics for one.
func (b *seats) giveBack(held []*conn) {
	if len(held) == 0 {
		return
	}
	defer b.giveBack(held[1:])
	b.p.returnKept(b.ctx, held[0])
}

// returnKept gives back a connection that a session kept.
func (p *Pool) returnKept(ctx context.Context, c *conn) {
	owner := true
	defer p.rescue(c, &owner)
	p.putBack(ctx, c, ClosedUnknown, nil, &owner)
	if owner {
		owner = false
		p.giveBack(c)
	}
}

// take makes the use me the one that has the seat of addr, or finds that the caller is
// inside the one that has it. A nil seat means that the session has ended.
func (b *seats) take(ctx context.Context, addr Addr, me uint64) (st *seat, nested bool, _ error) {
	b.mu.Lock()
	st = b.byAddr[addr]
	if st != nil && st.by != 0 {
		by := st.by
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
		st = &seat{addr: addr}
		b.byAddr[addr] = st
		fallthrough
	case st.by == 0:
		st.by = me
		b.taken++
		b.mu.Unlock()
		return st, false, nil
	}
	w := &turn{by: me, ready: make(chan struct{})}
	st.line = append(st.line, w)
	b.mu.Unlock()
	start := b.p.clock.exactly()
	var err error
	select {
	case <-w.ready:
	case <-ctx.Done():
		err = fmt.Errorf("%w; another use of the session's connection was still under way (one that waits for this one should leave the session out of its ctx)", causeOf(ctx))
	case <-b.p.ctx.Done():
		err = ErrClosed
	}
	b.mu.Lock()
	mine := st.by == me
	switch {
	case mine && err != nil: // served at the last moment
		b.riseLocked(st)
	case !w.served:
		st.leave(w)
	}
	b.mu.Unlock()
	switch {
	case err != nil:
		return nil, false, b.p.failed(addr, StageSession, err, start)
	case mine:
		return st, false, nil
	}
	return nil, false, nil // the session has ended
}

// leave needs seats.mu.
func (st *seat) leave(w *turn) {
	for i, o := range st.line {
		if o == w {
			st.line = append(st.line[:i], st.line[i+1:]...)
			return
		}
	}
}

func (w *turn) serve() {
	w.served = true
	close(w.ready)
}

func (b *seats) rise(st *seat) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.riseLocked(st)
}

// riseLocked frees a seat, or gives it to the next in line.
func (b *seats) riseLocked(st *seat) {
	if len(st.line) > 0 {
		w := st.line[0]
		st.line = st.line[1:]
		st.by = w.by
		w.serve()
		return
	}
	st.by = 0
	b.taken--
	if st.c == nil {
		delete(b.byAddr, st.addr)
	}
	b.leaveLocked()
}
