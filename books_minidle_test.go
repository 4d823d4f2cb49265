package connpool

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// TDBC-11
func TestTheNextConnectionIsOpenedWhenTheLastSpareIsLent(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MinIdlePerAddr = 1 })
		var all []held
		for k := range 4 {
			all = append(all, hold(t, p, n.addr))
			soon(t, "one spare", func() bool { return p.Stats().Idle == 1 && p.Stats().Dialing == 0 })
			soon(t, "one more accepted than lent", func() bool { return n.srv.Accepts() == k+2 })
			p.check(t)
		}
		require.EqualValues(t, 1, p.Stats().Waits, "of all borrowers only the first had to wait")
		for _, h := range all {
			require.NoError(t, h.end(nil))
		}
		require.EqualValues(t, 5, p.Stats().Dials)
	})
}

// TDBC-11: nobody waits for a dial, however slow dials are.
func TestTheSecondBorrowerDoesNotWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1})
		n.Host("a").SetLatency(time.Second)
		first := n.borrow(bg, at("a"))
		first.conn()
		time.Sleep(2 * time.Second)
		n.gauges(1, 1, 0)
		start := time.Now()
		second := n.borrow(bg, at("a"))
		second.conn()
		require.Zero(t, time.Since(start))
		require.Equal(t, 3, n.p.Stats().Open)
		require.NoError(t, first.giveBack())
		require.NoError(t, second.giveBack())
		time.Sleep(2 * time.Second)
		n.gauges(0, 3, 0)
		n.use(at("a"))
		time.Sleep(2 * time.Second)
		n.gauges(0, 3, 0) // as long as some are idle, nothing is opened
		n.check()
	})
}

func TestABorrowerTakesASpareDialUnderWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1})
		n.Host("a").SetLatency(time.Second)
		first := n.borrow(bg, at("a"))
		first.conn()
		time.Sleep(900 * time.Millisecond)
		require.Equal(t, 1, n.p.Stats().Dialing)
		start := time.Now()
		second := n.borrow(bg, at("a"))
		synctest.Wait()
		require.Equal(t, 1, n.p.Stats().Dialing, "its dial is under way already")
		n.check()
		second.conn()
		require.Equal(t, 100*time.Millisecond, time.Since(start))
		synctest.Wait()
		require.Equal(t, 1, n.p.Stats().Dialing, "the next")
		n.check()
		require.NoError(t, first.giveBack())
		require.NoError(t, second.giveBack())
	})
}

// ORA-X03
func TestAReserveIsNoOrderToDialAtStart(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer srv.Close()
	goroutines := runtime.NumGoroutine()
	p, err := New(Config{MinIdlePerAddr: 3})
	require.NoError(t, err)
	defer p.Close()
	require.Zero(t, p.Stats().Dials)
	soon(t, "no goroutine more", func() bool { return runtime.NumGoroutine() <= goroutines })
	require.Zero(t, srv.Accepts())
	addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
	require.NoError(t, p.With(bg, addr, func(Conn) error { return nil }))
	soon(t, "the reserve", func() bool { return p.Stats().Idle >= 3 && p.Stats().Dialing == 0 })
	p.check(t)
}

// TDBC-15
func TestAReserveThatDiedIsRefilled(t *testing.T) {
	for name, kill := range map[string]func(*testnet){
		"by the sweep": func(n *testnet) {
			for _, c := range n.Host("a").Conns() {
				c.Close()
			}
		},
		"by age":    func(n *testnet) { time.Sleep(10 * time.Minute) },
		"by Retire": func(n *testnet) { n.p.Retire(at("a")) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MinIdlePerAddr: 1, MaxLifetime: 10 * time.Minute})
				n.idle(at("a"), 3)
				require.NoError(t, n.p.With(bg, at("a"), func(Conn) error { return nil }))
				n.CloseAllBut(t, 1)
				before := n.Host("a").Accepts()
				kill(n)
				time.Sleep(defaultSweepInterval)
				synctest.Wait()
				n.gauges(0, 1, 0)
				require.Equal(t, before+1, n.Host("a").Accepts(), "one new one")
				n.check()
			})
		})
	}
}

// CloseAllBut evicts idle connections until k are left, and lends once, so that
// their address has its reserve again.
func (n *testnet) CloseAllBut(t *testing.T, k int) {
	t.Helper()
	for n.p.Stats().Idle > k {
		_, ok := n.p.EvictLRU()
		require.True(t, ok)
	}
	n.use(at("a"))
	synctest.Wait()
}

// TDBC-15
func TestAReserveOfADeadServerIsTriedOncePerSweep(t *testing.T) {
	for _, interval := range []time.Duration{0, 100 * time.Millisecond, -1} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MinIdlePerAddr: 3, SweepInterval: interval, IdleTimeout: time.Hour})
			n.idle(at("a"), 1)
			synctest.Wait()
			require.GreaterOrEqual(t, n.p.Stats().Idle, 3)
			n.Host("a").Down()
			n.p.Retire(at("a"))
			synctest.Wait()
			n.gauges(0, 0, 0)
			before := n.p.Stats().Dials
			span := short.Of(time.Hour, 20*time.Minute)
			time.Sleep(span)
			synctest.Wait()
			tries := int(n.p.Stats().Dials - before)
			period := max(n.p.sweepPeriod(), backoffMax/2)
			require.LessOrEqual(t, tries, int(span/period)+4)
			require.Greater(t, tries, int(span/(2*failureMemory)), "it does not give up either")
			n.check()
			n.Host("a").Up()
			time.Sleep(5 * failureMemory)
			synctest.Wait() // for the sweep of that moment
			n.gauges(0, 3, 0)
			n.check()
		})
	}
}

// A server that accepts and hangs up is no reason to dial without end.
func TestAReserveThatDiesUnusedIsTriedOncePerSweep(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			s, err := faultnet.Start(faultnet.Options{Network: network})
			require.NoError(t, err)
			defer s.Close()
			transport := TCP
			if network == "tls" {
				transport = TLS
			}
			addr := Addr{Transport: transport, Host: s.Host(), Port: s.Port()}
			p, err := New(Config{MinIdlePerAddr: 1, SweepInterval: time.Hour, TLS: s.ClientTLS()})
			require.NoError(t, err)
			defer p.Close()
			h := hold(t, p, addr)
			// As soon as there is a spare, it dies.
			stop, killed := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(killed)
				for {
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Microsecond):
						s.CutIdle(-1, faultnet.FIN)
					}
				}
			}()
			sweeps := uint64(0)
			soon(t, "some deaths", func() bool {
				sweepAll(p)
				sweeps++
				return p.Stats().Closed[ClosedStale] >= short.Of[uint64](10, 4)
			})
			dials := p.Stats().Dials
			require.LessOrEqual(t, dials, 2+sweeps, "the first, its spare, and one for each sweep")
			soon(t, "the last is dead", func() bool { p.looksAround(); return p.Stats().Open == 1 })
			dials = p.Stats().Dials
			time.Sleep(20 * time.Millisecond) // in which nothing may happen
			require.Equal(t, dials, p.Stats().Dials)
			close(stop)
			<-killed
			p.check(t)
			h.end(nil)
		})
	}
}

// A server that hangs up on what is idle for some seconds is no failing one, and each
// of its hang-ups is one less in the reserve.
func TestAReserveBeforeAnImpatientServerIsTriedOncePerSweep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1, SweepInterval: time.Minute, IdleTimeout: time.Hour})
		b := n.borrow(bg, at("a"))
		mine := n.peer(b.conn())
		synctest.Wait()
		n.gauges(1, 1, 0)
		before := n.p.Stats().Dials
		for range 200 {
			time.Sleep(3 * time.Second)
			for _, c := range n.Host("a").Conns() {
				if c != mine {
					c.Reset()
				}
			}
			n.p.looksAround()
			synctest.Wait()
			require.False(t, n.stats(at("a")).BackingOff)
		}
		require.LessOrEqual(t, n.p.Stats().Dials-before, uint64(11), "in ten minutes")
		n.check()
		require.NoError(t, b.giveBack())
	})
}

// The dial of a borrower tells of a failing address as well as one of the reserve's.
func TestAReserveWaitsForTheSweepWhenABorrowersDialFailed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1, MaxPerAddr: 2})
		first := n.borrow(bg, at("a"))
		first.conn()
		synctest.Wait()
		second := n.borrow(bg, at("a"))
		second.conn()
		waiter := n.queue(1, at("a"))[0] // there is no room for a reserve
		n.Host("a").Down()
		require.ErrorIs(t, first.finish(discard), errBoom)
		require.Equal(t, StageDial, n.fail2(waiter).Stage)
		synctest.Wait()
		require.EqualValues(t, 3, n.p.Stats().Dials)
		n.check()
		require.NoError(t, second.giveBack())
	})
}

// looksAround looks at what is idle as a sweep does, and is none.
func (p *Pool) looksAround() {
	p.mu.Lock()
	var all []idleRef
	for _, c := range p.recency.all() {
		all = append(all, idleRef{c, c.generation()})
	}
	p.mu.Unlock()
	for _, at := range all {
		at.examine(false)
	}
}

// TDBC-X04
func TestTheReserveOutlivesIdleTimeoutAndIsChecked(t *testing.T) {
	for spare := range 3 {
		bubble(t, func(t *testing.T) {
			pinged := make(map[uint64]int)
			var mu sync.Mutex
			n := open(t, Config{MinIdlePerAddr: spare, Check: func(_ context.Context, c Conn) error {
				mu.Lock()
				defer mu.Unlock()
				pinged[c.Info().ID]++
				return nil
			}})
			n.idle(at("a"), 5)
			synctest.Wait()
			require.GreaterOrEqual(t, n.p.Stats().Idle, 5)
			time.Sleep(4 * defaultIdleTimeout)
			synctest.Wait()
			n.gauges(0, spare, 0)
			require.Len(t, n.Host("a").Conns(), spare)
			n.check()
			mu.Lock()
			clear(pinged)
			mu.Unlock()
			time.Sleep(10 * defaultSweepInterval)
			synctest.Wait()
			mu.Lock()
			require.Len(t, pinged, spare, "those that are left, and no others")
			for _, k := range pinged {
				require.Equal(t, 10, k, "one ping a sweep")
			}
			mu.Unlock()
			dials := n.p.Stats().Dials
			if spare > 0 {
				require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
					require.Greater(t, c.Info().Age, 2*defaultIdleTimeout, "it is lent, old as it is")
					return nil
				}))
				require.LessOrEqual(t, n.p.Stats().Dials, dials+1)
			}
			n.check()
		})
	}
}

// TDBC-X04: what is in reserve is looked at.
func TestADeadReserveIsNeitherKeptNorLent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1})
		n.use(at("a"))
		synctest.Wait()
		for _, c := range n.Host("a").Conns() {
			c.Reset()
		}
		require.NotContains(t, []string{"a#1", "a#2"}, n.use(at("a")))
		synctest.Wait()
		for _, c := range n.Host("a").Conns() {
			c.Write([]byte("unasked"))
		}
		dirty := n.p.Stats().Idle
		time.Sleep(2 * defaultSweepInterval)
		synctest.Wait()
		require.EqualValues(t, dirty, n.p.Stats().Closed[ClosedStale]-2, n.p.Stats().Closed)
		n.gauges(0, 1, 0)
		n.check()
	})
}

// What is beyond the reserve is not lent when it is too old, sweep or not.
func TestOnlyTheReserveIsLentBeyondIdleTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 2, IdleTimeout: time.Minute, SweepInterval: -1})
		n.idle(at("a"), 5)
		synctest.Wait()
		idle := n.p.Stats().Idle
		time.Sleep(2 * time.Minute)
		n.use(at("a"))
		synctest.Wait()
		require.EqualValues(t, idle-2, n.p.Stats().Closed[ClosedIdleTimeout])
		n.check()
	})
	bubble(t, func(t *testing.T) { // age in years is another matter
		n := open(t, Config{MinIdlePerAddr: 1, IdleTimeout: time.Minute, MaxLifetime: 3 * time.Minute, SweepInterval: -1})
		n.use(at("a"))
		synctest.Wait()
		time.Sleep(4 * time.Minute)
		require.Equal(t, "a#3", n.use(at("a")))
		synctest.Wait()
		n.closed(reasons{ClosedIdleTimeout: 1, ClosedLifetime: 1})
	})
}

// TDBC-X09
func TestACheckKeepsAConnectionAliveThatThePeerWouldClose(t *testing.T) {
	for name, ping := range map[string]bool{"with": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				cfg := Config{MinIdlePerAddr: 1, SweepInterval: 300 * time.Millisecond}
				if ping {
					cfg.Check = func(_ context.Context, c Conn) error {
						_, err := askLine(c, "ping")
						return err
					}
				}
				n := open(t, cfg)
				n.Host("a").Serve(func(c *faultnet.Conn) { // has no patience with silence
					for b := make([]byte, 1); ; {
						c.SetReadDeadline(time.Now().Add(time.Second))
						if _, err := c.Read(b); err != nil {
							return
						}
						if b[0] == '\n' {
							fmt.Fprint(c, "pong\n")
						}
					}
				})
				n.use(at("a"))
				time.Sleep(short.Of(10*time.Minute, 4*time.Minute))
				accepts := n.Host("a").Accepts()
				if ping {
					require.Equal(t, 2, accepts, "the first ones live")
				} else {
					require.Greater(t, accepts, 100, "they die")
				}
				// Nobody notices: no borrower meets an error, or a wait that is
				// longer than a dial.
				for range 20 {
					require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
						_, err := askLine(c, "work")
						return err
					}))
					time.Sleep(1700 * time.Millisecond)
				}
				if ping {
					require.LessOrEqual(t, n.Host("a").Accepts(), 4)
				}
				n.check()
			})
		})
	}
}

func TestAReserveEvictsNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 4, MinIdlePerAddr: 2})
		b := n.borrow(bg, at("b"))
		b.conn()
		synctest.Wait()
		n.gauges(1, 2, 0) // and one slot
		a := n.borrow(bg, at("a"))
		a.conn()
		synctest.Wait()
		n.gauges(2, 2, 0)
		n.closed(reasons{})
		n.check()
		// Who waits may evict a reserve, which is not opened again meanwhile.
		c := n.borrow(bg, at("c"))
		c.conn()
		synctest.Wait()
		n.closed(reasons{ClosedEvicted: 1})
		n.gauges(3, 1, 0)
		n.check()
		require.Equal(t, errBoom, a.finish(discard)) // leaves a slot, for the reserve of a or c
		synctest.Wait()
		require.Equal(t, 4, n.p.Stats().Open)
		n.closed(reasons{ClosedEvicted: 1, ClosedFnError: 1})
		n.check()
		require.NoError(t, b.giveBack())
		require.NoError(t, c.giveBack())
	})
}

func TestAWaiterHasTheSlotBeforeAReserve(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 3, MinIdlePerAddr: 1})
		a, b, c := n.borrow(bg, at("a")), n.borrow(bg, at("b")), n.borrow(bg, at("c"))
		a.conn()
		b.conn()
		c.conn()
		synctest.Wait()
		n.gauges(3, 0, 0)
		w := n.queue(1, at("d"))[0]
		require.Equal(t, errBoom, a.finish(discard))
		require.Equal(t, "d#1", who(w.conn()))
		n.check()
		for _, s := range []*scripted{b, c, w} {
			require.NoError(t, s.giveBack())
		}
	})
}

// Half of the dials are for those who wait, however many reserves are short and
// however long their dials take.
func TestReservesLeaveDialsToThoseWhoWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		var calls sync.Map
		n.open(Config{MaxDialing: 4, MaxDialingPerAddr: 4, MinIdlePerAddr: 1, Dialers: map[Transport]DialFunc{
			memory: func(ctx context.Context, a Addr) (net.Conn, error) {
				if _, again := calls.LoadOrStore(a, nil); again {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return n.dial(ctx, a)
			},
		}})
		var held []*scripted
		start := time.Now()
		for i := range 6 {
			b := n.borrow(bg, at(fmt.Sprint("h", i)))
			b.conn()
			held = append(held, b)
			synctest.Wait()
		}
		require.Zero(t, time.Since(start))
		require.Equal(t, 2, n.p.Stats().Dialing)
		n.use(at("x"))
		require.Zero(t, time.Since(start))
		n.check()
		for _, b := range held {
			require.NoError(t, b.giveBack())
		}
	})
}

// What could not be kept is not opened, and not opened again and again.
func TestAReserveOpensNothingThatCouldNotBeKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxIdle: 2, MinIdlePerAddr: 1})
		var held []*scripted
		for _, host := range []string{"a", "b", "c", "d"} {
			b := n.borrow(bg, at(host))
			b.conn()
			held = append(held, b)
			synctest.Wait()
		}
		n.gauges(4, 2, 0)
		time.Sleep(time.Minute)
		require.EqualValues(t, 6, n.p.Stats().Dials)
		n.closed(reasons{})
		n.check()
		for _, b := range held {
			require.NoError(t, b.giveBack())
		}
	})
	bubble(t, func(t *testing.T) { // nor while handles run low
		n := open(t, Config{MinIdlePerAddr: 1})
		n.p.mu.Lock()
		n.p.pressure, n.p.pressedAt = handlesLow, n.p.clock.Now()
		n.p.mu.Unlock()
		b := n.borrow(bg, at("a"))
		b.conn()
		synctest.Wait()
		require.EqualValues(t, 1, n.p.Stats().Dials)
		require.NoError(t, b.giveBack())
		n.p.mu.Lock()
		n.p.pressure = handlesPlenty
		n.p.mu.Unlock()
	})
}

// A reserve is what is idle. What the sweep pings is idle, too.
func TestAPingOpensNoSpare(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 1, SweepInterval: time.Second, CheckAfterIdle: time.Hour, Check: func(context.Context, Conn) error {
			time.Sleep(100 * time.Millisecond)
			return nil
		}})
		n.use(at("a"))
		time.Sleep(3 * defaultIdleTimeout)
		before := n.p.Stats().Dials
		for n.p.Stats().InUse == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		n.gauges(1, 0, 0) // the reserve
		b := n.borrow(bg, at("a"))
		b.conn()
		synctest.Wait()
		n.check()
		require.EqualValues(t, 1, n.p.Stats().Dials-before, "the borrower's, and no spare")
		require.NoError(t, b.giveBack())
	})
}

// What was closed to make room does not come back by itself.
func TestAnEvictedReserveComesBackWithTheNextLoan(t *testing.T) {
	for name, drop := range map[string]func(*Pool){
		"EvictLRU": func(p *Pool) {
			for ok := true; ok; _, ok = p.EvictLRU() {
			}
		},
		"CloseIdle": (*Pool).CloseIdle,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MinIdlePerAddr: 2})
				n.use(at("a"))
				synctest.Wait()
				n.gauges(0, 3, 0)
				drop(n.p)
				time.Sleep(time.Minute)
				synctest.Wait()
				n.gauges(0, 0, 0)
				require.Zero(t, n.p.Stats().Addrs)
				n.check()
				n.use(at("a"))
				synctest.Wait()
				require.GreaterOrEqual(t, n.p.Stats().Idle, 2)
				n.check()
			})
		})
	}
}

// PLT-03
func TestAnAddressNobodyUsesLosesItsReserve(t *testing.T) {
	for _, cfg := range []Config{{MinIdlePerAddr: 1}, {MinIdlePerAddr: 2, IdleTimeout: -1}, {MinIdlePerAddr: 1, SweepInterval: -1}} {
		bubble(t, func(t *testing.T) {
			cfg.MaxOpen = -1
			n := newTestnet(t)
			cfg.Dialers = map[Transport]DialFunc{memory: func(_ context.Context, addr Addr) (net.Conn, error) {
				return n.Mem.Dial(bg, addr.Host[len(addr.Host)-1:])
			}}
			n.open(cfg)
			visits := short.Of(1000, 100)
			for i := range visits {
				n.p.With(bg, at(fmt.Sprint("host-", i)), func(Conn) error { return nil })
			}
			synctest.Wait()
			require.Equal(t, visits, n.p.Stats().Addrs)
			n.check()
			busy := n.borrow(bg, at("host-7"))
			busy.conn()
			memory := n.p.reserveMemory()
			time.Sleep(memory - time.Minute + time.Second) // not at the moment of a sweep
			if cfg.SweepInterval >= 0 {
				require.Equal(t, visits*cfg.MinIdlePerAddr, n.p.Stats().Idle-n.idleTooMany(cfg))
			}
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			n.p.mu.Lock()
			kept := 0
			for s := range n.p.sites.all() {
				if s.prefill.reserved() {
					kept++
				}
			}
			n.p.mu.Unlock()
			require.Equal(t, 1, kept, "the one that is in use")
			if cfg.IdleTimeout == 0 && cfg.SweepInterval == 0 {
				require.Equal(t, 1, n.p.Stats().Addrs)
			}
			n.check()
			require.NoError(t, busy.giveBack())
			time.Sleep(memory + 5*time.Minute)
			synctest.Wait()
			if cfg.IdleTimeout == 0 && cfg.SweepInterval == 0 {
				require.Zero(t, n.p.Stats().Addrs)
				require.Zero(t, n.p.deficit.Len())
				require.Nil(t, n.p.sweeper)
			}
			n.check()
		})
	}
}

// idleTooMany is what IdleTimeout has not taken, because it is off.
func (n *testnet) idleTooMany(cfg Config) int {
	if cfg.IdleTimeout < 0 {
		return n.p.Stats().Idle - n.p.Stats().Addrs*cfg.MinIdlePerAddr
	}
	return 0
}

// An address that never worked has no reserve.
func TestAnAddressThatNeverAnsweredIsNotDialledAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MinIdlePerAddr: 2})
		n.Host("typo").Down()
		n.fail(bg, at("typo"))
		time.Sleep(time.Hour)
		require.EqualValues(t, 1, n.p.Stats().Dials)
		require.Zero(t, n.p.Stats().Addrs)
	})
}

// Loans, deaths and reserves at the same moments.
func TestStressReservesUnderTraffic(t *testing.T) {
	s, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer s.Close()
	p, err := New(Config{MinIdlePerAddr: 2, MaxOpen: 12, SweepInterval: 5 * time.Millisecond, IdleTimeout: 20 * time.Millisecond})
	require.NoError(t, err)
	addr := Addr{Transport: TCP, Host: s.Host(), Port: s.Port()}
	var workers tasks.Group
	for w := range 6 {
		workers.Go(func() {
			for i := range short.Of(200, 40) * stress() {
				if i%50 == 7 {
					s.CutIdle(2, faultnet.FIN)
				}
				p.With(bg, scoped(addr, (w+i)%3), func(c Conn) error {
					_, err := ask(c, newToken())
					return err
				})
				if err := p.inconsistency(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	require.NoError(t, p.Close())
	p.check(t)
	require.Zero(t, p.Stats().Open)
	require.Zero(t, p.Stats().Addrs)
}
