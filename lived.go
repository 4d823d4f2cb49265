package connpool

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// When a dial has worked. That a peer accepts a connection does not say that it
// serves it: a server that is shutting down, a proxy without a back end, and a
// TLS 1.3 server that refuses the client's certificate all accept first and hang
// up then. So a dial has worked when its connection has lived:
//
//	dialled -> lived     a borrower has written to the peer and read from it; or
//	                     the first loan ended in good order; or it stood idle,
//	                     and fit to be lent, for a sweep's period
//	dialled -> hollow    it was lost before that, while it was young, by the
//	                     peer's doing
//	dialled -> neither   everything else: the borrower's error, panic or ctx, a
//	                     limit, Retire, the end of the pool
//
// A hollow connection is a failure of the address, like a dial that failed
// (trouble, books_backoff.go). What the reserves make of it is in books_minidle.go, what Warm
// does in pool_warm.go.
//
// The flags told and heard of the state word say how far a connection has come.
// They last from the dial to the close; both of them mean that it has lived, or
// that its end is booked.
const flagsLived = flagWrote | flagRead

// youth is for how long after its dial the loss of a connection speaks against
// its address. A peer that hangs up on what nobody has used for longer does what
// servers do.
const youth = 2 * time.Second

// maxHollow is how many connections one borrow may find hollow.
const maxHollow = 3

// moves books that a loan has moved bytes in one direction.
func (c *conn) noteTraffic(way uint64) {
	if w := c.word.Load(); w&way != 0 || w&(flagHooked|flagDetached) != 0 {
		return // Setup and the other hooks are part of what makes a connection fit
	}
	if (c.word.Or(way)|way)&flagsLived == flagsLived {
		c.noteLived(true)
	}
}

// lives books that c has lived: in a loan, or idle.
func (c *conn) noteLived(inLoan bool) {
	p := c.site.pool
	var todo agenda
	p.mu.Lock()
	// An operation may outlive its connection's time in the pool.
	if c.phase != phaseNone && p.noteLivedLocked(c, inLoan) {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
}

// stood books that c was found fit in a sweep, if it has stood for long enough.
func (c *conn) noteStood(now clock.Instant) {
	if c.word.Load()&flagsLived != flagsLived && now.Sub(c.born) >= c.site.pool.sweepPeriod() {
		c.noteLived(false)
	}
}

// judge is told that c leaves the pool. Only its owner calls it.
func (c *conn) noteLoss(reason CloseReason, err error) {
	if c.word.Load()&flagsLived == flagsLived {
		return
	}
	if why := c.hollowness(reason, err); why != nil {
		c.noteHollow(why)
	}
}

// hollow books that c was, and reports whether its borrower has to be told: if
// the address is backing off, and if others wait for it or dial, each of whom
// would go on to the next one as well.
func (c *conn) noteHollow(why error) bool {
	p := c.site.pool
	now := p.clock.Exactly()
	var todo agenda
	p.mu.Lock()
	s := c.site
	if w := c.word.Or(flagsLived); w&flagsLived != flagsLived && !p.closed {
		p.noteFailureLocked(s, why, now, c.id, true)
		p.pauseLocked(s, &todo)
		p.refreshLocked(s)
	}
	told := s.backingOff() || s.queue.len+int(s.n[phaseDialing]) > 0
	p.mu.Unlock()
	todo.run(p)
	return told
}

// hollowness is why the end of c speaks against its address, nil if it does not.
func (c *conn) hollowness(reason CloseReason, err error) error {
	p, word := c.site.pool, c.word.Load()
	if c.site.unpooled() || reason.innocent() || c.idleFor+p.clock.Exactly().Sub(c.since) >= youth {
		return nil
	}
	if c.uses == 0 {
		switch reason {
		case ClosedDirty, ClosedLifetime:
			// Most peers that speak first are well, and a Setup that takes
			// longer than MaxLifetime is no fault of theirs.
			return nil
		}
		return unborn(reason, err)
	}
	// The first loan has ended. Its borrower may be at fault, unless the peer
	// was seen to go away before it had said anything.
	if reason != ClosedStale {
		if err = c.failure(); word&flagBroken == 0 || err == nil {
			return nil
		}
	}
	if word&(flagRead|flagHalfClosed|flagCut|flagTimedOut) != 0 || c.hasForeignError() {
		return nil
	}
	switch KindOf(err) {
	case KindEOF, KindBroken, KindBadMessage:
		return err
	}
	return nil
}

// unborn is the error for a connection that was lost before its first loan.
func unborn(reason CloseReason, err error) error {
	switch {
	case err == nil:
		return fmt.Errorf("a new connection was lost before its first loan: %v", reason)
	case reason == ClosedStale:
		return fmt.Errorf("the peer accepted the connection and hung up before its first loan: %w", err)
	case errors.Is(err, ErrUnread):
		return fmt.Errorf("the peer accepted the connection, sent something unasked and hung up: %w", io.EOF)
	}
	return fmt.Errorf("a new connection was lost before its first loan: %v: %w", reason, err)
}

// innocent reports whether a close for this reason is the pool's or its user's
// doing, and says nothing about the peer. It is a list of all that are, so that a
// reason nobody thought of counts.
func (r CloseReason) innocent() bool {
	switch r {
	case ClosedUnknown, ClosedEvicted, ClosedOnRequest, ClosedLowHandles, ClosedRetired, ClosedWithPool,
		ClosedSurplus, ClosedIdleTimeout, ClosedMaxUses, ClosedMarkedDead, ClosedQuarantined, ClosedCanceled,
		ClosedPanic, ClosedGoexit, ClosedLeaked,
		ClosedSetupFailed: // is booked as the dial's failure
		return true
	}
	return false
}

// blame is told how an operation with two ends ended: of its error nobody knows
// whose it is, so it speaks against no peer.
func (c *conn) noteForeignError(err error) {
	if err == nil {
		return
	}
	l := c.loanState()
	c.dmu.Lock()
	l.foreignErr = true
	c.dmu.Unlock()
}

func (c *conn) hasForeignError() bool {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	l := c.loan.Load()
	return l != nil && l.foreignErr
}

// content is told that fn is content with a loan: an end of stream that it has
// met was no surprise to it.
func (c *conn) noteContent() {
	if w := c.word.Load(); w&flagBroken != 0 && w&flagsLived != flagsLived {
		c.word.Or(flagHalfClosed)
	}
}
