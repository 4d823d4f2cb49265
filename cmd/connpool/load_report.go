package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// loadReport is the report of load. Times are in seconds.
type loadReport struct {
	Address     string    `json:"address"`
	OwnServer   bool      `json:"own_server"`
	Probe       string    `json:"probe"`
	Workers     int       `json:"workers"`
	Think       float64   `json:"think_s"`
	MaxPerAddr  int       `json:"max_per_addr,omitempty"`
	Rounds      int       `json:"rounds"` // that were completed
	Seconds     float64   `json:"seconds"`
	Interrupted bool      `json:"interrupted"`
	Ways        []wayPace `json:"ways"`

	// Ratio is the pool's throughput divided by that of dialing, over all rounds. The
	// least and the most of a single round show how reliable it is.
	Ratio      float64    `json:"ratio"`
	RatioRange [2]float64 `json:"ratio_range"`
	Saved      float64    `json:"saved_per_request_s"` // mean of dial less mean of pool
	BreakEven  *breakEven `json:"break_even,omitempty"`
	Advice     []advice   `json:"advice"`

	turns [][]*turn // by way, of completed rounds
	now   []*turn   // of the current round
}

// wayPace is one line of the table.
type wayPace struct {
	Name      string            `json:"name"`
	Answers   uint64            `json:"answers"`
	Errors    map[string]uint64 `json:"errors,omitempty"`
	PerSecond float64           `json:"per_second"`
	Mean      float64           `json:"mean_s"`
	P50       float64           `json:"p50_s"`
	P99       float64           `json:"p99_s"`
	Opened    uint64            `json:"opened"`
	Held      int               `json:"held"`

	firstErr error
}

// breakEven is the rate of requests from which a pool saves dials.
//
// A request finds an open connection if the previous one was no longer ago than
// IdleTimeout. If requests come at random, r a second, that holds for the share
// 1-exp(-r*IdleTimeout) of them, which is a half at r = ln 2/IdleTimeout. Below that rate
// most requests dial anyway, and the pool's idle connections serve nobody.
type breakEven struct {
	IdleTimeout float64 `json:"idle_timeout_s"`
	PerMinute   float64 `json:"requests_per_minute"`
}

const defaultIdleTimeout = 2 * time.Minute // of connpool.Config

func newLoadReport(o loadOptions, ways []way) *loadReport {
	return &loadReport{Address: o.target.addr.String(), OwnServer: o.own, Probe: o.target.probe.name, Workers: o.workers,
		Think: o.think.Seconds(), MaxPerAddr: o.maxPerAddr, turns: make([][]*turn, len(ways)), now: make([]*turn, len(ways))}
}

// add stores the result of a way in the current round.
func (r *loadReport) add(at int, t *turn) { r.now[at] = t }

// endRound counts the round if each way had its turn: an interrupted round would favour
// the ways that came first.
func (r *loadReport) endRound() {
	if !slices.Contains(r.now, nil) {
		r.Rounds++
		for at, t := range r.now {
			r.turns[at] = append(r.turns[at], t)
		}
	}
	clear(r.now)
}

var errNothingMeasured = errors.New("interrupted before each way had its turn")

// finish computes the figures. It returns an error if there are none.
func (r *loadReport) finish(o loadOptions, ways []way) error {
	if r.Rounds == 0 {
		return errNothingMeasured
	}
	for at, w := range ways {
		all := turn{errors: make(map[string]uint64)}
		for _, t := range r.turns[at] {
			all.add(t)
		}
		p := wayPace{Name: w.name(), Answers: all.answers, Errors: all.errors, PerSecond: perSecond(all.answers, all.seconds),
			P50: all.seen.quantile(0.50).Seconds(), P99: all.seen.quantile(0.99).Seconds(),
			Opened: w.opened(), Held: w.held(), firstErr: all.firstErr}
		if all.answers > 0 {
			p.Mean = all.sum.Seconds() / float64(all.answers)
		}
		r.Ways = append(r.Ways, p)
	}
	pool, dial := r.Ways[0], r.Ways[1]
	if pool.Answers == 0 || dial.Answers == 0 {
		for _, p := range r.Ways {
			if p.firstErr != nil && p.Answers == 0 {
				return fmt.Errorf("no answer (%s): %w", p.Name, p.firstErr)
			}
		}
		return errors.New("no answer: give it longer with -for")
	}
	r.Ratio = pool.PerSecond / dial.PerSecond
	r.RatioRange = [2]float64{math.Inf(1), 0}
	for i := range r.turns[0] {
		p, d := r.turns[0][i], r.turns[1][i]
		if p.answers == 0 || d.answers == 0 {
			continue
		}
		ratio := float64(p.answers) / p.seconds / (float64(d.answers) / d.seconds)
		r.RatioRange[0], r.RatioRange[1] = min(r.RatioRange[0], ratio), max(r.RatioRange[1], ratio)
	}
	if r.RatioRange[1] == 0 {
		r.RatioRange = [2]float64{r.Ratio, r.Ratio}
	}
	r.Saved = dial.Mean - pool.Mean
	if r.Saved > 0 {
		r.BreakEven = &breakEven{defaultIdleTimeout.Seconds(), 60 * math.Ln2 / defaultIdleTimeout.Seconds()}
	}
	r.advise(o)
	return nil
}

func (r *loadReport) advise(o loadOptions) {
	peer := o.flags.flags()
	if r.OwnServer {
		peer = "-to ADDR -probe PROBE"
		r.Advice = append(r.Advice, advice{"This was a server of its own. With yours, the figures are others.", "connpool load " + peer})
	}
	if r.Saved <= 0 {
		r.Advice = append(r.Advice, advice{"Here a pool saves no time. Where opening a connection costs as little as this, do without.",
			fmt.Sprintf("connpool load %s -workers %d -for 30s", peer, r.Workers)})
	}
	r.Advice = append(r.Advice,
		advice{"How many connections the peer can use at once decides MaxPerAddr.", "connpool size " + peer},
		advice{"What a limit on them costs: fewer connections than workers.",
			fmt.Sprintf("connpool load %s -workers %d -max-per-addr %d", peer, r.Workers, max(1, r.Workers/4))})
}

func (r *loadReport) text() string {
	var b strings.Builder
	whose, early := "", ""
	if r.OwnServer {
		whose = " (an echo server of its own)"
	}
	if r.Interrupted {
		early = ", interrupted"
	}
	fmt.Fprintf(&b, "connpool load: %s%s, probe %s, %d workers", r.Address, whose, r.Probe, r.Workers)
	if r.Think > 0 {
		fmt.Fprintf(&b, " that pause %s", seconds(r.Think))
	}
	fmt.Fprintf(&b, ", %d rounds, %.1f s%s\n\n", r.Rounds, r.Seconds, early)
	fmt.Fprintf(&b, "  %-14s   %10s   %9s   %9s   %9s   %7s   %9s   %6s\n", "", "requests/s", "mean", "p50", "p99", "errors", "opened", "held")
	for _, p := range r.Ways {
		fmt.Fprintf(&b, "  %-14s   %10s   %9s   %9s   %9s   %7s   %9s   %6d\n", p.Name, rate(p.PerSecond), seconds(p.Mean), seconds(p.P50), seconds(p.P99),
			grouped(p.failed()), grouped(p.Opened), p.Held)
	}
	fmt.Fprintf(&b, "\n  ratio       the pool does %.1f times as much as dialing (%.1f to %.1f in single rounds)\n", r.Ratio, r.RatioRange[0], r.RatioRange[1])
	if e := r.BreakEven; e != nil {
		fmt.Fprintf(&b, "  saved       %s per request that finds a connection open\n", seconds(r.Saved))
		fmt.Fprintf(&b, "  break-even  if requests come at random, half of them find one from %.2f a minute on (IdleTimeout %v)\n",
			e.PerMinute, time.Duration(e.IdleTimeout*float64(time.Second)))
	} else {
		fmt.Fprintf(&b, "  saved       nothing: a request through the pool took %s, by dialing %s\n", seconds(r.Ways[0].Mean), seconds(r.Ways[1].Mean))
	}
	for _, p := range r.Ways {
		if p.firstErr != nil {
			fmt.Fprintf(&b, "  errors      %s: %s; the first: %v\n", p.Name, p.kinds(), p.firstErr)
			if p.Name == "dial" && p.Errors[connpool.KindResource.String()] > 0 {
				b.WriteString("              Each closed connection keeps its local port for a minute: that many dials use them up.\n")
			}
		}
	}
	return b.String() + adviceText(r.Advice)
}

func (p *wayPace) failed() (n uint64) {
	for _, k := range p.Errors {
		n += k
	}
	return n
}

// kinds is "3 refused, 1 timeout".
func (p *wayPace) kinds() string {
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(p.Errors)) {
		parts = append(parts, fmt.Sprintf("%s %s", grouped(p.Errors[kind]), kind))
	}
	return strings.Join(parts, ", ")
}
