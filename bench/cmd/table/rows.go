package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/seed-ecb488c9/connpool/bench"
)

// row is one line of the table: a figure of every rival, and the goal of this pool.
type row struct {
	section string // heading above the row; empty: the row goes on with the section before
	title   string
	bench   string // with RIVAL in place of the rival's name
	ours    string // the benchmark of this pool, if its name differs
	unit    string
	scale   float64 // the figure is divided by it
	digits  int     // after the decimal point

	// goal is the largest allowed figure; 0: no goal. ofBest is a share of the best
	// library; below demands less than every library; limit names a benchmark, and
	// ofLimit how many times its figure is allowed. A goal in nanoseconds that was set on
	// another machine is given as such a multiple.
	goal    float64
	ofBest  float64
	below   bool
	limit   string
	ofLimit float64
}

// columns are the rivals, in order, with their titles.
var columns = []struct{ name, title string }{
	{"connpool", "connpool"},
	{"puddle", "puddle"},
	{"sql", "database/sql"},
	{"commons", "go-commons-pool"},
	{"redis", "go-redis"},
	{"http", "net/http"},
	{"channel", "channel"},
	{"stack", "mutex + slice"},
	{"held", "held"},
	{"shared", "one shared"},
	{"dial", "dial per use"},
}

var libraries = []string{"puddle", "sql", "commons", "redis", "http"}

func w6(addrs, goal float64, unit, title string) row {
	return row{title: title, bench: fmt.Sprintf("W6/addrs=%.0f/rival=RIVAL", addrs), unit: unit, goal: goal}
}

// used is W1 as pools are used, see BenchmarkUsed.
func used(way, title string) row {
	return row{title: title, bench: "Used/way=" + way + "/check=none/rival=RIVAL", unit: "ns/op", below: true}
}

// begins makes r the first row of a section.
func begins(section string, r row) row {
	r.section = section
	return r
}

var rows = []row{
	begins("As it is used: under a request's ctx, handed on as a net.Conn", used("cancelable", "loan and return, no checks, ctx that can be cancelled, ns")),
	{title: "— allocations", bench: "Used/way=cancelable/check=none/rival=RIVAL", unit: "allocs/op", goal: nothing},
	used("deadline", "— ctx with a deadline an hour away, ns"),
	used("timeout", "— WithTimeout made for each loan, with what that costs, ns"),
	used("deep", "— ctx ten values deep, ns"),
	{title: "— with a Trace in ctx, ns", bench: "Used/way=trace/check=none/rival=RIVAL", unit: "ns/op"},
	{title: "— the connection handed to a codec, ns", bench: "UsedCodec/check=none/rival=RIVAL", unit: "ns/op", below: true},
	{title: "— 16 goroutines, 16 connections, ns", bench: "UsedW2/check=none/rival=RIVAL", unit: "ns/op", below: true},
	{title: "— 64-byte echo, TCP, no checks, times a held one", bench: "UsedW4/check=none/rival=RIVAL", unit: "x-held", digits: 3, goal: 1.05},
	{title: "— — default; rivals: peek", bench: "UsedW4/check=peek/rival=RIVAL", ours: "UsedW4/check=all/rival=connpool", unit: "x-held", digits: 3, goal: 1.10},
	{title: "— over TLS 1.3, no checks, times a held one", bench: "UsedW5/check=none/rival=RIVAL", unit: "x-held", digits: 3, goal: 1.05},
	{title: "— — default; rivals: peek", bench: "UsedW5/check=peek/rival=RIVAL", ours: "UsedW5/check=all/rival=connpool", unit: "x-held", digits: 3, goal: 1.10},
	{title: "— the dialer returns its own *tls.Conn, no checks, times a held one", bench: "UsedW5Own/check=none/rival=RIVAL", unit: "x-held", digits: 3, goal: 1.05},
	{title: "— — default; rivals: peek", bench: "UsedW5Own/check=peek/rival=RIVAL", ours: "UsedW5Own/check=all/rival=connpool", unit: "x-held", digits: 3, goal: 1.10},
	{section: "The floor: under context.Background(), with a fn that does nothing", title: "W1 loan and return, no checks, ns", bench: "W1/check=none/rival=RIVAL", unit: "ns/op", ofBest: 0.8},
	{title: "— allocations", bench: "W1/check=none/rival=RIVAL", unit: "allocs/op", goal: nothing},
	{title: "W1 with a peek, ns", bench: "W1/check=peek/rival=RIVAL", unit: "ns/op", below: true, limit: "W1/check=peek/rival=stack", ofLimit: 380. / 384},
	{title: "W1 peek + identity (default), ns; rivals: peek", bench: "W1/check=peek/rival=RIVAL", ours: "W1/check=all/rival=connpool", unit: "ns/op", limit: "Parts/part=control+both", ofLimit: 620. / (231 + 289)},
	{title: "W2 16 goroutines, 16 connections, no checks, ns", bench: "W2/check=none/rival=RIVAL", unit: "ns/op", below: true},
	{title: "W2 default; rivals: peek, ns", bench: "W2/check=peek/rival=RIVAL", ours: "W2/check=all/rival=connpool", unit: "ns/op"},
	{title: "W3 256 goroutines, 8 connections, echo, no checks, µs", bench: "W3/check=none/rival=RIVAL", unit: "ns/op", scale: 1000, digits: 2, limit: "W3/check=none/rival=channel", ofLimit: 6.9 / 6.74},
	{title: "— 99 % wait less than, ms", bench: "W3/check=none/rival=RIVAL", unit: "p99-wait-ms", digits: 2, limit: "W3/check=none/rival=channel", ofLimit: 2.4 / 2.23},
	{title: "— served, most / least", bench: "W3/check=none/rival=RIVAL", unit: "max/min", digits: 2, goal: 1.10},
	{title: "W3 default; rivals: peek, µs", bench: "W3/check=peek/rival=RIVAL", ours: "W3/check=all/rival=connpool", unit: "ns/op", scale: 1000, digits: 2},
	{title: "W4 64-byte echo, TCP, no checks, µs", bench: "W4/check=none/rival=RIVAL", unit: "ns/op", scale: 1000, digits: 2},
	{title: "— times a held connection", bench: "W4/check=none/rival=RIVAL", unit: "x-held", digits: 3, goal: 1.03},
	{title: "W4 default; rivals: peek, times a held one", bench: "W4/check=peek/rival=RIVAL", ours: "W4/check=all/rival=connpool", unit: "x-held", digits: 3, goal: 1.09},
	{title: "W5 64-byte echo, TLS 1.3, no checks, µs", bench: "W5/check=none/rival=RIVAL", unit: "ns/op", scale: 1000, digits: 2},
	{title: "— times a held connection", bench: "W5/check=none/rival=RIVAL", unit: "x-held", digits: 3, goal: 1.03},
	{title: "W5 default; rivals: peek, times a held one", bench: "W5/check=peek/rival=RIVAL", ours: "W5/check=all/rival=connpool", unit: "x-held", digits: 3, goal: 1.08},
	begins("Many addresses, many connections", w6(1, 0, "ns/op", "W6 one address, ns")),
	w6(100, 0, "ns/op", "— 100 addresses at random, ns"),
	{title: "— 10,000 addresses, ns", bench: "W6/addrs=10000/rival=RIVAL", unit: "ns/op", limit: "W6/addrs=1/rival=connpool", ofLimit: 1.5},
	{title: "— 100,000 addresses, ns", bench: "W6/addrs=100000/rival=RIVAL", unit: "ns/op", limit: "W6/addrs=100000/rival=stack", ofLimit: 450. / 178},
	w6(100_000, 500, "B/addr", "— bytes per address, of 100,000"),
	{title: "W7 bytes per idle connection beyond the net.Conn, TCP", bench: "W7/net=tcp/rival=RIVAL", unit: "B/conn", goal: 400},
	{title: "— TLS", bench: "W7/net=tls/rival=RIVAL", unit: "B/conn", goal: 400},
	{title: "— goroutines per connection", bench: "W7/net=tcp/rival=RIVAL", unit: "goroutines/conn", goal: nothing},
	{section: "In a crowd, after cuts, with more addresses than connections", title: "W8 200 goroutines, cold, limit 20, dial +5 ms, ms", bench: "W8/rival=RIVAL", unit: "ms/op", digits: 2, limit: "W8/rival=channel", ofLimit: 7.9 / 7.5},
	{title: "— dials", bench: "W8/rival=RIVAL", unit: "dials/op", goal: 20},
	{title: "W8 50 goroutines, 5 idle, dial 150 ms, work 2 ms: connections", bench: "W8Warm/rival=RIVAL", unit: "conns", goal: 6},
	{title: "— ms until all are done", bench: "W8Warm/rival=RIVAL", unit: "ms/op"},
	{title: "W9 errors in 100 after 16 idle were cut, TCP, 1 goroutine", bench: "W9/net=tcp/users=1/rival=RIVAL", unit: "errors/100", goal: nothing},
	{title: "— TCP, 16 goroutines", bench: "W9/net=tcp/users=16/rival=RIVAL", unit: "errors/100", goal: nothing},
	{title: "— TLS, 1 goroutine", bench: "W9/net=tls/users=1/rival=RIVAL", unit: "errors/100", goal: nothing},
	{title: "— TLS, 16 goroutines", bench: "W9/net=tls/users=16/rival=RIVAL", unit: "errors/100", goal: nothing},
	{title: "W11 every loan evicts, 256 of 1,000 addresses, µs", bench: "W11/rival=RIVAL", ours: "W11/rival=connpool/addrs=1000", unit: "ns/op", scale: 1000, digits: 1, limit: "W11/rival=byhand", ofLimit: 1.25},
	{title: "— of 20,000, µs", bench: "W11/rival=RIVAL", ours: "W11/rival=connpool/addrs=20000", unit: "ns/op", scale: 1000, digits: 1, limit: "W11/rival=byhand", ofLimit: 1.25},
	{title: "— of 100,000, µs", bench: "W11/rival=RIVAL", ours: "W11/rival=connpool/addrs=100000", unit: "ns/op", scale: 1000, digits: 1, limit: "W11/rival=byhand", ofLimit: 1.25},
	{title: "— by hand: a ring of 256, each dial on a goroutine, with a deadline, µs", ours: "W11/rival=byhand", unit: "ns/op", scale: 1000, digits: 1},
	{title: "W12 sweep of 10,000 at the default interval, % of a core", ours: "W12/sweep=10ps", unit: "%core-usual", digits: 3, goal: 1},
	{title: "— one sweep, ms of CPU", ours: "W12/sweep=10ps", unit: "sweep-ms", digits: 1},
	{title: "— 10,000 bare peeks, ms", ours: "W12/sweep=never", unit: "peeks-ms", digits: 1},
	{title: "— borrower's p99, ten sweeps a second, µs", ours: "W12/sweep=10ps", unit: "p99-us", digits: 1},
	{title: "— borrower's p99, no sweeps, µs", ours: "W12/sweep=never", unit: "p99-us", digits: 1},
	{section: "Instead of a dial; on more processors", title: "TLS connection, primed pool or dial, µs", bench: "Handle/rival=RIVAL", unit: "ns/op", scale: 1000, digits: 1},
	{title: "— handshake of 50 ms: p99, µs", bench: "Primed/rival=RIVAL", unit: "p99-us", digits: 1},
	{title: "connections for 64 workers, busy 1/8 of the time (one each: 64)", bench: "Workers/rival=RIVAL", unit: "conns"},
	{title: "64 addresses, default: 1,000 loans/s with 1 processor", ours: "Cores/procs=1", unit: "loans/s", scale: 1000},
	{title: "— 2 processors", ours: "Cores/procs=2", unit: "loans/s", scale: 1000},
	{title: "— 16 processors, more than there are", ours: "Cores/procs=16", unit: "loans/s", scale: 1000},
}

const nothing = math.SmallestNonzeroFloat64 // stands for a goal of 0

// write makes the table; with judge it adds which goals were reached.
func (r results) write(w *strings.Builder, command string, judge bool) {
	fmt.Fprintf(w, "%s; %s. Medians of %s.\n", bench.Machine(), bench.Versions(), command)
	head, rule := "| workload |", "|---|"
	for _, c := range columns {
		head += " " + c.title + " |"
		rule += "---:|"
	}
	if judge {
		head += " must reach | reached |"
		rule += "---:|---|"
	}
	section := "" // which the next line begins
	for _, row := range rows {
		if row.section != "" {
			section = row.section
		}
		figure := func(rival string) (float64, bool) {
			name := strings.ReplaceAll(row.bench, "RIVAL", rival)
			if rival == "connpool" && row.ours != "" {
				name = row.ours
			}
			v, ok := r.median(name, row.unit)
			if row.scale != 0 {
				v /= row.scale
			}
			return v, ok
		}
		ours, ok := figure("connpool")
		if !ok {
			continue
		}
		if section != "" {
			fmt.Fprintf(w, "\n### %s\n\n%s\n%s\n", section, head, rule)
			section = ""
		}
		fmt.Fprintf(w, "| %s |", row.title)
		best := math.Inf(1)
		for _, c := range columns {
			v, ok := figure(c.name)
			switch {
			case !ok:
				w.WriteString(" |")
			case c.name == "connpool":
				fmt.Fprintf(w, " **%s** |", row.format(v))
			default:
				fmt.Fprintf(w, " %s |", row.format(v))
			}
			if ok && isLibrary(c.name) {
				best = min(best, v)
			}
		}
		goal := row.goal
		if row.ofBest > 0 {
			goal = row.ofBest * best
		}
		if row.below {
			goal = best
			if row.goal > 0 {
				goal = min(goal, row.goal)
			}
		}
		if limit, ok := r.median(row.limit, row.unit); ok && row.ofLimit > 0 {
			if row.scale != 0 {
				limit /= row.scale
			}
			if limit *= row.ofLimit; row.below {
				limit = min(limit, goal)
			}
			goal = limit
		}
		switch {
		case !judge:
			w.WriteString("\n")
		case goal == 0:
			w.WriteString(" | |\n")
		case round(ours, row.digits) <= round(goal, row.digits):
			fmt.Fprintf(w, " %s | yes |\n", row.format(goal))
		default:
			fmt.Fprintf(w, " %s | no |\n", row.format(goal))
		}
	}
}

// partsOf are the parts of W1, with how many there are in a loan and return. The checks
// share one visit to the descriptor.
var partsOf = []struct {
	part, what   string
	plain, check int
}{
	{"mutex", "Lock and Unlock of a mutex that is free", 2, 2},
	{"hash", "hash of an Addr, with the host's name", 1, 1},
	{"compare", "comparison of two Addrs", 1, 1},
	{"coarse", "reading of a clock that ticks: two atomic loads", 2, 2},
	{"atomic", "atomic read-modify-write", 2, 2},
	{"defer", "deferred function that would recover", 1, 1},
	{"control+both", "RawConn.Control with peek and SO_COOKIE", 0, 1},
}

// parts is the table of the parts of W1.
func (r results) parts() string {
	var w strings.Builder
	w.WriteString("| piece | ns | in a loan | ns, no checks | ns, default |\n|---|---:|---:|---:|---:|\n")
	var plain, check float64
	for _, p := range partsOf {
		ns, _ := r.median("Parts/part="+p.part, "ns/op")
		fmt.Fprintf(&w, "| %s | %.1f | %d | %.0f | %.0f |\n", p.what, ns, p.check, ns*float64(p.plain), ns*float64(p.check))
		plain += ns * float64(p.plain)
		check += ns * float64(p.check)
	}
	a, _ := r.median("W1/check=none/rival=connpool", "ns/op")
	b, _ := r.median("W1/check=all/rival=connpool", "ns/op")
	fmt.Fprintf(&w, "| the rest: lists, counts, calls, comparisons | | | %.0f | %.0f |\n", a-plain, b-check)
	fmt.Fprintf(&w, "| **W1** | | | **%.0f** | **%.0f** |\n\n", a, b)
	alone, _ := r.median("Parts/part=control", "ns/op")
	peek, _ := r.median("Parts/part=control+peek", "ns/op")
	cookie, _ := r.median("Parts/part=control+cookie", "ns/op")
	watch, _ := r.median("Parts/part=afterfunc", "ns/op")
	fmt.Fprintf(&w, "Alone: RawConn.Control %.0f ns, with the peek %.0f ns, with SO_COOKIE %.0f ns; context.AfterFunc, armed and stopped, %.0f ns.\n", alone, peek, cookie, watch)
	clock, _ := r.median("Parts/part=clock", "ns/op")
	addr, _ := r.median("Parts/part=map", "ns/op")
	lru, _ := r.median("Parts/part=lru", "ns/op")
	fmt.Fprintf(&w, "What is not in it any more: time.Now %.0f ns, twice; a map whose key is an Addr %.0f ns; simplelru %.0f ns.\n", clock, addr, lru)
	return w.String()
}

func isLibrary(name string) bool {
	for _, l := range libraries {
		if l == name {
			return true
		}
	}
	return false
}

func round(v float64, digits int) float64 {
	p := math.Pow(10, float64(max(digits, 0)))
	return math.Round(v*p) / p
}

// format formats v with commas between thousands.
func (row row) format(v float64) string {
	text := strconv.FormatFloat(round(v, row.digits), 'f', max(row.digits, 0), 64)
	whole, rest, _ := strings.Cut(text, ".")
	sign := ""
	if strings.HasPrefix(whole, "-") {
		sign, whole = "-", whole[1:]
	}
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		whole += "." + rest
	}
	return sign + whole
}
