package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// ORA-13
func TestWarmOpensAFirstSetBeforeTheFirstBorrow(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		require.NoError(t, p.Warm(t.Context(), n.addr, 5))
		p.check(t)
		st := p.Stats()
		require.Equal(t, [3]int{5, 5, 0}, [3]int{st.Open, st.Idle, st.Waiting})
		soon(t, "five accepted", func() bool { return n.srv.Accepts() == 5 })
		var held []held
		for range 5 {
			held = append(held, hold(t, p, n.addr))
		}
		for _, h := range held {
			require.False(t, h.Info().Reused)
			require.NoError(t, h.end(nil))
		}
		require.Equal(t, uint64(5), p.Stats().Dials, "the borrowers needed none")
		require.NoError(t, p.Warm(t.Context(), n.addr, 5), "they are there")
		require.Equal(t, uint64(5), p.Stats().Dials)
	})
}

// ORA-36
func TestWarmOpensInParallel(t *testing.T) {
	for dials, want := range map[int]time.Duration{0: 50, 5: 4 * 50, 1: 20 * 50} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{MaxDialingPerAddr: dials})
			n.Host("a").SetLatency(50 * time.Millisecond)
			start := time.Now()
			require.NoError(t, n.p.Warm(bg, at("a"), 20))
			require.Equal(t, want*time.Millisecond, time.Since(start))
			n.gauges(0, 20, 0)
			require.Equal(t, 20, n.Host("a").Accepts())
			if dials > 0 {
				require.EqualValues(t, dials, n.peakDialing.Load())
			}
			n.check()
		})
	}
	bubble(t, func(t *testing.T) { // and within the limit of all addresses
		n := open(t, Config{MaxDialing: 3, MaxDialingPerAddr: 3})
		n.Host("a").SetLatency(50 * time.Millisecond)
		require.NoError(t, n.p.Warm(bg, at("a"), 9))
		require.EqualValues(t, 3, n.peakDialing.Load())
	})
}

// APR-X19
func TestWarmOnADeadServerNamesTheAddress(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		n.srv.Stop()
		err := p.Warm(t.Context(), n.addr, 1)
		var pe *Error
		require.ErrorAs(t, err, &pe)
		require.Equal(t, KindRefused, pe.Kind)
		require.Equal(t, StageDial, pe.Stage)
		canon, cerr := n.addr.canonical()
		require.NoError(t, cerr)
		require.Equal(t, canon, pe.Addr)
		require.ErrorContains(t, err, canon.String())
		require.ErrorContains(t, err, "0 of 1 are open")
		require.Zero(t, settled(t, p).Open)
	})
}

// failingDials is a dialer of memory whose k-th dial fails, counted from 1.
func (n *testnet) failingDials(k int64, err error) map[Transport]DialFunc {
	var calls atomic.Int64
	return map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
		if calls.Add(1) == k {
			time.Sleep(500 * time.Microsecond)
			return nil, err
		}
		return n.dial(ctx, a)
	}}
}

// APR-X02
func TestWarmKeepsWhatItOpenedWhenADialFails(t *testing.T) {
	for _, together := range []int{1, 2, 5} { // dials at the same time
		bubble(t, func(t *testing.T) {
			n := newTestnet(t)
			n.open(Config{MaxDialingPerAddr: together, Dialers: n.failingDials(3, syscall.ECONNREFUSED)})
			n.Host("a").SetLatency(time.Millisecond)
			err := n.p.Warm(bg, at("a"), 5)
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
			require.Equal(t, KindRefused, KindOf(err))
			there := map[int]int{1: 2, 2: 3, 5: 4}[together] // the third, and no more after it
			require.ErrorContains(t, err, fmt.Sprintf("dial mem://a: %d of 5 are open: ", there))
			n.gauges(0, there, 0)
			require.Len(t, n.Host("a").Conns(), there, "what was opened is kept")
			n.check()
			time.Sleep(time.Second)
			n.gauges(0, there, 0)
			require.NoError(t, n.p.Warm(bg, at("a"), 5))
			n.gauges(0, 5, 0)
			n.check()
		})
	}
}

func TestWarmCountsWhatIsThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.idle(at("a"), 2)
		b := n.borrow(bg, at("a"))
		b.conn()
		n.Host("a").SetLatency(time.Second)
		n.Host("b").SetLatency(time.Second)
		slow := n.borrow(bg, at("b"))
		synctest.Wait()
		require.NoError(t, n.p.Warm(bg, at("a"), 2))
		require.EqualValues(t, 3, n.p.Stats().Dials)
		require.NoError(t, n.p.Warm(bg, at("a"), 4))
		slow.conn()
		n.gauges(2, 3, 0)
		require.NoError(t, n.p.Warm(bg, at("a"), 0))
		require.NoError(t, n.p.Warm(bg, at("never"), 0))
		require.Equal(t, 2, n.p.Stats().Addrs)
		n.check()
		require.NoError(t, b.giveBack())
		require.NoError(t, slow.giveBack())
	})
}

func TestTwoWarmsShareTheirConnections(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").SetLatency(time.Second)
		results := make(chan error, 2)
		for _, k := range []int{3, 5} {
			go func() { results <- n.p.Warm(bg, at("a"), k) }()
		}
		require.NoError(t, <-results)
		require.NoError(t, <-results)
		n.gauges(0, 5, 0)
		require.EqualValues(t, 5, n.p.Stats().Dials)
		n.check()
	})
}

func TestABorrowerTakesADialOfWarm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").SetLatency(time.Second)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 2) }()
		time.Sleep(900 * time.Millisecond)
		b := n.borrow(bg, at("a"))
		start := time.Now()
		b.conn()
		require.Equal(t, 100*time.Millisecond, time.Since(start), "the dial that was under way")
		require.NoError(t, <-warmed)
		require.EqualValues(t, 2, n.p.Stats().Dials)
		n.check()
		require.NoError(t, b.giveBack())
	})
}

func TestWarmRefusesWhatNoLimitAllows(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for name, cfg := range map[string]Config{
			"MaxOpen": {MaxOpen: 4}, "MaxPerAddr": {MaxPerAddr: 4}, "MaxIdle": {MaxIdle: 4}, "MaxIdlePerAddr": {MaxIdlePerAddr: 4},
		} {
			n := open(t, cfg)
			err := n.p.Warm(bg, at("a"), 5)
			require.Equal(t, KindUsage, KindOf(err), name)
			require.ErrorContains(t, err, name+" allows 4")
			require.Zero(t, n.p.Stats().Addrs)
			require.NoError(t, n.p.Warm(bg, at("a"), 4))
			n.gauges(0, 4, 0)
		}
		n := open(t, Config{MaxIdle: -1})
		require.ErrorContains(t, n.p.Warm(bg, at("a"), 1), "MaxIdle allows 0")
		for _, err := range []error{
			n.p.Warm(bg, at("a"), -1),
			n.p.Warm(bg, Addr{}, 1),
			n.p.Warm(bg, Addr{Transport: "none", Host: "x"}, 1),
			n.p.Warm(nil, at("a"), 1), //lint:ignore SA1012 that is the mistake
			new(Pool).Warm(bg, at("a"), 1),
		} {
			require.Equal(t, KindUsage, KindOf(err))
		}
		done, cancel := context.WithCancel(bg)
		cancel()
		require.ErrorIs(t, n.p.Warm(done, at("a"), 1), context.Canceled)
		require.Zero(t, n.p.Stats().Dials)
	})
}

func TestWarmEvictsNobodyAndWaitsForRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 4})
		n.idle(at("b"), 3)
		ctx, cancel := context.WithTimeout(bg, 10*time.Second)
		defer cancel()
		start := time.Now()
		err := n.p.Warm(ctx, at("a"), 3)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 10*time.Second, time.Since(start))
		require.ErrorContains(t, err, "1 of 3 are open")
		require.ErrorContains(t, err, "raise MaxOpen")
		n.gauges(0, 4, 0)
		n.closed(reasons{})
		n.check()

		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 3) }()
		synctest.Wait()
		n.check()
		// A borrower needs the slot more.
		held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("c"))}
		held[0].conn()
		held[1].conn()
		n.closed(reasons{ClosedEvicted: 1})
		n.p.Retire(at("b"))
		require.NoError(t, <-warmed)
		n.gauges(2, 2, 0)
		n.check()
		for _, b := range held {
			require.NoError(t, b.giveBack())
		}
	})
}

func TestWarmFailsAtOnceWhereNobodyMayWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 4, WhenFull: FullFail})
		n.idle(at("b"), 2)
		err := n.p.Warm(bg, at("a"), 3)
		require.ErrorIs(t, err, ErrExhausted)
		require.ErrorContains(t, err, "2 of 3 are open")
		var pe *Error
		require.ErrorAs(t, err, &pe)
		require.Equal(t, "MaxOpen", pe.LimitName)
		n.gauges(0, 4, 0)
		n.check()
	})
	bubble(t, func(t *testing.T) { // what cannot be kept is not opened again and again
		n := open(t, Config{MaxIdle: 4})
		n.idle(at("b"), 3)
		err := n.p.Warm(bg, at("a"), 3)
		require.ErrorIs(t, err, ErrExhausted)
		require.ErrorContains(t, err, "raise MaxIdle")
		n.gauges(0, 4, 0)
		require.LessOrEqual(t, n.Host("a").Accepts(), 3)
		n.check()
	})
}

func TestCloseEndsWarm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").BlackHole(true)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 3) }()
		synctest.Wait()
		require.Equal(t, 3, n.p.Stats().Dialing)
		require.NoError(t, n.p.Close())
		require.ErrorIs(t, <-warmed, ErrClosed)
		require.ErrorIs(t, n.p.Warm(bg, at("a"), 1), ErrClosed)
		require.Zero(t, n.p.Stats().Addrs)
	})
}

// The dials belong to the pool: who loses patience leaves them to others.
func TestDialsOfAWarmThatGaveUpGoOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").SetLatency(time.Second)
		ctx, cancel := context.WithTimeout(bg, 100*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, n.p.Warm(ctx, at("a"), 3), context.DeadlineExceeded)
		n.check()
		time.Sleep(time.Second)
		n.gauges(0, 3, 0)
		n.check()
	})
}

func TestWarmReplacesWhatIsRetiredMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialingPerAddr: 2})
		n.Host("a").SetLatency(time.Second)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 4) }()
		time.Sleep(1500 * time.Millisecond)
		n.p.Retire(at("a"))
		require.NoError(t, <-warmed)
		n.gauges(0, 4, 0)
		n.closed(reasons{ClosedRetired: 4})
		n.check()
	})
}

// A Warm of an address that is backing off sends one probe, when it is due.
func TestWarmHeedsTheBackOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Down()
		for range backoffAfter {
			n.fail(bg, at("a"))
		}
		before := n.p.Stats().Dials
		err := n.p.Warm(bg, at("a"), 5)
		require.ErrorContains(t, err, "0 of 5 are open")
		require.EqualValues(t, 1, n.p.Stats().Dials-before)
		n.check()
		n.Host("a").Up()
		require.NoError(t, n.p.Warm(bg, at("a"), 5))
		require.EqualValues(t, 6, n.p.Stats().Dials-before, "the probe, and when it worked the others")
	})
}

// A Warm hears of its own dials, and of Trace.
func TestTheTraceOfAWarmIsToldOfItsDials(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		var told atomic.Int64
		ctx := WithTrace(bg, &Trace{DialDone: func(i DialInfo) {
			if i.Err == nil && i.Addr == at("a") {
				told.Add(1)
			}
		}})
		require.NoError(t, n.p.Warm(ctx, at("a"), 3))
		synctest.Wait()
		require.EqualValues(t, 3, told.Load())
	})
}

func TestALimitLoweredBelowAWarmEndsIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 8})
		n.Host("a").SetLatency(time.Second)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 6) }()
		synctest.Wait()
		l := n.p.Limits()
		l.MaxOpen = 4
		require.NoError(t, n.p.SetLimits(l))
		err := <-warmed
		require.ErrorContains(t, err, "MaxOpen allows 4")
		n.check()
		time.Sleep(2 * time.Second)
		n.gauges(0, 4, 0)
		n.closed(reasons{ClosedSurplus: 2})
		n.check()
	})
}

// An unfit fresh connection, or a Setup that fails, is a failure of Warm too.
func TestWarmReportsSetup(t *testing.T) {
	bubble(t, func(t *testing.T) {
		refused := errors.New("wrong password")
		n := open(t, Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, refused }})
		err := n.p.Warm(bg, at("a"), 2)
		require.ErrorIs(t, err, refused)
		var pe *Error
		require.ErrorAs(t, err, &pe)
		require.Equal(t, StageSetup, pe.Stage)
		synctest.Wait()
		require.Empty(t, n.Host("a").Conns())
		n.check()
	})
}

// What Warm opens is not given up because borrowers were served by what came back.
func TestDialsOfWarmAreNoSurplus(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxDialing: -1})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.Host("a").SetLatency(time.Second)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(bg, at("a"), 6) }()
		synctest.Wait()
		waiter := n.borrow(bg, at("a")) // counts on one of its dials
		synctest.Wait()
		require.NoError(t, holder.giveBack())
		waiter.conn()
		time.Sleep(2 * surplusPatience)
		synctest.Wait()
		require.Equal(t, 5, n.p.Stats().Dialing)
		n.check()
		require.NoError(t, <-warmed)
		require.Zero(t, n.p.Stats().DialErrors)
		require.NoError(t, waiter.giveBack())
		n.gauges(0, 6, 0)
		n.check()
	})
}
