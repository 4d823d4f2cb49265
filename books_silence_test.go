package connpool

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// swallow makes callers that borrow from the black hole at addr, give up after a
// quarter of a second, and come again.
func (n *testnet) swallow(ctx context.Context, addr Addr, callers int) {
	n.Host(addr.Host).BlackHole(true)
	for range callers {
		go func() {
			for ctx.Err() == nil {
				c, stop := context.WithTimeout(ctx, 250*time.Millisecond)
				n.p.With(c, addr, func(Conn) error { return nil })
				stop()
				time.Sleep(20 * time.Millisecond)
			}
		}()
	}
}

// TRY-51, BETA-X11
func TestABlackHoleHoldsUpNoOtherAddress(t *testing.T) {
	every := short.Of(1, 6)
	for i, cfg := range []Config{{MaxOpen: 4}, {MaxOpen: 8}, {MaxOpen: 32}, {MaxOpen: 34}, {}, {MaxDialing: 4}, {MaxOpen: 8, MinIdlePerAddr: 1}, {MaxOpen: 8, WhenFull: FullOverflow}} {
		for _, holes := range short.Of([]int{1, 2}, []int{2 - i%2}) {
			t.Run(fmt.Sprintf("MaxOpen %d, MaxDialing %d, MinIdlePerAddr %d, %v, %d holes", cfg.MaxOpen, cfg.MaxDialing, cfg.MinIdlePerAddr, cfg.WhenFull, holes), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := open(t, cfg)
					n.Host("good").SetLatency(time.Millisecond)
					n.idle(at("good"), 2)
					time.Sleep(time.Second)
					ctx, stop := context.WithCancel(bg)
					defer stop()
					for i := range holes {
						n.swallow(ctx, at(fmt.Sprint("hole", i)), 80)
					}
					for moment := 0; moment < 22; moment += every { // while the dials to the holes time out
						cold := at(fmt.Sprint("cold", moment))
						for name, addr := range map[string]Addr{"warm": at("good"), "cold": cold} {
							start := time.Now()
							require.NoError(t, n.p.With(bg, addr, func(c Conn) error {
								if name == "cold" {
									c.Close() // it takes no room from the other for longer
								}
								return nil
							}))
							took := time.Since(start)
							require.LessOrEqual(t, took, 100*time.Millisecond, "%s, after %v", name, time.Duration(moment)*600*time.Millisecond)
							// Of four, each hole has one and a cold one another; and what
							// Overflow opened too much goes at its return.
							if name == "warm" && (cfg.MaxOpen != 4 || holes == 1) && cfg.WhenFull != FullOverflow {
								require.Less(t, took, time.Millisecond, "an idle one was there")
							}
						}
						n.p.check(t)
						time.Sleep(time.Duration(every) * 600 * time.Millisecond)
					}
					stop()
					time.Sleep(time.Minute)
				})
			})
		}
	}
}

// What is idle makes room for an address that answers, and for the first dial to
// any other.
func TestASilentAddressEvictsOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 8})
		n.idle(at("good"), 8)
		ctx, stop := context.WithCancel(bg)
		defer stop()
		n.swallow(ctx, at("hole"), 8)
		time.Sleep(50 * time.Second) // no moment of a sweep's
		require.EqualValues(t, 1, n.p.Stats().Closed[ClosedEvicted])
		n.gauges(0, 7, n.p.Stats().Waiting)
		n.check()

		// One that answers gets what it asks for.
		n.Host("late").SetLatency(time.Millisecond)
		start := time.Now()
		var late []*scripted
		for range 6 {
			late = append(late, n.borrow(bg, at("late")))
		}
		for _, b := range late {
			b.conn()
		}
		require.LessOrEqual(t, time.Since(start), 10*time.Millisecond)
		require.EqualValues(t, 7, n.p.Stats().Closed[ClosedEvicted])
		stop()
		time.Sleep(time.Minute)
	})
}

// An address that is alone dials as much as its limits allow, at once, however
// slowly it answers.
func TestNoColdStartIsSlowerForTheSakeOfOthers(t *testing.T) {
	for _, latency := range []time.Duration{time.Millisecond, 3 * time.Second} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxOpen: 16, MaxDialingPerAddr: 16, MaxDialing: 16})
			n.Host("a").SetLatency(latency)
			start := time.Now()
			var all []*scripted
			for range 16 {
				all = append(all, n.borrow(bg, at("a")))
			}
			for _, b := range all {
				b.conn()
			}
			require.Equal(t, latency, time.Since(start))
			require.EqualValues(t, 16, n.p.Stats().Dials)
			n.check()
		})
	}
}

// A dial that is broken off for another address costs nobody his place, and says
// nothing about its peer.
func TestADialThatMakesRoomIsDialledAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 4})
		n.Host("slow").SetLatency(time.Second)
		start := time.Now()
		var slow []*scripted
		for range 4 {
			slow = append(slow, n.borrow(bg, at("slow")))
			synctest.Wait()
		}
		time.Sleep(2 * silence)
		n.use(at("cold"))
		require.Less(t, time.Since(start), 3*silence)
		for _, b := range slow {
			b.conn()
			require.NoError(t, b.giveBack())
		}
		st := n.stats(at("slow"))
		require.False(t, st.BackingOff)
		require.NoError(t, st.LastErr)
		n.check()

		// Also if it was opened for nobody who waits.
		n.p.CloseIdle()
		synctest.Wait()
		warm := make(chan error, 1)
		go func() { warm <- n.p.Warm(bg, at("slow"), 4) }()
		time.Sleep(2 * silence)
		start = time.Now()
		n.use(at("colder"))
		require.Less(t, time.Since(start), silence)
		n.p.CloseIdle() // the room it took
		require.NoError(t, <-warm)
		n.check()
	})
}

// BETA-X11, TRY-51: what was dialled before it is needed, and is not answered, holds up
// nobody either: a reserve or a Warm takes no room from a borrower.
func TestASilentDialForNobodyHoldsUpNoBorrower(t *testing.T) {
	for name, cfg := range map[string]Config{
		"the slots":                       {MaxOpen: 2},
		"the slots, and nobody may wait":  {MaxOpen: 2, WhenFull: FullFail},
		"the dials":                       {MaxDialing: 1},
		"the dials, and nobody may wait":  {MaxDialing: 1, WhenFull: FullFail},
		"the dials, beside a full server": {MaxDialing: 1, MaxPerAddr: 2, WhenFull: FullOverflow},
	} {
		for _, by := range []string{"reserve", "Warm"} {
			t.Run(name+"/"+by, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := open(t, cfg)
					n.idle(at("a"), 1)
					time.Sleep(time.Second)
					n.Host("a").BlackHole(true)
					warm := make(chan error, 1)
					if by == "reserve" {
						l := n.p.Limits()
						l.MinIdlePerAddr = 1
						require.NoError(t, n.p.SetLimits(l))
					}
					a := n.borrow(bg, at("a"))
					a.conn()
					if by == "Warm" {
						go func() { warm <- n.p.Warm(bg, at("a"), 2) }()
					}
					synctest.Wait()
					require.Equal(t, 1, n.p.Stats().Dialing, "%v", n.p.Stats())
					start := time.Now()
					n.use(at("b"))
					require.LessOrEqual(t, time.Since(start), 2*silence)
					n.check()
					for range 20 { // nor is it tried again whenever there is room
						n.p.CloseIdle()
						n.use(at("b"))
					}
					require.LessOrEqual(t, time.Since(start), 30*silence)
					st := n.stats(at("a"))
					require.False(t, st.BackingOff)
					n.check()
					n.Host("a").BlackHole(false)
					require.NoError(t, a.giveBack())
					n.p.CloseIdle()
					if by == "Warm" {
						time.Sleep(time.Minute)
						require.Len(t, warm, 1)
					}
					n.check()
				})
			})
		}
	}
}

// An address whose surplus dials were given up stands in line as one with fewer dials,
// at once, and not only when they have ended.
func TestSurplusDialsThatAreGivenUpDoNotCountAgainstTheirAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 5, Debug: true})
		first := n.borrow(bg, at("a"))
		first.conn()
		n.Host("a").BlackHole(true)
		queued := n.queue(4, at("a"))
		require.Equal(t, 4, n.p.Stats().Dialing)
		time.Sleep(2 * silence)
		for _, b := range append([]*scripted{first}, queued...) {
			b.conn()
			require.NoError(t, b.giveBack())
		}
		time.Sleep(surplusPatience) // then the pool audits its books
		synctest.Wait()
		n.check()
		require.Equal(t, 1, n.p.Stats().Dialing)
	})
}
