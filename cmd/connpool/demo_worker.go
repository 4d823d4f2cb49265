package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// The tide: for the first part of each period all workers run and queue for connections;
// for the rest only a few run, so that connections are idle, where faults can hit them
// unnoticed.
const (
	tidePeriod = 400 * time.Millisecond
	highTide   = 250 * time.Millisecond
	ebbShare   = 8 // one worker in ebbShare continues
)

// patience is how long a borrower waits that has no reason to give up. It is so long that
// a timeout is a failure of the pool.
const patience = 5 * time.Second

// mood is how a worker behaves in one exchange.
type mood struct {
	patience  time.Duration
	leaves    bool          // its ctx is canceled after the request was sent
	leavesFor time.Duration // the time from the request to that
}

// worker makes one exchange after the other. No other goroutine uses its fields.
type worker struct {
	id     int
	rng    *rand.Rand
	favour *rand.Zipf // some servers are asked much more often than others
	fleet  *fleet
	asked  int // tokens made
	tally  tally
}

func hire(o demoOptions, f *fleet) []*worker {
	crew := make([]*worker, o.workers)
	for i := range crew {
		rng := rand.New(rand.NewPCG(o.seed, uint64(i)+1))
		crew[i] = &worker{id: i, rng: rng, fleet: f,
			favour: rand.NewZipf(rng, skew, 1, uint64(len(f.peers)-1)),
			tally:  tally{outcomes: make(map[outcome]uint64)}}
	}
	return crew
}

// token returns a token that differs from every other token of the run.
func (w *worker) token() string {
	w.asked++
	return "w" + strconv.Itoa(w.id) + "-" + strconv.Itoa(w.asked)
}

func (w *worker) peer() *peer { return w.fleet.peers[w.favour.Uint64()] }

// mood returns a patient mood most of the time. The other moods cause late replies.
func (w *worker) mood() mood {
	switch n := w.rng.IntN(100); {
	case n < 7:
		return mood{patience: time.Duration(200+w.rng.IntN(8000)) * time.Microsecond}
	case n < 10:
		return mood{patience: patience, leaves: true}
	case n < 13:
		return mood{patience: patience, leaves: true, leavesFor: time.Duration(w.rng.IntN(3000)) * time.Microsecond}
	}
	return mood{patience: patience}
}

// waitForTide returns true when the worker may continue, and false when ctx is done.
func (w *worker) waitForTide(ctx context.Context, began time.Time) bool {
	if ctx.Err() != nil {
		return false
	}
	at := time.Since(began) % tidePeriod
	if at < highTide || w.id%ebbShare == 0 {
		return true
	}
	flood := time.NewTimer(tidePeriod - at)
	defer flood.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-flood.C:
		return true
	}
}

// borrow makes one exchange through the pool. It runs to its own end even if the demo's
// ctx ends, so that the demo causes no error.
func (w *worker) borrow(pool *connpool.Pool, m mood) {
	p := w.peer()
	ctx, cancel := context.WithTimeout(context.Background(), m.patience)
	defer cancel()
	x := exchange{token: w.token(), impatient: m.leaves || m.patience < patience}
	if m.leaves {
		x.sent = cancel
		if m.leavesFor > 0 {
			x.sent = func() { time.AfterFunc(m.leavesFor, cancel) }
		}
	}
	err := x.with(ctx, pool, p.addr)
	o := x.outcome(err, &p.faultLog)
	w.tally.add(&x, o, time.Now())
	switch o.class {
	case serverDown:
		// As a sensible client does; otherwise the refusals, which are quick, would
		// outnumber everything else.
		time.Sleep(time.Duration(5+w.rng.IntN(15)) * time.Millisecond)
	case avoidable, unexplained, foreign:
		w.tally.example(fmt.Sprintf("%s: %v: %v", o.class, p.addr, err))
	}
}

// tally is what a worker, and in the end the crew, has counted.
type tally struct {
	outcomes map[outcome]uint64
	borrow   latencies // from the call of With to the beginning of fn
	whole    latencies // of answered exchanges
	examples []string
}

const mostExamples = 8

func (t *tally) add(x *exchange, o outcome, end time.Time) {
	t.outcomes[o]++
	if x.ran {
		t.borrow.add(x.got.Sub(x.asked))
	}
	if o.class == answered {
		t.whole.add(end.Sub(x.asked))
	}
}

func (t *tally) example(s string) {
	if len(t.examples) < mostExamples && !slices.Contains(t.examples, s) {
		t.examples = append(t.examples, s)
	}
}

func (t *tally) answered() uint64 { return t.whole.count }

// muster adds up what the crew has seen.
func muster(crew []*worker) *tally {
	sum := tally{outcomes: make(map[outcome]uint64)}
	for _, w := range crew {
		for o, n := range w.tally.outcomes {
			sum.outcomes[o] += n
		}
		sum.borrow.merge(&w.tally.borrow)
		sum.whole.merge(&w.tally.whole)
		for _, e := range w.tally.examples {
			sum.example(e)
		}
	}
	return &sum
}
