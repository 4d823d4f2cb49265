package connpool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// lying is a connection of nobody's, which only lies in a pool.
type lying struct{ net.Conn }

func (lying) Close() error                     { return nil }
func (lying) SetDeadline(time.Time) error      { return nil }
func (lying) SetReadDeadline(time.Time) error  { return nil }
func (lying) SetWriteDeadline(time.Time) error { return nil }
func (lying) Probe() error                     { return nil }

func layDown(context.Context, Addr) (net.Conn, error) { return lying{}, nil }

// crowd is a pool with one idle connection for each of k addresses. It is not in debug mode:
// there, nothing is done in portions.
func crowd(t testing.TB, k int, cfg Config) *Pool {
	cfg.Dialers, cfg.SweepInterval, cfg.IdleTimeout = map[Transport]DialFunc{memory: layDown}, -1, -1
	cfg.MaxOpen = -1
	p, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	for i := range k {
		require.NoError(t, p.With(bg, at(fmt.Sprint(i)), func(Conn) error { return nil }))
	}
	return p
}

// unrelated is a socket of which no pool knows.
func unrelated(t testing.TB) syscall.Conn {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

// USE-04: what closes many connections closes the first while others of them are idle still,
// and the pool serves borrowers in between.
func TestWhatClosesManyConnectionsLetsBorrowersPass(t *testing.T) {
	const k = 20 * atOnce
	for name, act := range map[string]func(p *Pool){
		"CloseIdle":                (*Pool).CloseIdle,
		"RetireFunc":               func(p *Pool) { require.Equal(t, k, p.RetireFunc(nil)) },
		"SetLimits MaxIdle":        func(p *Pool) { require.NoError(t, p.SetLimits(Limits{MaxOpen: -1, MaxIdle: -1})) },
		"SetLimits MaxIdlePerAddr": func(p *Pool) { require.NoError(t, p.SetLimits(Limits{MaxOpen: -1, MaxIdlePerAddr: -1})) },
		"SetLimits MaxOpen":        func(p *Pool) { require.NoError(t, p.SetLimits(Limits{MaxOpen: 3})) },
	} {
		t.Run(name, func(t *testing.T) {
			var once sync.Once
			served := make(chan error, 1)
			idle := 0
			var p *Pool
			p = crowd(t, k, Config{Trace: &Trace{Closed: func(CloseInfo) {
				once.Do(func() {
					idle = p.Stats().Idle
					served <- p.With(bg, at("other"), func(Conn) error { return nil })
				})
			}}})
			act(p)
			require.NoError(t, <-served)
			require.Positive(t, idle)
			// The close of a foreign connection has a goroutine of its own.
			require.Eventually(t, func() bool { return p.Stats().Open <= 3 }, time.Minute, time.Millisecond)
			p.check(t)
		})
	}
}

// USE-04: a Trace function that ends its goroutine in the middle of the work does not leave the
// rest undone.
func TestWorkInPortionsIsDoneToItsEnd(t *testing.T) {
	for name, act := range map[string]func(p *Pool){
		"CloseIdle":  (*Pool).CloseIdle,
		"RetireFunc": func(p *Pool) { p.RetireFunc(nil) },
		"SetLimits":  func(p *Pool) { p.SetLimits(Limits{MaxOpen: -1, MaxIdlePerAddr: -1}) },
	} {
		t.Run(name, func(t *testing.T) {
			var once sync.Once
			p := crowd(t, 5*atOnce, Config{Trace: &Trace{Closed: func(CloseInfo) { once.Do(runtime.Goexit) }}})
			p.mu.Lock()
			for _, c := range p.recency.all() {
				c.sock.plain = true // closed, and told, on the goroutine that evicts it
			}
			p.mu.Unlock()
			done := make(chan struct{})
			go func() {
				defer close(done)
				act(p)
			}()
			<-done
			require.Eventually(t, func() bool { return p.Stats().Open == 0 }, time.Minute, time.Millisecond)
			p.check(t)
		})
	}
}

// USE-04: loans go on while all that visits many connections runs at once, and nothing is lost.
func TestLoansAndWorkInPortionsDisturbEachOtherInNothing(t *testing.T) {
	const k = 6 * atOnce
	p := crowd(t, k, Config{MaxPerAddr: 2})
	var left atomic.Int64
	left.Store(int64(short.Of(2000, 400)))
	var group tasks.Group
	for g := range 4 {
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for left.Add(-1) > 0 {
				n := 0
				require.NoError(t, p.With(bg, at(fmt.Sprint(r.IntN(k))), func(Conn) error { n++; return nil }))
				require.Equal(t, 1, n)
			}
		})
	}
	limits, other := p.Limits(), unrelated(t)
	for _, act := range []func(){
		p.CloseIdle,
		p.sweep,
		func() { p.MarkDead(other) },
		func() {
			for range p.Addrs() {
			}
		},
		func() {
			l := limits
			l.MaxIdle, l.MaxIdlePerAddr = rand.IntN(k)+2, rand.IntN(2)+1
			require.NoError(t, p.SetLimits(l))
		},
		func() { p.Retire(at(fmt.Sprint(rand.IntN(k)))) },
		func() {
			some := fmt.Sprint(rand.IntN(10))
			p.RetireFunc(func(a Addr) bool { return strings.HasSuffix(a.Host, some) })
		},
	} {
		group.Go(func() {
			for left.Load() > 0 {
				act()
				time.Sleep(time.Millisecond)
			}
		})
	}
	group.Wait()
	require.NoError(t, p.SetLimits(limits))
	require.Eventually(t, func() bool { st := p.Stats(); return st.Closing+st.InUse+st.Dialing == 0 }, time.Minute, time.Millisecond)
	p.check(t)
	p.CloseIdle()
	require.Eventually(t, func() bool { return p.Stats().Open == 0 }, time.Minute, time.Millisecond)
}

// BenchmarkStall is how long borrowers wait for work on 100,000 connections, each to an address
// of its own. One goroutine does the work, another asks for the lock all the time: hold-us is
// the longest time that the asking one found the lock taken, the median over the rounds.
// loan-p999-us is for loans of another address on that goroutine instead.
func BenchmarkStall(b *testing.B) {
	const k = 100_000
	lower, other := 0, unrelated(b)
	for _, work := range []struct {
		name string
		do   func(p *Pool)
		old  func(p *Pool) // makes the crowd whole again
	}{
		{"nothing", func(*Pool) { time.Sleep(20 * time.Millisecond) }, nil},
		{"nothing for long", func(*Pool) { time.Sleep(250 * time.Millisecond) }, nil},
		{"sweep", (*Pool).sweep, nil},
		{"Stats", func(p *Pool) {
			for range 20 {
				time.Sleep(time.Millisecond)
				p.Stats()
			}
		}, nil},
		{"Addrs", func(p *Pool) {
			for range p.Addrs() {
			}
		}, nil},
		{"MarkDead", func(p *Pool) { p.MarkDead(other) }, nil},
		{"Retire", func(p *Pool) {
			for i := range 20 {
				time.Sleep(time.Millisecond)
				p.Retire(at(fmt.Sprint(i)))
			}
		}, refill},
		{"CloseIdle", (*Pool).CloseIdle, refill},
		{"SetLimits", func(p *Pool) {
			l := p.Limits()
			l.MaxIdle = k/2 + lower%2
			lower++
			if err := p.SetLimits(l); err != nil {
				panic(err)
			}
			l.MaxIdle = 0
			p.SetLimits(l)
		}, refill},
	} {
		for _, beside := range []string{"lock", "loan"} {
			b.Run("work="+work.name+"/beside="+beside, func(b *testing.B) {
				p := crowd(b, k, Config{})
				p.mu.Lock()
				for i, c := range p.recency.all() {
					p.byFD[uintptr(1<<24+i)] = c
					c.sock.plain = true // so that no close needs a goroutine
				}
				p.mu.Unlock()
				defer func() {
					p.mu.Lock()
					clear(p.byFD)
					p.mu.Unlock()
				}()
				var longest []float64
				var loans []time.Duration
				b.ResetTimer()
				defer debug.SetGCPercent(debug.SetGCPercent(-1)) // its workers take the place of who holds the lock
				for range b.N {
					b.StopTimer()
					runtime.GC()
					begun, stop, stopped := make(chan struct{}), make(chan struct{}), make(chan struct{})
					go func() {
						defer close(stopped)
						close(begun)
						worst := time.Duration(0)
						for {
							select {
							case <-stop:
								longest = append(longest, float64(worst)/1e3)
								return
							default:
							}
							began := time.Now()
							if beside == "loan" {
								p.With(bg, at("other"), func(Conn) error { return nil })
								loans = append(loans, time.Since(began))
								continue
							}
							for !p.mu.TryLock() {
							}
							p.mu.Unlock()
							worst = max(worst, time.Since(began))
						}
					}()
					<-begun
					b.StartTimer()
					work.do(p)
					close(stop)
					<-stopped
					b.StopTimer()
					if work.old != nil {
						work.old(p)
					}
				}
				b.StopTimer()
				if beside == "lock" {
					slices.Sort(longest)
					b.ReportMetric(longest[len(longest)/2], "hold-us")
				} else if len(loans) > 0 {
					slices.Sort(loans)
					b.ReportMetric(float64(loans[len(loans)*999/1000])/1e3, "loan-p999-us")
				}
			})
		}
	}
}

func refill(p *Pool) {
	for i := range 100_000 {
		p.With(bg, at(fmt.Sprint(i)), func(Conn) error { return nil })
	}
}

// CloseIdle closes whatever was idle when it began, also if something else came back meanwhile.
func TestCloseIdleClosesWhatWasIdleAlthoughOthersComeBack(t *testing.T) {
	const k = 3 * atOnce
	var once sync.Once
	var p *Pool
	var checked *conn
	p = crowd(t, k, Config{Trace: &Trace{Closed: func(CloseInfo) {
		once.Do(func() { checked.releaseFrom(fromCheck) }) // a check has ended well
	}}})
	p.mu.Lock()
	all := p.recency.all()
	checked = all[2*atOnce]
	youngest := all[k-1]
	p.moveLocked(checked, phaseBorrowed)
	checked.lendAtLocked(p.clock.Now())
	p.setCheckingLocked(checked, true)
	p.mu.Unlock()
	p.CloseIdle()
	p.mu.Lock()
	defer p.mu.Unlock()
	require.NotEqual(t, phaseIdle, youngest.phase)
}

// TRY-52: while SetLimits tells the addresses of new limits, nobody is admitted, so that the
// oldest waiters are served first. Later everybody is.
func TestNobodyIsAdmittedBeforeAllAddressesKnowTheLimits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.p.mu.Lock()
		n.p.relimiting++ // as another SetLimits that is under way
		n.p.mu.Unlock()
		b := n.borrow(bg, at("a"))
		synctest.Wait()
		require.True(t, b.waits())
		n.p.mu.Lock()
		n.p.relimiting--
		n.p.mu.Unlock()
		require.NoError(t, n.p.SetLimits(n.p.Limits()))
		b.conn()
		require.NoError(t, b.giveBack())
		n.check()
	})
}
