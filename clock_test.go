package connpool

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Who sets short times, or watches, is told exact ones.
func TestTheClockIsExactWhereALagCouldBeFelt(t *testing.T) {
	nop := func(context.Context, Conn) error { return nil }
	for _, c := range []struct {
		set   func(*Config)
		exact bool
	}{
		{func(*Config) {}, false},
		{func(c *Config) { c.IdleTimeout = time.Second }, false},
		{func(c *Config) { c.IdleTimeout = 999 * time.Millisecond }, true},
		{func(c *Config) { c.IdleTimeout = -1 }, false},
		{func(c *Config) { c.Trace = &Trace{} }, true},
		{func(c *Config) { c.Check, c.CheckAfterIdle = nop, 10*time.Millisecond }, true},
		{func(c *Config) { c.Check, c.CheckAfterIdle = nop, time.Minute }, false},
	} {
		var cfg Config
		c.set(&cfg)
		p, err := New(cfg)
		require.NoError(t, err)
		require.Equal(t, c.exact, p.clock.Exact, "%+v", cfg)
		require.NoError(t, p.Close())
	}
}

// aRealTime has a monotonic reading, which the times of a bubble have not.
var aRealTime = time.Now()

// twoHands is a clock for a bubble whose wall clock is ahead by as much as ahead says.
func twoHands(ahead *atomic.Int64) func() time.Time {
	start := time.Now()
	return func() time.Time {
		return onTheWall(aRealTime.Add(time.Since(start)), time.Duration(ahead.Load()))
	}
}

// TRY-21: what a pool tells of waits, holds and dials is measured; a step of the wall clock
// in the middle changes none of them.
func TestAStepOfTheWallClockIsNoTimeThatPassed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex
		var told []time.Duration
		tell := func(d time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, d)
		}
		var step atomic.Int64
		n := open(t, Config{MaxPerAddr: 1, HoldWarn: time.Minute, IdleTimeout: -1, Trace: &Trace{
			GotConn:  func(i GotInfo) { tell(i.Waited); tell(i.IdleFor) },
			DialDone: func(i DialInfo) { tell(i.Took) },
			PutConn:  func(i PutInfo) { tell(i.Held) },
			Detached: func(i PutInfo) { tell(i.Held) },
			Closed:   func(i CloseInfo) { tell(i.Age) },
			HeldLong: func(i HeldInfo) { tell(i.Held) },
		}})
		n.p.clock.Read = twoHands(&step)
		forward := func() {
			time.Sleep(time.Millisecond)
			step.Add(int64(time.Hour))
		}
		n.Host("a").SetLatency(time.Second)
		b := n.borrow(bg, at("a"))
		synctest.Wait()
		forward() // in the dial and the wait
		c := b.conn()
		waiting := n.borrow(bg, at("a"))
		ctx, cancel := context.WithCancel(bg)
		gone := n.borrow(ctx, at("a"))
		synctest.Wait()
		forward() // in the loan and the waits
		time.Sleep(time.Second)
		n.p.loanLog.tell()
		tell(c.Info().Age)
		require.Contains(t, n.p.stillOut(), "(for 1.001s)")
		cancel()
		var pe *Error
		require.ErrorAs(t, gone.result(), &pe)
		tell(pe.Waited)
		require.NoError(t, b.giveBack())
		waiting.conn()
		forward()
		require.NoError(t, waiting.giveBack())
		forward() // while it is idle
		last := n.borrow(bg, at("a"))
		c = last.conn()
		tell(c.Info().IdleFor)
		forward()
		require.NoError(t, last.finish(func(c Conn) error {
			nc, err := c.Detach()
			if err == nil {
				nc.Close()
			}
			return err
		}))
		l, err := n.p.Lease(bg, at("a"))
		require.NoError(t, err)
		forward()
		require.NoError(t, l.Discard())
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Greater(t, len(told), 14)
		for _, d := range told {
			require.Less(t, d, time.Minute)
		}
		require.Less(t, n.p.Stats().WaitDuration, time.Minute)
		n.Host("a").SetLatency(0)
	})
}

// TRY-21: a wall clock that is set to and fro expires nothing that was just used, and one
// that says that the machine slept expires what was idle meanwhile.
func TestAWallClockThatIsSetToAndFroExpiresNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		checks := 0
		n := open(t, Config{IdleTimeout: 8 * time.Second, MaxLifetime: time.Minute, CheckAfterIdle: 9 * time.Second, SweepInterval: -1,
			Check: func(context.Context, Conn) error { checks++; return nil }})
		var wall atomic.Int64
		n.p.clock.Read = twoHands(&wall)
		require.Equal(t, "a#1", n.use(at("a")))
		for range 20 {
			time.Sleep(time.Millisecond)
			wall.Store(int64(time.Second))
			n.p.clock.Exactly()
			time.Sleep(time.Millisecond)
			wall.Store(0)
			n.p.clock.Exactly()
		}
		require.Equal(t, "a#1", n.use(at("a")))
		require.Zero(t, checks)
		wall.Store(int64(10 * time.Second))
		time.Sleep(2 * clock.Tick)
		require.Equal(t, "a#2", n.use(at("a")), "10 s are more than IdleTimeout")
		time.Sleep(2 * clock.Tick)
		wall.Store(int64(time.Hour))
		n.p.clock.Exactly() // as a dial, or a wait, does
		require.Equal(t, "a#3", n.use(at("a")))
		n.check()
	})
}
