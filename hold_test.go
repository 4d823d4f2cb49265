package connpool

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// heldLong collects the reports of Trace.HeldLong.
type heldLong struct {
	mu   sync.Mutex
	told []HeldInfo
}

func (h *heldLong) trace() *Trace {
	return &Trace{HeldLong: func(i HeldInfo) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.told = append(h.told, i)
	}}
}

func (h *heldLong) take() []HeldInfo {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	told := h.told
	h.told = nil
	return told
}

// ORA-31
func TestAConnectionHeldForLongIsReportedOnceWithThePlace(t *testing.T) {
	for name, hold := range map[string]func(n *testnet, d time.Duration){
		"With":  func(n *testnet, d time.Duration) { holdWith(n, bg, d) },
		"Lease": holdLease,
		"session": func(n *testnet, d time.Duration) { // which holds between its uses
			ctx, end := n.session(bg)
			defer end()
			holdWith(n, ctx, 0)
			time.Sleep(d / 2)
			n.useUnder(ctx, at("a"))
			time.Sleep(d - d/2)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var pools, own heldLong
				var mu sync.Mutex
				var out bytes.Buffer
				n := open(t, Config{MaxPerAddr: 1, HoldWarn: 5 * time.Second, Trace: pools.trace(),
					Logger: slog.New(slog.NewTextHandler(syncedWriter{&mu, &out}, nil))})
				hold(n, 4999*time.Millisecond)
				hold(n, 0)
				time.Sleep(time.Minute)
				require.Empty(t, pools.take())
				require.Empty(t, out.String())
				hold(n, time.Hour)
				told := pools.take()
				require.Len(t, told, 1)
				require.Equal(t, HeldInfo{Addr: at("a"), ID: 1, Held: 5 * time.Second, Place: told[0].Place, Stack: told[0].Stack}, told[0])
				what := "connpool.holdWith ("
				if name == "Lease" {
					what = "connpool.holdLease ("
				}
				require.Contains(t, told[0].Place, what)
				require.Contains(t, told[0].Place, "hold_test.go:")
				require.True(t, strings.HasPrefix(told[0].Stack, "github.com/seed-ecb488c9/connpool.hold"), told[0].Stack)
				mu.Lock()
				require.Equal(t, 1, strings.Count(out.String(), "has been in use for long"))
				require.Contains(t, out.String(), "level=WARN")
				require.Contains(t, out.String(), "held=5s")
				require.Contains(t, out.String(), "hold_test.go:")
				mu.Unlock()
				// Nothing was taken from anybody.
				n.closed(reasons{})
				n.gauges(0, 1, 0)
				require.NoError(t, n.p.With(WithTrace(bg, own.trace()), at("a"), func(Conn) error { time.Sleep(time.Minute); return nil }))
				require.Len(t, own.take(), 1)
				require.Len(t, pools.take(), 1, "once for each hold")
			})
		})
	}
}

//go:noinline
func holdWith(n *testnet, ctx context.Context, d time.Duration) {
	require.NoError(n.t, n.p.With(ctx, at("a"), func(Conn) error { time.Sleep(d); return nil }))
}

//go:noinline
func holdLease(n *testnet, d time.Duration) {
	l, err := n.p.Lease(bg, at("a"))
	require.NoError(n.t, err)
	time.Sleep(d)
	require.NoError(n.t, l.Return())
}

func TestReportsComeInTimeForEach(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var reports heldLong
		n := open(t, Config{HoldWarn: 10 * time.Second, Trace: reports.trace()})
		start := time.Now()
		var held []*scripted
		for i := range 6 { // one a second
			b := n.borrow(bg, at(fmt.Sprint("h", i)))
			b.conn()
			held = append(held, b)
			time.Sleep(time.Second)
		}
		// The oldest, one in the middle and the youngest end in time.
		for _, i := range []int{0, 3, 5} {
			require.NoError(t, held[i].giveBack())
		}
		for _, i := range []int{1, 2, 4} {
			time.Sleep(time.Until(start.Add(time.Duration(i)*time.Second + 10*time.Second - 1)))
			require.Empty(t, reports.take())
			time.Sleep(time.Nanosecond)
			told := reports.take()
			require.Len(t, told, 1)
			require.Equal(t, fmt.Sprint("h", i), told[0].Addr.Host)
			require.Equal(t, 10*time.Second, told[0].Held)
		}
		n.p.loanLog.mu.Lock()
		require.Nil(t, n.p.loanLog.untold)
		require.False(t, n.p.loanLog.timer.Stop(), "it runs only while something is out")
		n.p.loanLog.mu.Unlock()
		// However a hold ends, it ends.
		for _, how := range []func(Conn) error{discard, Conn.Close, func(Conn) error { panic(errBoom) },
			func(Conn) error { runtime.Goexit(); return nil }, func(c Conn) error { nc, err := c.Detach(); nc.Close(); return err }} {
			b := n.borrow(bg, at("x"))
			b.conn()
			b.finish(how)
			synctest.Wait()
			n.p.loanLog.mu.Lock()
			require.Nil(t, n.p.loanLog.untold)
			require.False(t, n.p.loanLog.timer.Stop())
			n.p.loanLog.mu.Unlock()
		}
		time.Sleep(time.Hour)
		require.Empty(t, reports.take())
		for _, i := range []int{1, 2, 4} {
			require.NoError(t, held[i].giveBack())
		}
	})
}

func TestAReportThatPanicsHarmsNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var told atomic.Int32
		n := open(t, Config{HoldWarn: time.Second, Trace: &Trace{
			HeldLong: func(HeldInfo) { told.Add(1); panic(errBoom) },
			Leaked:   func(HeldInfo) { told.Add(1); panic(errBoom) },
		}})
		for range 3 {
			require.NoError(t, n.p.With(bg, at("a"), func(Conn) error { time.Sleep(time.Minute); return nil }))
		}
		require.EqualValues(t, 3, told.Load())
		forget(n.lease(at("a")))
		require.EqualValues(t, 4, told.Load())
		require.EqualValues(t, 1, n.p.Stats().Leaked)
		n.check()
	})
}

var profiles atomic.Int64 // a name can be given once in a process

func TestAProfileShowsWhatIsInUseAndByWhom(t *testing.T) {
	profile := pprof.NewProfile(fmt.Sprintf("connpool.test/%s/%d", t.Name(), profiles.Add(1)))
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Profile: profile})
		ctx, end := n.session(bg)
		n.useUnder(ctx, at("a"))
		l := n.lease(at("a"))
		require.NoError(t, n.p.With(bg, at("a"), func(Conn) error {
			require.Equal(t, 3, profile.Count())
			var out bytes.Buffer
			require.NoError(t, profile.WriteTo(&out, 1))
			require.Equal(t, 3, strings.Count(out.String(), ".TestAProfileShows"), out.String())
			require.NotContains(t, out.String(), "(*Pool)")
			return nil
		}))
		require.Equal(t, 2, profile.Count())
		end()
		require.Equal(t, 1, profile.Count())
		require.NoError(t, l.Discard())
		require.Zero(t, profile.Count())
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error { nc, err := c.Detach(); nc.Close(); return err }))
		b := n.borrow(bg, at("a"))
		b.conn()
		b.finish(func(Conn) error { panic(errBoom) })
		require.Zero(t, profile.Count())
	})
}

// A pool that wants none of this does not walk the stack, and has no timer.
func TestNobodyPaysForReportsThatNobodyWants(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		require.False(t, n.p.loanLog.wanted)
		b := n.borrow(bg, at("a"))
		require.Nil(t, holdOf(b.conn().c))
		require.NoError(t, b.giveBack())
	})
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	loan(t, p, n.addr)
	before := runtime.NumGoroutine()
	l, err := p.Lease(t.Context(), n.addr)
	require.NoError(t, err)
	require.NotNil(t, holdOf(l.c), "of a forgotten lease the place is all there is to tell")
	require.NoError(t, l.Return())
	require.Nil(t, holdOf(l.c))
	soon(t, "no goroutine more", func() bool { return runtime.NumGoroutine() <= before })
}

func holdOf(c *conn) *loanRecord {
	if l := c.loan.Load(); l != nil {
		return l.record
	}
	return nil
}

// BETA-16: package pprof panics over an entry that it cannot take. That ends the borrow,
// and costs no slot.
func TestAProfileThatPanicsCostsNoSlot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, HoldWarn: time.Hour})
		n.p.loanLog.profile = pprof.Lookup("heap") // which New refuses
		require.Panics(t, func() { n.p.With(bg, at("a"), func(Conn) error { return nil }) })
		require.Panics(t, func() { n.p.Lease(bg, at("a")) })
		ctx, end := n.p.Session(bg)
		require.Panics(t, func() { n.p.With(ctx, at("a"), func(Conn) error { return nil }) })
		end()
		n.gauges(0, 0, 0)
		require.Nil(t, n.p.loanLog.oldest)
		n.p.loanLog.profile = nil
		n.use(at("a"))
		n.gauges(0, 1, 0)
	})
}

// USE-05: a lease costs the Lease and what watches for a leak. Its record is used again.
func TestALeaseAllocatesThreeTimes(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a sync.Pool forgets at random")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	lend := func() {
		l, err := p.Lease(ctx, n.addr)
		require.NoError(t, err)
		require.NoError(t, l.Return())
	}
	lend()
	require.LessOrEqual(t, patience.Allocs(1000, lend), 3.0)
}

// A record that is used again says nothing of the loan before.
func TestARecordOfALoanEndsWithTheLoan(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var reports heldLong
		n := open(t, Config{HoldWarn: time.Second, Trace: reports.trace()})
		for i := range 20 {
			l := n.lease(at(fmt.Sprint("h", i)))
			b := n.borrow(bg, at(fmt.Sprint("b", i)))
			b.conn()
			if i%2 == 0 {
				time.Sleep(time.Second)
				told := reports.take()
				require.Len(t, told, 2)
				require.Equal(t, at(fmt.Sprint("h", i)), told[0].Addr)
				require.Equal(t, at(fmt.Sprint("b", i)), told[1].Addr)
				require.NotEqual(t, told[0].Stack, told[1].Stack)
			}
			require.NoError(t, l.Return())
			require.NoError(t, b.giveBack())
		}
		require.Nil(t, n.p.loanLog.oldest)
		require.Nil(t, n.p.loanLog.newest)
		time.Sleep(time.Hour)
		require.Empty(t, reports.take())
	})
}
