package connpool

import (
	"container/list"
	"context"
	"fmt"
	"slices"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// The state of Warm: the calls under way, and when each of them ends.

// prefill is the state of Warm, MinIdlePerAddr and LimitsFor for an address; nil for an
// address that uses none of them.
type prefill struct {
	limits *ownLimits // nil without LimitsFor, see books_limits.go

	warm      []*warming    // calls of Warm under way
	dials     int           // dials under way for which nobody waits
	missing   int           // dials for which nobody waits and that the limits of this site would let start
	inDeficit *list.Element // the site's element in books.deficit; nil if the site is not in it
	forWarm   bool          // that element is in the first part of the list, for a Warm

	reserve   bool          // the address has a reserve, see books_minidle.go
	unstable  bool          // the reserve was seen to fail, see books_minidle.go
	retryOnce bool          // one attempt to refill the unstable reserve is allowed
	checking  int           // idle connections being checked
	usedAt    clock.Instant // when the last loan began or ended; with MinIdlePerAddr only
}

// keeps reports whether the state of an address without connections and waiters must be
// kept.
func (x *prefill) keeps() bool    { return x != nil && (x.reserve || x.warm != nil) }
func (x *prefill) reserved() bool { return x != nil && x.reserve }

// prefillLocked is the prefill of s, made at the first call.
func (s *site) prefillLocked() *prefill {
	if s.prefill == nil {
		s.prefill = new(prefill)
	}
	return s.prefill
}

// warming is one call of Warm. It ends once, under Pool.mu: the connections are open; or
// one of its own dials failed and the others have ended; or its ctx is done; or the pool is
// closed; or the limits do not allow that many connections (any more).
type warming struct {
	ctx   context.Context // the caller's ctx: the dials use its values
	n     int             // connections wanted
	since clock.Instant   // when the call began
	own   int             // dials that were started for this call and have not ended
	lost  int             // connections opened since then that were lost before anybody used them
	err   *Error          // the first failure, not yet classified; with it set, no more dials start
	ended bool
	open  int           // open connections when the call ended
	ready chan struct{} // closed when the call has ended
}

// endWarmingLocked ends w with w.err.
func (b *books) endWarmingLocked(s *site, w *warming) {
	w.ended, w.open = true, s.openHere()
	x := s.prefill
	if x.warm = slices.DeleteFunc(x.warm, func(o *warming) bool { return o == w }); len(x.warm) == 0 {
		x.warm = nil
	}
	close(w.ready)
}

// endWarmingsLocked ends the calls of Warm that have the connections they want or cannot
// get them.
func (b *books) endWarmingsLocked(s *site) {
	for _, w := range slices.Clone(s.prefill.warm) {
		switch {
		case b.closed:
			w.err = b.warmFailedLocked(s, ErrClosed)
		case s.openHere() >= w.n:
			w.err = nil
		case w.err != nil && w.own == 0:
		case b.whenFull == FullFail && w.own == 0 && s.n[phaseDialing] == 0 && b.fullForPrefillLocked(s):
			w.err = b.warmFailedLocked(s, ErrExhausted)
		default:
			continue
		}
		b.endWarmingLocked(s, w)
	}
}

// refuseWarmingsLocked ends the calls of Warm that ask for more than the limits allow now.
func (b *books) refuseWarmingsLocked(s *site) {
	if s.prefill == nil {
		return
	}
	for _, w := range slices.Clone(s.prefill.warm) {
		if err := b.warmableLocked(s, w.n); err != nil {
			w.err = usage(s.addr, err)
			b.endWarmingLocked(s, w)
		}
	}
}

// noteWarmDialedLocked records the end of a dial that was started for a Warm. closed is why
// its connection was not kept; ClosedUnknown if it was kept.
func (b *books) noteWarmDialedLocked(a *attempt, failure *dialError, closed CloseReason) {
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

// warmFailedLocked is the error of a Warm that waited in vain, with the limit that was in
// its way.
func (b *books) warmFailedLocked(s *site, err error) *Error {
	e := b.failedLocked(s.addr, StageWait, err, 0)
	if !b.closed && e.LimitName == "" {
		b.blameLocked(e, s, b.warmBlockerLocked(s))
	}
	return e
}

// noteWarmLostLocked records that a connection was lost that nobody had used. One may be
// lost by chance. After maxHollow, more connections would be lost too, so the Warm ends.
func (b *books) noteWarmLostLocked(c *conn, lost error) {
	for _, w := range c.site.prefill.warm {
		if w.err != nil || c.born < w.since {
			continue
		}
		if w.lost++; w.lost >= maxHollow {
			w.err = b.failedLocked(c.site.addr, StageDial, lost, 0)
		}
	}
}

// fullForPrefillLocked reports whether a limit leaves no room for a connection to s,
// unless an open connection is closed.
func (b *books) fullForPrefillLocked(s *site) bool {
	return b.n.kept() >= b.limitLocked() || s.n.kept() >= b.limitsAt(s).MaxOpen
}

// warmableLocked says why s can never have n unused connections; nil if it can.
func (b *books) warmableLocked(s *site, n int) error {
	for _, name := range [...]string{"MaxIdlePerAddr", "MaxIdle", "MaxPerAddr", "MaxOpen"} {
		limit, own := b.limitOfLocked(s, name)
		if own {
			name = ownName(name)
		}
		if n > limit {
			return fmt.Errorf("%d connections can never be kept: %s allows %d (warm fewer, or raise it)", n, name, limit)
		}
	}
	return nil
}

// openHere is the number of open connections of s, idle or lent; openOrDialing adds the
// dials under way.
func (s *site) openHere() int      { return int(s.n[phaseIdle] + s.n[phaseBorrowed]) }
func (s *site) openOrDialing() int { return s.openHere() + int(s.n[phaseDialing]) }

// warming is the oldest Warm of s for which another dial may start; nil if there is none.
func (s *site) warming() *warming {
	for _, w := range s.prefill.warm {
		if w.err == nil && s.openOrDialing() < w.n {
			return w
		}
	}
	return nil
}

var errLowHandles = fmt.Errorf("%w: file handles run low, and what nobody uses is not kept", ErrNoneRemovable)

// maxHollow is how many hollow connections one borrow may meet.
const maxHollow = 3
