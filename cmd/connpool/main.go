// Command connpool demonstrates package connpool, and makes measurements against the
// user's own servers. Run it without arguments, or as "connpool help", for a list of
// commands.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// The exit statuses of every command. A script must be able to tell a broken promise of
// the pool from a mistake on the command line.
const (
	exitOK     = 0
	exitBroken = 1 // a promise was broken, or the run could not be made
	exitUsage  = 2
)

// A command is one word after "connpool". Its run function gets the arguments after that
// word, ends early when ctx is done, and returns the exit status.
type command struct {
	name, summary string
	run           func(ctx context.Context, args []string, stdout, stderr io.Writer) int
}

var commands = []command{
	{"demo", "break 40 servers under a pool and count what its borrowers notice", demo},
	{"size", "how many connections: by arithmetic, by experiment, or from what a pool did", size},
	{"load", "what a pool saves with your own server: pooled against a dial for each request", load},
	{"gateway", "many clients on few connections to a server", gatewayCommand},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks for an early end with a report. After stop, a second signal
	// ends the process as usual.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process: it runs the command that args name.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	name := "help"
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "help", "-h", "-help", "--help":
		switch {
		case len(args) > 0 && args[0] == "-markdown":
			commandPage(stdout)
			return exitOK
		case len(args) > 0:
			return run(ctx, []string{args[0], "-h"}, stdout, stderr)
		}
		overview(stdout)
		return exitOK
	}
	names := make([]string, len(commands))
	for i, c := range commands {
		if c.name == name {
			return c.run(ctx, args, stdout, stderr)
		}
		names[i] = c.name
	}
	fmt.Fprintf(stderr, "connpool: there is no command %q; there is: %s\nconnpool help says what each does.\n",
		name, strings.Join(names, ", "))
	return exitUsage
}

func overview(w io.Writer) {
	fmt.Fprint(w, `connpool: client connections that are lent, taken back and lent again

A program that talks to servers over its own protocol needs connections, and
opening one for each exchange is slow. A pool keeps them. What a pool must
never do is lend one that is dead, that still holds the reply to somebody
else's question, or that somebody else is using; and it must not open more
than it may. These commands let you watch that, find out how many connections
you need and what keeping them saves, and share few among many programs.

usage: connpool <command> [flags]

`)
	for _, c := range commands {
		fmt.Fprintf(w, "  %-8s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, `
"connpool help <command>" explains one of them.

examples:
  connpool demo
  connpool demo -for 30s -workers 200 -max-open 16
  connpool size -users 10000 -think 10s -service 100ms
  connpool size -to tcp://127.0.0.1:6379 -probe redis
  connpool load -to tcp://127.0.0.1:6379 -probe redis
  connpool gateway -framing resp -listen tcp://127.0.0.1:6380 -to tcp://127.0.0.1:6379 -max-open 8
`)
}
