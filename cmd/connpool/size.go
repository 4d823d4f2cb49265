package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

const sizeTeaching = `usage: connpool size -users N -think TIME -service TIME    by arithmetic
       connpool size -concurrency N -fraction F            by arithmetic
       connpool size -to ADDR -probe PROBE                 by experiment
       connpool size -history FILE                         from what a pool did
       connpool size -total N -processes P                 shares only

How many connections should a pool have? Too few, and requests wait although
the peer could serve them. Too many, and the queue only moves from the pool,
where it is first come first served and a wait ends with its ctx, to the peer.

By arithmetic. A request needs a connection for the -service time; a user asks
again after the -think time. The mean number in use is the classic answer, and
it is too small: with 10,000 users, 10 s and 100 ms it is 99, and of 100
connections 83 % of the requests find none free. The table shows the effect of
more connections. (Exponential times, first come first served, a closed group of users:
an exact solution. -simulate follows each user to check it.) With -fraction only
that share of the requests needs a connection; -concurrency N is N threads that
are always at work, -fraction of the time with a connection.

By experiment. Clients make requests without a pause, each on a connection of
its own. Their number doubles until the response exceeds -limit; then two
numbers are narrowed down:

  the knee    the fewest clients with 95 % of the best throughput. It is the
              capacity of the peer: more connections do not get more done.
  the limit   the most clients whose response is within -limit. It sizes the
              queue before the peer, and may be far above the knee.

It puts the peer under full load: choose a peer that allows this. If others need
the peer too, -share 0.5 with -load-command stops as soon as the command (which
prints the load of the peer in percent; CONNPOOL_CLIENTS is set for it) prints 50.

From a history. A file with one JSON object per line, the pool's Stats and when
they were taken, as written by

	enc := json.NewEncoder(file)
	for now := range time.Tick(time.Second) {
		enc.Encode(struct {
			Time time.Time
			connpool.Stats
		}{now, pool.Stats()})
	}

With a field Addr and a connpool.AddrStats instead of Stats, the advice is
separate for each address. The advised MinIdlePerAddr is below the average in
use, so that no spares are kept for nothing. The advised MaxPerAddr is between
the average and the peak, so that borrowers may queue in the last percent of the
time.

Shares. -processes P divides each answer, rounded down, so that all processes
together never exceed it: 200 over 3 is 66 each.

flags:
`

const sizeExamples = `
examples:
  connpool size -users 10000 -think 10s -service 100ms
  connpool size -users 10000 -think 10s -service 100ms -simulate -connections 100,110,120,130
  connpool size -concurrency 100 -fraction 0.2        one request in five needs the peer
  connpool size -own 10x20ms -limit 400ms             a server of its own, to try it
  connpool size -to tcp://127.0.0.1:6379 -probe redis -limit 5ms -svg redis.svg
  connpool size -to tcp://127.0.0.1:5432 -probe postgres -limit 50ms -processes 4
  connpool size -to tls://plc.example:502 -probe hex:000100000006010300000001,len=11
  connpool size -to tcp://10.0.0.9:7000 -share 0.5 -load-command ./load-of-peer
  connpool size -history stats.jsonl
  connpool size -total 200 -processes 5

Ctrl-C ends a run early, with a report on what was measured and no plot. The
status is 0 if there is an answer, 1 if the peer could not be measured, 2 for a
mistake on the command line.
`

// sizeOptions holds the settings from the command line of size.
type sizeOptions struct {
	mode string // the flag that chose the mode

	// arithmetic
	users, concurrency int
	think, service     time.Duration
	fraction, mayWait  float64
	connections        []int
	simulate           bool
	seed               uint64
	requests           int
	processes, total   int
	json, quiet        bool
	history            string
	target             *target
	targetFlags        targetFlags
	ramp               rampOptions
	own                string
	work               func() // the work of size's own server
	loadCommand, svg   string
	explicit           map[string]bool // flags that were set
	connectionsText    string
}

// sizeModes lists which flags belong to which mode; flags of no mode go with all modes.
var sizeModes = []struct {
	flag  string // that chooses the mode
	other []string
}{
	{"users", []string{"think", "service", "fraction", "may-wait", "connections", "simulate", "seed", "requests", "processes"}},
	{"concurrency", []string{"service", "fraction", "may-wait", "connections", "simulate", "seed", "requests", "processes"}},
	{"to", []string{"probe", "tls-ca", "tls-insecure-trust-anyone", "timeout", "limit", "judge", "step", "max-clients", "share", "load-command", "svg", "processes"}},
	{"own", []string{"limit", "judge", "step", "max-clients", "share", "load-command", "svg", "processes"}},
	{"history", []string{"processes"}},
	{"total", []string{"processes"}},
}

// parseSize reads the flags. It returns flag.ErrHelp after it printed the usage on
// stdout, and any other error without printing anything.
func parseSize(args []string, stdout io.Writer) (sizeOptions, error) {
	o := sizeOptions{explicit: make(map[string]bool)}
	fs := flag.NewFlagSet("connpool size", flag.ContinueOnError)
	fs.IntVar(&o.users, "users", 0, "`number` of users in all")
	fs.IntVar(&o.concurrency, "concurrency", 0, "`number` of threads or requests always at work")
	fs.DurationVar(&o.think, "think", 0, "mean `time` from an answer to the same user's next request")
	fs.DurationVar(&o.service, "service", 100*time.Millisecond, "mean `time` that a request has the connection")
	fs.Float64Var(&o.fraction, "fraction", 1, "`share` of the requests (of the time, with -concurrency) that needs a connection, up to 1")
	fs.Float64Var(&o.mayWait, "may-wait", 0.01, "`share` of the requests that may find no connection free")
	fs.StringVar(&o.connectionsText, "connections", "", "`numbers` of connections for the table, such as 100,110,120 (default: around the answer)")
	fs.BoolVar(&o.simulate, "simulate", false, "check each line of the table by a simulation")
	fs.Uint64Var(&o.seed, "seed", 1, "a `number` that the simulation follows from")
	fs.IntVar(&o.requests, "requests", 1_000_000, "`number` of requests that a simulation follows")
	o.targetFlags.register(fs)
	fs.StringVar(&o.own, "own", "", "`workers x time` of a server of its own, such as 10x20ms, instead of -to: to see what a report looks like")
	fs.DurationVar(&o.ramp.limit, "limit", 2*time.Second, "response `time` that is still acceptable")
	fs.StringVar(&o.ramp.judge, "judge", "mean", "`figure` of the response that is compared with the limit: mean, p50, p95 or p99")
	fs.DurationVar(&o.ramp.step, "step", 2*time.Second, "the least `time` that each number of clients is measured for")
	fs.IntVar(&o.ramp.max, "max-clients", 1000, "largest `number` of clients that is tried")
	fs.Float64Var(&o.ramp.share, "share", 0, "`share` of the peer's capacity that you may use, such as 0.5")
	fs.StringVar(&o.loadCommand, "load-command", "", "shell `command` that prints the load of the peer in percent")
	fs.StringVar(&o.svg, "svg", "", "`file` for a plot of throughput and response")
	fs.StringVar(&o.history, "history", "", "`file` with a pool's Stats, one JSON object per line")
	fs.IntVar(&o.total, "total", 0, "`number` of connections to be divided")
	fs.IntVar(&o.processes, "processes", 1, "`number` of processes that share the connections")
	fs.BoolVar(&o.json, "json", false, "print the report as one JSON object")
	fs.BoolVar(&o.quiet, "quiet", false, "nothing on stderr while it runs")
	if err := parseTeaching(fs, args, stdout, sizeTeaching, "\n"+probeTeaching+sizeExamples); err != nil {
		return o, err
	}
	fs.Visit(func(f *flag.Flag) { o.explicit[f.Name] = true })
	return o, o.check()
}

// parseTeaching parses args. For -h it prints the usage on stdout and returns
// flag.ErrHelp; it prints no other error.
func parseTeaching(fs *flag.FlagSet, args []string, stdout io.Writer, before, after string) error {
	fs.SetOutput(io.Discard) // the caller prints an error once, without the whole usage
	fs.Usage = func() {}
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		var b bytes.Buffer
		b.WriteString(before)
		fs.SetOutput(&b)
		fs.PrintDefaults()
		b.WriteString(after)
		if _, err := b.WriteTo(stdout); err != nil {
			return err
		}
		return flag.ErrHelp
	case err != nil:
		return err
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q: %s takes flags only", fs.Arg(0), fs.Name())
	}
	return nil
}

// check finds the mode, and every flag that does not fit the mode.
func (o *sizeOptions) check() error {
	var modes []string
	var fits []string
	for _, m := range sizeModes {
		if o.explicit[m.flag] {
			modes = append(modes, "-"+m.flag)
			o.mode, fits = m.flag, m.other
		}
	}
	switch len(modes) {
	case 0:
		return errors.New("nothing to size: give -users or -concurrency (arithmetic), -to or -own (experiment), -history, or -total")
	case 1:
	default:
		return fmt.Errorf("%s are different ways to a size: choose one", strings.Join(modes, " and "))
	}
	for name := range o.explicit {
		if name != o.mode && name != "json" && name != "quiet" && !slices.Contains(fits, name) {
			return fmt.Errorf("-%s has no meaning with -%s", name, o.mode)
		}
	}
	if o.processes < 1 {
		return fmt.Errorf("-processes is %d: it must be at least 1", o.processes)
	}
	switch o.mode {
	case "users", "concurrency":
		return o.checkArithmetic()
	case "to", "own":
		return o.checkExperiment()
	case "history":
		if o.history == "" {
			return errors.New("-history needs the name of a file")
		}
	case "total":
		if o.total < o.processes {
			return fmt.Errorf("-total %d cannot be divided among %d processes: at least one each", o.total, o.processes)
		}
	}
	return nil
}

func (o *sizeOptions) checkArithmetic() error {
	n, what := o.users, "-users"
	if o.mode == "concurrency" {
		n, what = o.concurrency, "-concurrency"
	}
	const most = 10_000_000
	switch {
	case n < 1 || n > most:
		return fmt.Errorf("%s is %d: it must be from 1 to %d", what, n, most)
	case o.mode == "users" && o.think <= 0:
		return errors.New("-users needs -think, the time between an answer and the next request, such as -think 10s; for threads that never pause use -concurrency")
	case o.service <= 0:
		return fmt.Errorf("-service is %v: it must be positive", o.service)
	case !(o.fraction > 0 && o.fraction <= 1):
		return fmt.Errorf("-fraction is %v: it must be above 0, and 1 at most", o.fraction)
	case !(o.mayWait > 0 && o.mayWait < 1):
		return fmt.Errorf("-may-wait is %v: it must be between 0 and 1, such as 0.01 for one request in a hundred", o.mayWait)
	case o.requests < 1000 || o.requests > 1_000_000_000:
		return fmt.Errorf("-requests is %d: it must be from 1000 to 1000000000", o.requests)
	case n < o.processes:
		return fmt.Errorf("%s %d over %d processes leaves some without any", what, n, o.processes)
	}
	for word := range strings.FieldsFuncSeq(o.connectionsText, func(r rune) bool { return r == ',' || r == ' ' }) {
		c, err := strconv.Atoi(word)
		if err != nil || c < 1 || c > n {
			return fmt.Errorf("-connections: %q is not a number from 1 to %d, that of %s", word, n, what)
		}
		o.connections = append(o.connections, c)
	}
	if len(o.connections) > 100 {
		return fmt.Errorf("-connections: %d numbers are too many for a table: 100 at most", len(o.connections))
	}
	slices.Sort(o.connections)
	o.connections = slices.Compact(o.connections)
	return nil
}

func (o *sizeOptions) checkExperiment() (err error) {
	r := &o.ramp
	if o.mode == "own" {
		if o.work, err = workersOf(o.own); err != nil {
			return fmt.Errorf("-own: %w", err)
		}
	} else if o.target, err = o.targetFlags.target(); err != nil {
		return err
	}
	switch {
	case r.limit <= 0:
		return fmt.Errorf("-limit is %v: it must be positive", r.limit)
	case r.limit > o.targetFlags.timeout:
		return fmt.Errorf("-limit %v is beyond -timeout %v: raise the latter", r.limit, o.targetFlags.timeout)
	case !slices.Contains([]string{"mean", "p50", "p95", "p99"}, r.judge):
		return fmt.Errorf("-judge is %q: it must be mean, p50, p95 or p99", r.judge)
	case r.step < 10*time.Millisecond:
		return fmt.Errorf("-step is %v: it must be 10ms at least, and a second or more for numbers to rely on", r.step)
	case r.max < 1 || r.max > 100_000:
		return fmt.Errorf("-max-clients is %d: it must be from 1 to 100000", r.max)
	case r.share < 0 || r.share > 1:
		return fmt.Errorf("-share is %v: it must be above 0, and 1 at most", r.share)
	case r.share > 0 && o.loadCommand == "":
		return errors.New("-share needs -load-command, a command that prints the load of the peer in percent")
	}
	if o.loadCommand != "" {
		r.load = commandLoad(o.loadCommand)
	}
	if o.svg != "" {
		if err := canWrite(o.svg); err != nil {
			return fmt.Errorf("-svg: %w", err)
		}
	}
	return nil
}

// sizeReport is the result of size, as JSON or as text.
type sizeReport interface{ text() string }

// size is the command.
func size(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseSize(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "connpool size: %v\nconnpool size -h explains the flags.\n", err)
		return exitUsage
	}
	live := newNotices(stderr, o.quiet)
	var r sizeReport
	switch o.mode {
	case "users", "concurrency":
		r, err = calculate(ctx, o, live)
	case "to", "own":
		r, err = experimentOn(ctx, o, live)
	case "history":
		r, err = adviseFromFile(o)
	case "total":
		r = divide(o.total, o.processes)
	}
	live.end()
	if err == nil {
		err = writeReport(stdout, r, o.json)
	}
	if err != nil {
		fmt.Fprintf(stderr, "connpool size: %v\n", err)
		return exitBroken
	}
	return exitOK
}

func writeReport(w io.Writer, r sizeReport, asJSON bool) error {
	var b bytes.Buffer
	if asJSON {
		enc := json.NewEncoder(&b)
		enc.SetIndent("", "  ")
		if err := enc.Encode(r); err != nil {
			return err
		}
	} else {
		b.WriteString(r.text())
	}
	if _, err := b.WriteTo(w); err != nil {
		return fmt.Errorf("the report could not be written: %w", err)
	}
	return nil
}

// advice is what to set, and the command that verifies it.
type advice struct {
	Text    string `json:"text"`
	Command string `json:"measure_with"`
}

func adviceText(all []advice) string {
	var b strings.Builder
	b.WriteString("\nwhat to do with it\n")
	for _, a := range all {
		fmt.Fprintf(&b, "  %s\n      measure: %s\n", a.Text, a.Command)
	}
	return b.String()
}

// division is a number of connections over several processes.
type division struct {
	Total     int `json:"total"`
	Processes int `json:"processes"`
	Each      int `json:"each"`
	Sum       int `json:"sum"` // never more than Total
}

func divide(total, processes int) division {
	each := total / processes
	return division{total, processes, each, each * processes}
}

func (d division) String() string {
	if d.Each == 0 {
		return fmt.Sprintf("%d over %d processes: less than one each, so fewer processes may connect", d.Total, d.Processes)
	}
	return fmt.Sprintf("%d over %d processes: %d each (%d of %d)", d.Total, d.Processes, d.Each, d.Sum, d.Total)
}

func (d division) advice() []advice {
	return []advice{{
		fmt.Sprintf("MaxPerAddr: %d in each process, if the total is right.", d.Each),
		fmt.Sprintf("connpool size -to ADDR -probe PROBE -processes %d", d.Processes),
	}}
}

func (d division) text() string { return d.String() + "\n" + adviceText(d.advice()) }
