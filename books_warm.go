package connpool

import (
	"container/list"
	"context"
	"fmt"
	"slices"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// The state of Warm: who has asked for connections, and when a call of Warm ends.

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
func (x *special) keeps() bool { return x != nil && (x.reserve || x.warm != nil) }

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

// fullForSpareLocked reports whether a limit leaves no room for a connection to
// s, unless something is closed for it.
func (b *books) fullForSpareLocked(s *site) bool {
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
func (s *site) here() int { return int(s.n[idle] + s.n[borrowed]) }

func (s *site) live() int { return s.here() + int(s.n[dialing]) }

// warming is the oldest Warm of s for which another dial may start.
func (s *site) warming() *warming {
	for _, w := range s.special.warm {
		if w.err == nil && s.live() < w.n {
			return w
		}
	}
	return nil
}
