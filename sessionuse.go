package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// What happens on a seat: a use, and the uses nested in it.

// use is the outermost use of a seat, which the caller has taken.
func (b *seats) use(ctx context.Context, st *seat, fn func(Conn) error) error {
	p := b.p
	risen := false
	defer func() {
		if risen {
			return
		}
		// st.c is there only if a Trace function ended this before c was taken.
		if left := b.rise(st, st.c); left != nil {
			go b.giveBackQuietly(left)
		}
	}()
	st.loan, st.spoiled, st.why = Conn{}, ClosedUnknown, nil
	t := p.trace(ctx)
	if t != nil && t.GetConn != nil {
		p.named("Trace.GetConn", func() { t.GetConn(st.addr) })
	}
	c, waited, owner := st.c, time.Duration(0), true
	st.c = nil
	if c == nil {
		var err error
		if c, waited, err = p.borrow(ctx, st.addr, t); err != nil {
			return err
		}
		defer p.rescue(c, &owner)
		c.observedBy(t)
		if p.holds != nil {
			p.hold(c, 3+st.marks)
		}
	} else {
		defer p.rescue(c, &owner)
		if err := p.refuse(c, &owner); err != nil {
			return err
		}
		c.observedBy(t)
		c.idleFor = p.clock.Exactly().Sub(st.usedAt)
	}
	c.uses++
	c.uncounted = true
	began := p.clock.Exactly()
	st.loan = c.begin(ctx, 0)
	if t != nil && t.GotConn != nil {
		info := GotInfo{Addr: st.addr, ID: c.id, Reused: c.uses > 1, Uses: c.uses, IdleFor: c.idleFor, Waited: waited}
		p.named("Trace.GotConn", func() { t.GotConn(info) })
	}
	err := fn(st.loan)
	if err == nil {
		c.content()
	}
	word := c.end()
	if word&gone != 0 {
		owner = false
		return unkeep(err)
	}
	reason, why := c.verdict(ctx, word, err)
	switch {
	case reason != ClosedUnknown:
	case st.spoiled != ClosedUnknown:
		reason, why = st.spoiled, st.why
	case c.leftovers(word):
		reason, why = ClosedDirty, c.held().clean("the borrower")
	}
	if reason != ClosedUnknown {
		owner = false
		p.discard(c, reason, why)
		return unkeep(err)
	}
	id := c.id
	p.mu.Lock()
	p.countLoanLocked(c)
	p.mu.Unlock()
	c.observedBy(b.trace)
	st.usedAt = p.clock.Exactly()
	owner, risen = false, true // from here on c is the next one's in line, or the session's
	left := b.rise(st, c)
	if left == nil || b.giveBackOne(left) {
		if t != nil && t.PutConn != nil {
			info := PutInfo{Addr: st.addr, ID: id, Held: p.clock.Exactly().Sub(began)}
			p.named("Trace.PutConn", func() { t.PutConn(info) })
		}
	}
	return unkeep(err)
}

// refuse says why a connection that a session kept cannot be used again, and
// closes it.
func (p *Pool) refuse(c *conn, owner *bool) error {
	addr := c.site.addr
	if p.ctx.Err() != nil {
		*owner = false
		p.discard(c, ClosedWithPool, nil)
		return p.failed(addr, StageWait, ErrClosed, 0)
	}
	reason, why := c.ask()
	if p.cfg.Push != nil {
		unread := p.pushes(reason)
		if reason == ClosedUnknown {
			if unread, why = c.unread(); why != nil {
				reason = ClosedDirty
			}
		}
		if unread {
			reason, why = p.pushAll(c) // a message that came between two uses
		}
	}
	if reason == ClosedUnknown {
		return nil
	}
	*owner = false
	p.discard(c, reason, why)
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
func (st *seat) again(ctx context.Context, fn func(Conn) error) error {
	c := st.loan.c
	if c == nil {
		return usage(st.addr, errors.New("the session's connection is not there yet: a Trace function cannot use it"))
	}
	before := c.word.Load()
	switch {
	case st.spoiled != ClosedUnknown:
		return c.site.pool.lost(st.addr, st.spoiled, st.why)
	case before&(gone|cut) == gone:
		return c.site.pool.lost(st.addr, ClosedByBorrower, net.ErrClosed)
	case before&(cut|stolen|broken) != 0:
		return c.site.pool.lost(st.addr, ClosedBroken, c.failure())
	}
	returned := false
	defer func() {
		if !returned {
			st.spoiled = ClosedPanic // or Goexit, which ends the outer use too
		}
	}()
	defer c.nest(ctx)()
	err := fn(st.loan)
	returned = true
	switch {
	case err == nil:
	case !isKept(err):
		st.spoiled, st.why = ClosedFnError, err
	case before&timedOut == 0:
		c.word.And(^uint64(timedOut))
	}
	return unkeep(err)
}

// nest puts the loan under ctx as well, until the function it returns is called.
func (c *conn) nest(ctx context.Context) (undo func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	l := c.remember()
	c.dmu.Lock()
	outer := l.ctx
	l.ctx = ctx
	if c.probe.foreign && l.over == nil {
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
