package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// level is what was measured with one number of clients. Times are in seconds.
type level struct {
	Clients   int      `json:"clients"`
	Seconds   float64  `json:"seconds"`
	Answers   uint64   `json:"answers"`
	Errors    uint64   `json:"errors"`
	Starved   int      `json:"starved"` // clients without a single answer
	PerSecond float64  `json:"per_second"`
	Mean      float64  `json:"mean_s"`
	P50       float64  `json:"p50_s"`
	P95       float64  `json:"p95_s"`
	P99       float64  `json:"p99_s"`
	Load      *float64 `json:"load_percent,omitempty"` // as the load command reported it

	lastErr error
}

// rampOptions decide how far a ramp goes.
type rampOptions struct {
	limit time.Duration // the response that is still acceptable
	judge string        // which figure of the response is held against limit: mean, p50, p95, p99
	step  time.Duration // the least time that a level is measured for
	max   int           // clients

	share float64                                                 // of a shared peer, 0 to 1; 0: all of it
	load  func(ctx context.Context, clients int) (float64, error) // in percent; nil: not measured
}

// The reasons why a ramp ended.
const (
	endedByResponse = "response" // the response took longer than the limit
	endedByErrors   = "errors"   // more than errorShare of the exchanges failed
	endedByShare    = "share"    // the peer has reached its allowed load
	endedByHandles  = "handles"  // this machine cannot open more sockets
	endedByMax      = "max-clients"
	endedByCtx      = "interrupted"
)

const (
	errorShare = 0.01 // of exchanges that may fail
	// precision is the gap, as a share, at which a search between two numbers of clients
	// ends.
	precision = 0.02
	// A response needs some samples per client. A level is extended for them, up to
	// longestLevel.
	answersPerClient = 3
	longestLevel     = 8 // times step
	// A throughput below this share of one with fewer clients is measured twice.
	slower = 0.9
)

// ramp is a measurement with more and more clients.
type ramp struct {
	rampOptions
	crew   *crew
	levels []level // in the order in which they were measured
	live   *notices
}

// response is the figure of l that is compared with the limit.
func (r *ramp) response(l level) float64 {
	switch r.judge {
	case "p50":
		return l.P50
	case "p95":
		return l.P95
	case "p99":
		return l.P99
	}
	return l.Mean
}

// verdict returns "" if l is within all bounds, else the bound it exceeds.
func (r *ramp) verdict(l level) string {
	switch {
	case !l.sound() && connpool.KindOf(l.lastErr) == connpool.KindResource:
		return endedByHandles
	case !l.sound():
		return endedByErrors
	case r.response(l) > r.limit.Seconds():
		return endedByResponse
	case r.share > 0 && l.Load != nil && *l.Load > 100*r.share:
		return endedByShare
	}
	return ""
}

// sound reports whether nearly every client got answers.
func (l level) sound() bool {
	return l.Starved == 0 && float64(l.Errors) <= errorShare*float64(l.Answers+l.Errors)
}

// run doubles the number of clients until a bound is reached. Then it searches for that
// bound, and for the knee, between the measured numbers. It returns why the ramp ended,
// and the largest number of clients that stayed within all bounds.
func (r *ramp) run(ctx context.Context) (ended string, within int, err error) {
	defer r.crew.resize(0)
	beyond := 0
	for n := 1; beyond == 0; {
		l, err := r.measure(ctx, n)
		if err != nil {
			return r.interrupted(ctx, within, err)
		}
		if ended = r.verdict(l); ended != "" {
			beyond = n
			if within == 0 {
				return ended, 0, nil
			}
			break
		}
		within = n
		if r.share > 0 && *l.Load >= 100*r.share {
			ended = endedByShare
			break
		}
		if n == r.max {
			ended = endedByMax
			break
		}
		n = r.next(n, l)
	}
	for beyond > 0 && beyond-within > max(1, int(precision*float64(within))) {
		mid := (within + beyond) / 2
		l, err := r.measure(ctx, mid)
		if err != nil {
			return r.interrupted(ctx, within, err)
		}
		if v := r.verdict(l); v != "" {
			beyond, ended = mid, v
		} else {
			within = mid
		}
	}
	if err := r.searchKnee(ctx); err != nil {
		return r.interrupted(ctx, within, err)
	}
	return ended, within, nil
}

func (r *ramp) interrupted(ctx context.Context, within int, err error) (string, int, error) {
	if ctx.Err() != nil {
		return endedByCtx, within, nil
	}
	return "", within, err
}

// next is the number of clients after n. For a shared peer it follows the line of the
// load, so that the ramp overshoots the share as little as possible.
func (r *ramp) next(n int, l level) int {
	to := 2 * n
	if r.share > 0 && *l.Load > 0 {
		to = min(to, int(float64(n)*100*r.share / *l.Load))
	}
	return min(max(to, n+1), r.max)
}

// searchKnee measures between the last level below the knee and the first at it, until
// they are close. The ceiling may move meanwhile, so the number of steps is bounded.
func (r *ramp) searchKnee(ctx context.Context) error {
	for range 12 {
		below, at, ok := kneeOf(r.sorted()).bracket()
		if !ok || at-below <= max(1, int(precision*float64(at))) {
			return nil
		}
		if _, err := r.measure(ctx, (below+at)/2); err != nil {
			return err
		}
	}
	return nil
}

// sorted is the levels by number of clients.
func (r *ramp) sorted() []level {
	return slices.SortedStableFunc(slices.Values(r.levels), func(a, b level) int { return cmp.Compare(a.Clients, b.Clients) })
}

// measure measures a level, twice if needed: a disturbance makes a measurement slower,
// hardly ever faster. If the throughput is much lower than with fewer clients, there was
// a disturbance or the peer declines under load. A second measurement decides, and the
// better of the two counts.
func (r *ramp) measure(ctx context.Context, n int) (level, error) {
	l, err := r.once(ctx, n)
	if err != nil {
		return l, err
	}
	best := 0.0
	for _, other := range r.levels {
		if other.Clients < n {
			best = max(best, other.PerSecond)
		}
	}
	if l.sound() && l.PerSecond < slower*best {
		again, err := r.once(ctx, n)
		if err != nil {
			return l, err
		}
		if again.sound() && again.PerSecond > l.PerSecond {
			l = again
		}
	}
	r.levels = append(r.levels, l)
	return l, nil
}

// once has n clients make exchanges without a pause. What happens before each of them has
// had an answer, the dials included, does not count.
func (r *ramp) once(ctx context.Context, n int) (level, error) {
	r.crew.resize(n)
	r.crew.settle()
	if err := r.await(ctx, n, "settling", r.step+2*r.limit, func(p progress, _ time.Duration) bool {
		return p.settled
	}); err != nil {
		return level{}, err
	}
	began := time.Now()
	r.crew.note(true)
	if err := r.await(ctx, n, "measuring", longestLevel*r.step, func(p progress, gone time.Duration) bool {
		return gone >= r.step && p.answers+p.errors >= uint64(answersPerClient*n)
	}); err != nil {
		return level{}, err
	}
	r.crew.note(false)
	if err := r.await(ctx, n, "finishing", 2*r.crew.t.timeout, func(p progress, _ time.Duration) bool {
		return p.resting
	}); err != nil {
		return level{}, err
	}
	l := r.crew.level()
	l.Seconds = time.Since(began).Seconds()
	if r.load != nil { // while the clients are still at work
		load, err := r.load(ctx, n)
		if err != nil {
			return level{}, err
		}
		l.Load = &load
	}
	r.live.say("%s", l.line())
	return l, nil
}

// await calls done now and then, for at most patience. Its error is that of ctx.
func (r *ramp) await(ctx context.Context, n int, what string, patience time.Duration, done func(progress, time.Duration) bool) error {
	began := time.Now()
	tick := time.NewTicker(max(r.step/20, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		gone, p := time.Since(began), r.crew.progress()
		if gone >= patience || done(p, gone) {
			return nil
		}
		r.live.redo("%d clients, %s for %.1f s: %s answers, %d errors", n, what, gone.Seconds(), grouped(p.answers), p.errors)
	}
}

// line describes a level in the log of a run.
func (l level) line() string {
	s := fmt.Sprintf("%5d clients: %s/s, mean %s, p99 %s", l.Clients, grouped(uint64(l.PerSecond+0.5)), seconds(l.Mean), seconds(l.P99))
	if l.Errors > 0 {
		s += fmt.Sprintf(", %d errors: %v", l.Errors, l.lastErr)
	}
	if l.Load != nil {
		s += fmt.Sprintf(", load %.1f %%", *l.Load)
	}
	return s
}
