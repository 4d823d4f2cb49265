package connpool

import (
	"context"
	"log/slog"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// loggerFunc is a slog.Handler.
type loggerFunc func(slog.Record)

func (loggerFunc) Enabled(_ context.Context, l slog.Level) bool    { return l >= slog.LevelWarn }
func (f loggerFunc) Handle(_ context.Context, r slog.Record) error { f(r); return nil }
func (f loggerFunc) WithAttrs([]slog.Attr) slog.Handler            { return f }
func (f loggerFunc) WithGroup(string) slog.Handler                 { return f }
func (p *Pool) isWatching() bool                                   { p.mu.Lock(); defer p.mu.Unlock(); return p.watching.watcher != nil }
func (p *Pool) setWatcher(make func() (*sock.Watcher, error))      { p.watching.create = make }
func failing(while *atomic.Bool, err error) func() (*sock.Watcher, error) {
	return func() (*sock.Watcher, error) {
		if while.Load() {
			return nil, err
		}
		return sock.NewWatcher()
	}
}

// TRY-16: a watcher that could not be made is tried again, by itself, and has then what
// was dialled meanwhile. The log is written with nothing held, once.
func TestAWatcherThatCouldNotBeMadeIsTriedAgain(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	var p *Pool
	var logged atomic.Int64
	p = n.pool(t, func(c *Config) {
		c.SweepInterval = -1
		c.Logger = slog.New(loggerFunc(func(slog.Record) {
			if logged.Add(1) == 1 { // which may use the pool
				loan(t, p, scoped(n.addr, "log"))
			}
		}))
	})
	var refused atomic.Bool
	refused.Store(true)
	p.setWatcher(failing(&refused, unix.EMFILE))
	fillIdle(t, p, n.addr, 3)
	require.False(t, p.isWatching())
	require.EqualValues(t, 1, logged.Load())
	require.EqualValues(t, 4, p.Stats().Idle)
	p.mu.Lock()
	p.sweeper.Stop() // which would try again, too, once a minute
	p.mu.Unlock()
	refused.Store(false)
	soon(t, "a watcher", p.isWatching)
	require.Equal(t, 4, n.srv.CutIdle(-1, faultnet.FIN))
	soon(t, "all are gone", func() bool { return p.Stats().Open == 0 })
	require.EqualValues(t, 1, logged.Load())
	p.check(t)
}

// TRY-16: nor is it forgotten if there is nothing to watch for a moment.
func TestAWatcherIsTriedAgainThoughNothingWasOpenMeanwhile(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.SweepInterval = -1 })
	var refused atomic.Bool
	refused.Store(true)
	p.setWatcher(failing(&refused, unix.EMFILE))
	fillIdle(t, p, n.addr, 1)
	p.CloseIdle()
	refused.Store(false)
	fillIdle(t, p, n.addr, 1)
	soon(t, "a watcher", p.isWatching)
	n.srv.CutIdle(-1, faultnet.FIN)
	soon(t, "it is gone", func() bool { return p.Stats().Open == 0 })
}

// TRY-16: it is not tried at each dial, and in the long run once a second at most.
func TestAWatcherIsNotTriedAtEachDial(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	var tries atomic.Int64
	p.setWatcher(func() (*sock.Watcher, error) { tries.Add(1); return nil, unix.EMFILE })
	start := time.Now()
	fillIdle(t, p, n.addr, 20)
	most := int64(0) // the pauses are 50, 100, 200, 400, 800 ms, and then a second
	for passed, pause := time.Since(start), rewatchSoon; passed >= 0; pause = min(2*pause, rewatchAfter) {
		most++
		passed -= pause
	}
	require.LessOrEqual(t, tries.Load(), most)
}

// TRY-16: a connection that the watcher could not take is tried again by the sweep.
func TestAConnectionThatCouldNotBeWatchedIsTriedAgain(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.SweepInterval = time.Hour })
	var full atomic.Bool
	full.Store(true)
	p.watching.add = func(w *sock.Watcher, raw syscall.RawConn, data bool) error {
		if full.Load() {
			return unix.ENOSPC
		}
		return w.Add(raw, data)
	}
	fillIdle(t, p, n.addr, 3)
	loan(t, p, scoped(n.addr, "gone"))
	require.Equal(t, 4, len(p.watching.missed))
	_, ok := p.EvictLRU()
	require.True(t, ok)
	require.Equal(t, 3, len(p.watching.missed), "what was closed is not missed any more")
	p.sweep()
	require.Equal(t, 3, len(p.watching.missed), "not yet")
	full.Store(false)
	p.sweep()
	require.Empty(t, p.watching.missed)
	n.srv.CutIdle(-1, faultnet.FIN)
	soon(t, "all are gone", func() bool { return p.Stats().Open == 0 })
	p.check(t)
}

// TRY-15: pools that were used and forgotten leave nothing, and are garbage, once their
// connections have expired.
func TestForgottenPoolsLeaveNothing(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	warmNet()
	count := func() (goroutines, files int) {
		runtime.GC()
		return runtime.NumGoroutine(), descriptorsOpen(t)
	}
	var collected atomic.Int64
	const k = 100
	goroutines, files := count()
	func() {
		for i := range k {
			p, err := New(Config{IdleTimeout: 50 * time.Millisecond, SweepInterval: 50 * time.Millisecond})
			require.NoError(t, err)
			runtime.AddCleanup(p, func(*atomic.Int64) { collected.Add(1) }, &collected)
			loan(t, p, n.addr)
			if i%2 == 0 { // some by a library, which closes
				network, address := n.target()
				nc, err := p.DialContext(t.Context(), network, address)
				require.NoError(t, err)
				require.NoError(t, nc.Close())
			}
		}
	}()
	soon(t, "no goroutine and no descriptor is left", func() bool {
		g, f := count()
		return g <= goroutines && f <= files
	})
	soon(t, "no pool is left", func() bool { runtime.GC(); return collected.Load() == k })
}

// TRY-15: the watcher ends with what it watches, and is there again for what comes later.
func TestTheWatcherComesAndGoesWithTheConnections(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.SweepInterval = time.Hour })
	ended := func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.watching.watcher == nil && p.watching.running == 0
	}
	for range 3 {
		fillIdle(t, p, n.addr, 2)
		require.True(t, p.isWatching())
		p.sweep()
		require.True(t, p.isWatching(), "there is something to watch")
		require.Equal(t, 2, n.srv.CutIdle(-1, faultnet.FIN))
		soon(t, "both are gone", func() bool { return p.Stats().Open == 0 })
		p.sweep()
		soon(t, "the watcher is gone", ended)
	}
	// Where only a library dials, there is a sweep all the same.
	network, address := n.target()
	q := n.pool(t, func(c *Config) { c.SweepInterval = 10 * time.Millisecond })
	nc, err := q.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	require.True(t, q.isWatching())
	require.NoError(t, nc.Close())
	soon(t, "the watcher is gone", func() bool { return !q.isWatching() })
	soon(t, "the sweep is over", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.sweeper == nil
	})
}

// TRY-15: a watcher that ends as a connection comes takes nothing with it.
func TestWatchersThatEndRaceWithDialsAndNothingIsLost(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.SweepInterval = -1 })
	stop := make(chan struct{})
	var sweeps tasks.Group
	sweeps.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				p.rewatch()
				runtime.Gosched()
			}
		}
	})
	var all tasks.Group
	for w := range 4 {
		all.Go(func() {
			for range 50 {
				if err := p.With(t.Context(), scoped(n.addr, w), func(c Conn) error {
					_, err := ask(c, newToken())
					c.Close()
					return err
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for w := range 4 {
		loan(t, p, scoped(n.addr, w))
	}
	close(stop)
	sweeps.Wait()
	require.Equal(t, 4, n.srv.CutIdle(-1, faultnet.FIN))
	soon(t, "all four are gone", func() bool { return p.Stats().Open == 0 })
	p.check(t)
}
