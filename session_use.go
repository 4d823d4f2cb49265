package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// What happens on a seat: a use, and the uses nested in it.

// use is the outermost use of a seat, which the caller has taken.
func (b *sessionConns) use(ctx context.Context, st *sessionConn, fn func(Conn) error) error {
	p := b.p
	risen := false
	defer func() {
		if risen {
			return
		}
		// st.c is there only if a Trace function ended this before c was taken.
		if left := b.endUse(st, st.c); left != nil {
			go b.releaseQuietly(left)
		}
	}()
	st.loan, st.spoiled, st.why = Conn{}, ClosedUnknown, nil
	k := checkout{p: p, trace: p.cfg.trace(ctx)}
	defer k.rescue()
	k.get(&st.addr)
	if st.c == nil {
		if err := k.borrow(ctx, &st.addr); err != nil {
			return err
		}
		if p.loanLog.wanted {
			k.record(3 + st.marks)
		}
	} else {
		k.c, k.owned, st.c = st.c, true, nil
		if err := k.checkKept(); err != nil {
			return err
		}
		k.c.idleFor = p.clock.Exactly().Sub(st.usedAt)
	}
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
	id := c.id
	p.mu.Lock()
	p.countLoanLocked(c)
	p.mu.Unlock()
	c.observedBy(b.trace)
	st.usedAt = p.clock.Exactly()
	k.owned, risen = false, true // from here on c is the next one's in line, or the session's
	left := b.endUse(st, c)
	if left == nil || b.releaseOne(left) {
		k.put(st.addr, id, began)
	}
	return unkeep(err)
}

// refuse says why a connection that a session kept cannot be used again, and
// closes it.
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

// lost is the error of a use whose session has no connection to go on with.
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

// again is a use nested in the one under way: it has the same loan.
func (st *sessionConn) nested(ctx context.Context, fn func(Conn) error) error {
	c := st.loan.c
	if c == nil {
		return usage(st.addr, errors.New("the session's connection is not there yet: a Trace function cannot use it"))
	}
	before := c.word.Load()
	switch {
	case st.spoiled != ClosedUnknown:
		return c.site.pool.lost(st.addr, st.spoiled, st.why)
	case before&(flagGone|flagCut) == flagGone:
		return c.site.pool.lost(st.addr, ClosedByBorrower, net.ErrClosed)
	case before&(flagCut|flagStolen|flagBroken) != 0:
		return c.site.pool.lost(st.addr, ClosedBroken, c.failure())
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
	switch {
	case err == nil:
	case !isKept(err):
		st.spoiled, st.why = ClosedFnError, err
	case before&flagTimedOut == 0:
		c.word.And(^uint64(flagTimedOut))
	}
	return unkeep(err)
}

// nest puts the loan under ctx as well, until the function it returns is called.
func (c *conn) underCtx(ctx context.Context) (undo func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	l := c.loanState()
	c.dmu.Lock()
	outer := l.ctx
	l.ctx = ctx
	if c.sock.foreign && l.over == nil {
		l.over = make(chan struct{})
	}
	c.dmu.Unlock()
	stop := context.AfterFunc(ctx, l.interrupt)
	return func() {
		if !stop() {
			// It runs now, or has not begun yet, and must not meet another loan.
			// What was detached has no other, and its deadlines are the caller's.
			c.cutShort()
		}
		c.dmu.Lock()
		l.ctx = outer
		c.dmu.Unlock()
	}
}
