package connpool

import (
	"container/list"
	"context"
	"fmt"
	"slices"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// The state of Warm: who has asked for connections, and when a call of Warm ends.

// special is the state of Warm and MinIdlePerAddr for an address; nil for one that uses
// neither.
type prefill struct {
	warm      []*warming    // calls of Warm under way
	dials     int           // under way, of those that were started for nobody who waits
	missing   int           // such dials that this site's own limits would let start
	inDeficit *list.Element // in Pool.short, nil if not
	forWarm   bool          // ... in its first part, for a Warm

	reserve   bool          // a reserve is kept, see below
	unstable  bool          // ... which was seen to die unused
	retryOnce bool          // ... and the sweep allows one attempt
	checking  int           // idle ones that are being looked at
	usedAt    clock.Instant // the last loan began or ended; with MinIdlePerAddr only
}

// keeps reports whether there is a reason to keep the books, empty as they are.
func (x *prefill) keeps() bool { return x != nil && (x.reserve || x.warm != nil) }

func (x *prefill) reserved() bool { return x != nil && x.reserve }

func (s *site) prefillLocked() *prefill {
	if s.prefill == nil {
		s.prefill = new(prefill)
	}
	return s.prefill
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

// endWarmingLocked ends w, with the error that it has.
func (b *books) endWarmingLocked(s *site, w *warming) {
	w.ended, w.open = true, s.openHere()
	x := s.prefill
	if x.warm = slices.DeleteFunc(x.warm, func(o *warming) bool { return o == w }); len(x.warm) == 0 {
		x.warm = nil
	}
	close(w.ready)
}

// endWarmingsLocked ends those that have what they want, or cannot get it.
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

// refuseWarmingsLocked ends those that ask for more than the limits allow now.
func (b *books) refuseWarmingsLocked(s *site) {
	if s.prefill == nil {
		return
	}
	for _, w := range slices.Clone(s.prefill.warm) {
		if err := b.warmableLocked(w.n); err != nil {
			w.err = usage(s.addr, err)
			b.endWarmingLocked(s, w)
		}
	}
}

// noteWarmDialedLocked books the end of a dial that was started for a Warm. closed
// is why its connection was not kept, ClosedUnknown if it was.
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

// warmFailedLocked is the error of a Warm that waited in vain, with the limit
// that was in its way.
func (b *books) warmFailedLocked(s *site, err error) *Error {
	e := b.failedLocked(s.addr, StageWait, err, 0)
	if !b.closed && e.LimitName == "" {
		e.LimitName = b.warmBlockerLocked(s)
		e.Limit = b.limitOfLocked(e.LimitName)
	}
	return e
}

// noteWarmLostLocked books that a connection was lost that nobody had used. One may
// be lost by chance; of several more would come to the same end.
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

// fullForPrefillLocked reports whether a limit leaves no room for a connection to
// s, unless something is closed for it.
func (b *books) fullForPrefillLocked(s *site) bool {
	return b.n.kept() >= b.limitLocked() || s.n.kept() >= b.limits.MaxPerAddr
}

// warmable says why addr can never have n connections that nobody uses.
func (b *books) warmableLocked(n int) error {
	for _, l := range [...]struct {
		name  string
		limit int
	}{
		{"MaxIdlePerAddr", b.limits.MaxIdlePerAddr},
		{"MaxIdle", b.limits.MaxIdle},
		{"MaxPerAddr", b.limits.MaxPerAddr},
		{"MaxOpen", b.limitLocked()},
	} {
		if n > l.limit {
			return fmt.Errorf("%d connections can never be kept: %s allows %d (warm fewer, or raise it)", n, l.name, l.limit)
		}
	}
	return nil
}

// here is the number of open connections of s, idle or lent; live adds the dials under
// way.
func (s *site) openHere() int { return int(s.n[phaseIdle] + s.n[phaseBorrowed]) }

func (s *site) openOrDialing() int { return s.openHere() + int(s.n[phaseDialing]) }

// warming is the oldest Warm of s for which another dial may start.
func (s *site) warming() *warming {
	for _, w := range s.prefill.warm {
		if w.err == nil && s.openOrDialing() < w.n {
			return w
		}
	}
	return nil
}
