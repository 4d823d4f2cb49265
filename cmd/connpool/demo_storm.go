package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

const (
	dialTimeout = 2 * time.Second
	// longestBackoff is longer than the pool refuses an address after a failed dial.
	longestBackoff = 3 * time.Second
	// leakGrace is how long a server may take to notice a close, and a goroutine to end,
	// on a busy machine.
	leakGrace = 5 * time.Second
	faultGap  = 5 * time.Millisecond // between two faults
	glance    = 20 * time.Millisecond
	// lagSpan is much longer than a server takes to notice a close.
	lagSpan = time.Second
)

// skew is the exponent of the traffic's distribution over the servers: the second gets a
// third of the first one's traffic, the tenth a thirtieth.
const skew = 1.5

// noiseMark begins the servers' unrequested bytes, and occurs in no reply.
var noiseMark = []byte("#")

var noise = []byte("#unasked\n")

// poolConfig has short timeouts, so that within a few seconds connections expire by idle
// time and by age, and the sweep runs.
func poolConfig(o demoOptions, f *fleet) connpool.Config {
	return connpool.Config{
		MaxOpen:       o.maxOpen,
		IdleTimeout:   700 * time.Millisecond,
		MaxLifetime:   2 * time.Second,
		SweepInterval: 250 * time.Millisecond,
		DialTimeout:   dialTimeout,
		TLSFor: func(a connpool.Addr) (*tls.Config, error) {
			p := f.byAddr[a]
			if p == nil {
				return nil, fmt.Errorf("the pool asks for %v, which nobody named", a)
			}
			return p.tls, nil // the same each time, so that sessions are resumed
		},
		Setup: func(context.Context, connpool.Addr, net.Conn) (any, error) {
			return &note{born: time.Now()}, nil
		},
	}
}

// storm is the part with the faults.
func storm(ctx context.Context, o demoOptions, f *fleet, live *liveLine, r *report) error {
	pool, err := connpool.New(poolConfig(o, f))
	if err != nil {
		return err
	}
	defer pool.Close()

	began := time.Now()
	over, cancel := context.WithTimeout(ctx, o.span)
	defer cancel()
	var chaos, crowd errgroup.Group
	crew := hire(o, f)
	for _, w := range crew {
		crowd.Go(func() error {
			for w.waitForTide(over, began) {
				w.borrow(pool, w.mood())
			}
			return nil
		})
	}
	chaos.Go(func() error { return harm(over, o, f, r.Faults) })
	chaos.Go(func() error {
		watch(over, began, pool, f, live, r)
		return nil
	})
	crowd.Wait() // the workers end between two exchanges; none is cut off
	r.Seconds = time.Since(began).Seconds()
	cancel()
	if err := chaos.Wait(); err != nil {
		return err
	}

	t := muster(crew)
	for o, n := range t.outcomes {
		r.count(o, n)
	}
	r.Examples = t.examples
	r.BorrowP50, r.BorrowP99 = inMicros(t.borrow.quantile(0.50)), inMicros(t.borrow.quantile(0.99))
	r.ExchangeP50, r.ExchangeP99 = inMicros(t.whole.quantile(0.50)), inMicros(t.whole.quantile(0.99))
	r.Overlaps = f.overlaps()
	finish(pool, f, r)
	st := pool.Stats()
	r.Loans, r.Reused, r.Dials, r.DialErrors, r.Waits, r.Closed =
		st.Loans, st.Reused, st.Dials, st.DialErrors, st.Waits, st.Closed
	if st.Loans > 0 {
		r.ReuseRatio = float64(st.Reused) / float64(st.Loans)
	}
	return nil
}

// finish closes the pool and reports what stays open.
func finish(pool *connpool.Pool, f *fleet, r *report) {
	pool.Close()
	eventually(leakGrace, func() bool { return pool.Stats().Open == 0 })
	eventually(leakGrace, func() bool { return f.served() == 0 })
	st := pool.Stats()
	r.Left.PoolOpen += st.Open
	r.Left.ServerOpen += f.served()
	r.PeakOpen = max(r.PeakOpen, st.PeakOpen)
}

// watch samples the pool and the servers until ctx is done.
func watch(ctx context.Context, began time.Time, pool *connpool.Pool, f *fleet, live *liveLine, r *report) {
	tick := time.NewTicker(glance)
	defer tick.Stop()
	defer live.end()
	var shown time.Time
	lowest, since := 0, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			// A server counts a closed connection until it notices the close. So a count
			// above the limit proves nothing unless it lasts.
			served := f.served()
			r.PeakServed = max(r.PeakServed, served)
			if now.Sub(since) >= lagSpan {
				r.LastingServed = max(r.LastingServed, lowest)
				lowest, since = served, now
			}
			lowest = min(lowest, served)
			if now.Sub(shown) >= liveEvery {
				shown = now
				live.show(now.Sub(began), pool.Stats())
			}
		}
	}
}

// A strike is one kind of fault. share is its part of all strikes; do returns how many
// connections it hit.
type strike struct {
	share int
	fault fault
	do    func(p *peer, n int) int
}

var strikes = []strike{
	{25, cutIdle, func(p *peer, n int) int { return p.CutIdle(n, faultnet.FIN) }},
	{15, cutIdle, func(p *peer, n int) int { return p.CutIdle(n, faultnet.RST) }},
	{10, cutIdle, func(p *peer, n int) int { return p.CutIdle(n, faultnet.HalfClose) }},
	{10, cutBusy, func(p *peer, n int) int { return p.CutBusy(n, faultnet.FIN) }},
	{10, cutBusy, func(p *peer, n int) int { return p.CutBusy(n, faultnet.RST) }},
	{25, unasked, func(p *peer, n int) int { return p.PushIdle(n, noise) }},
	{5, stopping, func(p *peer, n int) int { p.Stop(); return 1 }},
}

// harm strikes one server after the other until ctx is done, and leaves all of them
// running. The seed alone decides which server is struck, how, and in which order.
func harm(ctx context.Context, o demoOptions, f *fleet, done map[string]int) error {
	rng := rand.New(rand.NewPCG(o.seed, 0xbad))
	favour := rand.NewZipf(rng, skew, 1, uint64(len(f.peers)-1))
	gone := make(map[*peer]time.Time) // servers that are down, and until when
	restart := func(now time.Time) error {
		var failed error
		for p, until := range gone {
			if now.Before(until) {
				continue
			}
			// While the server was down, its port may have become the local port of some
			// connection. That passes, so harm tries again.
			if err := p.Restart(); err != nil {
				failed = fmt.Errorf("the server of %v does not start again: %w", p.addr, err)
				continue
			}
			p.end(down)
			delete(gone, p)
		}
		return failed
	}
	tick := time.NewTicker(faultGap)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return restart(time.Now().Add(time.Hour)) // restarts all of them
		case now := <-tick.C:
			restart(now)
			// Half of the strikes go to the busiest servers.
			i := int(favour.Uint64())
			if rng.IntN(2) == 0 {
				i = rng.IntN(len(f.peers))
			}
			p, s, n := f.peers[i], drawn(rng), 1+rng.IntN(3)
			away := time.Duration(10+rng.IntN(50)) * time.Millisecond
			if _, already := gone[p]; already {
				continue
			}
			if s.fault == stopping {
				p.begin(down)
				gone[p] = now.Add(away)
			}
			p.during(s.fault, func() { done[faultNames[s.fault]] += s.do(p, n) })
		}
	}
}

func drawn(rng *rand.Rand) strike {
	all := 0
	for _, s := range strikes {
		all += s.share
	}
	k := rng.IntN(all)
	for _, s := range strikes {
		if k -= s.share; k < 0 {
			return s
		}
	}
	panic("unreachable: the shares add up")
}
