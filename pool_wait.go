package connpool

import (
	"context"
	"fmt"
	"reflect"
	"runtime"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// The part of a borrower's wait that blocks. The queue itself is in books_queue.go.

// announce runs the agenda of a borrower that was queued, and calls Trace.Wait. If foreign
// code ends the borrower's goroutine there, the borrower leaves the queue.
func (w *waiter) announce(t *Trace, todo *agenda) {
	p := w.site.env.pool
	told := false
	defer func() {
		if !told { // a Trace function called runtime.Goexit
			w.leaveQueue()
		}
	}()
	todo.run(p)
	if t != nil && t.Wait != nil {
		p.report.observe("Trace.Wait", func() { t.Wait(WaitInfo{Addr: w.site.addr, Waiting: w.met}) })
	}
	told = true
}

// waitTimeout is the error of a borrower whose wait lasted for Config.WaitTimeout. It is
// context.DeadlineExceeded.
type waitTimeout time.Duration

func (d waitTimeout) Error() string {
	return fmt.Sprintf("no connection within Config.WaitTimeout, %v", time.Duration(d))
}
func (waitTimeout) Timeout() bool   { return true }
func (waitTimeout) Temporary() bool { return true }
func (waitTimeout) Unwrap() error   { return context.DeadlineExceeded }

// waitEnds returns a channel that signals the end of Config.WaitTimeout for a wait that
// began at start, and what releases its timer. Without a WaitTimeout the channel is nil.
func (e *env) waitEnds(start clock.Instant) (over <-chan time.Time, stop func() bool) {
	d := e.cfg.WaitTimeout
	if d == 0 {
		return nil, func() bool { return false }
	}
	t := time.NewTimer(d - e.clock.Exactly().Sub(start))
	return t.C, t.Stop
}

// await blocks until w is served, ctx is done, or the wait that began at start has lasted
// for Config.WaitTimeout. On return w is in no queue; exactly one of the
// connection and the error is set, and with a connection the caller owns the connection.
func (w *waiter) await(ctx context.Context, start clock.Instant) (*conn, error) {
	late, stop := w.site.env.waitEnds(start)
	defer stop()
	served, over := false, false
	defer func() {
		switch {
		case over:
		case !served: // a ctx of the borrower's making panicked
			w.leaveQueue()
		case w.err == nil:
			w.noteDeclined()
		}
	}()
	select {
	case <-w.ready:
		served = true
		canceled := ctx.Err() != nil
		over = true
		if canceled && w.err == nil {
			w.noteDeclined()
			return nil, causeOf(ctx)
		}
		return w.c, w.err
	case <-ctx.Done():
		over = true
		if err := w.leaveQueue(); err != nil {
			return nil, err
		}
		return nil, w.gaveUp(causeOf(ctx))
	case <-late:
		over = true
		if err := w.leaveQueue(); err != nil {
			return nil, err
		}
		return nil, w.gaveUp(waitTimeout(w.site.env.cfg.WaitTimeout))
	}
}

// stageAndCause splits the error of a wait: a failed dial has its own stage.
func stageAndCause(err error) (Stage, error) {
	if de, ok := err.(*dialError); ok {
		return de.stage, de.err
	}
	return StageWait, err
}

// leaveQueue takes w out of the queue. If w was served a connection meanwhile, leaveQueue gives
// the connection back and returns nil; if w was served an error, leaveQueue returns the error.
func (w *waiter) leaveQueue() error {
	s, p := w.site, w.site.env.pool
	var todo agenda
	p.mu.Lock()
	if w.queued {
		w.why = p.whyLocked(s, w)
		s.queue.remove(w)
		p.noteWaitedLocked(w, true)
		p.refreshLocked(s)
		p.admitLocked(&todo)
		p.dropIfEmptyLocked(s)
		p.mu.Unlock()
		todo.run(p)
		return nil
	}
	p.mu.Unlock()
	<-w.ready // w was served before leaveQueue got the lock
	if w.err == nil {
		w.noteDeclined()
	}
	return w.err
}

// noteDeclined gives back the connection with which a waiter was served that had given up.
func (w *waiter) noteDeclined() {
	p := w.c.site.env.pool
	p.mu.Lock()
	p.counts.WaitsFailed++
	p.mu.Unlock()
	w.c.releaseFrom(fromCheck)
}

// gaveUp completes w.why and returns the error of the wait. mu is not held.
func (w *waiter) gaveUp(ctx error) error {
	env := w.site.env
	e := w.why
	if e == nil { // the waiter was served at the last moment
		return ctx
	}
	e.ctx = ctx
	if e.held == 0 && !e.here {
		return e
	}
	if h, ok := env.loanLog.longest(func(a Addr) bool { return e.counts(a, w.site.addr) }); ok {
		e.holder = h.stack()
		e.held = max(e.held, env.clock.Exactly().Sub(h.since))
	}
	e.nested = e.here && insideWith()
	return e
}

// insideWith reports whether the calling goroutine, which is in a With, is also inside
// the fn of another With. Only the goroutine's stack can tell. It is read only after a
// wait has failed.
func insideWith() bool {
	var pcs [128]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for n := 0; ; {
		f, more := frames.Next()
		if f.Function == nameOfWith {
			if n++; n == 2 {
				return true
			}
		}
		if !more {
			return false
		}
	}
}

var nameOfWith = reflect.TypeFor[Pool]().PkgPath() + ".(*Pool).With"
