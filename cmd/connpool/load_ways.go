package main

import (
	"context"
	"crypto/tls"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// way is how a request gets a connection.
type way interface {
	name() string
	ask(ctx context.Context, worker int) error // one worker calls it once at a time
	opened() uint64                            // connections opened so far
	held() int                                 // the most connections held at once
	close()
}

// pooled borrows from a pool.
type pooled struct {
	t    *target
	pool *connpool.Pool
}

func newPooled(t *target, pool *connpool.Pool) *pooled { return &pooled{t, pool} }

func (p *pooled) name() string { return "pool" }

func (p *pooled) ask(ctx context.Context, _ int) error {
	return p.pool.With(ctx, p.t.addr, func(c connpool.Conn) error {
		if err := c.SetDeadline(time.Now().Add(p.t.timeout)); err != nil {
			return err
		}
		more, err := connpool.State[session](c).exchange()
		if err == nil && !more {
			c.Close()
		}
		return err
	})
}

func (p *pooled) opened() uint64 { st := p.pool.Stats(); return st.Dials - st.DialErrors }
func (p *pooled) held() int      { return p.pool.Stats().PeakOpen }
func (p *pooled) close()         { p.pool.Close() }

// gauge counts connections.
type gauge struct{ total, now, peak atomic.Int64 }

func (g *gauge) up() {
	g.total.Add(1)
	now := g.now.Add(1)
	for peak := g.peak.Load(); now > peak && !g.peak.CompareAndSwap(peak, now); peak = g.peak.Load() {
	}
}

func (g *gauge) opened() uint64 { return uint64(g.total.Load()) }
func (g *gauge) held() int      { return int(g.peak.Load()) }

// dialing opens a connection for each request.
type dialing struct {
	gauge
	t        *target
	sessions tls.ClientSessionCache
}

func newDialing(t *target) *dialing {
	return &dialing{t: t, sessions: tls.NewLRUClientSessionCache(0)}
}

func (d *dialing) name() string { return "dial" }

func (d *dialing) ask(ctx context.Context, _ int) error {
	o, err := d.t.dial(ctx, d.sessions)
	if err != nil {
		return err
	}
	d.up()
	defer d.now.Add(-1)
	defer o.nc.Close()
	defer context.AfterFunc(ctx, func() { o.nc.SetDeadline(time.Unix(1, 0)) })()
	_, err = o.ask(d.t.timeout)
	return err
}

func (d *dialing) close() {}

// keeping gives each worker a connection of its own.
type keeping struct {
	gauge
	t        *target
	sessions tls.ClientSessionCache
	of       []*own // by worker, like unwatch
	unwatch  []func() bool
}

func newKeeping(t *target, workers int) *keeping {
	return &keeping{t: t, sessions: tls.NewLRUClientSessionCache(0), of: make([]*own, workers), unwatch: make([]func() bool, workers)}
}

func (k *keeping) name() string { return "one per worker" }

func (k *keeping) ask(ctx context.Context, worker int) error {
	o := k.of[worker]
	if o == nil {
		fresh, err := k.t.dial(ctx, k.sessions)
		if err != nil {
			return err
		}
		k.up()
		// One AfterFunc for the life of the connection: ctx is that of the whole run.
		k.unwatch[worker] = context.AfterFunc(ctx, func() { fresh.nc.Close() })
		k.of[worker], o = fresh, fresh
	}
	more, err := o.ask(k.t.timeout)
	if err != nil || !more {
		k.drop(worker)
	}
	return err
}

func (k *keeping) drop(worker int) {
	if o := k.of[worker]; o != nil {
		k.unwatch[worker]()
		o.nc.Close()
		k.now.Add(-1)
		k.of[worker] = nil
	}
}

func (k *keeping) close() {
	for worker := range k.of {
		k.drop(worker)
	}
}

// turn is what one way did in one round.
type turn struct {
	answers  uint64
	seconds  float64
	seen     latencies
	sum      time.Duration
	errors   map[string]uint64
	firstErr error
}

// turn lets all workers make requests in one way, for the given time or number. Requests
// that ctx interrupted do not count.
func (o loadOptions) turn(ctx context.Context, w way, round int, live *notices) *turn {
	var (
		all     turn
		mu      sync.Mutex // guards all, at the end of each worker
		left    atomic.Int64
		count   atomic.Uint64
		running tasks.Group
	)
	all.errors = make(map[string]uint64)
	span := o.span / time.Duration(3*o.rounds)
	if o.requests > 0 {
		n := o.requests / o.rounds
		if round < o.requests%o.rounds {
			n++
		}
		left.Store(int64(n))
	}
	began := time.Now()
	more := func() bool {
		if ctx.Err() != nil {
			return false
		}
		if o.requests > 0 {
			return left.Add(-1) >= 0
		}
		return time.Since(began) < span
	}
	for worker := range o.workers {
		running.Go(func() {
			one := turn{errors: make(map[string]uint64)}
			for more() {
				asked := time.Now()
				err := w.ask(ctx, worker)
				took := time.Since(asked)
				switch {
				case err == nil:
					one.answers++
					one.seen.add(took)
					one.sum += took
					count.Add(1)
				case ctx.Err() != nil:
				default:
					one.errors[kindName(err)]++
					if one.firstErr == nil {
						one.firstErr = err
					}
					rest(ctx, time.Millisecond)
				}
				if o.think > 0 {
					rest(ctx, o.think)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all.add(&one)
		})
	}
	done := make(chan struct{})
	go func() { running.Wait(); close(done) }()
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case <-done:
			waiting = false
		case <-tick.C:
			live.redo("round %d of %d, %s: %s answers", round+1, o.rounds, w.name(), grouped(count.Load()))
		}
	}
	all.seconds = time.Since(began).Seconds()
	return &all
}

// kindName describes what went wrong with a request, in a word or two.
func kindName(err error) string {
	var answer *probeError
	if errors.As(err, &answer) {
		return "unexpected answer"
	}
	return connpool.KindOf(err).String()
}

func (t *turn) add(o *turn) {
	t.answers += o.answers
	t.seconds += o.seconds
	t.sum += o.sum
	t.seen.merge(&o.seen)
	for kind, n := range o.errors {
		t.errors[kind] += n
	}
	if t.firstErr == nil {
		t.firstErr = o.firstErr
	}
}

// rest pauses for d, or until ctx is done.
func rest(ctx context.Context, d time.Duration) {
	pause := time.NewTimer(d)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
	}
}
