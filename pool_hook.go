package connpool

import (
	"context"
	"log/slog"
	"runtime/debug"
	"time"
)

// runHook lends c to a hook that talks over it (Reset, Check, Push) and waits for the
// hook's answer, HookTimeout at most. The caller owns c before and after. After an error the
// caller must discard c, because the hook may still be running.
func (c *conn) runHook(ctx context.Context, where string, hook func(context.Context, Conn) error) (err error) {
	p := c.site.env.pool
	ctx, cancel := p.within(ctx, p.cfg.HookTimeout)
	defer cancel()
	defer recoverInto(&err, where) // a panic from the borrower's ctx
	loan := c.begin(ctx, flagHooked)
	answer := make(chan error, 1)
	go func() {
		var err error = &PanicError{Where: where} // stays if the hook calls runtime.Goexit
		defer func() { answer <- err }()
		defer recoverInto(&err, where)
		err = tame(returned(hook(ctx, loan)))
	}()
	late := false
	select {
	case err = <-answer:
	case <-ctx.Done():
		// The hook's I/O was interrupted, so the hook ends now or never.
		select {
		case err = <-answer:
		case <-time.After(hookGrace):
			late = true
			err = causeOf(ctx)
		}
	}
	word := c.end()
	switch {
	case late:
		p.report.noteAbandoned(where, c.site.addr)
	case err != nil:
	case word&(flagCut|inFlight) != 0:
		err = &brokenContract{"it left an operation running"}
	case word&(flagGone|flagBroken|flagTimedOut|flagHalfClosed) != 0:
		err = c.failureOf(word, "it closed the connection")
	default:
		var in holdings
		if in, err = c.heldSoon(); err == nil && c.leftoversBeside(word, in) {
			if err = in.clean("it"); err == nil {
				err = &brokenContract{"it left unread bytes behind"}
			}
		}
	}
	switch err.(type) {
	case nil, *hookPanic: // a hookPanic says already where it happened
		return err
	}
	return &hookError{where, tame(err)}
}

// hookError is what a hook returned, or the rule it broke.
type hookError struct {
	where string
	err   error
}

func (e *hookError) Error() string { return oneLine(e.where + ": " + e.err.Error()) }
func (e *hookError) Unwrap() error { return e.err }

// hookGrace is how long a hook, dialer or Setup may run on after the end of its ctx, before
// the pool abandons it.
const hookGrace = 100 * time.Millisecond

// within derives a ctx that ends after d (0: no time limit) and with the pool. The derived
// ctx has no session: hooks and dialers run on goroutines of their own while the borrower
// has the session connection and waits for them.
func (p *Pool) within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if p.inSession.Load() != 0 {
		ctx = context.WithValue(ctx, sessionKey{p}, nil)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(p.ctx, func() { cancel(ErrClosed) })
	if d <= 0 {
		return ctx, func() { stop(); cancel(nil) }
	}
	ctx, done := context.WithTimeout(ctx, d)
	return ctx, func() { stop(); done(); cancel(nil) }
}

// hookPanic says that the hook that has just run panicked itself. No other error may say so:
// the error that a hook returns may hold the PanicError of another pool, which is no panic
// of this hook. So the pool recognizes hookPanic by its type, never by errors.As.
type hookPanic struct{ pan *PanicError }

func (e *hookPanic) Error() string      { return e.pan.Error() }
func (e *hookPanic) Unwrap() error      { return e.pan }
func (e *hookPanic) As(target any) bool { return entomb(target) }

// returned is the error of foreign code that returned it. If the foreign code got the error
// from a pool, for example from CloseInfo.Err, a hookPanic in it is a panic of other code.
func returned(err error) error {
	if e, ok := err.(*hookPanic); ok {
		return e.pan
	}
	return err
}

// panicOf is the PanicError for foreign code that panicked with v, which was just recovered;
// or, if v is nil, that called runtime.Goexit.
func panicOf(where string, v any) *PanicError {
	e := &PanicError{Where: where}
	if v != nil {
		e.Value, e.Stack = v, debug.Stack()
	}
	if err, ok := v.(error); ok {
		e.cause = tame(err)
	}
	return e
}

// recoverInto turns a panic of foreign code into an error. It must be deferred.
func recoverInto(err *error, where string) {
	if v := recover(); v != nil {
		*err = &hookPanic{panicOf(where, v)}
	}
}

// recoverAt is recoverInto for code that updates *where as it goes on.
func recoverAt(err *error, where *string) {
	if v := recover(); v != nil {
		*err = &hookPanic{&PanicError{Where: *where, Value: v, Stack: debug.Stack()}}
	}
}

func isPanic(err error) bool {
	_, ok := err.(*hookPanic)
	return ok
}

// passOn panics again with the panic of a hook that ran for the caller.
func passOn(err error) {
	if e, ok := err.(*hookPanic); ok {
		panic(e.pan)
	}
}

// reportUseAfterReturn reports, in debug mode, the use of a handle whose loan has ended.
func (c *conn) reportUseAfterReturn(gen uint64) {
	env := c.site.env
	if !env.cfg.Debug {
		return
	}
	loan := "not known any more"
	c.dmu.Lock()
	if c.recentLoans != nil {
		for _, l := range *c.recentLoans {
			if l.gen == gen {
				loan = string(l.stack)
			}
		}
	}
	c.dmu.Unlock()
	env.report.log(slog.LevelError, "a Conn was used after it was given back", "addr", c.site.addr,
		"borrowed by", loan, "used by", string(debug.Stack()))
}

// recordBorrower records, in debug mode, who borrowed the connection, for the last eight
// loans.
func (c *conn) recordBorrower(gen uint64) {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.recentLoans == nil {
		c.recentLoans = new([]pastLoan)
	}
	if len(*c.recentLoans) == 8 {
		*c.recentLoans = append((*c.recentLoans)[:0], (*c.recentLoans)[1:]...)
	}
	*c.recentLoans = append(*c.recentLoans, pastLoan{gen, debug.Stack()})
}

type pastLoan struct {
	gen   uint64
	stack []byte
}

func (c *conn) logClosed(reason CloseReason, err error) {
	level := slog.LevelDebug
	switch reason {
	case ClosedDirty, ClosedInFlight, ClosedResetFailed, ClosedCheckFailed, ClosedPushFailed:
		level = slog.LevelWarn
	case ClosedQuarantined, ClosedLeaked:
		level = slog.LevelError
	case ClosedStale:
		level = slog.LevelInfo
	}
	c.site.env.report.log(level, "connection closed", "addr", c.site.addr, "id", c.id, "reason", reason.String(), "uses", c.uses, "err", err)
}
