package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
)

// arithmetic is the report of a calculation.
type arithmetic struct {
	Users    int     `json:"users"` // or threads
	Threads  bool    `json:"users_are_threads"`
	Think    float64 `json:"think_s"` // between two requests that need a connection
	Service  float64 `json:"service_s"`
	Fraction float64 `json:"fraction"`
	MayWait  float64 `json:"may_wait"`

	Offered   float64   `json:"offered"`
	Mean      int       `json:"mean_connections"` // Offered, rounded up
	Enough    int       `json:"enough_connections"`
	Rows      []sizeRow `json:"table"`
	Division  *spread   `json:"division,omitempty"`
	Requests  int       `json:"simulated_requests,omitempty"`
	Seed      uint64    `json:"seed,omitempty"`
	Advice    []advice  `json:"advice"`
	requested string    // the request in the user's words
}

type sizeRow struct {
	service
	Simulated *simulated `json:"simulated,omitempty"`
}

// spread is the result for several processes, each with a pool and a part of the users.
type spread struct {
	division
	UsersEach  int     `json:"users_each"` // of the largest process
	WaitShare  float64 `json:"wait_share"` // with Each
	EnoughEach int     `json:"enough_each"`
	EnoughSum  int     `json:"enough_sum"`
}

// modelOf translates the flags into a model.
//
// With users, only a fraction of the requests needs a connection. Between two that do
// lies a geometric number of exponential think times, which is again exponential, with
// the mean think/fraction. With threads, the time is divided: service/(think+service)
// must be fraction.
func modelOf(o sizeOptions) closedModel {
	s := o.service.Seconds()
	if o.mode == "concurrency" {
		return closedModel{o.concurrency, s * (1 - o.fraction) / o.fraction, s}
	}
	return closedModel{o.users, o.think.Seconds() / o.fraction, s}
}

func calculate(ctx context.Context, o sizeOptions, live *notices) (*arithmetic, error) {
	m := modelOf(o)
	r := &arithmetic{Users: m.users, Threads: o.mode == "concurrency", Think: m.think, Service: m.service,
		Fraction: o.fraction, MayWait: o.mayWait, Offered: m.offered(), Enough: m.fewest(o.mayWait)}
	// The mean of whole threads times a fraction is a whole number that rounding must not
	// lift.
	r.Mean = max(1, int(math.Ceil(r.Offered-1e-9)))
	r.requested = fmt.Sprintf("%s users, %s of thinking, %s of service", grouped(uint64(o.users)), o.think, o.service)
	if r.Threads {
		r.requested = fmt.Sprintf("%s threads, %s of service", grouped(uint64(o.concurrency)), o.service)
	}
	if o.fraction < 1 {
		r.requested += fmt.Sprintf(", %.4g %% of it with a connection", 100*o.fraction)
	}
	conns := o.connections
	if len(conns) == 0 {
		conns = m.interesting(r.Enough)
	}
	for _, c := range conns {
		row := sizeRow{service: m.with(c)}
		if o.simulate {
			live.redo("simulating %s requests over %d connections", grouped(uint64(o.requests)), c)
			s, err := m.simulate(ctx, c, o.requests, o.seed)
			if err != nil {
				return nil, fmt.Errorf("the simulation was interrupted; without -simulate the table is there at once: %w", err)
			}
			row.Simulated, r.Requests, r.Seed = &s, o.requests, o.seed
		}
		r.Rows = append(r.Rows, row)
	}
	each := r.Enough
	if o.processes > 1 {
		d := &spread{division: divide(r.Enough, o.processes), UsersEach: (m.users + o.processes - 1) / o.processes, WaitShare: 1}
		one := closedModel{d.UsersEach, m.think, m.service}
		if d.Each > 0 {
			d.WaitShare = one.with(min(d.Each, one.users)).WaitShare
		}
		d.EnoughEach = one.fewest(o.mayWait)
		d.EnoughSum = d.EnoughEach * o.processes
		r.Division, each = d, d.EnoughEach
	}
	processes := ""
	if o.processes > 1 {
		processes = fmt.Sprintf(" -processes %d", o.processes)
	}
	r.Advice = []advice{
		{fmt.Sprintf("MaxPerAddr: %d in each process, if the peer can serve that many at once: arithmetic knows nothing of its knee.", each),
			"connpool size -to ADDR -probe PROBE" + processes},
		{fmt.Sprintf("The service time of %s is an assumption; the mean of a request on an open connection is the truth.", seconds(m.service)),
			"connpool load -to ADDR -probe PROBE"},
		{"Users and think time are assumptions too: record Stats in production, and look again.",
			"connpool size -history FILE" + processes},
	}
	return r, nil
}

// interesting returns the numbers of connections worth a line: around the mean, in round
// steps of about its deviation, and the result.
func (m closedModel) interesting(enough int) []int {
	a := m.offered()
	step := roundStep(math.Sqrt(a))
	out := []int{enough}
	first := (int(a)/step - 1) * step
	for i := range 8 {
		c := first + i*step
		if c < 1 {
			continue
		}
		if c > m.users || c > enough+2*step {
			break
		}
		out = append(out, c)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// roundStep is the number among 1, 2, 5, 10, 20, ... that is closest to x by
// ratio.
func roundStep(x float64) int {
	best := 1
	for p := 1; p < math.MaxInt/20; p *= 10 {
		for _, s := range []int{p, 2 * p, 5 * p} {
			if math.Abs(math.Log(float64(s)/x)) < math.Abs(math.Log(float64(best)/x)) {
				best = s
			}
		}
	}
	return best
}

func (r *arithmetic) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "connpool size: %s\n\n", r.requested)
	head := "connections   have to wait   mean wait    p99 wait   mean response   requests/s   in use"
	if r.Seed != 0 || r.Requests > 0 {
		head += "   simulated: wait   mean response"
	}
	b.WriteString("  " + head + "\n")
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "  %11s   %12s   %9s   %9s   %13s   %10s   %6s", grouped(uint64(row.Connections)), share(row.WaitShare),
			seconds(row.MeanWait), seconds(row.P99Wait), seconds(row.MeanResponse), rate(row.PerSecond), fmt.Sprintf("%.0f %%", 100*row.Busy))
		if s := row.Simulated; s != nil {
			fmt.Fprintf(&b, "   %15s   %13s", share(s.WaitShare), seconds(s.MeanResponse))
		}
		b.WriteString("\n")
	}
	m := closedModel{r.Users, r.Think, r.Service}
	atMean, atEnough := m.with(min(r.Mean, r.Users)), m.with(r.Enough)
	fmt.Fprintf(&b, "\n  offered  %.1f connections in use on average, if nobody ever waited.\n", r.Offered)
	fmt.Fprintf(&b, "  knee     %s connections, the mean rounded up: with fewer, the rate of requests is what the connections\n"+
		"           allow and not what the users ask for. With as many, %s of the requests still have to wait.\n", grouped(uint64(r.Mean)), share(atMean.WaitShare))
	fmt.Fprintf(&b, "  limit    %s connections: from here on at most %s of the requests wait (here %s, p99 of the wait %s).\n",
		grouped(uint64(r.Enough)), share(r.MayWait), share(atEnough.WaitShare), seconds(atEnough.P99Wait))
	if d := r.Division; d != nil {
		fmt.Fprintf(&b, "  shares   %v.\n", d.division)
		fmt.Fprintf(&b, "           But a connection that is free in one process is of no use in another: with its %s users and %d\n"+
			"           connections %s of its requests wait. To meet the target each needs %d, %d in all.\n",
			grouped(uint64(d.UsersEach)), d.Each, share(d.WaitShare), d.EnoughEach, d.EnoughSum)
	}
	return b.String() + adviceText(r.Advice)
}

func share(p float64) string {
	switch {
	case p <= 0:
		return "0 %"
	case p < 0.0001:
		return "<0.01 %"
	case p < 0.01:
		return fmt.Sprintf("%.2f %%", 100*p)
	}
	return fmt.Sprintf("%.1f %%", 100*p)
}

func rate(perSecond float64) string {
	switch {
	case perSecond < 9.995:
		return fmt.Sprintf("%.2f", perSecond)
	case perSecond < 99.95:
		return fmt.Sprintf("%.1f", perSecond)
	}
	return grouped(uint64(perSecond + 0.5))
}
