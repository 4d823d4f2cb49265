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

// Why a wait failed. The ctx's own error says only that time ran out. The reader wants to
// know what the time was spent on: the server refuses connections, a dial hangs in its
// handshake, or other borrowers hold all the slots. The facts are collected when a waiter
// gives up, and formatted when somebody asks for the text.

// inVain is the error of a wait that ended with its ctx. It wraps the ctx's error and, if
// the address's last dial failed, the error of that dial.
type inVain struct {
	ctx error

	last     error // error of the last dial, if that dial failed
	failures int   // failed dials in a row
	pause    bool  // the address is in back-off: the next dial is not due yet

	stage Stage // stage of the oldest dial in flight; 0: there is none
	since time.Duration

	full   string        // the limit that was in the way
	held   time.Duration // how long the longest loan under that limit has lasted; 0: unknown
	holder callers       // who has the longest loan; nil: unknown
	here   bool          // a loan under that limit is of the same address
	nested bool          // here, and this goroutine is inside the fn of another With
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
		fmt.Fprintf(&b, "; the previous dial failed: %s", textOf(e.last))
	}
	if e.held > 0 {
		fmt.Fprintf(&b, "; the longest loan has lasted %v", e.held.Round(time.Microsecond))
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

// times returns n with the noun what, in the plural unless n is 1.
func times(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// farEnough bounds the search for the longest loan: making an error must not walk over a
// hundred thousand connections.
const farEnough = 256

// counts reports whether a connection to addr counts against the limit that a borrower of
// address mine has met.
func (e *inVain) counts(addr, mine Addr) bool { return e.full != "MaxPerAddr" || addr == mine }

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
	if h := env.loanLog.out.find(func(h *loanRecord) bool { return e.counts(h.addr, w.site.addr) }); h != nil {
		e.holder = h.stack
		e.held = max(e.held, env.clock.Exactly().Sub(h.since))
	}
	e.nested = e.here && insideWith()
	return e
}

// loansOut lists the recorded loans (see recordLoan), longest first.
type loansOut struct {
	mu  sync.Mutex // guards all; nothing else happens under it
	all list.List  // of *loanRecord
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

// find returns the first loan that satisfies which, among the farEnough longest; nil if
// none does.
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

// at lists up to n loans at addr, and counts the others.
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

// callers are the calls on the stack of a goroutine, the innermost first.
type callers []uintptr

// place returns the innermost call: a function, its file and line.
func (s callers) place() string {
	place, _ := s.text()
	return place
}

// text returns the innermost call, and all of them as in the text of a panic.
func (s callers) text() (place, all string) {
	var b strings.Builder
	frames := runtime.CallersFrames(s)
	for more := len(s) > 0; more; {
		var f runtime.Frame
		f, more = frames.Next()
		if place == "" {
			place = fmt.Sprintf("%s (%s:%d)", f.Function, f.File, f.Line)
		}
		fmt.Fprintf(&b, "%s\n\t%s:%d\n", f.Function, f.File, f.Line)
	}
	return place, b.String()
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
