package connpool

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

func TestMaxIdleBelowZeroMakesEveryUseDial(t *testing.T) {
	for name, cfg := range map[string]Config{
		"MaxIdle": {MaxIdle: -1}, "MaxIdlePerAddr": {MaxIdlePerAddr: -1}, "MaxUses": {MaxUses: 1},
	} {
		bubble(t, func(t *testing.T) {
			cfg.MaxPerAddr = 2
			n := open(t, cfg)
			const k = 20
			for i := range k {
				b := n.borrow(bg, at("a"))
				require.Equal(t, fmt.Sprintf("a#%d", i+1), who(b.conn()))
				require.NoError(t, b.giveBack())
				synctest.Wait()
				n.gauges(0, 0, 0)
				n.check()
			}
			// Each waiter gets a connection of its own too.
			held := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
			held[0].conn()
			held[1].conn()
			waiter := n.queue(1, at("a"))[0]
			require.NoError(t, held[0].giveBack())
			require.Equal(t, 1, waiter.conn().Info().Uses, name)
			require.NoError(t, held[1].giveBack())
			require.NoError(t, waiter.giveBack())
			synctest.Wait()
			require.Equal(t, k+3, n.Host("a").Accepts(), name)
			var closes uint64
			for _, c := range n.p.Stats().Closed {
				closes += c
			}
			require.EqualValues(t, k+3, closes, name)
			require.Empty(t, n.Host("a").Conns(), name)
		})
	}
}

// APR-X03
func TestMoreThanMaxIdleIsClosedWhenGivenBack(t *testing.T) {
	for name, cfg := range map[string]Config{"MaxIdle": {MaxIdle: 2}, "MaxIdlePerAddr": {MaxIdlePerAddr: 2}} {
		bubble(t, func(t *testing.T) {
			n := open(t, cfg)
			n.idle(at("a"), 10)
			synctest.Wait()
			n.gauges(0, 2, 0)
			n.closed(reasons{ClosedSurplus: 8})
			require.Len(t, n.Host("a").Conns(), 2)
			n.check()
			n.idle(at("b"), 3)
			synctest.Wait()
			if name == "MaxIdle" {
				n.gauges(0, 2, 0)
			} else {
				n.gauges(0, 4, 0)
			}
			n.check()
		})
	}
}

// ORA-X11
func TestMaxUsesCountsLoans(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxUses: 3})
		for i := range 9 {
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				require.Equal(t, fmt.Sprintf("a#%d", i/3+1), who(c))
				require.Equal(t, i%3+1, c.Info().Uses)
				return nil
			}))
			n.check()
		}
		synctest.Wait()
		n.closed(reasons{ClosedMaxUses: 3})
	})
}

// ORA-X11
func TestLifetimeNeverInterruptsALoan(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxLifetime: time.Minute})
		n.Host("a").Serve(echoLines)
		b := n.borrow(bg, at("a"))
		c := b.conn()
		time.Sleep(time.Hour)
		require.Equal(t, time.Hour, c.Info().Age)
		answer, err := askLine(c, "x")
		require.NoError(t, err)
		require.Equal(t, "1 x", answer)
		require.NoError(t, b.giveBack())
		synctest.Wait()
		n.gauges(0, 0, 0)
		n.closed(reasons{ClosedLifetime: 1})
		require.Equal(t, "a#2", n.use(at("a")))
		n.check()
	})
}

// TDBC-22
func TestNewStartsNothing(t *testing.T) {
	stacks := func() string {
		b := make([]byte, 1<<20)
		return string(b[:runtime.Stack(b, true)])
	}
	require.NotContains(t, stacks(), "created by github.com/seed-ecb488c9/connpool.(*Pool)", "before there is a pool")
	require.NotContains(t, stacks(), "created by github.com/seed-ecb488c9/connpool.init", "by importing the package")
	before := runtime.NumGoroutine()
	p, err := New(Config{MaxOpen: 3, SweepInterval: time.Millisecond, MaxLifetime: time.Millisecond})
	require.NoError(t, err)
	require.Nil(t, p.sweeper)
	soon(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= before })
	require.NoError(t, p.Close())
	soon(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= before })
	bubble(t, func(t *testing.T) { // the end of the bubble proves that no goroutine comes later
		p, err := New(Config{})
		require.NoError(t, err)
		time.Sleep(time.Hour)
		require.NoError(t, p.Close())
	})
}

func TestWarmLoanAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates on its own account")
	}
	// Every option that a warm loan has to pass.
	for name, cfg := range map[string]Config{
		"zero": {},
		"all limits": {MaxOpen: 9, MaxPerAddr: 8, MaxIdle: 7, MaxIdlePerAddr: 6, MaxUses: 1 << 30, MaxWaiters: 5,
			MaxLifetime: time.Hour, Trace: &Trace{GotConn: func(GotInfo) {}, PutConn: func(PutInfo) {}, GetConn: func(Addr) {}}},
	} {
		n := open(t, cfg)
		addr := at("a")
		fn := func(Conn) error { return nil }
		require.Zero(t, patience.Allocs(1000, func() {
			if n.p.With(bg, addr, fn) != nil {
				panic("With failed")
			}
		}), name)
	}
}

// APR-12
func TestZeroConfigIsAGoodOne(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer srv.Close()
	handles := openHandles(t)
	p, err := New(Config{})
	require.NoError(t, err)
	addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
	exchange := func(token string) error {
		return p.With(bg, addr, func(c Conn) error {
			answer, err := askLine(c, token)
			if err == nil && !strings.HasSuffix(answer, " "+token) {
				err = fmt.Errorf("%q answers %q", answer, token)
			}
			return err
		})
	}
	for range 100 {
		require.NoError(t, exchange("x"))
	}
	require.Equal(t, 1, srv.Accepts())
	p.check(t)
	const workers = 16
	failed := make(chan error, workers)
	for w := range workers {
		go func() {
			for i := range 50 {
				if err := exchange(fmt.Sprint(w, "-", i)); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range workers {
		require.NoError(t, <-failed)
	}
	p.check(t)
	require.LessOrEqual(t, srv.Peak(), workers)
	require.ErrorIs(t, p.With(bg, addr, discard), errBoom)
	b := p.Stats()
	require.Equal(t, uint64(1), b.Closed[ClosedFnError])
	require.Equal(t, b.Idle, b.Open)
	addr.Port = 1 // no server listens on port 1
	require.ErrorIs(t, p.With(bg, addr, discard), syscall.ECONNREFUSED)
	require.NoError(t, p.Close())
	require.Zero(t, p.Stats().Open)
	p.check(t)
	require.Eventually(t, func() bool { return srv.Open() == 0 && openHandles(t) <= handles }, time.Minute, time.Millisecond)
}

// openHandles counts the descriptors of the process; 0 where the number is not known.
func openHandles(t *testing.T) int {
	if runtime.GOOS != "linux" {
		return 0
	}
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}
