package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// What happens on a session connection: a use, and the uses nested in it.

// use runs fn on the session connection st, which the caller has acquired. It is With
// for a session, and differs in three points: the connection of an earlier use is lent
// again, after a probe, without a new borrow; after a use in good order the connection
// stays with the session; and Reset runs only at the end of the session. Nested uses run
// inside fn, see nested.
func (b *sessionConns) use(ctx context.Context, st *sessionConn, fn func(Conn) error) error {
	p := b.p
	released := false // endUse was called
	defer func() {
		if released {
			return
		}
		// st.c is set only if a Trace function ended this use before c was taken.
		if left := b.endUse(st, st.c); left != nil {
			go b.releaseQuietly(left)
		}
	}()
	st.loan, st.spoiled, st.why = Conn{}, ClosedUnknown, nil
	k := checkout{p: p, trace: p.trace(ctx)}
	defer k.rescue()
	k.get(&st.addr)
	if st.c == nil { // the first use of the address, or the last use lost its connection
		if err := k.borrow(ctx, &st.addr); err != nil {
			return err
		}
		if p.loanLog.wanted {
			k.record(3 + st.frames)
		}
	} else {
		k.c, k.owned, st.c = st.c, true, nil
		if err := k.checkKept(); err != nil {
			return err
		}
		k.c.idleFor = p.clock.Exactly().Sub(st.usedAt)
	}
	// Nested uses get st.loan from here on.
	c, began := k.c, p.clock.Exactly()
	st.loan = k.start(ctx)
	k.got()
	err := fn(st.loan)
	if err == nil {
		c.noteContent()
	}
	word, mine := k.end()
	if !mine {
		return unkeep(err)
	}
	// The pool closes the connection if this use failed, if a nested use failed, or if
	// bytes are left. The next use borrows another one.
	reason, why := c.verdict(ctx, word, err)
	if reason == ClosedUnknown {
		reason, why = st.spoiled, st.why
	}
	if reason == ClosedUnknown {
		reason, why = c.unclean(word)
	}
	if reason != ClosedUnknown {
		k.close(reason, why)
		return unkeep(err)
	}
	// The connection stays with the session. The loan is counted now, and the Trace of
	// this use gives way to that of the session.
	id := c.id
	p.mu.Lock()
	p.countLoanLocked(c)
	p.mu.Unlock()
	c.observedBy(b.trace)
	st.usedAt = p.clock.Exactly()
	k.owned, released = false, true // endUse gives c to the next use in the queue, or to the session
	left := b.endUse(st, c)
	if left == nil || b.releaseOne(left) { // left is c if the session has ended
		k.put(st.addr, id, began)
	}
	return unkeep(err)
}

// checkKept probes a connection that the session kept from an earlier use. If it is
// unfit, checkKept closes it and returns the error of the use, ErrSessionLost: a new
// connection could not go on with what was begun on this one. With Config.Push,
// messages that came between the two uses go to Push first.
func (k *checkout) checkKept() error {
	p, c, addr := k.p, k.c, k.c.site.addr
	if p.ctx.Err() != nil {
		k.close(ClosedWithPool, nil)
		return p.failed(addr, StageWait, ErrClosed, 0)
	}
	reason, why := c.probe()
	if p.cfg.Push != nil {
		unread := p.cfg.isForPush(reason)
		if reason == ClosedUnknown {
			if unread, why = c.unread(); why != nil {
				reason = ClosedDirty
			}
		}
		if unread {
			reason, why = c.pushAll() // a message that came between two uses
		}
	}
	if reason == ClosedUnknown {
		return nil
	}
	k.close(reason, why)
	if isPanic(why) {
		passOn(why)
	}
	return p.lost(addr, reason, why)
}

// lost returns the error of a use whose session has lost its connection.
func (p *Pool) lost(addr Addr, reason CloseReason, why error) *Error {
	e := p.failed(addr, StageSession, ErrSessionLost, 0)
	if why == nil {
		e.Err = fmt.Errorf("%w (%v)", ErrSessionLost, reason)
	} else {
		e.Err = fmt.Errorf("%w (%v): %w", ErrSessionLost, reason, why)
	}
	if e.Kind = KindOf(why); e.Kind == KindUnknown {
		e.Kind = KindBroken
	}
	return e
}

// nested runs fn inside the use under way, on the same goroutine and with the same
// loan. If fn fails without Keep, or panics, st.spoiled makes the outer use close the
// connection, and later nested uses fail with ErrSessionLost.
func (st *sessionConn) nested(ctx context.Context, fn func(Conn) error) error {
	c := st.loan.c
	if c == nil {
		return usage(st.addr, errors.New("the session's connection is not there yet: a Trace function cannot use it"))
	}
	before := c.word.Load()
	switch {
	case st.spoiled != ClosedUnknown:
		return c.site.env.pool.lost(st.addr, st.spoiled, st.why)
	case before&(flagGone|flagCut) == flagGone:
		return c.site.env.pool.lost(st.addr, ClosedByBorrower, net.ErrClosed)
	case before&(flagCut|flagStolen|flagBroken) != 0:
		return c.site.env.pool.lost(st.addr, ClosedBroken, c.failure())
	}
	returned := false
	defer func() {
		if !returned {
			st.spoiled = ClosedPanic // or Goexit, which ends the outer use too
		}
	}()
	defer c.underCtx(ctx)()
	err := fn(st.loan)
	returned = true
	// After a failure the connection may be in the middle of an exchange.
	switch {
	case err == nil:
	case !isKept(err) && !c.isHarmless(ctx, c.word.Load(), err):
		st.spoiled, st.why = ClosedFnError, err
	case before&flagTimedOut == 0: // fn kept the connection, so a time-out inside fn does not count
		c.word.And(^uint64(flagTimedOut))
	}
	return unkeep(err)
}
