package main

import (
	"fmt"
	"io"
	"os"
	"time"
)

// notices shows the progress of a long run on stderr: lines that stay, and on a terminal
// one more line below them that is redrawn. It is for one goroutine.
type notices struct {
	w      io.Writer
	off    bool
	redraw bool
	next   time.Time // when the line may be redrawn
	drawn  bool
}

func newNotices(w io.Writer, quiet bool) *notices {
	return &notices{w: w, off: quiet, redraw: isTerminal(w) && os.Getenv("TERM") != "dumb"}
}

// say writes a line that stays.
func (n *notices) say(format string, args ...any) {
	if n.off {
		return
	}
	n.end()
	fmt.Fprintf(n.w, format+"\n", args...)
}

// redo redraws the last line, if that is possible and not too soon.
func (n *notices) redo(format string, args ...any) {
	now := time.Now()
	if n.off || !n.redraw || now.Before(n.next) {
		return
	}
	n.next = now.Add(liveEvery)
	n.drawn = true
	fmt.Fprintf(n.w, "\r"+format+"\x1b[K", args...)
}

// end clears the redrawn line on the terminal.
func (n *notices) end() {
	if n.drawn {
		fmt.Fprint(n.w, "\r\x1b[K")
		n.drawn = false
	}
}

// seconds formats a time in the unit that suits its size, with about three digits.
func seconds(s float64) string {
	switch {
	case s <= 0:
		return "0"
	case s < 1e-6:
		return fmt.Sprintf("%.0f ns", s*1e9)
	case s < 1e-5:
		return fmt.Sprintf("%.1f µs", s*1e6)
	case s < 1e-3:
		return fmt.Sprintf("%.0f µs", s*1e6)
	case s < 1e-2:
		return fmt.Sprintf("%.2f ms", s*1e3)
	case s < 0.1:
		return fmt.Sprintf("%.1f ms", s*1e3)
	case s < 0.9995:
		return fmt.Sprintf("%.0f ms", s*1e3)
	case s < 10:
		return fmt.Sprintf("%.2f s", s)
	case s < 100:
		return fmt.Sprintf("%.1f s", s)
	}
	return fmt.Sprintf("%.0f s", s)
}
