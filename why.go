package connpool

import (
	"container/list"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"time"
)

// Why a wait was in vain. The ctx's own error says only that time ran out; what
// somebody who reads it wants to know is what the time was spent on: the server
// refuses connections, a dial is stuck in its handshake, somebody holds all the
// slots. It is written down when a waiter gives up, and put into words when
// somebody asks for the text.

// inVain is the error of a wait that ended with its ctx. errors.Is finds the ctx's
// error in it, and that of the address's last dial, if that failed.
type inVain struct {
	ctx error

	last     error // of the dial before, if it failed
	failures int   // in a row
	pause    bool  // the next dial is not due yet

	stage Stage // of the oldest dial under way, 0: there is none
	since time.Duration

	full   string        // the limit that was in the way
	held   time.Duration // how long the one of its slots has been out that has been longest; 0: not known
	holder *loanRecord   // which is that one; nil: not known
	here   bool          // one of its slots is of the same address
	nested bool          // ... and the goroutine is inside the fn of another With
}

func (e *inVain) Error() string {
	var b strings.Builder
	b.WriteString(e.ctx.Error())
	if e.stage != 0 {
		fmt.Fprintf(&b, "; a dial has been under way for %v (%v)", e.since.Round(time.Microsecond), e.stage)
	}
	switch {
	case e.last == nil:
	case e.pause:
		fmt.Fprintf(&b, "; the next dial is not due after %s, the last one: %s", times(e.failures, "failure"), textOf(e.last))
	default:
		fmt.Fprintf(&b, "; the dial before failed: %s", textOf(e.last))
	}
	if e.held > 0 {
		fmt.Fprintf(&b, "; what is in use for longest has been for %v", e.held.Round(time.Microsecond))
		if e.holder != nil {
			fmt.Fprintf(&b, ", borrowed by %s", e.holder.place())
		}
	}
	if e.nested {
		b.WriteString("; this goroutine is inside the function of a With already: to use one connection in both, call them with the ctx of a Session")
	}
	return oneLine(b.String())
}

func (e *inVain) Unwrap() []error {
	if e.last == nil {
		return []error{e.ctx}
	}
	return []error{e.ctx, spent(e.last)}
}

func times(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// farEnough bounds the search for who holds what: an error must not cost a walk
// over a hundred thousand connections.
const farEnough = 256

// counts reports whether a connection to addr fills the limit that a borrower of
// mine has met.
func (e *inVain) counts(addr, mine Addr) bool { return e.full != "MaxPerAddr" || addr == mine }

// gaveUp completes what w wrote down, and is the error of its wait. mu is not held.
func (w *waiter) gaveUp(ctx error) error {
	p := w.site.pool
	e := w.why
	if e == nil { // it was served in the last moment
		return ctx
	}
	e.ctx = ctx
	if e.held == 0 && !e.here {
		return e
	}
	e.holder = p.loanLog.out.find(func(h *loanRecord) bool { return e.counts(h.addr, w.site.addr) })
	if e.holder != nil {
		e.held = max(e.held, p.clock.Exactly().Sub(e.holder.since))
	}
	e.nested = e.here && insideWith()
	return e
}

// outs lists what is out, as far as it is written down at all (see hold), longest
// held first.
type loansOut struct {
	mu  sync.Mutex // guards all; nothing else happens under it
	all list.List  // of *holding
}

func (o *loansOut) add(h *loanRecord) {
	o.mu.Lock()
	h.out = o.all.PushBack(h)
	o.mu.Unlock()
}

func (o *loansOut) remove(h *loanRecord) {
	o.mu.Lock()
	o.all.Remove(h.out)
	o.mu.Unlock()
}

// find is the first, of those that are not too far, that which wants.
func (o *loansOut) find(which func(*loanRecord) bool) *loanRecord {
	o.mu.Lock()
	defer o.mu.Unlock()
	el := o.all.Front()
	for n := 0; el != nil && n < farEnough; n++ {
		if h := el.Value.(*loanRecord); which(h) {
			return h
		}
		el = el.Next()
	}
	return nil
}

// at lists those at addr, up to n of them, and counts the others.
func (o *loansOut) at(addr Addr, n int) (hs []*loanRecord, more int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for el := o.all.Front(); el != nil; el = el.Next() {
		if h := el.Value.(*loanRecord); h.addr != addr {
			continue
		} else if len(hs) < n {
			hs = append(hs, h)
		} else {
			more++
		}
	}
	return hs, more
}

// place is where h was borrowed.
func (h *loanRecord) place() string { return h.info(h.since).Place }

// insideWith reports whether the calling goroutine, which is in a With, is inside
// the fn of another one. A goroutine's stack is all there is that could say so. It
// is looked at only when a wait has failed.
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
