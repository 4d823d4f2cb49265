package connpool

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Connections that are opened before a borrower wants them: because Warm was
// called, or because an address in use is short of its reserve (MinSpare). They
// are dials like all others, in the same books. No borrower waits for them, but
// one who comes takes such a dial as if it had been started for it.
//
// An address that wants such dials is on the list Pool.short. They start only
// when nobody wants the slot: no waiter is without a dial, a slot is free, and
// nothing has to be evicted for it.

// special is what the books of an address have beside those of most.
type special struct {
	network string // that DialContext was asked for; "" for a pooled address

	warm    []*warming    // calls of Warm under way
	dials   int           // under way, of those that were started for nobody who waits
	spare   int           // such dials that this site's own limits would let start
	inShort *list.Element // in Pool.short, nil if not
	asked   bool          // ... in its first part, for a Warm

	reserve bool    // a reserve is kept, see below
	shaky   bool    // ... which was seen to die unused
	probe   bool    // ... and the sweep allows one attempt
	looked  int     // idle ones that are being looked at
	usedAt  instant // the last loan began or ended; with MinSpare only
}

// keeps reports whether there is a reason to keep the books, empty as they are.
func (x *special) keeps() bool    { return x != nil && (x.reserve || x.warm != nil) }
func (x *special) reserved() bool { return x != nil && x.reserve }

func (s *site) specialLocked() *special {
	if s.special == nil {
		s.special = new(special)
	}
	return s.special
}

// warming is one call of Warm. It ends once, under Pool.mu: the connections are
// there, one of its own dials failed and the others have ended, its ctx is
// done, or the pool is closed.
type warming struct {
	ctx   context.Context // its values, for the dials
	n     int             // connections wanted
	own   int             // dials that were started for it and have not ended
	err   *Error          // of the first of those that failed; no more are started
	ended bool
	ready chan struct{} // closed when it has ended
}

// Warm opens connections to addr, several at a time, until n are open, and
// returns when they are. Those count that are idle, lent, or being opened for a
// borrower; so before the first borrow n will be idle.
//
// It keeps to all limits and has less right to room than a borrower: it waits,
// until ctx is done, while others need the slots, and evicts nothing. What it
// opens expires like any other idle connection.
//
// If a dial fails it starts no more, waits for those under way and returns an
// *[Error] with the first failure, in which errors.Is finds the cause. Those that
// were opened stay, also when ctx ends the wait; the error says how many there
// are. An n that no limit ever allows is an error that names the limit; so is a
// connection that could not be kept because others fill MaxIdle, or because file
// handles run low. With [Fail] in force a full pool is ErrExhausted. n may be 0.
func (p *Pool) Warm(ctx context.Context, addr Addr, n int) error {
	switch {
	case p.stop == nil:
		return usage(addr, ErrClosed)
	case ctx == nil:
		return usage(addr, errors.New("ctx is nil: pass context.Background()"))
	case n < 0:
		return usage(addr, errNegative)
	}
	addr, err := p.resolve(addr)
	if err != nil {
		return usage(addr, err)
	}
	start := p.clock.exactly()
	if ctx.Err() != nil {
		return p.failed(addr, StageWait, causeOf(ctx), start)
	}
	w := &warming{ctx: ctx, n: n, ready: make(chan struct{})}
	var todo agenda
	p.mu.Lock()
	if p.closed {
		defer p.mu.Unlock()
		return p.failedLocked(addr, StageWait, ErrClosed, start)
	}
	if err := p.warmableLocked(n); err != nil {
		p.mu.Unlock()
		return usage(addr, err)
	}
	s := p.sites.find(addr)
	if s == nil {
		s = p.newSiteLocked(addr)
	}
	s.specialLocked().warm = append(s.special.warm, w)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.refreshLocked(s) // a full pool, under Fail
	p.forgetLocked(s)
	p.mu.Unlock()
	todo.run(p)

	select {
	case <-w.ready:
	case <-ctx.Done():
		p.mu.Lock()
		if !w.ended {
			w.err = p.warmFailedLocked(s, causeOf(ctx))
			p.endWarmingLocked(s, w)
			p.refreshLocked(s)
			p.forgetLocked(s)
		}
		p.mu.Unlock()
	}
	if w.err == nil {
		return nil
	}
	w.err.Waited = p.clock.exactly().sub(start)
	return w.err
}

// endWarmingLocked ends w, with the error that it has, and puts the number of
// connections that there are into that.
func (p *Pool) endWarmingLocked(s *site, w *warming) {
	w.ended = true
	if w.err != nil {
		w.err.Err = fmt.Errorf("%d of %d are open: %w", s.here(), w.n, w.err.Err)
	}
	x := s.special
	if x.warm = slices.DeleteFunc(x.warm, func(o *warming) bool { return o == w }); len(x.warm) == 0 {
		x.warm = nil
	}
	close(w.ready)
}

// endWarmingsLocked ends those that have what they want, or cannot get it.
func (p *Pool) endWarmingsLocked(s *site) {
	for _, w := range slices.Clone(s.special.warm) {
		switch {
		case p.closed:
			w.err = p.warmFailedLocked(s, ErrClosed)
		case s.here() >= w.n:
			w.err = nil
		case w.err != nil && w.own == 0:
		case p.cfg.WhenFull == Fail && w.own == 0 && s.n[dialing] == 0 && p.fullForSpareLocked(s):
			w.err = p.warmFailedLocked(s, ErrExhausted)
		default:
			continue
		}
		p.endWarmingLocked(s, w)
	}
}

// refuseWarmingsLocked ends those that ask for more than the limits allow now.
func (p *Pool) refuseWarmingsLocked(s *site) {
	if s.special == nil {
		return
	}
	for _, w := range slices.Clone(s.special.warm) {
		if err := p.warmableLocked(w.n); err != nil {
			w.err = usage(s.addr, err)
			p.endWarmingLocked(s, w)
		}
	}
}

// warmDialedLocked books the end of a dial that was started for a Warm. closed
// is why its connection was not kept, ClosedUnknown if it was.
func (p *Pool) warmDialedLocked(a *attempt, failure *dialError, closed CloseReason) {
	w, s := a.warm, a.c.site
	w.own--
	if w.err != nil || w.ended {
		return
	}
	switch {
	case failure != nil:
		w.err = p.failedLocked(s.addr, failure.stage, failure.err, 0)
	case closed == ClosedSurplus:
		w.err = p.warmFailedLocked(s, ErrExhausted)
	case closed == ClosedLowHandles:
		w.err = p.warmFailedLocked(s, errLowHandles)
	}
}

var errLowHandles = fmt.Errorf("%w: file handles run low, and what nobody uses is not kept", ErrNoneRemovable)

// warmFailedLocked is the error of a Warm that waited in vain, with the limit
// that was in its way; it may not evict, so idle connections are, too.
func (p *Pool) warmFailedLocked(s *site, err error) *Error {
	e := p.failedLocked(s.addr, StageWait, err, 0)
	switch {
	case p.closed || e.LimitName != "":
	case openOf(&p.n) >= p.limitLocked():
		e.LimitName, e.Limit = "MaxOpen", p.limitLocked()
	case int(p.n[idle]) >= p.cfg.MaxIdle:
		e.LimitName, e.Limit = "MaxIdle", p.cfg.MaxIdle
	}
	return e
}

// here counts the connections of s that Warm counts, live those and the dials.
func (s *site) here() int { return int(s.n[idle] + s.n[borrowed]) }
func (s *site) live() int { return s.here() + int(s.n[dialing]) }

// fullForSpareLocked reports whether a limit leaves no room for a connection to
// s, unless something is closed for it.
func (p *Pool) fullForSpareLocked(s *site) bool {
	return openOf(&p.n)-int(p.n[closing]) >= p.limitLocked() || openOf(&s.n)-int(s.n[closing]) >= p.cfg.MaxPerAddr
}

// warming is the oldest Warm of s for which another dial may start.
func (s *site) warming() *warming {
	for _, w := range s.special.warm {
		if w.err == nil && s.live() < w.n {
			return w
		}
	}
	return nil
}

// refreshSpareLocked brings up to date what s wants beside what its waiters
// want. It is a part of refreshLocked.
func (p *Pool) refreshSpareLocked(s *site) {
	p.endWarmingsLocked(s)
	x := s.special
	if p.closed {
		x.reserve = false
	}
	x.spare = p.spareLocked(s)
	asked := s.warming() != nil
	if x.inShort != nil && (x.spare == 0 || x.asked != asked) {
		p.short.Remove(x.inShort)
		x.inShort = nil
	}
	switch x.asked = asked; {
	case x.spare == 0 || x.inShort != nil:
	case asked: // goes before those for which nobody asked
		x.inShort = p.short.PushFront(s)
	default:
		x.inShort = p.short.PushBack(s)
	}
}

// spareLocked counts the dials that s's own limits would let start for no waiter.
func (p *Pool) spareLocked(s *site) int {
	x := s.special
	if p.closed || s.queue.bare != nil || s.retrying() || s.backingOff() && s.n[dialing] > 0 {
		return 0
	}
	want := 0
	for _, w := range x.warm {
		if w.err == nil {
			want = max(want, w.n-s.live())
		}
	}
	if x.reserve && s.queue.len == 0 && (!x.shaky && !s.failing() || x.probe) {
		short := p.cfg.MinSpare - int(s.n[idle]+s.n[dialing]) - x.looked
		if s.failing() {
			short = min(short, 1)
		}
		want = max(want, short)
	}
	if s.backingOff() {
		want = min(want, 1)
	}
	return max(0, min(want, p.cfg.MaxDialingPerAddr-int(s.n[dialing]), p.cfg.MaxPerAddr-openOf(&s.n)))
}

// openSparesLocked starts what nobody waits for. It is the last part of
// admitLocked, which comes to it when no waiter wants a slot.
func (p *Pool) openSparesLocked(todo *agenda) {
	for p.short.Len() > 0 && !p.closed {
		if openOf(&p.n) >= p.limitLocked() || int(p.n[dialing]) >= p.cfg.MaxDialing {
			return
		}
		s := p.short.Front().Value.(*site)
		a := &attempt{ctx: context.Background(), spare: true, warm: s.warming()}
		if a.warm != nil {
			a.warm.own++
			a.ctx = a.warm.ctx
		} else if !p.spareableLocked() {
			return // nor for the others: those of Warm come first
		}
		s.special.probe = false
		s.special.dials++
		p.startDialLocked(s, a, todo)
	}
}

// spareableLocked reports whether the pool may open connections for a reserve:
// half of the dials are left to those who wait, what could not be kept is not
// opened, and handles are plenty.
func (p *Pool) spareableLocked() bool {
	return int(p.n[dialing]) < p.cfg.MaxDialing-p.cfg.MaxDialing/2 &&
		int(p.n[idle]+p.n[dialing]) < p.cfg.MaxIdle &&
		p.pressure < handlesLow && p.starving == 0
}

// The reserve of an address (MinSpare):
//
//	none  -> kept    a loan
//	kept  -> none    evicted, CloseIdle, or unused for reserveMemory
//	kept  -> shaky   a connection died that was never lent and younger than a sweep's
//	                 period; or the address failed
//	shaky -> kept    a loan
//
// A reserve that is short is refilled at once, if the address is known to work.
// Where the last dial failed, and where connections die at once, one attempt per
// sweep has to do: there may be thousands of such addresses.

// reserveMemory is for how long after its last loan an address has a reserve.
func (p *Pool) reserveMemory() time.Duration {
	if p.cfg.IdleTimeout > 0 {
		return 10 * p.cfg.IdleTimeout
	}
	return 10 * defaultIdleTimeout
}

// lentLocked books, if there is a MinSpare, that a connection of s goes to a
// borrower or comes from one.
func (p *Pool) lentLocked(s *site, now instant) {
	if s.tracked() || p.closed {
		return
	}
	x := s.specialLocked()
	x.reserve, x.shaky, x.usedAt = true, false, now
}

// takenLocked books, if there is a MinSpare, that a borrower took c off the stack.
func (p *Pool) takenLocked(c *conn, now instant) {
	if reserve := p.reservedLocked(c.site, c.site.n[idle]+1, now); reserve || c.more.Load() != nil {
		c.extra().reserve = reserve
	}
	p.lentLocked(c.site, now)
}

// lookedAtLocked books, if there is a MinSpare, whether c is being looked at: then
// it counts as idle.
func (c *conn) lookedAtLocked(yes bool) {
	e := c.more.Load()
	switch {
	case yes && c.site.special != nil:
		if e = c.extra(); !e.looked {
			e.looked = true
			c.site.special.looked++
		}
	case !yes && e != nil && e.looked:
		e.looked = false
		c.site.special.looked--
	}
}

// reservedLocked reports whether the idle connections of s, if there are no more
// than so many, are its reserve, which IdleTimeout does not concern.
func (p *Pool) reservedLocked(s *site, n int32, now instant) bool {
	x := s.special
	return x.reserved() && int(n) <= p.cfg.MinSpare && now.sub(x.usedAt) < p.reserveMemory()
}

// sweepReserveLocked is the sweep's part.
func (p *Pool) sweepReserveLocked(s *site, now instant) {
	x := s.special
	if int(s.n[borrowed]) > x.looked || s.queue.len > 0 { // a loan may take longer
		x.usedAt = now
	}
	if now.sub(x.usedAt) >= p.reserveMemory() {
		x.reserve = false
		p.refreshLocked(s)
		p.forgetLocked(s)
		return
	}
	x.probe = s.failing() || x.shaky
	p.refreshLocked(s)
}

// reserveLostLocked books what the close of c means for the reserve of its
// address, before it is refilled.
func (p *Pool) reserveLostLocked(c *conn, reason CloseReason, age time.Duration) {
	c.lookedAtLocked(false)
	switch x := c.site.special; reason {
	case ClosedEvicted, ClosedOnRequest, ClosedLowHandles:
		x.reserve = false // it was to make room, or to save handles
	case ClosedStale, ClosedDirty, ClosedCheckFailed:
		if c.uses == 0 && age < p.sweepPeriod() {
			x.shaky = true
		}
	}
}
