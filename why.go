package connpool

import (
	"fmt"
	"runtime"
	"strings"
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

// counts reports whether a connection to addr counts against the limit that a borrower of
// address mine has met.
func (e *inVain) counts(addr, mine Addr) bool { return e.full != "MaxPerAddr" || addr == mine }

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
