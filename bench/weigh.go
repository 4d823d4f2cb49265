package bench

import (
	"context"
	"os"
	"strings"
	"time"
)

// Weight is what N idle connections of this pool, all checks on, cost one process. Weigh
// measures it in a process of its own, with the server in another.
type Weight struct {
	N          int
	Bare       float64       // bytes of a net.Conn
	Pool       float64       // bytes that the pool adds
	Kernel     float64       // bytes of kernel memory per connection, both ends; 0 if unknown
	Sweep      time.Duration // CPU time of one sweep
	BorrowP99  time.Duration // while it sweeps ten times a second
	QuietP99   time.Duration // while it does not
	Goroutines float64       // per connection
}

func Weigh(n int, window time.Duration) (w Weight, err error) {
	// One server for each measurement: the ports of the last one are still in use.
	var servers []string
	for range 4 {
		addr, stop, err := serveElsewhere(Echo, false)
		if err != nil {
			return w, err
		}
		defer stop()
		servers = append(servers, addr)
	}
	var m memory
	if err := (task{Do: "memory", Rival: "connpool", Protocol: Echo, Servers: servers[:2], N: n}).run(&m); err != nil {
		return w, err
	}
	w = Weight{N: n, Bare: m.Bare, Pool: m.Rival, Kernel: m.Kernel, Goroutines: m.Goroutines}
	const period = 100 * time.Millisecond
	var cost [2]sweepCost
	for i, sweep := range []time.Duration{-1, period} {
		t := task{Do: "sweep", Servers: servers[2+i : 3+i], N: n, Sweep: sweep, Window: window}
		if err := t.run(&cost[i]); err != nil {
			return w, err
		}
	}
	w.Sweep = max(0, cost[1].CPU-cost[0].CPU) * period / window
	w.QuietP99, w.BorrowP99 = cost[0].P99, cost[1].P99
	return w, nil
}

// slab is the kernel's memory for small objects, sockets among them.
func slab() float64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "Slab:" {
			kB := 0.0
			for _, d := range f[1] {
				kB = kB*10 + float64(d-'0')
			}
			return kB * 1024
		}
	}
	return 0
}

// Opening returns what a use costs with a dial and without, on loopback.
func Opening(overTLS bool, n int) (dial, loan time.Duration, err error) {
	sv, err := Serve(Echo, overTLS, 0)
	if err != nil {
		return 0, 0, err
	}
	defer sv.Close()
	ctx := context.Background()
	s := &Settings{Servers: []string{sv.Addr}, TLS: overTLS, Max: 1, Check: CheckAll}
	for i, rival := range []string{"dial", "connpool"} {
		r := Rivals[rival](s)
		defer r.Close()
		if err := r.Loan(ctx, 0); err != nil {
			return 0, 0, err
		}
		began := time.Now()
		for range n {
			if err := r.Loan(ctx, 0); err != nil {
				return 0, 0, err
			}
		}
		took := time.Since(began) / time.Duration(n)
		if i == 0 {
			dial = took
		} else {
			loan = took
		}
	}
	return dial, loan, nil
}
