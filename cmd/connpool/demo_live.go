package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

const (
	liveEvery  = 200 * time.Millisecond // between two redraws on a terminal
	plainEvery = time.Second            // between two lines of a log
	barCells   = 16
)

// liveLine shows the progress of the storm: one line redrawn in place on a terminal, a
// line now and then in a log, nothing with -quiet.
type liveLine struct {
	w      io.Writer
	off    bool
	redraw bool
	colour bool

	next      time.Duration // when a plain line is due
	lastAt    time.Duration
	lastLoans uint64
}

func newLiveLine(w io.Writer, o demoOptions) *liveLine {
	l := &liveLine{w: w, off: o.quiet}
	l.redraw = isTerminal(w) && os.Getenv("TERM") != "dumb"
	l.colour = l.redraw && os.Getenv("NO_COLOR") == ""
	return l
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// show prints st, taken at the given time since the start.
func (l *liveLine) show(at time.Duration, st connpool.Stats) {
	if l.off || !l.redraw && at < l.next {
		return
	}
	rate := perSecond(st.Loans-l.lastLoans, (at - l.lastAt).Seconds())
	l.lastAt, l.lastLoans = at, st.Loans
	evicted := st.Closed[connpool.ClosedEvicted]
	if !l.redraw {
		l.next += plainEvery
		fmt.Fprintf(l.w, "%5.1fs  %.0f loans/s, %d open: %d in use, %d idle; %d waiting, %d dials, %d evictions\n",
			at.Seconds(), rate, st.Open, st.InUse, st.Idle, st.Waiting, st.Dials, evicted)
		return
	}
	fmt.Fprintf(l.w, "\r%s %5.0f/s  use %2d idle %2d wait %2d  dials %d  evicted %d\x1b[K",
		l.bar(st), rate, st.InUse, st.Idle, st.Waiting, st.Dials, evicted)
}

// bar draws the connections in use, idle, and on their way in or out against
// the limit.
func (l *liveLine) bar(st connpool.Stats) string {
	limit := max(1, st.Limit, st.Open)
	cells := func(n int) int { return (n*barCells + limit/2) / limit }
	var b strings.Builder
	b.WriteByte('[')
	drawn := 0
	for _, part := range []struct {
		upTo   int
		mark   string
		colour string
	}{
		{st.InUse, "#", "32"},
		{st.InUse + st.Idle, "=", "36"},
		{st.Open, "~", "33"},
		{limit, ".", "2"},
	} {
		n := max(0, min(barCells, cells(part.upTo))-drawn)
		drawn += n
		marks := strings.Repeat(part.mark, n)
		if l.colour && n > 0 {
			marks = "\x1b[" + part.colour + "m" + marks + "\x1b[0m"
		}
		b.WriteString(marks)
	}
	b.WriteByte(']')
	return b.String()
}

// end clears the line on the terminal.
func (l *liveLine) end() {
	if !l.off && l.redraw {
		fmt.Fprint(l.w, "\r\x1b[K")
	}
}
