package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// experiment is the report of a ramp. Times are in seconds.
type experiment struct {
	Address string  `json:"address"`
	Probe   string  `json:"probe"`
	Limit   float64 `json:"limit_s"`
	Judge   string  `json:"judge"`
	Share   float64 `json:"share,omitempty"`

	Levels []level `json:"levels"` // by clients
	Knee   knee    `json:"knee"`
	Within int     `json:"limit_clients"` // the most clients within all bounds
	Ended  string  `json:"ended_by"`

	// Disturbed: the figures contradict each other, so something else was using the
	// machine or the peer.
	Disturbed bool `json:"disturbed"`

	// Beyond is where the limit would be if the throughput stayed at its ceiling, for a
	// ramp that ended before the limit: response = clients/throughput.
	Beyond int `json:"limit_extrapolated,omitempty"`

	KneeShare  *division `json:"knee_division,omitempty"`
	LimitShare *division `json:"limit_division,omitempty"`
	Plot       string    `json:"svg,omitempty"`
	Advice     []advice  `json:"advice"`

	lastErr error
}

func experimentOn(ctx context.Context, o sizeOptions, live *notices) (*experiment, error) {
	during, greeting := ctx, func() error { return nil }
	if o.work != nil {
		s, err := startEchoServer(o.work)
		if err != nil {
			return nil, fmt.Errorf("no server of its own on the loopback: %w", err)
		}
		defer s.close()
		o.targetFlags.to, o.targetFlags.probe = "tcp://"+s.addr(), "line"
		if o.target, err = o.targetFlags.target(); err != nil {
			return nil, err
		}
	} else {
		during, greeting = o.target.listening(ctx)
	}
	r := &ramp{rampOptions: o.ramp, crew: newCrew(during, o.target), live: live}
	live.say("%v, probe %s: more and more clients, until the %s response exceeds %v (%v each; Ctrl-C ends it with a report)",
		o.target.addr, o.target.probe.name, o.ramp.judge, o.ramp.limit, o.ramp.step)
	ended, within, err := r.run(during)
	if spoke := greeting(); spoke != nil {
		return nil, spoke
	}
	if err != nil {
		return nil, err
	}
	e := &experiment{Address: o.target.addr.String(), Probe: o.target.probe.name, Limit: o.ramp.limit.Seconds(), Judge: o.ramp.judge,
		Share: o.ramp.share, Levels: r.sorted(), Within: within, Ended: ended}
	e.Knee, e.Disturbed = kneeOf(e.Levels), disturbed(e.Levels)
	for _, l := range e.Levels {
		if l.lastErr != nil {
			e.lastErr = l.lastErr
		}
	}
	if e.Knee.Clients == 0 {
		switch {
		case ended == endedByCtx:
			return nil, errors.New("interrupted before anything was measured")
		case e.lastErr != nil:
			return nil, fmt.Errorf("not even one client gets an answer: %w", e.lastErr)
		}
		return nil, fmt.Errorf("not even one client gets an answer within %v: is it the right -probe?", o.ramp.step+2*o.ramp.limit)
	}
	if ended != endedByResponse && ended != endedByCtx && e.Knee.Reached {
		e.Beyond = int(math.Min(e.Knee.Ceiling*e.Limit, math.MaxInt32))
	}
	if o.processes > 1 {
		k, l := divide(e.Knee.Clients, o.processes), divide(e.Within, o.processes)
		e.KneeShare, e.LimitShare = &k, &l
	}
	e.Advice = e.advise(o)
	if o.svg != "" && ended != endedByCtx {
		if err := writeFileAtOnce(o.svg, []byte(e.plot())); err != nil {
			return nil, fmt.Errorf("-svg: %w", err)
		}
		e.Plot = o.svg
	}
	return e, nil
}

func (e *experiment) advise(o sizeOptions) []advice {
	processes, inEach := "", ""
	knee, limit := e.Knee.Clients, e.Within
	if o.processes > 1 {
		processes, inEach = fmt.Sprintf(" -processes %d", o.processes), " in each process"
		knee, limit = e.KneeShare.Each, e.LimitShare.Each
	}
	peer := o.targetFlags.flags()
	if o.work != nil {
		peer = "-to ADDR -probe PROBE"
	}
	again := fmt.Sprintf("connpool size %s -limit %v -judge %s -step %v%s", peer, o.ramp.limit, e.Judge, 2*o.ramp.step, processes)
	if o.ramp.share > 0 {
		again += fmt.Sprintf(" -share %v -load-command %s", o.ramp.share, quoted(o.loadCommand))
	}
	var all []advice
	switch {
	case e.Share > 0:
		all = append(all, advice{fmt.Sprintf("MaxPerAddr: %d%s leaves the others their part of the peer.", limit, inEach), again})
	case e.Knee.Reached && e.Within > e.Knee.Clients:
		all = append(all, advice{fmt.Sprintf("MaxPerAddr: %d%s keeps the peer just busy, and the rest queues in the pool. More than %d is too slow.", knee, inEach, limit), again})
	case e.Knee.Reached:
		all = append(all, advice{fmt.Sprintf("MaxPerAddr: %d%s. The peer is no longer within bounds where it is just busy.", min(knee, limit), inEach), again})
	default:
		all = append(all, advice{fmt.Sprintf("MaxPerAddr: %d%s at least; the peer could do more, but the measurement ended there.", limit, inEach),
			strings.Replace(again, " -limit", fmt.Sprintf(" -max-clients %d -limit", min(4*o.ramp.max, 100_000)), 1)})
	}
	return append(all,
		advice{"What a pool saves you with this peer, against a dial for each request.",
			fmt.Sprintf("connpool load %s -workers %d", peer, max(1, e.Knee.Clients))},
		advice{"Whether your program needs as many: record its pool's Stats.", "connpool size -history FILE" + processes})
}

// why returns the reason why the ramp ended.
func (e *experiment) why() string {
	switch e.Ended {
	case endedByResponse:
		return fmt.Sprintf("with more, the %s response exceeds %s", e.Judge, seconds(e.Limit))
	case endedByErrors:
		if e.lastErr == nil { // nothing failed, but see level.sound
			return "with more, some clients get no answer within a step: a longer -step may serve them"
		}
		return fmt.Sprintf("with more, exchanges fail: %v", e.lastErr)
	case endedByHandles:
		return fmt.Sprintf("this machine cannot open more, whatever the peer could do: %v", e.lastErr)
	case endedByShare:
		return fmt.Sprintf("the load of the peer has reached %.4g %%", 100*e.Share)
	case endedByMax:
		return "more were not tried (-max-clients)"
	}
	return "interrupted there"
}

func (e *experiment) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "connpool size: %s, probe %s, back to back, a connection for each client\n\n", e.Address, e.Probe)
	loads := false
	for _, l := range e.Levels {
		loads = loads || l.Load != nil
	}
	fmt.Fprintf(&b, "  %7s   %10s   %9s   %9s   %9s   %9s   %6s", "clients", "requests/s", "mean", "p50", "p95", "p99", "errors")
	if loads {
		b.WriteString("     load")
	}
	b.WriteString("\n")
	for _, l := range e.Levels {
		fmt.Fprintf(&b, "  %7d   %10s   %9s   %9s   %9s   %9s   %6s", l.Clients, rate(l.PerSecond),
			seconds(l.Mean), seconds(l.P50), seconds(l.P95), seconds(l.P99), grouped(l.Errors))
		if l.Load != nil {
			fmt.Fprintf(&b, "   %4.1f %%", *l.Load)
		}
		b.WriteString("\n")
	}
	k := e.Knee
	if k.Reached {
		fmt.Fprintf(&b, "\n  knee     %d clients get %.0f %% of the best throughput, %s a second: the capacity of the peer. With more, a\n"+
			"           request only waits longer. (The line of one client meets the ceiling at %.1f.)\n",
			k.Clients, min(100, 100*k.PerSecond/k.Ceiling), rate(k.Ceiling), k.Line)
	} else {
		fmt.Fprintf(&b, "\n  knee     not reached: with %d clients the throughput, %s a second, may still grow.\n", e.Levels[len(e.Levels)-1].Clients, rate(k.Ceiling))
	}
	fmt.Fprintf(&b, "  limit    %d clients: %s.\n", e.Within, e.why())
	if e.Ended == endedByResponse {
		b.WriteString("           It sizes the line before the peer, not the peer: between knee and limit nothing is gained but waiting.\n")
	}
	if e.Beyond > e.Within {
		fmt.Fprintf(&b, "           By Little's law the %s response would reach %s at %s clients; nobody has tried.\n", e.Judge, seconds(e.Limit), grouped(uint64(e.Beyond)))
	}
	if e.Disturbed {
		b.WriteString("  beware   Some numbers of clients are much slower than both fewer and more. The peer, or this machine, was\n" +
			"           busy with something else: measure again when it is not, and with a longer -step.\n")
	}
	if e.KneeShare != nil {
		fmt.Fprintf(&b, "  shares   knee: %v; limit: %v.\n", e.KneeShare, e.LimitShare)
	}
	if e.Plot != "" {
		fmt.Fprintf(&b, "  plot     %s\n", e.Plot)
	}
	return b.String() + adviceText(e.Advice)
}

// commandLoad runs the user's command for each level, in a shell, and reads a percentage
// from its output.
func commandLoad(command string) func(context.Context, int) (float64, error) {
	return func(ctx context.Context, clients int) (float64, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		shell := []string{"sh", "-c"}
		if runtime.GOOS == "windows" {
			shell = []string{"cmd", "/C"}
		}
		cmd := exec.CommandContext(ctx, shell[0], shell[1], command)
		cmd.Env = append(os.Environ(), "CONNPOOL_CLIENTS="+strconv.Itoa(clients))
		cmd.WaitDelay = time.Second // for processes that the command leaves behind with its output open
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return 0, fmt.Errorf("-load-command: %w: %s", err, shortened([]byte(strings.TrimSpace(stderr.String()))))
		}
		text := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(string(out)), "%"))
		load, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(load) || load < 0 {
			return 0, fmt.Errorf("-load-command printed %q: it must print one number, the load in percent, such as 47.5", shortened(out))
		}
		return load, nil
	}
}
