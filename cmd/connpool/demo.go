package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"
)

// demoOptions holds the settings from the demo's command line.
type demoOptions struct {
	addrs, workers, maxOpen int
	span                    time.Duration // of the storm
	compare                 time.Duration // of each half of the comparison; 0: none
	seed                    uint64
	json, quiet             bool
}

const demoTeaching = `usage: connpool demo [flags]

The demo starts servers of its own on the loopback (TCP, TLS 1.3 and Unix
sockets in turn) and lets workers talk to them through one pool that may open
fewer connections than there are servers. Meanwhile it

  - cuts connections that are idle and connections that are in use, politely
    (FIN) and rudely (RST),
  - stops servers and starts them again,
  - sends bytes that nobody asked for,
  - answers late, to borrowers that have given up already.

A late answer to one borrower, read by the next, is the worst thing that can
happen in a pool. So every request carries a token, every reply repeats it, and
each reply is compared with its request.

What a borrower may notice is the failure of a connection that it is using, or
of a server that is down. What it must not notice is the failure of one that
died while it lay idle: the table lists those as avoidable.

A run fails (status 1) if a reply belonged to somebody else, if two requests met
on one connection, if more connections were open than allowed, or if anything
was left over in the end. Ctrl-C ends it early, with the report.

flags:
`

const demoExamples = `
examples:
  connpool demo                             five seconds of trouble, then the table
  connpool demo -for 1m -seed 7             longer, and other trouble
  connpool demo -max-open 4 -workers 200    what scarcity does to the waiting time
  connpool demo -json -quiet | jq .foreign_replies
`

// parseDemo reads the flags. It returns flag.ErrHelp after it printed the usage on
// stdout, and any other error without printing anything.
func parseDemo(args []string, stdout io.Writer) (demoOptions, error) {
	var o demoOptions
	fs := flag.NewFlagSet("connpool demo", flag.ContinueOnError)
	fs.IntVar(&o.addrs, "addrs", 40, "`number` of servers, each with an address of its own")
	fs.IntVar(&o.workers, "workers", 64, "`number` of workers, each with one exchange at a time")
	fs.IntVar(&o.maxOpen, "max-open", 24, "`number` of connections that may be open: the pool's MaxOpen")
	fs.DurationVar(&o.span, "for", 5*time.Second, "`duration` of the storm")
	fs.DurationVar(&o.compare, "compare", time.Second, "`duration` of each half of the comparison with dialing for each exchange; 0 leaves it out")
	fs.Uint64Var(&o.seed, "seed", 1, "a `number` that decides which faults follow on each other, and who talks to whom")
	fs.BoolVar(&o.json, "json", false, "print the report as one JSON object")
	fs.BoolVar(&o.quiet, "quiet", false, "no live line while it runs")

	if err := parseTeaching(fs, args, stdout, demoTeaching, demoExamples); err != nil {
		return o, err
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"addrs", o.addrs}, {"workers", o.workers}, {"max-open", o.maxOpen}} {
		if n.value < 1 || n.value > 10_000 {
			return o, fmt.Errorf("-%s is %d: it must be from 1 to 10000", n.flag, n.value)
		}
	}
	if o.span <= 0 {
		return o, fmt.Errorf("-for is %v: it must be positive, such as 5s", o.span)
	}
	if o.compare < 0 {
		return o, fmt.Errorf("-compare is %v: it must be positive, or 0 for no comparison", o.compare)
	}
	return o, nil
}

// demo is the command.
func demo(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseDemo(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "connpool demo: %v\nconnpool demo -h explains the flags.\n", err)
		return exitUsage
	}
	live := newLiveLine(stderr, o)
	r, err := play(ctx, o, live)
	if err != nil {
		fmt.Fprintf(stderr, "connpool demo: %v\n", err)
		return exitBroken
	}
	r.judge()
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(r)
	} else {
		_, err = io.WriteString(stdout, r.table())
	}
	if err != nil {
		fmt.Fprintf(stderr, "connpool demo: the report could not be written: %v\n", err)
		return exitBroken
	}
	return r.exitStatus()
}

// play runs the whole demo: servers, storm, comparison, and the count of what is still
// open after everything was closed. ctx ends it early; closing and counting do not depend
// on ctx.
func play(ctx context.Context, o demoOptions, live *liveLine) (*report, error) {
	if err := openNetpoller(); err != nil {
		return nil, err
	}
	before := footprintNow()
	f, err := startFleet(o)
	if err != nil {
		return nil, err
	}
	defer f.close()

	r := newReport(o, f)
	if err := storm(ctx, o, f, live, r); err != nil {
		return nil, err
	}
	if o.compare > 0 && ctx.Err() == nil {
		if err := compare(ctx, o, f, r); err != nil {
			return nil, err
		}
	}
	r.Interrupted = ctx.Err() != nil

	f.close()
	eventually(leakGrace, func() bool {
		left := footprintNow().beyond(before)
		r.Left.Goroutines, r.Left.Descriptors = left.goroutines, left.descriptors
		return left.goroutines == 0 && left.descriptors <= 0
	})
	return r, nil
}
