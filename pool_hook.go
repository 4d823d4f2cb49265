package connpool

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// runHook lends c to a hook that talks over it (Reset, Check, Push) and waits for the
// hook's answer, HookTimeout at most. The caller owns c before and after. After an error the
// caller must discard c, because the hook may still be running. The hook's ctx has the values
// of ctx, and ends with ctx if follow is set.
func (c *conn) runHook(ctx context.Context, follow bool, where string, hook func(context.Context, Conn) error) (err error) {
	p := c.site.env.pool
	defer recoverInto(&err, where) // a panic from the borrower's ctx
	k, _ := p.hookCalls.Get().(*hookCall)
	if k == nil {
		k = &hookCall{answer: make(chan error, 1)}
		k.start = k.run
	}
	own := newHookCtx(p, ctx, follow)
	defer own.finish()
	k.where, k.hook, k.ctx, k.loan = where, hook, own, c.begin(own, flagHooked)
	go k.start()
	err, late := k.await(own)
	if !late {
		k.hook, k.ctx, k.loan = nil, nil, Conn{}
		p.hookCalls.Put(k)
	}
	word := c.end()
	switch {
	case late:
		p.report.noteAbandoned(where, c.site.addr)
	case err != nil:
	case own.ended():
		err = causeOf(own)
	case word&flagCut != 0, operating(word):
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

// hookCall is one run of a hook. Calls are used again, unless their hook was abandoned.
type hookCall struct {
	where  string
	hook   func(context.Context, Conn) error
	ctx    *hookCtx
	loan   Conn
	answer chan error
	start  func() // k.run, made once: a method value allocates
}

// run runs the hook, on a goroutine of its own.
func (k *hookCall) run() {
	var err error
	ended := false
	defer func() {
		if !ended && err == nil { // runtime.Goexit
			err = &PanicError{Where: k.where}
		}
		k.answer <- err
	}()
	defer recoverInto(&err, k.where)
	err = sanitizeError(returned(k.hook(k.ctx, k.loan)))
	ended = true
}

// await returns what the hook answered, or, with late set, why the hook is abandoned.
func (k *hookCall) await(ctx context.Context) (err error, late bool) {
	for range 4 { // many hooks end before it pays to ask for the end of ctx
		select {
		case err = <-k.answer:
			return err, false
		default:
			runtime.Gosched()
		}
	}
	over, err := endOf(ctx, k.where)
	if err == nil {
		select {
		case err = <-k.answer:
			return err, false
		case <-over:
			err = causeOf(ctx)
		}
	}
	// The hook's I/O was interrupted, so the hook ends now or never.
	select {
	case answer := <-k.answer:
		if isPanic(err) {
			return err, false
		}
		return answer, false
	case <-time.After(hookGrace):
		return err, true
	}
}

// endOf returns the channel that says when ctx is done. A panic of the borrower's ctx is the
// error.
func endOf(ctx context.Context, where string) (over <-chan struct{}, err error) {
	defer recoverInto(&err, where)
	return ctx.Done(), nil
}

// hookCtx is the ctx of a hook's run: what within would return, made only when something asks
// for more than its deadline and its values. Most hooks do not, and within costs more than
// they do.
type hookCtx struct {
	p        *Pool
	borrower context.Context
	follow   bool // the end of borrower counts
	deadline time.Time

	mu   sync.Mutex // guards the fields below; methods of borrower, which are foreign code, run under it, so only the methods of this ctx and the end of its run take it
	full context.Context
	end  context.CancelFunc // of full
	over bool               // the run has ended
}

func newHookCtx(p *Pool, borrower context.Context, follow bool) *hookCtx {
	x := &hookCtx{p: p, borrower: borrower, follow: follow}
	if p.cfg.HookTimeout > 0 {
		x.deadline = time.Now().Add(p.cfg.HookTimeout)
	}
	return x
}

// whole returns the complete ctx.
func (x *hookCtx) whole() context.Context {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.full == nil {
		x.full, x.end = x.p.within(x.borrower, x.follow, x.deadline)
		if x.over {
			x.end()
		}
	}
	return x.full
}

// made returns the complete ctx if there is one already.
func (x *hookCtx) made() context.Context {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.full
}

// ended reports whether the ctx was done before its run ended, if anything asked for its end.
func (x *hookCtx) ended() bool {
	full := x.made()
	return full != nil && full.Err() != nil
}

// finish ends the ctx.
func (x *hookCtx) finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = true
	if x.end != nil {
		x.end()
	}
}

// String is for who prints a ctx, which would read the fields.
func (x *hookCtx) String() string { return "connpool: the ctx of a hook" }

func (x *hookCtx) Deadline() (time.Time, bool) {
	t := x.deadline
	if x.follow {
		if d, ok := x.borrower.Deadline(); ok && (t.IsZero() || d.Before(t)) {
			t = d
		}
	}
	return t, !t.IsZero()
}

func (x *hookCtx) Done() <-chan struct{} { return x.whole().Done() }

func (x *hookCtx) Err() error { return x.whole().Err() }

func (x *hookCtx) AfterFunc(f func()) (stop func() bool) { return context.AfterFunc(x.whole(), f) }

func (x *hookCtx) Value(key any) any {
	if full := x.made(); full != nil {
		return full.Value(key)
	}
	if key == (sessionKey{x.p}) {
		return nil
	}
	return x.borrower.Value(key)
}

// within derives a ctx that has the values of ctx, and ends at t (zero: no time limit), with
// the pool and, if follow is set, with ctx. The derived ctx has no session: hooks and dialers
// run on goroutines of their own while the borrower has the session connection and waits for
// them.
func (p *Pool) within(ctx context.Context, follow bool, t time.Time) (context.Context, context.CancelFunc) {
	until := context.WithCancel
	if !t.IsZero() {
		until = func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithDeadline(ctx, t) }
	}
	if !follow {
		return until(&poolCtx{p.ctx, p, context.WithoutCancel(ctx)})
	}
	both, end := context.WithCancelCause(&poolCtx{ctx, p, nil})
	stop := context.AfterFunc(p.ctx, func() { end(ErrClosed) })
	both, cancel := until(both)
	return both, func() { stop(); cancel(); end(nil) }
}

// poolCtx is a ctx without the session of a borrower, and with the values of another ctx if
// that is not nil.
type poolCtx struct {
	context.Context
	p      *Pool
	values context.Context
}

func (x *poolCtx) Value(key any) any {
	if key == (sessionKey{x.p}) {
		return nil
	}
	if x.values != nil {
		if v := x.values.Value(key); v != nil {
			return v
		}
	}
	return x.Context.Value(key) // package context asks in this way whose end is this one's
}

// sessionKey is the key of a session in a ctx. Each pool has a key of its own.
type sessionKey struct{ p *Pool }
