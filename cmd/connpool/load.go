package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

const loadTeaching = `usage: connpool load [-to ADDR -probe PROBE] [flags]

What does a pool save with your own server? The same requests are made in three
ways, in turns within one run, so that whatever else happens on the machine
happens to all of them:

  pool            each request borrows a connection and gives it back
  dial            each request opens a connection and closes it (TLS sessions
                  are resumed, as a careful program would)
  one per worker  each worker keeps a connection for itself

The first two differ in speed. The last two differ little in speed, but in what
they hold: with -think, workers that are not at work hold no connection of a
pool, while connections of their own stay open.

Meanwhile the peer has up to two connections per worker open, and one more for
each that is being dialed.

Without -to it starts a server of its own on the loopback, which echoes lines.
That is the worst case for a pool: nowhere is a connection opened as cheaply.

flags:
`

const loadExamples = `
examples:
  connpool load                                                   a server of its own
  connpool load -to tcp://127.0.0.1:6379 -probe redis -workers 50
  connpool load -to tcp://db.example:5432 -probe postgres -for 30s
  connpool load -to tls://api.example:443 -probe http:/health -workers 4
  connpool load -to tcp://127.0.0.1:6379 -probe redis -workers 50 -max-per-addr 5
  connpool load -workers 50 -think 5ms                            see "held"
  connpool load -n 10000 -json | jq .ratio

Ctrl-C ends it early, with a report. The status is 1 if there were no answers.
`

// loadOptions holds the settings from the command line of load.
type loadOptions struct {
	target     *target
	own        bool // load starts a server of its own
	flags      targetFlags
	workers    int
	span       time.Duration // of the whole run
	requests   int           // of each way; 0: span decides
	rounds     int
	think      time.Duration
	maxPerAddr int
	json       bool
	quiet      bool
}

// parseLoad reads the flags. It returns flag.ErrHelp after it printed the usage on
// stdout, and any other error without printing anything.
func parseLoad(args []string, stdout io.Writer) (loadOptions, error) {
	var o loadOptions
	fs := flag.NewFlagSet("connpool load", flag.ContinueOnError)
	o.flags.register(fs)
	fs.IntVar(&o.workers, "workers", 8, "`number` of workers, each with one request at a time")
	fs.DurationVar(&o.span, "for", 6*time.Second, "`duration` of the whole run")
	fs.IntVar(&o.requests, "n", 0, "`number` of requests made in each way, instead of -for")
	fs.IntVar(&o.rounds, "rounds", 5, "`number` of turns that each way gets")
	fs.DurationVar(&o.think, "think", 0, "`time` that a worker pauses between two requests")
	fs.IntVar(&o.maxPerAddr, "max-per-addr", 0, "`number` of connections that the pool may open; 0: as many as there are workers at work")
	fs.BoolVar(&o.json, "json", false, "print the report as one JSON object")
	fs.BoolVar(&o.quiet, "quiet", false, "nothing on stderr while it runs")
	if err := parseTeaching(fs, args, stdout, loadTeaching, "\n"+probeTeaching+loadExamples); err != nil {
		return o, err
	}
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	switch {
	case o.workers < 1 || o.workers > 10_000:
		return o, fmt.Errorf("-workers is %d: it must be from 1 to 10000", o.workers)
	case o.span <= 0:
		return o, fmt.Errorf("-for is %v: it must be positive, such as 6s", o.span)
	case o.requests < 0:
		return o, fmt.Errorf("-n is %d: it must be positive", o.requests)
	case given["n"] && given["for"]:
		return o, errors.New("-n and -for contradict each other: choose one")
	case o.rounds < 1 || o.rounds > 1000:
		return o, fmt.Errorf("-rounds is %d: it must be from 1 to 1000", o.rounds)
	case o.requests > 0 && o.requests < o.rounds:
		return o, fmt.Errorf("-n %d is less than one request for each of %d rounds", o.requests, o.rounds)
	case o.think < 0:
		return o, fmt.Errorf("-think is %v: it must not be negative", o.think)
	case o.maxPerAddr < 0:
		return o, fmt.Errorf("-max-per-addr is %d: it must not be negative", o.maxPerAddr)
	}
	if !given["to"] {
		for _, name := range []string{"probe", "tls-ca", "tls-insecure-trust-anyone"} {
			if given[name] {
				return o, fmt.Errorf("-%s needs -to: without it, load talks to a server of its own", name)
			}
		}
		o.own = true
		return o, nil
	}
	var err error
	o.target, err = o.flags.target()
	return o, err
}

// load is the command.
func load(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseLoad(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "connpool load: %v\nconnpool load -h explains the flags.\n", err)
		return exitUsage
	}
	live := newNotices(stderr, o.quiet)
	r, err := comparing(ctx, o, live)
	live.end()
	if err == nil {
		err = writeReport(stdout, r, o.json)
	}
	if err != nil {
		fmt.Fprintf(stderr, "connpool load: %v\n", err)
		return exitBroken
	}
	return exitOK
}

// comparing makes a whole run: the server if needed, the rounds, the report.
func comparing(ctx context.Context, o loadOptions, live *notices) (*loadReport, error) {
	during, greeting := ctx, func() error { return nil }
	if o.own {
		s, err := startEchoServer(noWork)
		if err != nil {
			return nil, fmt.Errorf("no server of its own on the loopback: %w", err)
		}
		defer s.close()
		o.flags.to, o.flags.probe = "tcp://"+s.addr(), "line"
		if o.target, err = o.flags.target(); err != nil {
			return nil, err
		}
	}
	cfg := o.target.poolConfig()
	cfg.MaxPerAddr = o.maxPerAddr
	pool, err := connpool.New(cfg)
	if err != nil {
		return nil, err
	}
	ways := []way{newPooled(o.target, pool), newDialing(o.target), newKeeping(o.target, o.workers)}
	defer func() {
		for _, w := range ways {
			w.close()
		}
	}()
	live.say("%v, probe %s: %d workers, %d rounds of %d ways; Ctrl-C ends it with a report",
		o.target.addr, o.target.probe.name, o.workers, o.rounds, len(ways))
	r := newLoadReport(o, ways)
	if !o.own {
		during, greeting = o.target.listening(ctx)
	}
	began := time.Now()
	for round := range o.rounds {
		for i := range ways {
			at := (round + i) % len(ways) // so that no way always comes first
			r.add(at, o.turn(during, ways[at], round, live))
			if during.Err() != nil {
				break
			}
		}
		r.endRound()
		if during.Err() != nil {
			break
		}
	}
	if err := greeting(); err != nil {
		return nil, err
	}
	r.Seconds, r.Interrupted = time.Since(began).Seconds(), ctx.Err() != nil
	return r, r.finish(o, ways)
}
