package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/seed-ecb488c9/connpool"
)

// compare does the same work twice, with servers that answer at once and suffer no
// faults: through a pool, and with a dial for each exchange. The second half gets what is
// possible without a pool: the same limit on open connections, and resumed TLS sessions.
func compare(ctx context.Context, o demoOptions, f *fleet, r *report) error {
	f.calm.Store(true)
	pool, err := connpool.New(poolConfig(o, f))
	if err != nil {
		return err
	}
	defer pool.Close()
	pooled := half(ctx, o, f, r, func(w *worker) { w.borrow(pool, mood{patience: patience}) })
	finish(pool, f, r)

	room := semaphore.NewWeighted(int64(o.maxOpen))
	dialed := half(ctx, o, f, r, func(w *worker) { w.dialOnce(room) })

	c := &comparison{Seconds: o.compare.Seconds(), Pooled: pooled, Dialed: dialed}
	if dialed.PerSecond > 0 {
		c.Ratio = pooled.PerSecond / dialed.PerSecond
	}
	r.Comparison = c
	return nil
}

// half lets a new crew repeat one thing for the duration of the comparison.
func half(ctx context.Context, o demoOptions, f *fleet, r *report, once func(*worker)) pace {
	ctx, cancel := context.WithTimeout(ctx, o.compare)
	defer cancel()
	began := time.Now()
	crew := hire(o, f)
	var g errgroup.Group
	for _, w := range crew {
		g.Go(func() error {
			for ctx.Err() == nil {
				once(w)
			}
			return nil
		})
	}
	g.Wait()
	t := muster(crew)
	for o, n := range t.outcomes {
		if o.class == foreign {
			r.ForeignReplies += n
		}
	}
	for _, e := range t.examples {
		r.Examples = append(r.Examples, "without faults: "+e)
	}
	return paceOf(t, time.Since(began).Seconds())
}

// dialOnce makes one exchange on a connection of its own.
func (w *worker) dialOnce(room *semaphore.Weighted) {
	p := w.peer()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	x := exchange{token: w.token(), asked: time.Now()}
	err := room.Acquire(ctx, 1)
	if err == nil {
		defer room.Release(1)
		err = func() error {
			nc, err := p.dial(ctx)
			if err != nil {
				return err
			}
			defer nc.Close()
			nc.SetDeadline(x.asked.Add(patience))
			x.got = time.Now()
			n := &note{born: x.got}
			x.lent(n, false)
			return x.talk(nc, n)
		}()
	}
	o := outcome{class: answered, stage: stageUse}
	if err != nil {
		o = outcome{class: unexplained, stage: "dial", kind: connpool.KindOf(err)}
		w.tally.example(fmt.Sprintf("a dial for each exchange: %v: %v", p.addr, err))
	}
	w.tally.add(&x, o, time.Now())
}
