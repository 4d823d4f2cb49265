package bench

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"time"
)

// memory is what an idle connection costs, in bytes and goroutines.
type memory struct {
	Bare       float64 // the net.Conn alone
	Rival      float64 // what the rival adds to it
	Goroutines float64 // that the rival adds
	Kernel     float64 // the kernel's memory for it, both ends
}

// inUse returns the sizes of heap and stacks after garbage collection.
func inUse() (heap, stacks float64) {
	var m runtime.MemStats
	for range 4 { // entries of a sync.Pool survive two
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc), float64(m.StackInuse)
}

// measureMemory opens N bare connections to the first server, closes them, and opens N
// through the rival to the last server, because the ports of the first stay in use for a
// while. Nothing else runs in its process.
func measureMemory(t task) (memory, error) {
	ctx := context.Background()
	s := &Settings{Servers: t.Servers, TLS: t.TLS}
	x := NewExchange(0)

	// The runtime never frees the descriptor of a goroutine that has ended, some 450
	// bytes. So as many goroutines as will be needed are started beforehand.
	wait := make(chan struct{})
	for range 4 * t.N {
		go func() { <-wait }()
	}
	close(wait)
	time.Sleep(50 * time.Millisecond)

	measured := func(n int) (m memory, err error) {
		bare := make([]net.Conn, n)
		kernel := slab()
		before, _ := inUse()
		for i := range bare {
			if bare[i], err = s.dial(ctx, 0); err != nil {
				return m, err
			}
			if t.Protocol == Echo {
				if err := exchange(bare[i], x); err != nil {
					return m, err
				}
			}
		}
		after, _ := inUse()
		m.Bare = (after - before) / float64(n)
		m.Kernel = max(0, slab()-kernel) / float64(n)
		for _, nc := range bare {
			nc.Close()
		}
		clear(bare)

		before, stacks := inUse()
		goroutines := runtime.NumGoroutine()
		s := &Settings{Servers: t.Servers[len(t.Servers)-1:], TLS: t.TLS, Max: t.N, MaxOpen: -1, Check: CheckAll}
		r := Rivals[t.Rival](s)
		defer r.Close()
		if err := Fill(ctx, r, n, Same); err != nil {
			return m, err
		}
		if got := s.Opened.Load(); got != int64(n) {
			return m, fmt.Errorf("%s opened %d connections, not %d", t.Rival, got, n)
		}
		time.Sleep(50 * time.Millisecond) // so that what ends after the last exchange has ended
		m.Goroutines = float64(runtime.NumGoroutine()-goroutines) / float64(n)
		after, stacksAfter := inUse()
		m.Rival = (after-before)/float64(n) - m.Bare
		if m.Goroutines > 0.5 {
			// Otherwise the difference is the rest of Fill's stacks, which the runtime
			// keeps for the next goroutine.
			m.Rival += (stacksAfter - stacks) / float64(n)
		}
		runtime.KeepAlive(r)
		return m, nil
	}
	if _, err := measured(min(t.N, 50)); err != nil { // so that one-time allocations are made
		return memory{}, err
	}
	return measured(t.N)
}

// sweepCost is what checking N idle connections costs.
type sweepCost struct {
	CPU  time.Duration // of the process, in the window
	P99  time.Duration // of one borrower's loans meanwhile
	Peek time.Duration // one bare peek into each
}

// measureSweep keeps N idle connections at 100 addresses, and borrows one of another
// address each millisecond.
func measureSweep(t task) (cost sweepCost, err error) {
	ctx := context.Background()
	const addrs = 100
	s := &Settings{Servers: t.Servers, Addrs: addrs + 1, MaxOpen: -1, Check: CheckAll, Sweep: t.Sweep}
	var looks []*line
	s.OnDial = func(nc net.Conn) {
		l := &line{Conn: nc}
		l.raw, _ = nc.(*net.TCPConn).SyscallConn()
		l.look = func(fd uintptr) { l.dead = quiet(fd) != nil }
		looks = append(looks, l) // one dial at a time
	}
	r := newConnpool(s)
	defer r.Close()
	if err := Fill(ctx, r, t.N, func(i int) int { return i % addrs }); err != nil {
		return cost, err
	}
	if err := r.Loan(ctx, addrs); err != nil {
		return cost, err
	}
	began := time.Now()
	for _, l := range looks {
		if !l.alive() {
			return cost, errNotQuiet
		}
	}
	cost.Peek = time.Since(began)

	var took []time.Duration
	runtime.GC()
	before := cpuTime()
	for end := time.Now().Add(t.Window); ; {
		began := time.Now()
		if !began.Before(end) {
			break
		}
		if err := r.Loan(ctx, addrs); err != nil {
			return cost, err
		}
		took = append(took, time.Since(began))
		time.Sleep(time.Millisecond)
	}
	cost.CPU = cpuTime() - before
	cost.P99 = percentile(took, 99)
	return cost, nil
}

// percentile sorts d.
func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[(len(d)-1)*p/100]
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}
