package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// class says what an unanswered exchange means for the pool.
type class string

const (
	answered    class = "answered"
	gaveUp      class = "gave_up"     // the borrower's own ctx was done
	diedInUse   class = "died_in_use" // cut, stopped or polluted after the pool's last check
	serverDown  class = "server_down" // no connection could be opened, and the server really was down
	avoidable   class = "avoidable"   // dead or polluted before the loan, and lent all the same
	unexplained class = "unexplained" // no fault of the server explains it
	foreign     class = "foreign"     // somebody else's reply
)

// errorClasses is the order of the classes in the table, and the text about each.
var errorClasses = []struct {
	class class
	text  string
}{
	{gaveUp, "the borrower gave up"},
	{diedInUse, "the connection died while in use"},
	{serverDown, "the server was down"},
	{avoidable, "avoidable: dead before it was lent"},
	{unexplained, "unexplained"},
	{foreign, "somebody else's reply"},
}

// outcome is the category of the end of an exchange.
type outcome struct {
	class class
	stage string // of a *connpool.Error, else "use": inside fn
	kind  connpool.Kind
}

// errorCount is one row of the report's errors.
type errorCount struct {
	Class class         `json:"class"`
	Stage string        `json:"stage"`
	Kind  connpool.Kind `json:"kind"`
	Count uint64        `json:"count"`
}

// pace is how fast something went; times are in microseconds.
type pace struct {
	Exchanges uint64  `json:"exchanges"`
	Errors    uint64  `json:"errors"`
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_us"`
	P99       float64 `json:"p99_us"`
}

// comparison is the same work done twice, with no faults.
type comparison struct {
	Seconds float64 `json:"seconds_each"`
	Pooled  pace    `json:"pooled"`
	Dialed  pace    `json:"dial_per_exchange"`
	Ratio   float64 `json:"ratio"`
}

// leftovers is what was still open after the pools and servers were closed.
type leftovers struct {
	PoolOpen    int `json:"pool_open"`   // by the count of a closed pool
	ServerOpen  int `json:"server_open"` // by the servers' own count, after that
	Goroutines  int `json:"goroutines"`
	Descriptors int `json:"descriptors"` // unknown where the system does not tell
}

// report holds the results of a run. It holds everything that decides the exit status, so
// that tests can check the decision without a run.
type report struct {
	Seed        uint64  `json:"seed"`
	Servers     int     `json:"servers"`
	Workers     int     `json:"workers"`
	MaxOpen     int     `json:"max_open"`
	Seconds     float64 `json:"seconds"` // of the storm
	Interrupted bool    `json:"interrupted"`

	Exchanges uint64       `json:"exchanges"`
	Answered  uint64       `json:"answered"`
	Errors    []errorCount `json:"errors"`
	Examples  []string     `json:"examples,omitempty"` // of errors that should not occur

	ForeignReplies uint64 `json:"foreign_replies"`
	Overlaps       int    `json:"overlaps"` // requests that overlapped on one connection, as the servers saw it
	Avoidable      uint64 `json:"avoidable_errors"`
	Unexplained    uint64 `json:"unexplained_errors"`

	Faults map[string]int `json:"faults"` // what was done to the servers

	Loans       uint64                          `json:"loans"`
	Reused      uint64                          `json:"reused"`
	ReuseRatio  float64                         `json:"reuse_ratio"`
	Dials       uint64                          `json:"dials"`
	DialErrors  uint64                          `json:"dial_errors"`
	Waits       uint64                          `json:"waits"`
	Closed      map[connpool.CloseReason]uint64 `json:"closed"`
	BorrowP50   float64                         `json:"borrow_p50_us"`
	BorrowP99   float64                         `json:"borrow_p99_us"`
	ExchangeP50 float64                         `json:"exchange_p50_us"`
	ExchangeP99 float64                         `json:"exchange_p99_us"`

	PeakOpen      int `json:"peak_open"`
	PeakServed    int `json:"peak_open_seen_by_servers"`
	LastingServed int `json:"lasting_open_seen_by_servers"` // the number never fell below this for lagSpan

	Comparison *comparison `json:"comparison,omitempty"`
	Left       leftovers   `json:"left"`

	Broken []string `json:"broken"` // the promises that were broken
}

func newReport(o demoOptions, f *fleet) *report {
	return &report{Seed: o.seed, Servers: len(f.peers), Workers: o.workers, MaxOpen: o.maxOpen,
		Faults: map[string]int{}, Closed: map[connpool.CloseReason]uint64{}}
}

// judge fills in Broken. Errors that a borrower could not avoid do not count. An
// avoidable one does not count either: the log knows when a server closed a connection,
// but not when the client's kernel learned of it, and on a busy machine that may be
// later.
func (r *report) judge() {
	r.Broken = []string{}
	broken := func(format string, args ...any) { r.Broken = append(r.Broken, fmt.Sprintf(format, args...)) }
	if r.ForeignReplies > 0 {
		broken("%d replies belonged to someone else", r.ForeignReplies)
	}
	if r.Overlaps > 0 {
		broken("%d times a request arrived on a connection that still owed the answer to another", r.Overlaps)
	}
	if r.PeakOpen > r.MaxOpen {
		broken("%d connections were open, with a limit of %d", r.PeakOpen, r.MaxOpen)
	}
	if r.LastingServed > r.MaxOpen {
		broken("%d connections were open at the servers all the time for %v, with a limit of %d", r.LastingServed, lagSpan, r.MaxOpen)
	}
	if n := r.Left.PoolOpen; n > 0 {
		broken("%d connections are open in the books of a closed pool", n)
	}
	if n := r.Left.ServerOpen; n > 0 {
		broken("%d connections of a closed pool are open at the servers", n)
	}
	if n := r.Left.Goroutines; n > 0 {
		broken("%d goroutines were left running", n)
	}
	if n := r.Left.Descriptors; n > 0 {
		broken("%d descriptors were left open", n)
	}
	if r.Answered == 0 && !r.Interrupted {
		broken("no exchange was answered, so nothing was shown")
	}
}

func (r *report) exitStatus() int {
	if len(r.Broken) > 0 {
		return exitBroken
	}
	return exitOK
}

// count adds n exchanges that ended as o.
func (r *report) count(o outcome, n uint64) {
	r.Exchanges += n
	switch o.class {
	case answered:
		r.Answered += n
		return
	case foreign:
		r.ForeignReplies += n
	case avoidable:
		r.Avoidable += n
	case unexplained:
		r.Unexplained += n
	}
	i := slices.IndexFunc(r.Errors, func(e errorCount) bool {
		return e.Class == o.class && e.Stage == o.stage && e.Kind == o.kind
	})
	if i < 0 {
		i = len(r.Errors)
		r.Errors = append(r.Errors, errorCount{o.class, o.stage, o.kind, 0})
	}
	r.Errors[i].Count += n
}

// table returns the report as text.
func (r *report) table() string {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-38s %s\n", name, fmt.Sprintf(format, args...))
	}
	section := func(format string, args ...any) { fmt.Fprintf(&b, "\n%s\n", fmt.Sprintf(format, args...)) }

	early := ""
	if r.Interrupted {
		early = ", interrupted"
	}
	fmt.Fprintf(&b, "connpool demo: %d workers, %d servers, at most %d connections, %.1f s%s, seed %d\n",
		r.Workers, r.Servers, r.MaxOpen, r.Seconds, early, r.Seed)

	section("what was done to the servers")
	for _, name := range slices.Sorted(maps.Keys(r.Faults)) {
		row(name, "%s", grouped(uint64(r.Faults[name])))
	}

	section("what the borrowers saw")
	row("exchanges", "%s, %s a second", grouped(r.Exchanges), grouped(uint64(perSecond(r.Exchanges, r.Seconds))))
	row("answered", "%s, %s", grouped(r.Answered), percent(r.Answered, r.Exchanges))
	for _, c := range errorClasses {
		row(c.text, "%s", r.errorsOf(c.class))
	}
	row("getting a connection", "p50 %s, p99 %s", micros(r.BorrowP50), micros(r.BorrowP99))
	row("the whole exchange", "p50 %s, p99 %s", micros(r.ExchangeP50), micros(r.ExchangeP99))

	section("what the pool did")
	row("loans", "%s, %s of a connection used before", grouped(r.Loans), percent(r.Reused, r.Loans))
	row("dials", "%s, of which %s failed", grouped(r.Dials), grouped(r.DialErrors))
	row("borrowers that had to queue", "%s", grouped(r.Waits))
	row("open at once", "%d of %d at most (%d at the servers, which hear of a close later)", r.PeakOpen, r.MaxOpen, r.PeakServed)
	b.WriteString("  connections closed, by reason\n")
	for _, reason := range slices.SortedFunc(maps.Keys(r.Closed), func(x, y connpool.CloseReason) int {
		return cmp.Or(cmp.Compare(r.Closed[y], r.Closed[x]), cmp.Compare(x, y))
	}) {
		row("  "+reason.String(), "%s", grouped(r.Closed[reason]))
	}

	if c := r.Comparison; c != nil {
		section("the same work without faults, %.1f s each", c.Seconds)
		for _, half := range []struct {
			name string
			pace pace
		}{{"through a pool", c.Pooled}, {"a dial for each exchange", c.Dialed}} {
			p := half.pace
			row(half.name, "%s a second, p50 %s, p99 %s, %s failed",
				grouped(uint64(p.PerSecond)), micros(p.P50), micros(p.P99), grouped(p.Errors))
		}
		row("the pool does", "%.1f times as much", c.Ratio)
	}

	section("what was left when all was closed")
	row("connections", "%d in the pool, %d at the servers", r.Left.PoolOpen, r.Left.ServerOpen)
	row("goroutines", "%d", r.Left.Goroutines)
	if r.Left.Descriptors == unknown {
		row("descriptors", "not told by this system")
	} else {
		row("descriptors", "%d", r.Left.Descriptors)
	}

	if len(r.Examples) > 0 {
		section("errors that should not be, some examples")
		for _, e := range r.Examples {
			fmt.Fprintf(&b, "  %s\n", e)
		}
	}
	fmt.Fprintf(&b, "\nreplies that belonged to someone else: %d\n", r.ForeignReplies)
	for _, promise := range r.Broken {
		fmt.Fprintf(&b, "BROKEN: %s\n", promise)
	}
	return b.String()
}

// errorsOf returns a text such as "7: 4 eof, 3 broken" for one class, with the stage
// where the stage is not fn.
func (r *report) errorsOf(c class) string {
	var total uint64
	var rows []errorCount
	for _, e := range r.Errors {
		if e.Class == c {
			total += e.Count
			rows = append(rows, e)
		}
	}
	slices.SortFunc(rows, func(x, y errorCount) int { return cmp.Compare(y.Count, x.Count) })
	var parts []string
	for _, e := range rows {
		part := grouped(e.Count) + " " + e.Kind.String()
		if e.Stage != stageUse {
			part += " (" + e.Stage + ")"
		}
		parts = append(parts, part)
	}
	if total == 0 {
		return "0"
	}
	return grouped(total) + ": " + strings.Join(parts, ", ")
}

func paceOf(t *tally, seconds float64) pace {
	p := pace{Exchanges: t.answered(), PerSecond: perSecond(t.answered(), seconds),
		P50: inMicros(t.whole.quantile(0.50)), P99: inMicros(t.whole.quantile(0.99))}
	for o, n := range t.outcomes {
		if o.class != answered {
			p.Errors += n
		}
	}
	return p
}

func perSecond(n uint64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(n) / seconds
}

func inMicros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// micros writes a time in the unit that suits its size.
func micros(us float64) string {
	d := time.Duration(us * 1e3)
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.0f µs", us)
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", us/1e3)
	}
	return fmt.Sprintf("%.2f s", us/1e6)
}

func percent(part, whole uint64) string {
	if whole == 0 {
		return "0 %"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(part)/float64(whole))
}

// grouped is n with its digits in threes: 1,234,567.
func grouped(n uint64) string {
	digits := strconv.FormatUint(n, 10)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
