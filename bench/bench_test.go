package bench

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

func TestMain(m *testing.M) {
	if Child() {
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// few is the size of a workload: n, or short under -short, where the run only shows that
// it works.
func few(n, short int) int {
	if testing.Short() {
		return short
	}
	return n
}

func server(b testing.TB, protocol string, overTLS bool) *Server {
	b.Helper()
	s, err := Serve(protocol, overTLS, 0)
	must(b, err)
	b.Cleanup(func() { s.Close() })
	return s
}

func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// start makes a rival that is closed when the benchmark ends.
func start(b testing.TB, rival string, s *Settings) Rival {
	r := Rivals[rival](s)
	b.Cleanup(func() { r.Close() })
	return r
}

// lenders lend a connection; own are clients with a protocol of their own.
var (
	libraries = []string{"puddle", "sql", "commons"}
	byHand    = []string{"channel", "stack"}
	lenders   = slices.Concat([]string{"connpool"}, libraries, byHand)
	own       = []string{"redis", "http"}
)

// checksOf returns the checks that a rival supports.
func checksOf(rival string) []Check {
	switch rival {
	case "connpool":
		return []Check{CheckNone, CheckPeek, CheckAll}
	case "held", "shared", "dial", "redis", "http":
		return []Check{CheckNone}
	}
	return []Check{CheckNone, CheckPeek}
}

// each runs a benchmark for all rivals with all their checks.
func each(b *testing.B, rivals []string, run func(b *testing.B, rival string, check Check)) {
	for _, check := range []Check{CheckNone, CheckPeek, CheckAll} {
		for _, rival := range rivals {
			if slices.Contains(checksOf(rival), check) {
				b.Run(fmt.Sprintf("check=%v/rival=%s", check, rival), func(b *testing.B) { run(b, rival, check) })
			}
		}
	}
}

// W1: one goroutine borrows a warm connection and gives it back. The dial for each use
// shows what a loan saves (ORA-76: what a loan costs, in time and in allocations, beside
// a dial on loopback).
func BenchmarkW1(b *testing.B) {
	each(b, slices.Concat(lenders, []string{"shared", "held", "dial"}), func(b *testing.B, rival string, check Check) {
		r := start(b, rival, &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: 1, Check: check})
		ctx := context.Background()
		must(b, r.Loan(ctx, 0))
		b.ReportAllocs()
		before := cpuTime()
		for b.Loop() {
			if err := r.Loan(ctx, 0); err != nil {
				b.Fatal(err)
			}
		}
		// On a machine with other load, this is the better figure.
		b.ReportMetric(float64(cpuTime()-before)/float64(b.N), "cpu-ns/op")
	})
}

// ORA-76: an object that is cheap to make is not worth a pool. rival=make allocates.
func BenchmarkCheap(b *testing.B) {
	ctx := context.Background()
	b.Run("rival=make", func(b *testing.B) {
		b.ReportAllocs()
		var keep net.Conn
		for b.Loop() {
			keep = new(fake)
		}
		runtime.KeepAlive(keep)
	})
	for _, rival := range []string{"connpool", "stack"} {
		b.Run("rival="+rival, func(b *testing.B) {
			r := start(b, rival, &Settings{Fake: true, Max: 1})
			must(b, r.Loan(ctx, 0))
			b.ReportAllocs()
			for b.Loop() {
				if err := r.Loan(ctx, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// W2: 16 goroutines, one address, 16 connections.
func BenchmarkW2(b *testing.B) {
	const users = 16
	each(b, slices.Concat(lenders, []string{"shared"}), func(b *testing.B, rival string, check Check) {
		r := start(b, rival, &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: users, Check: check})
		ctx := context.Background()
		if rival != "shared" {
			must(b, Fill(ctx, r, users, Same))
		}
		b.SetParallelism(max(1, users/runtime.GOMAXPROCS(0)))
		b.ReportAllocs()
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := r.Loan(ctx, 0); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// W3: 256 goroutines echo over 8 connections. Besides the time of a request it reports
// the 99th percentile of the wait for a connection, and the ratio of requests between the
// goroutines with the most and the fewest.
//
// ORA-09: rival=peruser has one connection for each goroutine, rival=dial one for each
// request; conns is the number open at the peak, dials/op the number opened for a
// request.
func BenchmarkW3(b *testing.B) {
	const users, most = 256, 8
	each(b, slices.Concat(lenders, own, []string{"shared", "dial", "peruser"}), func(b *testing.B, rival string, check Check) {
		ctx := context.Background()
		s := &Settings{Servers: []string{server(b, ProtocolOf(rival), false).Addr}, Max: most, Check: check}
		var use func(user int) Rival
		if rival == "peruser" {
			each := make([]Rival, users)
			for i := range each {
				each[i] = start(b, "held", s)
				must(b, each[i].Exchange(ctx, 0, NewExchange(i)))
			}
			use = func(user int) Rival { return each[user] }
		} else {
			r := start(b, rival, s)
			if rival != "dial" && rival != "shared" {
				must(b, Fill(ctx, r, most, Same))
			}
			use = func(int) Rival { return r }
		}

		var left atomic.Int64
		left.Store(int64(b.N))
		waits := make([][]time.Duration, users)
		served := make([]float64, users)
		var group sync.WaitGroup
		begin := make(chan struct{})
		for user := range users {
			group.Go(func() {
				r, x := use(user), NewExchange(user)
				<-begin
				for left.Add(-1) >= 0 {
					x.Stamp = int(served[user])%4 == 0 // the clock is not free
					var began time.Time
					if x.Stamp {
						began, x.Lent = time.Now(), time.Time{}
					}
					if err := r.Exchange(ctx, 0, x); err != nil {
						b.Error(err)
						return
					}
					if !x.Lent.IsZero() && x.Stamp {
						waits[user] = append(waits[user], x.Lent.Sub(began))
					}
					served[user]++
				}
			})
		}
		opened := s.Opened.Load()
		b.ResetTimer()
		close(begin)
		group.Wait()
		b.StopTimer()
		if all := slices.Concat(waits...); len(all) > 0 {
			b.ReportMetric(float64(percentile(all, 99).Microseconds())/1000, "p99-wait-ms")
		}
		if least := slices.Min(served); least > 0 {
			b.ReportMetric(slices.Max(served)/least, "max/min")
		}
		b.ReportMetric(float64(s.Opened.Load()-opened)/float64(b.N), "dials/op")
		conns := most
		switch rival {
		case "peruser":
			conns = users
		case "shared":
			conns = 1
		}
		b.ReportMetric(float64(conns), "conns")
	})
}

// W4 and W5: a 64-byte echo, borrowed each time, in turn with the same over a held
// connection. x-held is the ratio. Both are medians over batches, so that other load on
// the machine affects both equally. rival=peruser is the same connection twice: it shows
// how far from 1 chance alone goes.
func BenchmarkW4(b *testing.B) { echoes(b, false) }

// W5 is W4 over TLS 1.3.
func BenchmarkW5(b *testing.B) { echoes(b, true) }

func echoes(b *testing.B, overTLS bool) {
	each(b, slices.Concat(lenders, own, []string{"shared", "held", "dial"}), func(b *testing.B, rival string, check Check) {
		ctx := context.Background()
		s := &Settings{Servers: []string{server(b, ProtocolOf(rival), overTLS).Addr}, TLS: overTLS, Max: 1, Check: check}
		r, x := start(b, rival, s), NewExchange(1)
		besideHeld(b, s, ProtocolOf(rival), func() error { return r.Exchange(ctx, 0, x) })
	})
}

// besideHeld measures use in turn with an exchange over a held connection.
func besideHeld(b *testing.B, s *Settings, protocol string, use func() error) {
	const batch = 50
	base, err := newRawHeld(s, protocol)
	must(b, err)
	defer base.nc.Close()
	must(b, use())
	var borrowed, held []float64
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; done += batch {
		n := min(batch, b.N-done)
		t0 := time.Now()
		for range n {
			if err := base.exchange(); err != nil {
				b.Fatal(err)
			}
		}
		t1 := time.Now()
		for range n {
			if err := use(); err != nil {
				b.Fatal(err)
			}
		}
		t2 := time.Now()
		held = append(held, float64(t1.Sub(t0))/float64(n))
		borrowed = append(borrowed, float64(t2.Sub(t1))/float64(n))
	}
	b.ReportMetric(median(borrowed), "ns/op")
	b.ReportMetric(median(held), "held-ns/op")
	b.ReportMetric(median(borrowed)/median(held), "x-held")
}

// W6: a random address among many, with connections that go nowhere, since there are more
// addresses than descriptors. B/addr is the memory of an address with one idle
// connection, including the connection itself (16 bytes).
func BenchmarkW6(b *testing.B) {
	for _, addrs := range []int{1, 100, 10_000, 100_000} {
		b.Run(fmt.Sprintf("addrs=%d", addrs), func(b *testing.B) {
			for _, rival := range []string{"connpool", "puddle", "commons", "channel", "stack"} {
				b.Run("rival="+rival, func(b *testing.B) {
					addrs := min(addrs, few(addrs, 1000))
					ctx := context.Background()
					s := &Settings{Fake: true, Addrs: addrs, Max: 2}
					r := start(b, rival, s)
					before, _ := inUse()
					for key := range addrs {
						must(b, r.Loan(ctx, key))
					}
					after, _ := inUse()
					held := after - before
					order := make([]int32, 1<<16)
					for i := range order {
						order[i] = rand.Int32N(int32(addrs))
					}
					i := 0
					b.ReportAllocs()
					for b.Loop() {
						if err := r.Loan(ctx, int(order[i&(len(order)-1)])); err != nil {
							b.Fatal(err)
						}
						i++
					}
					if addrs > 1 {
						b.ReportMetric(held/float64(addrs), "B/addr")
					}
				})
			}
		})
	}
}

// W7: the memory of an idle connection beyond the bare net.Conn, in a process of its own,
// with the server in another.
func BenchmarkW7(b *testing.B) {
	for _, net := range []string{"tcp", "tls"} {
		for _, rival := range slices.Concat(lenders, own) {
			b.Run("net="+net+"/rival="+rival, func(b *testing.B) {
				t := task{Do: "memory", Rival: rival, Protocol: ProtocolOf(rival), TLS: net == "tls", N: few(2000, 50)}
				if t.TLS {
					t.N = few(500, 50) // a handshake is a millisecond
				}
				addr, stop, err := serveElsewhere(t.Protocol, t.TLS)
				must(b, err)
				defer stop()
				t.Servers = []string{addr}
				var bare, added, goroutines []float64
				for range b.N {
					var m memory
					must(b, t.run(&m))
					bare, added, goroutines = append(bare, m.Bare), append(added, m.Rival), append(goroutines, m.Goroutines)
				}
				b.ReportMetric(median(added), "B/conn")
				b.ReportMetric(median(bare), "bare-B/conn")
				b.ReportMetric(median(goroutines), "goroutines/conn")
			})
		}
	}
}

// W8: 200 goroutines at once borrow from a cold address, 20 connections at most, each
// dial takes 5 ms longer. ms/op is the time until all have their reply.
func BenchmarkW8(b *testing.B) {
	const users, most, delay = 200, 20, 5 * time.Millisecond
	for _, rival := range slices.Concat(lenders, own) {
		b.Run("rival="+rival, func(b *testing.B) {
			sv := server(b, ProtocolOf(rival), false)
			var took, dials []float64
			for range b.N {
				s := &Settings{Servers: []string{sv.Addr}, Max: most, Check: CheckAll}
				s.Delay.Store(int64(delay))
				r := Rivals[rival](s)
				ms := stampede(b, r, users, func(x *Exchange) error { return r.Exchange(context.Background(), 0, x) })
				took, dials = append(took, ms), append(dials, float64(s.Opened.Load()))
				r.Close()
			}
			b.ReportMetric(median(took), "ms/op")
			b.ReportMetric(median(dials), "dials/op")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// W8 with 5 idle connections: 50 goroutines at once need one for 2 ms each, and a dial
// takes 150 ms. conns is the number open in the end; 50 are allowed.
func BenchmarkW8Warm(b *testing.B) {
	const users, spare, delay, work = 50, 5, 150 * time.Millisecond, 2 * time.Millisecond
	for _, rival := range lenders {
		b.Run("rival="+rival, func(b *testing.B) {
			sv := server(b, Echo, false)
			ctx := context.Background()
			var took, conns []float64
			for range b.N {
				s := &Settings{Servers: []string{sv.Addr}, Max: users, Check: CheckAll}
				r := Rivals[rival](s)
				must(b, Fill(ctx, r, spare, Same))
				s.Delay.Store(int64(delay))
				ms := stampede(b, r, users, func(x *Exchange) error {
					return r.Hold(ctx, 0, func(c net.Conn) error {
						time.Sleep(work)
						return exchange(c, x)
					})
				})
				time.Sleep(delay + delay/4) // the dials still in flight
				took, conns = append(took, ms), append(conns, float64(s.Opened.Load()))
				r.Close()
			}
			b.ReportMetric(median(took), "ms/op")
			b.ReportMetric(median(conns), "conns")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// stampede runs use in n goroutines at once and returns how many milliseconds passed
// until all had ended.
func stampede(b *testing.B, r Rival, n int, use func(*Exchange) error) float64 {
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	ready.Add(n)
	for i := range n {
		done.Go(func() {
			x := NewExchange(i)
			ready.Done()
			<-begin
			if err := use(x); err != nil {
				b.Error(err)
			}
		})
	}
	ready.Wait()
	began := time.Now()
	close(begin)
	done.Wait()
	return float64(time.Since(began).Microseconds()) / 1000
}

// W9: the server closes 16 idle connections; how many of the next 100 exchanges fail?
// Every rival has its default settings; the hand-written ones check nothing, as usual.
func BenchmarkW9(b *testing.B) {
	const idle, uses = 16, 100
	for _, net := range []string{"tcp", "tls"} {
		for _, users := range []int{1, 16} {
			for _, rival := range slices.Concat(lenders, own) {
				b.Run(fmt.Sprintf("net=%s/users=%d/rival=%s", net, users, rival), func(b *testing.B) {
					failed := 0
					for range b.N {
						failed += afterTheCut(b, rival, net == "tls", idle, users, uses)
					}
					b.ReportMetric(float64(failed)/float64(b.N), "errors/100")
					b.ReportMetric(0, "ns/op")
				})
			}
		}
	}
}

func afterTheCut(b *testing.B, rival string, overTLS bool, idle, users, uses int) (failed int) {
	ctx := context.Background()
	sv, err := Serve(ProtocolOf(rival), overTLS, 0)
	must(b, err)
	defer sv.Close()
	var mu sync.Mutex
	var socks []*line
	s := &Settings{Servers: []string{sv.Addr}, TLS: overTLS, Max: idle, Check: CheckNone}
	if rival == "connpool" {
		s.Check = CheckAll
	}
	s.OnDial = func(nc net.Conn) {
		l := &line{Conn: nc}
		l.raw, _ = nc.(*net.TCPConn).SyscallConn()
		l.look = func(fd uintptr) { l.dead = quiet(fd) != nil }
		mu.Lock()
		defer mu.Unlock()
		socks = append(socks, l)
	}
	r := Rivals[rival](s)
	defer r.Close()
	must(b, Fill(ctx, r, idle, Same))
	sv.CutAll()
	for _, l := range socks[:idle] { // until each has received the FIN
		for tries := 0; l.alive(); tries++ {
			if tries > 1000 {
				b.Fatal("the client's end does not see the cut")
			}
			time.Sleep(time.Millisecond)
		}
	}
	if rival != "connpool" {
		// Some rivals notice in the background. This pool must not depend on that.
		time.Sleep(20 * time.Millisecond)
	}
	var left, bad atomic.Int64
	left.Store(int64(uses))
	var group sync.WaitGroup
	for user := range users {
		group.Go(func() {
			x := NewExchange(user)
			for left.Add(-1) >= 0 {
				if r.Exchange(ctx, 0, x) != nil {
					bad.Add(1)
				}
			}
		})
	}
	group.Wait()
	return int(bad.Load())
}

// W11: so many addresses that every loan must evict, through 256 connections, compared
// with a dial and a close, and with the same by hand: 256 connections in a ring, the oldest
// is closed while a goroutine dials the next, with a deadline, so that the caller could leave.
// There are 16 servers so that the client's ports do not run out.
func BenchmarkW11(b *testing.B) {
	const most = 256
	servers := make([]string, 16)
	for i := range servers {
		servers[i] = server(b, Echo, false).Addr
	}
	ctx := context.Background()
	b.Run("rival=dial", func(b *testing.B) {
		r := start(b, "dial", &Settings{Servers: servers, Addrs: len(servers)})
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			must(b, r.Loan(ctx, i%len(servers)))
		}
	})
	b.Run("rival=byhand", func(b *testing.B) {
		type dialed struct {
			nc  net.Conn
			err error
		}
		s := &Settings{Servers: servers, Addrs: len(servers)}
		var ring [most]net.Conn
		next := func(i int) {
			done := make(chan dialed, 1)
			go func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
				defer cancel()
				nc, err := s.dial(ctx, i%len(servers))
				done <- dialed{nc, err}
			}()
			if old := ring[i%most]; old != nil {
				old.Close()
			}
			select {
			case d := <-done:
				must(b, d.err)
				ring[i%most] = d.nc
			case <-ctx.Done():
				b.Fatal(ctx.Err())
			}
		}
		for i := range most {
			next(i)
		}
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			next(i)
		}
		b.StopTimer()
		for _, nc := range ring {
			nc.Close()
		}
	})
	for _, addrs := range []int{1000, 20_000, 100_000} {
		b.Run(fmt.Sprintf("rival=connpool/addrs=%d", addrs), func(b *testing.B) {
			s := &Settings{Servers: servers, Addrs: addrs, MaxOpen: most, Check: CheckAll}
			r := start(b, "connpool", s)
			key := 0
			next := func() {
				must(b, r.Loan(ctx, key))
				key = (key + 7919) % addrs // a prime: every address once before any comes twice
			}
			for range most {
				next()
			}
			opened := s.Opened.Load()
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				next()
			}
			b.StopTimer()
			if got := s.Opened.Load() - opened; got != int64(b.N) {
				b.Fatalf("%d of %d loans dialled", got, b.N)
			}
		})
	}
}

// W12: the share of one core that checking 10,000 idle connections takes at the default
// interval of 20 s. It is the CPU time of a process that sweeps ten times a second less
// that of one that never sweeps, compared with one bare peek into each. p99-us is the
// borrower's.
func BenchmarkW12(b *testing.B) {
	const period, usual = 100 * time.Millisecond, 20 * time.Second
	conns := few(10_000, 200)
	addr, stop, err := serveElsewhere(Echo, false)
	must(b, err)
	defer stop()
	measure := func(sweep time.Duration) (cpu, p99, peek []float64) {
		t := task{Do: "sweep", Servers: []string{addr}, N: conns, Sweep: sweep, Window: time.Duration(few(3000, 300)) * time.Millisecond}
		for range b.N {
			var c sweepCost
			must(b, t.run(&c))
			cpu = append(cpu, c.CPU.Seconds()/t.Window.Seconds())
			p99 = append(p99, float64(c.P99)/1000)
			peek = append(peek, float64(c.Peek)/1e6)
		}
		return cpu, p99, peek
	}
	var none float64
	b.Run("sweep=never", func(b *testing.B) {
		cpu, p99, peek := measure(-1)
		none = median(cpu)
		b.ReportMetric(none*100, "%core")
		b.ReportMetric(median(p99), "p99-us")
		b.ReportMetric(median(peek), "peeks-ms")
		b.ReportMetric(0, "ns/op")
	})
	b.Run("sweep=10ps", func(b *testing.B) {
		cpu, p99, _ := measure(period)
		each := (median(cpu) - none) * period.Seconds()
		b.ReportMetric(median(cpu)*100, "%core")
		b.ReportMetric(each*1000, "sweep-ms")
		b.ReportMetric(each/usual.Seconds()*100, "%core-usual")
		b.ReportMetric(median(p99), "p99-us")
		b.ReportMetric(0, "ns/op")
	})
}

// TDBC-12, TDBC-13: a server takes 50 ms for the handshake. How long a user waits for a
// connection from a primed pool, and without a pool.
func BenchmarkPrimed(b *testing.B) {
	ctx := context.Background()
	sv, err := Serve(Echo, true, 50*time.Millisecond)
	must(b, err)
	defer sv.Close()
	for _, rival := range []string{"connpool", "dial"} {
		b.Run("rival="+rival, func(b *testing.B) {
			r := start(b, rival, &Settings{Servers: []string{sv.Addr}, TLS: true, Max: 8, Check: CheckAll})
			n := few(2000, 20)
			if rival == "dial" {
				n = few(10, 1)
			} else {
				must(b, Fill(ctx, r, 8, Same))
			}
			var took []time.Duration
			b.ResetTimer()
			for range b.N {
				for range n {
					began := time.Now()
					must(b, r.Loan(ctx, 0))
					took = append(took, time.Since(began))
				}
			}
			b.ReportMetric(float64(b.Elapsed())/float64(len(took)), "ns/op")
			b.ReportMetric(float64(percentile(took, 99))/1000, "p99-us")
		})
	}
}

// TDBC-13, ORA-77: a TLS connection to a quick server, from the pool and without one;
// cmd/table -addr does the same with the user's own server.
func BenchmarkHandle(b *testing.B) {
	ctx := context.Background()
	sv := server(b, Echo, true)
	for _, rival := range []string{"connpool", "dial"} {
		b.Run("rival="+rival, func(b *testing.B) {
			r := start(b, rival, &Settings{Servers: []string{sv.Addr}, TLS: true, Max: 1, Check: CheckAll})
			must(b, r.Loan(ctx, 0))
			for b.Loop() {
				must(b, r.Loan(ctx, 0))
			}
		})
	}
}

// APR-04: 64 workers use a connection for an eighth of their time. How many connections
// are there with one for each worker, and with a pool?
func BenchmarkWorkers(b *testing.B) {
	const workers, busy, other = 64, 2 * time.Millisecond, 14 * time.Millisecond
	rounds := few(20, 2)
	for _, rival := range []string{"connpool", "peruser"} {
		b.Run("rival="+rival, func(b *testing.B) {
			ctx := context.Background()
			var conns []float64
			for range b.N {
				s := &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: workers, Check: CheckAll}
				var group sync.WaitGroup
				pool := Rivals["connpool"](s)
				for worker := range workers {
					group.Go(func() {
						r, x := pool, NewExchange(worker)
						if rival == "peruser" {
							r = Rivals["held"](s)
							defer r.Close()
						}
						time.Sleep((busy + other) * time.Duration(worker) / workers)
						for range rounds {
							err := r.Hold(ctx, 0, func(c net.Conn) error {
								time.Sleep(busy)
								return exchange(c, x)
							})
							if err != nil {
								b.Error(err)
							}
							time.Sleep(other/2 + rand.N(other))
						}
					})
				}
				group.Wait()
				pool.Close()
				conns = append(conns, float64(s.Opened.Load()))
			}
			b.ReportMetric(median(conns), "conns")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// APR-10: many addresses, a growing number of processors, one goroutine each. The table
// names the machine's processors; beyond them it is a test of overload.
func BenchmarkCores(b *testing.B) {
	const addrs = 64
	for _, procs := range []int{1, 2, 4, 8, 16} {
		b.Run(fmt.Sprintf("procs=%d", procs), func(b *testing.B) {
			ctx := context.Background()
			r := start(b, "connpool", &Settings{Servers: []string{server(b, Echo, false).Addr}, Addrs: addrs, Check: CheckAll})
			for key := range addrs {
				must(b, r.Loan(ctx, key))
			}
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			var user atomic.Int64
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for i := int(user.Add(1)) * 7; pb.Next(); i++ {
					if err := r.Loan(ctx, i%addrs); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "loans/s")
		})
	}
}

// ORA-77: only a measurement of your own application can tell. CONNPOOL_BENCH_ADDR is a
// server, in the form of ParseAddr; nothing is sent to it.
func BenchmarkYours(b *testing.B) {
	text := os.Getenv("CONNPOOL_BENCH_ADDR")
	if text == "" {
		b.Skip("CONNPOOL_BENCH_ADDR is not set")
	}
	if !strings.Contains(text, "://") && !strings.HasPrefix(text, "unix:") {
		text = "tcp://" + text
	}
	addr, err := connpool.ParseAddr(text)
	must(b, err)
	ctx := context.Background()
	for _, rival := range []string{"pooled", "unpooled"} {
		b.Run("rival="+rival, func(b *testing.B) {
			cfg := connpool.Config{}
			if rival == "unpooled" {
				cfg.MaxUses = 1
			}
			p, err := connpool.New(cfg)
			must(b, err)
			defer p.Close()
			must(b, p.With(ctx, addr, nothing))
			for b.Loop() {
				must(b, p.With(ctx, addr, nothing))
			}
		})
	}
}
