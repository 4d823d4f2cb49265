package connpool

import (
	"context"
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
		err = sanitizeError(returned(hook(ctx, loan)))
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
	return &hookError{where, sanitizeError(err)}
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

// sessionKey is the key of a session in a ctx. Each pool has a key of its own.
type sessionKey struct{ p *Pool }
