package connpool

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// When a dial has worked. A peer that accepts a connection may still not serve it: a
// server that is shutting down, a proxy without a back end, and a TLS 1.3 server that
// refuses the client's certificate all accept first and then hang up. So a dial has
// worked only when its connection has lived:
//
//	dialled -> lived     a borrower has written to the peer and read from it; or
//	                     the first loan ended in good order; or the connection
//	                     was idle, and fit to be lent, for a sweep's period
//	dialled -> hollow    it was lost before that, while it was young (see youth),
//	                     by an act of the peer
//	dialled -> neither   everything else: the borrower's error, panic or ctx, a
//	                     limit, Retire, the end of the pool
//
// A hollow connection counts as a failure of its address, like a dial that failed
// (backoff, books_backoff.go). books_minidle.go says what a hollow connection means for
// a reserve, pool_warm.go what it means for Warm.

// youth is how long after its dial the loss of a connection counts against its address.
// Servers commonly hang up on connections that nobody has used for longer.
const youth = 2 * time.Second

// noteLived records that c has lived, in a loan or while it was idle.
func (c *conn) noteLived(inLoan bool) {
	p := c.site.env.pool
	var todo agenda
	p.mu.Lock()
	// An operation may end after its connection has left the pool.
	if c.phase != phaseNone && p.noteLivedLocked(c, inLoan) {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
}

// noteStood is called when a sweep has found c fit. It records that c has lived, if c
// has been open for a sweep's period.
func (c *conn) noteStood(now clock.Instant) {
	if c.word.Load()&flagsLived != flagsLived && now.Sub(c.born) >= c.site.env.pool.sweepPeriod() {
		c.noteLived(false)
	}
}

// noteLoss is called when c leaves the pool, and records c as hollow if it was. Only
// the owner of c calls it.
func (c *conn) noteLoss(reason CloseReason, err error) {
	if c.word.Load()&flagsLived == flagsLived {
		return
	}
	if why := c.hollowness(reason, err); why != nil {
		c.noteHollow(why)
	}
}

// noteHollow records that c was hollow. It reports whether the borrower that met c must
// get the error instead of another connection: if the address is in back-off, or if
// other borrowers wait for the address or dials are in flight, since each of these
// would go on to the next connection, too.
func (c *conn) noteHollow(why error) bool {
	p := c.site.env.pool
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

// hollowness returns why the end of c counts against its address, nil if it does not.
func (c *conn) hollowness(reason CloseReason, err error) error {
	p, word := c.site.env.pool, c.word.Load()
	if c.site.unpooled() || reason.innocent() || c.idleFor+p.clock.Exactly().Sub(c.since) >= youth {
		return nil
	}
	if c.uses == 0 {
		switch reason {
		case ClosedDirty, ClosedLifetime:
			// Most peers that speak first are healthy, and if Setup takes longer than
			// MaxLifetime, the peer is not at fault.
			return nil
		}
		return lostBeforeUse(reason, err)
	}
	// The first loan has ended. Its borrower may be at fault, unless the peer was seen
	// to hang up before it had sent anything.
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

// lostBeforeUse returns the error for a connection that was lost before its first loan.
func lostBeforeUse(reason CloseReason, err error) error {
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
