package connpool

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The part of the model that holds connections: leases, sessions, uses inside
// uses, and the reports about them. A borrower with a visit calls With under the
// ctx of a session; everything else about it is as for any other.

// modelHolds counts what happened in the long runs.
var modelHolds holdTotals

type holdTotals struct{ leases, kept, nested, spoiled, lost, turns, reports atomic.Uint64 }

// sufficed checks that the histories were worth something.
func (h *holdTotals) sufficed(t *testing.T, steps int) {
	t.Helper()
	t.Logf("%d leases, %d uses of a kept connection, %d inside another, %d of which spoiled it, %d told of a loss, %d waited for a turn, %d reports",
		h.leases.Load(), h.kept.Load(), h.nested.Load(), h.spoiled.Load(), h.lost.Load(), h.turns.Load(), h.reports.Load())
	for what, n := range map[string]uint64{
		"leases": h.leases.Load(), "kept": h.kept.Load(), "nested": h.nested.Load(), "spoiled": h.spoiled.Load(),
		"lost": h.lost.Load(), "turns": h.turns.Load(), "reports": h.reports.Load(),
	} {
		require.Greater(t, n, uint64(steps/5_000), what)
	}
}

// visit is a session, as the model knows it.
type visit struct {
	ctx    context.Context
	end    func()
	cancel context.CancelFunc // of the ctx it was begun under
	seats  *sessionConns

	// Under world.mu.
	ended bool
	last  map[Addr]uint64 // the connection of its last use
}

// watchHolds makes a pool report what is held for long, or not.
func (w *world) watchHolds(cfg *Config) {
	warn := []time.Duration{0, time.Millisecond, 10 * time.Second}[w.pick(3)]
	cfg.HoldWarn = warn
	cfg.Trace.HeldLong = func(i HeldInfo) {
		modelHolds.reports.Add(1)
		if warn == 0 || i.Held < warn || i.Place == "" {
			w.failed("reported %+v under HoldWarn %v", i, warn)
		}
	}
}

// runHolds is the instructions of this file.
func (w *world) runHolds(op int) {
	switch {
	case op < 3:
		w.call(op == 2, &borrower{lease: true, nested: w.pick(4)})
		w.op = "lease"
	case op == 3 || len(w.visits) == 0:
		w.op = "begin a session"
		w.beginVisit()
	case op < 9:
		v := w.visits[w.pick(len(w.visits))]
		w.call(op == 8, &borrower{visit: v, nested: w.pick(10)})
		w.op = "borrow in a session"
	default:
		w.op = "end a session"
		v := w.visits[w.pick(len(w.visits))]
		w.endVisit(v, w.pick(2) == 0)
	}
}

func (w *world) beginVisit() {
	if len(w.visits) >= 3 {
		return
	}
	parent, cancel := context.WithCancel(context.Background())
	v := &visit{cancel: cancel, last: make(map[Addr]uint64)}
	v.ctx, v.end = w.pool.Session(parent)
	v.seats = v.ctx.Value(sessionKey{w.pool}).(*session).sessionConns
	w.visits = append(w.visits, v)
	before := w.pool.inSession.Load()
	if ctx, end := w.pool.Session(v.ctx); ctx != v.ctx || w.pool.inSession.Load() != before {
		w.failed("a session inside a session did not join it")
	} else {
		end()
	}
}

// endVisit ends a session, or the ctx it was begun under.
func (w *world) endVisit(v *visit, canceled bool) {
	w.mu.Lock()
	v.ended = true
	for id, of := range w.kept {
		if of == v {
			delete(w.kept, id)
		}
	}
	w.mu.Unlock()
	w.visits = slices.DeleteFunc(w.visits, func(o *visit) bool { return o == v })
	if !canceled {
		v.end()
	}
	v.cancel()
	v.end()
}

func (w *world) endVisits() {
	for len(w.visits) > 0 {
		w.endVisit(w.visits[0], false)
	}
}

// keptBy books that b got the connection id, and checks that no session keeps
// it from b, or b's session another. It needs world.mu.
func (w *world) keptBy(b *borrower, id uint64) {
	v := b.visit
	if of := w.kept[id]; of != nil && of != v {
		w.fail("call %d got connection %d, which a session keeps", b.order, id)
	}
	if v == nil || v.ended {
		return
	}
	switch last := v.last[b.addr]; last {
	case 0:
	case id:
		modelHolds.kept.Add(1)
	default: // which must be gone
		w.doomed = append(w.doomed, last)
	}
	v.last[b.addr] = id
	w.kept[id] = v
}

// closedWhileKept checks that nothing but its use or its peer ends a connection
// of a session. It needs world.mu.
func (w *world) closedWhileKept(i CloseInfo) {
	if w.kept[i.ID] == nil {
		return
	}
	delete(w.kept, i.ID)
	switch i.Reason {
	case ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus, ClosedRetired, ClosedMoved, ClosedOnRequest, ClosedLeaked:
		w.fail("connection %d was closed as %v while a session had it", i.ID, i.Reason)
	}
}

// nest does what b does inside its loan, on the loan's goroutine.
func (w *world) nest(ctx context.Context, b *borrower, c Conn) {
	w.mu.Lock()
	idle := b.visit == nil || b.visit.ended
	w.mu.Unlock()
	if idle || b.nested > 6 {
		return
	}
	ran := false
	inside := func(end func(cancel func()) error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer func() { recover() }()
		err := w.pool.With(ctx, b.addr, func(again Conn) error {
			ran = true
			modelHolds.nested.Add(1)
			if again != c {
				w.failed("call %d got another connection inside its use", b.order)
			}
			return end(cancel)
		})
		if err != nil && !ran && ctx.Err() == nil && c.c.word.Load()&(flagCut|flagStolen|flagBroken) == 0 {
			w.failed("call %d was refused its own connection: %v", b.order, err)
		}
	}
	fine := func(func()) error { return nil }
	switch b.nested {
	case 0:
		inside(fine)
		return
	case 1:
		inside(func(func()) error { inside(fine); return nil })
		return
	case 2:
		inside(func(func()) error { return Keep(errFn) })
		return
	case 3:
		inside(func(func()) error { return errFn })
	case 4:
		inside(func(func()) error { panic(errFn) })
	case 5:
		inside(func(cancel func()) error { cancel(); return nil })
	case 6:
		inside(func(func()) error { inside(func(func()) error { return errFn }); return nil })
	}
	if !ran {
		return
	}
	modelHolds.spoiled.Add(1)
	err := w.pool.With(ctx, b.addr, func(Conn) error { return errors.New("it ran") })
	if !errors.Is(err, ErrSessionLost) && ctx.Err() == nil {
		w.failed("call %d used a spoiled connection once more: %v", b.order, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.doomed = append(w.doomed, b.holds)
}

// leaves books that a connection was detached, or may have been.
func (w *world) leaves(b *borrower) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.doomed = slices.DeleteFunc(w.doomed, func(id uint64) bool { return id == b.holds })
	delete(w.kept, b.holds)
	if b.visit != nil {
		delete(b.visit.last, b.addr)
	}
}

// useLease is the body of every lease.
func (w *world) useLease(ctx context.Context, pool *Pool, b *borrower, top []uint64) error {
	l, err := pool.Lease(ctx, b.addr)
	if err != nil {
		return err
	}
	modelHolds.leases.Add(1)
	id := w.lentTo(ctx, b, Conn{l.c, l.gen}, top)
	if l.Info().ID != id {
		w.failed("lease %d says that it is connection %d", id, l.Info().ID)
	}
	order := w.told(b)
	w.converse(context.Background(), b, order) // a ctx has no power over a lease
	w.mu.Lock()
	delete(w.owner, id)
	w.usedNow(id)
	w.clientBack(b)
	w.mu.Unlock()
	over := order == vClose || order == vDetach // ended otherwise than by Return
	defer func() {
		if err := l.Return(); (err == nil) == over {
			w.failed("Return of lease %d after %d: %v", id, order, err)
		}
		if !errors.Is(l.Return(), ErrReturned) {
			w.failed("lease %d was returned twice", id)
		}
	}()
	if w.clientObeys(order, b, l, l.c) {
		return nil
	}
	switch order {
	case vNil:
		if b.nested == 0 { // nobody can reach it any more
			l.cleanup.Stop()
			over, l.state = true, leaseOver
			leakedLease(l.c)
		}
	case vKeep, vError, vPanic, vGoexit:
		return l.Do(context.Background(), func(c Conn) error { return w.obey(ctx, order, b, c) })
	case vClose:
		return l.Discard()
	case vDetach:
		nc, err := l.Detach()
		if over = err == nil; over {
			w.mu.Lock()
			w.detached = append(w.detached, nc)
			w.clientLeaves(b)
			w.mu.Unlock()
		}
	case vInFlight:
		var read atomic.Bool
		go func() {
			l.Read(make([]byte, 1))
			read.Store(true)
		}()
		for l.c.word.Load()&inFlight == 0 && !read.Load() {
			runtime.Gosched()
		}
	case vHalfClose:
		l.CloseWrite()
	case vTimeoutThenNil:
		if l.SetReadDeadline(time.Now().Add(-time.Second)) == nil { // else the read would wait
			l.Read(make([]byte, 1))
		}
	}
	return nil
}

// holdsInconsistent looks at what is held: the seats of the sessions, and the
// list of what may have to be reported.
func (w *world) holdsInconsistent() error {
	w.mu.Lock()
	for _, b := range w.live {
		if b.done && errors.Is(b.err, ErrSessionLost) {
			modelHolds.lost.Add(1)
		}
	}
	for _, id := range w.doomed {
		if w.thinking > 0 {
			break // its loan may not be over
		}
		if !w.isGone(id) {
			w.fail("connection %d was spoiled, or lost by its session, and lives", id)
		}
	}
	if w.thinking == 0 {
		w.doomed = nil
	}
	w.mu.Unlock()
	p := w.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, v := range w.visits {
		if err := v.seats.inconsistency(); err != nil {
			return err
		}
	}
	if n := p.inSession.Load(); n < int64(len(w.visits)) || len(w.live) == 0 && n != int64(len(w.visits)) {
		return fmt.Errorf("the pool counts %d sessions of %d", n, len(w.visits))
	}
	return p.holdsInconsistency()
}

// inconsistency needs Pool.mu.
func (b *sessionConns) inconsistency() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	taken := 0
	for addr, st := range b.byAddr {
		switch {
		case st.addr != addr:
			return fmt.Errorf("the seat of %v is filed under %v", st.addr, addr)
		case st.owner != 0:
			taken++
			modelHolds.turns.Add(uint64(min(1, len(st.queue))))
		case len(st.queue) > 0:
			return fmt.Errorf("%d wait for the free seat of %v", len(st.queue), addr)
		case st.c == nil:
			return fmt.Errorf("the empty seat of %v was kept", addr)
		case st.c.phase != phaseBorrowed || st.c.site.addr != addr:
			return fmt.Errorf("a session has a connection of %v in phase %d", st.c.site.addr, st.c.phase)
		case operating(st.c.word.Load()), st.c.word.Load()&(flagLent|flagGone) != 0, st.c.word.Load()&(flagBroken|flagResident) == flagBroken:
			return fmt.Errorf("a connection that a session keeps has the word %#x", st.c.word.Load())
		case st.c.deadlineSet || st.c.watched():
			return fmt.Errorf("a connection that a session keeps remembers its last use")
		}
	}
	switch {
	case b.ended:
		return errors.New("a session has ended by itself")
	case taken != b.inUse:
		return fmt.Errorf("a session counts %d uses of %d", b.inUse, taken)
	}
	return nil
}

// watched reports whether a ctx still has to do with c.
func (c *conn) watched() bool {
	l := c.loan.Load()
	return c.ctx != nil || l != nil && (l.unwatch != nil || l.nested != nil || !l.limit.IsZero())
}

// holdsInconsistency needs mu.
func (p *Pool) holdsInconsistency() error {
	l := &p.loanLog
	if !l.wanted {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	var prev *loanRecord
	for h := l.oldest; h != nil; prev, h = h, h.next {
		if n++; h.prev != prev || prev != nil && h.since < prev.since {
			return errors.New("the list of what is held is torn or out of order")
		}
	}
	if l.newest != prev || n > int(p.n[phaseBorrowed]) {
		return fmt.Errorf("%d are held, %d are in use", n, p.n[phaseBorrowed])
	}
	return nil
}
