package connpool

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Connections that are opened before a borrower wants them: because Warm was
// called, or because an address in use is short of its reserve (MinSpare). They
// are dials like all others, in the same books. No borrower waits for them, but
// one who comes takes such a dial as if it had been started for it.
//
// An address that wants such dials is on the list Pool.short. They start only
// when nobody wants the slot: no waiter is without a dial, a slot is free, and
// nothing has to be evicted for it.

// special is the state of Warm and MinSpare for an address; nil for one that uses
// neither.
type special struct {
	warm    []*warming    // calls of Warm under way
	dials   int           // under way, of those that were started for nobody who waits
	spare   int           // such dials that this site's own limits would let start
	inShort *list.Element // in Pool.short, nil if not
	asked   bool          // ... in its first part, for a Warm

	reserve bool          // a reserve is kept, see below
	shaky   bool          // ... which was seen to die unused
	probe   bool          // ... and the sweep allows one attempt
	looked  int           // idle ones that are being looked at
	usedAt  clock.Instant // the last loan began or ended; with MinSpare only
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
	since clock.Instant   // when it began
	own   int             // dials that were started for it and have not ended
	lost  int             // connections opened since that were lost before anybody used them
	err   *Error          // of the first of those that failed, to be classified; no more are started
	ended bool
	open  int           // connections when it ended
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
// If a dial fails, or three of the connections are lost before anybody has used
// them, it starts no more, waits for the dials under way and returns an *[Error]
// with the first failure or the last loss, in which errors.Is finds the cause. Those that
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
	start := p.clock.Exactly()
	if ctx.Err() != nil {
		return p.tooLate(ctx, addr)
	}
	w := &warming{ctx: ctx, n: n, since: start, ready: make(chan struct{})}
	var todo agenda
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return p.failed(addr, StageWait, ErrClosed, start)
	}
	if err := p.warmableLocked(n); err != nil {
		p.mu.Unlock()
		return usage(addr, err)
	}
	s := p.sites.find(addr)
	if s == nil {
		s = p.newSite(addr)
		p.addSiteLocked(s, &todo)
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
		why := causeOf(ctx)
		p.mu.Lock()
		if !w.ended {
			vain := p.whyLocked(s, nil)
			vain.ctx = why
			w.err = p.warmFailedLocked(s, vain)
			p.endWarmingLocked(s, w)
			p.refreshLocked(s)
			p.forgetLocked(s)
		}
		p.mu.Unlock()
	}
	if w.err == nil {
		return nil
	}
	w.err.Waited = p.clock.Exactly().Sub(start)
	w.err.classify()
	w.err.Err = fmt.Errorf("%d of %d are open: %w", w.open, w.n, w.err.Err)
	return w.err
}

// endWarmingLocked ends w, with the error that it has.
func (b *books) endWarmingLocked(s *site, w *warming) {
	w.ended, w.open = true, s.here()
	x := s.special
	if x.warm = slices.DeleteFunc(x.warm, func(o *warming) bool { return o == w }); len(x.warm) == 0 {
		x.warm = nil
	}
	close(w.ready)
}

// endWarmingsLocked ends those that have what they want, or cannot get it.
func (b *books) endWarmingsLocked(s *site) {
	for _, w := range slices.Clone(s.special.warm) {
		switch {
		case b.closed:
			w.err = b.warmFailedLocked(s, ErrClosed)
		case s.here() >= w.n:
			w.err = nil
		case w.err != nil && w.own == 0:
		case b.whenFull == Fail && w.own == 0 && s.n[dialing] == 0 && b.fullForSpareLocked(s):
			w.err = b.warmFailedLocked(s, ErrExhausted)
		default:
			continue
		}
		b.endWarmingLocked(s, w)
	}
}

// refuseWarmingsLocked ends those that ask for more than the limits allow now.
func (b *books) refuseWarmingsLocked(s *site) {
	if s.special == nil {
		return
	}
	for _, w := range slices.Clone(s.special.warm) {
		if err := b.warmableLocked(w.n); err != nil {
			w.err = usage(s.addr, err)
			b.endWarmingLocked(s, w)
		}
	}
}

// warmDialedLocked books the end of a dial that was started for a Warm. closed
// is why its connection was not kept, ClosedUnknown if it was.
func (b *books) warmDialedLocked(a *attempt, failure *dialError, closed CloseReason) {
	w, s := a.warm, a.c.site
	w.own--
	if w.err != nil || w.ended {
		return
	}
	switch {
	case failure != nil:
		w.err = b.failedLocked(s.addr, failure.stage, failure.err, 0)
	case closed == ClosedSurplus:
		w.err = b.warmFailedLocked(s, ErrExhausted)
	case closed == ClosedLowHandles:
		w.err = b.warmFailedLocked(s, errLowHandles)
	}
}

var errLowHandles = fmt.Errorf("%w: file handles run low, and what nobody uses is not kept", ErrNoneRemovable)

// warmFailedLocked is the error of a Warm that waited in vain, with the limit
// that was in its way; it may not evict, so idle connections are, too.
func (b *books) warmFailedLocked(s *site, err error) *Error {
	e := b.failedLocked(s.addr, StageWait, err, 0)
	switch {
	case b.closed || e.LimitName != "":
	case b.roomLocked() <= 0:
		e.LimitName, e.Limit = "MaxOpen", b.limitLocked()
	case int(b.n[idle]) >= b.limits.MaxIdle:
		e.LimitName, e.Limit = "MaxIdle", b.limits.MaxIdle
	}
	return e
}

// warmLostLocked books that a connection was lost that nobody had used. One may
// be lost by chance; of several more would come to the same end.
func (b *books) warmLostLocked(c *conn, lost error) {
	for _, w := range c.site.special.warm {
		if w.err != nil || c.born < w.since {
			continue
		}
		if w.lost++; w.lost >= maxHollow {
			w.err = b.failedLocked(c.site.addr, StageDial, lost, 0)
		}
	}
}

// here is the number of open connections of s, idle or lent; live adds the dials under
// way.
func (s *site) here() int { return int(s.n[idle] + s.n[borrowed]) }
func (s *site) live() int { return s.here() + int(s.n[dialing]) }

// fullForSpareLocked reports whether a limit leaves no room for a connection to
// s, unless something is closed for it.
func (b *books) fullForSpareLocked(s *site) bool {
	return b.n.kept() >= b.limitLocked() || s.n.kept() >= b.limits.MaxPerAddr
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
