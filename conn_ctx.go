package connpool

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// How the ctx of a loan governs the I/O of the loan. A watch on a ctx (context.AfterFunc) and
// a deadline on a socket together cost twice as much as all the rest of a loan, and most loans
// end before either would matter. So a loan under a ctx begins without both (beginUnder). It
// puts its connection on the list env.young, and a timer goes through the list once a tick: a
// loan that is still out gets its watch and its deadline then (watchCtx). Until then an
// operation goes on although the ctx is done: for a tick at most, and the time that the timer
// waits for a processor. The verdict at the end of the loan asks the ctx itself, so a
// connection whose ctx was done is closed in any case.
//
// A deadline that is nearer than the next tick is set when the loan begins. A deadline of fn's
// own comes after that of the ctx, which it must not exceed (limitLoan).
//
// Two flags of the state word order the begin of the watch against the end of the loan.
// Whoever clears flagUnwatched of a loan that is under way (flagLent) sets the watch from then
// on, and closes loanState.watching when the watch is set. An end that finds flagUnwatched set knows that nobody can begin the watch any more;
// an end that finds it cleared waits until the watch is set, and stops it.
//
// flagListed is set while the connection is on the list. A loan that finds the flag set is seen
// by the next tick: the tick clears the flag before it looks at the loan.

// atTick begins the watch for the loan under way, if there is one that needs it. The watch has
// a goroutine of its own, because a ctx may be foreign code, which may block.
func (c *conn) atTick() {
	if c.word.And(^uint64(flagListed))&(flagLent|flagUnwatched|flagGone) == flagLent|flagUnwatched {
		go c.watchCtx()
	}
}

// beginUnder prepares a loan under ctx, and returns the flags with which the loan begins. Only
// the owner calls it.
func (c *conn) beginUnder(ctx context.Context) (flags uint64) {
	c.setCtx(ctx)
	if c.sock.foreign && ctx.Done() != nil && !c.isResident() {
		l := c.loanState()
		l.over, l.left = make(chan struct{}), false
	}
	if t, ok := ctx.Deadline(); ok && c.site.env.clock.Until(t) < 2*clock.Tick { // the clock is up to a tick late
		c.limitLoan()
	}
	return flagUnwatched | flagListed
}

// limitLoan sets the deadline of the loan's ctx on the socket, if that has not been done, and if
// the deadlines of the connection are not those of its client. A connection that refuses the
// deadline is lent all the same, and the pool closes it when the ctx is done.
func (c *conn) limitLoan() {
	if c.isResident() {
		return
	}
	c.dmu.Lock()
	ctx, l := c.ctx, c.loan.Load()
	known := ctx == nil || l != nil && l.limited
	c.dmu.Unlock()
	if known {
		return
	}
	t, ok := ctx.Deadline()
	if !ok {
		t = time.Time{}
	}
	l = c.loanState()
	if ok && c.sock.foreign {
		c.tellDeadline(l, true, func() error {
			c.dmu.Lock()
			known := l.limited
			l.limit = t
			c.dmu.Unlock()
			if known || c.word.Load()&flagDetached != 0 {
				return nil
			}
			err := c.nc.SetDeadline(t)
			c.dmu.Lock()
			l.limited = true
			c.dmu.Unlock()
			return err
		})
		return
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l.limited {
		return
	}
	l.limit, l.limited = t, true
	if ok && c.word.Load()&(flagCut|flagDetached|flagResident) == 0 {
		c.deadlineSet = true
		c.nc.SetDeadline(t)
	}
}

// setDeadline sets a deadline for fn, at most the deadline of the loan's ctx.
func (c *conn) setDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if c.isResident() { // the caller is the client
		return set(c.nc, t)
	}
	c.limitLoan()
	if c.sock.foreign {
		return c.setForeignDeadline(t, set)
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	switch w := c.word.Load(); {
	case w&flagResident != 0: // meanwhile: Setup has returned
		return set(c.nc, t)
	case w&flagCut != 0:
		return nil // interrupted: the deadline in the past stays
	}
	c.deadlineSet = true
	return set(c.nc, c.limited(t))
}

// limited returns t, or the deadline of the loan's ctx if that is earlier. The caller
// holds dmu.
func (c *conn) limited(t time.Time) time.Time {
	if l := c.loan.Load(); l != nil && !l.limit.IsZero() && (t.IsZero() || t.After(l.limit)) {
		return l.limit
	}
	return t
}

// watchCtx begins the watch on the ctx of the loan under way, if there is one whose ctx nobody
// watches. It runs on a goroutine of its own.
func (c *conn) watchCtx() {
	c.dmu.Lock()
	for {
		w := c.word.Load()
		if w&(flagLent|flagUnwatched|flagGone) != flagLent|flagUnwatched {
			c.dmu.Unlock()
			return
		}
		if c.word.CompareAndSwap(w, w&^flagUnwatched) {
			break
		}
	}
	l, ctx := c.loanState(), c.ctx // the end of the loan waits for watching
	watching := make(chan struct{})
	l.watching = watching
	c.dmu.Unlock()
	defer close(watching)
	defer func() {
		if v := recover(); v != nil { // from a ctx of the caller's making
			c.site.env.report.log(slog.LevelError, "the ctx of a loan panicked, and does not end the loan's I/O", "addr", c.site.addr, "panic", v)
		}
	}()
	c.limitLoan()
	if ctx.Done() == nil {
		return
	}
	unwatch := context.AfterFunc(ctx, l.interrupt)
	c.dmu.Lock()
	l.unwatch = unwatch
	c.dmu.Unlock()
}

// interrupt makes blocked operations of the loan return. It runs when the loan's ctx is
// done. If the loan has ended in the meantime, stopping the watch has failed, and the
// owner discards the connection.
func (c *conn) interrupt(l *loanState) {
	defer func() {
		if v := recover(); v != nil { // from a ctx of the caller's making
			c.site.env.report.log(slog.LevelError, "interrupting a loan panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	switch {
	case !c.cutShort():
		return
	case c.isResident():
		c.revoke()
		return
	case c.sock.foreign:
		c.interruptForeign(l)
		return
	}
	c.dmu.Lock()
	c.deadlineSet = true
	err := c.nc.SetDeadline(aLongTimeAgo)
	c.dmu.Unlock()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		c.revoke()
	}
}

// cutShort sets flagCut: the loan's ctx was done. It reports false if the connection
// was detached (also by a use nested in this one, see underCtx): the pool must not
// interrupt a detached connection.
func (c *conn) cutShort() bool {
	for {
		w := c.word.Load()
		if w&flagDetached != 0 {
			return false
		}
		if c.word.CompareAndSwap(w, w|flagCut) {
			return true
		}
	}
}

// leaveCtx takes a loan from under its ctx. The loan has ended with the state word word. It
// reports false if the interrupt has begun already. Only the owner calls it, and only if the
// loan has a ctx.
func (c *conn) leaveCtx(word uint64) bool {
	if word&flagUnwatched == 0 {
		return c.unwatchCtx()
	}
	switch {
	case word&flagResident != 0:
		c.dmu.Lock()
		defer c.dmu.Unlock()
		c.forgetCtx()
	case word&inFlight == 0: // else operations may still ask for the ctx, and the owner discards the connection
		c.forgetCtx()
	}
	return true
}

// setCtx sets the ctx of the loan that begins. An operation that a client began in Setup may look
// at the ctx at any moment.
func (c *conn) setCtx(ctx context.Context) {
	if c.isResident() {
		c.dmu.Lock()
		defer c.dmu.Unlock()
	}
	c.ctx = ctx
}

// forgetCtx makes the ctx of a loan without a watch govern nothing any more. The caller holds dmu,
// or no operation is running.
func (c *conn) forgetCtx() {
	c.ctx = nil
	if l := c.loan.Load(); l != nil {
		l.limit = time.Time{}
	}
}

// quitCtx is leaveCtx for a loan whose connection was closed or detached, which left the state
// word word behind. The guard of a detached connection may be at work already.
func (c *conn) quitCtx(word uint64) bool {
	c.dmu.Lock()
	under := c.ctx != nil
	if word&flagUnwatched != 0 {
		c.forgetCtx()
	}
	c.dmu.Unlock()
	return !under || word&flagUnwatched != 0 || c.unwatchCtx()
}

// unwatchCtx stops the watch on the loan's ctx, once that watch is set. It reports false if the
// interrupt has begun already. Only the owner calls it.
func (c *conn) unwatchCtx() bool {
	c.dmu.Lock()
	l := c.loan.Load()
	var watching chan struct{}
	if l != nil {
		watching = l.watching
	}
	c.dmu.Unlock()
	if watching == nil { // stopped before, or a panic of the ctx kept the loan from beginning
		return true
	}
	<-watching
	if l.unwatch != nil && !l.unwatch() {
		return false
	}
	c.dmu.Lock() // the guard of a detached connection may be setting deadlines already
	c.ctx, l.watching, l.unwatch, l.limit = nil, nil, nil, time.Time{}
	c.dmu.Unlock()
	return true
}

// underway returns the ctx of the loan, or of the innermost use in it, and the deadline of the
// loan's ctx, if that was set on the socket. nil: the loan can never be interrupted.
func (c *conn) underway() (ctx context.Context, limit time.Time) {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	ctx = c.ctx
	if l := c.loan.Load(); l != nil {
		limit = l.limit
		if l.nested != nil {
			ctx = l.nested
		}
	}
	return ctx, limit
}

// overBecause returns why the loan of generation gen is over: the cause of its ctx, or of a use
// in it, whichever is done. nil: none is, or there is no such loan.
func (c *conn) overBecause(gen uint64) error {
	if c.enter(gen) != nil {
		return nil
	}
	defer c.leave(0, nil)
	c.dmu.Lock()
	ctxs := [2]context.Context{c.ctx}
	if l := c.loan.Load(); l != nil {
		ctxs[1] = l.nested
	}
	c.dmu.Unlock()
	for _, ctx := range ctxs {
		if ctx != nil && ctx.Err() != nil {
			return causeOf(ctx)
		}
	}
	return nil
}

// interruption returns why the loan was interrupted: the cause of its ctx. If the ctx
// of a nested use was done, that ctx is no longer known, and the error is
// context.Canceled.
func (c *conn) interruption() error {
	if ctx, _ := c.underway(); ctx != nil && ctx.Err() != nil {
		return causeOf(ctx)
	}
	return context.Canceled
}

// underCtx puts the loan under ctx as well, the ctx of a nested use, until undo is
// called. If ctx was done by then, the loan is cut short, and the outer use cannot keep
// the connection.
func (c *conn) underCtx(ctx context.Context) (undo func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	l := c.loanState()
	c.dmu.Lock()
	outer := l.nested
	l.nested = ctx
	if c.sock.foreign && l.over == nil {
		l.over = make(chan struct{})
	}
	c.dmu.Unlock()
	stop := context.AfterFunc(ctx, l.interrupt)
	return func() {
		if !stop() {
			// The interrupt runs now, or has not begun yet, and must not hit a later
			// loan: flagCut makes the owner close the connection. A connection that was
			// detached has no later loan, and its deadlines are set by its new owner.
			c.cutShort()
		}
		c.dmu.Lock()
		l.nested = outer
		c.dmu.Unlock()
	}
}
