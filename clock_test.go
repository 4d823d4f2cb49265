package connpool

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func newClock() *clock { return &clock{read: time.Now} }

func (k *clock) ticks() bool { return k.latest.Load() != 0 }

func TestTheCoarseClockLagsByATickAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.exactly(), time.Now()
		for i := range 2000 {
			time.Sleep(time.Duration(i%7) * time.Millisecond)
			lag := time.Since(start) - k.now().sub(begin)
			require.GreaterOrEqual(t, lag, time.Duration(0))
			require.LessOrEqual(t, lag, tick)
			require.Equal(t, time.Since(start), k.exactly().sub(begin))
			require.Equal(t, time.Since(start), k.now().sub(begin), "what was read exactly is known")
		}
		require.True(t, k.ticks())
		time.Sleep(2*tick + 1) // lets it come to rest
		synctest.Wait()
		require.False(t, k.ticks())
	})
}

func TestAClockThatIsSeldomAskedIsExactAndDoesNotTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.exactly(), time.Now()
		for range 100 {
			time.Sleep(tick)
			require.Equal(t, time.Since(start), k.now().sub(begin))
			require.False(t, k.ticks())
		}
		k.now()
		require.True(t, k.ticks(), "asked twice within a tick")
	})
}

func TestAClockThatMustBeExactNeverTicks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		k.exact = true
		begin, start := k.exactly(), time.Now()
		for range 100 {
			time.Sleep(time.Microsecond)
			require.Equal(t, time.Since(start), k.now().sub(begin))
			require.False(t, k.ticks())
		}
	})
}

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
		{func(c *Config) { c.Check, c.TrustIdle = nop, 10*time.Millisecond }, true},
		{func(c *Config) { c.Check, c.TrustIdle = nop, time.Minute }, false},
	} {
		var cfg Config
		c.set(&cfg)
		p, err := New(cfg)
		require.NoError(t, err)
		require.Equal(t, c.exact, p.clock.exact, "%+v", cfg)
		require.NoError(t, p.Close())
	}
}

// stepped is a clock over a real one that a test sets: both its hands, or the wall's alone.
type stepped struct {
	mu  sync.Mutex // guards now
	now time.Time
}

func (s *stepped) read() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *stepped) step(monotonic, wall time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = onTheWall(s.now.Add(monotonic), wall-monotonic)
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

// TRY-21: what is measured follows the monotonic clock. What is old may be older than
// that: the monotonic clock stands still while a laptop sleeps, and only the wall
// clock tells. A wall clock that is set back makes nothing younger.
func TestTheClockMeasuresByOneHandAndAgesByBoth(t *testing.T) {
	real := &stepped{now: time.Now()}
	k := newClock()
	k.read = real.read
	begin := k.exactly()
	step := func(monotonic, wall time.Duration) (passed, aged time.Duration) {
		before := k.exactly()
		real.step(monotonic, wall)
		now := k.exactly()
		return now.sub(before).Round(time.Millisecond), k.age(before, now).Round(time.Millisecond)
	}
	for _, c := range []struct{ monotonic, wall, passed, aged time.Duration }{
		{time.Second, time.Second, time.Second, time.Second},
		{time.Second, time.Hour, time.Second, time.Hour},
		{time.Second, -time.Hour, time.Second, time.Second},
		{0, -time.Hour, 0, 0},
		{0, time.Hour, 0, time.Hour}, // a laptop that slept, with its clock set back before
		{time.Second, time.Second, time.Second, time.Second},
	} {
		passed, aged := step(c.monotonic, c.wall)
		require.Equal(t, [2]time.Duration{c.passed, c.aged}, [2]time.Duration{passed, aged}, "%+v", c)
	}
	now := k.exactly()
	require.Equal(t, 4*time.Second, now.sub(begin).Round(time.Millisecond))
	require.Equal(t, 4*time.Second+time.Hour, k.age(begin, now).Round(time.Second), "the two hours do not add up")
	require.Zero(t, k.age(now, now), "what begins after a step is not aged by it")
}

// TRY-21: however the wall clock is set, what has been left alone for a while is no older
// than that while and the largest step in it, and no younger than either.
func TestStepsOfTheWallClockNeverAddUp(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 5))
		real := &stepped{now: time.Now()}
		k := newClock()
		k.read = real.read
		type moment struct {
			at      instant
			largest time.Duration // of the steps since
		}
		var moments []moment
		steps := 0
		for range 200 {
			moments = append(moments, moment{at: k.exactly()})
			run, jump := time.Duration(r.IntN(1000))*time.Millisecond, time.Duration(0)
			if r.IntN(3) == 0 {
				jump = time.Duration(r.IntN(7200)-3600) * time.Second
			}
			real.step(run, run+jump)
			now := k.exactly()
			if jump > 0 {
				steps++
			}
			for i := range moments {
				m := &moments[i]
				m.largest = max(m.largest, jump)
				age := k.age(m.at, now)
				if want := now.sub(m.at) + m.largest; age < want-time.Second || steps <= maxSteps && age > want+time.Second {
					t.Fatalf("seed %d: the age is %v, not %v", seed, age, want)
				}
			}
		}
		require.LessOrEqual(t, len(*k.steps.Load()), maxSteps)
	}
	// One after another, each shorter: the list is full, and the longest rules.
	real := &stepped{now: time.Now()}
	k := newClock()
	k.read = real.read
	begin := k.exactly()
	for i := range 3 * maxSteps {
		real.step(time.Second, time.Second+time.Duration(1000-i)*time.Second)
		k.exactly()
	}
	now := k.exactly()
	require.Len(t, *k.steps.Load(), maxSteps)
	require.Equal(t, now.sub(begin)+1000*time.Second, k.age(begin, now))
}

// TRY-49: many readings, however close, are worth no more time than few. (The two hands
// of a reading are taken one after the other, so the wall clock seems to run ahead by
// some nanoseconds at each.)
func TestAClockThatIsReadOftenRunsNoFaster(t *testing.T) {
	now := time.Now()
	k := newClock()
	reads := 0
	k.read = func() time.Time {
		reads++
		now = now.Add(50 * time.Nanosecond)
		if reads%2 == 0 {
			return onTheWallBy(now, 20*time.Microsecond)
		}
		return now
	}
	from, start := k.exactly(), now
	for range 1_000_000 {
		k.exactly()
	}
	told, real := k.exactly().sub(from), now.Sub(start)
	require.InDelta(t, real.Seconds(), told.Seconds(), real.Seconds()/1000)
	require.Equal(t, real, k.age(from, from+instant(real)))

	// And by the real one, which nobody stops meanwhile.
	k = newClock()
	start, from = time.Now(), k.exactly()
	for range 1_000_000 {
		k.exactly()
	}
	told = k.exactly().sub(from)
	require.LessOrEqual(t, told, time.Since(start))
}

// TRY-49: the lag is that of a tick, also after the machine slept: the first reading of
// the real clock that follows knows of the sleep.
func TestATickAfterASleepTheClockKnows(t *testing.T) {
	real := &stepped{now: time.Now()}
	k := newClock()
	k.read = real.read
	then := k.now()
	k.now()
	require.True(t, k.ticks())
	real.step(0, time.Hour)
	require.Zero(t, k.age(then, k.now()), "not yet")
	k.beat()
	require.Equal(t, time.Hour, k.age(then, k.now()).Round(time.Second))
	k.timer.Stop()
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
		n.p.clock.read = twoHands(&step)
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
		n.p.reportHolds()
		tell(c.Age())
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
		tell(c.IdleFor())
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
		n := open(t, Config{IdleTimeout: 8 * time.Second, MaxLifetime: time.Minute, TrustIdle: 9 * time.Second, CheckInterval: -1,
			Check: func(context.Context, Conn) error { checks++; return nil }})
		var wall atomic.Int64
		n.p.clock.read = twoHands(&wall)
		require.Equal(t, "a#1", n.use(at("a")))
		for range 20 {
			time.Sleep(time.Millisecond)
			wall.Store(int64(time.Second))
			n.p.clock.exactly()
			time.Sleep(time.Millisecond)
			wall.Store(0)
			n.p.clock.exactly()
		}
		require.Equal(t, "a#1", n.use(at("a")))
		require.Zero(t, checks)
		wall.Store(int64(10 * time.Second))
		time.Sleep(2 * tick)
		require.Equal(t, "a#2", n.use(at("a")), "10 s are more than IdleTimeout")
		time.Sleep(2 * tick)
		wall.Store(int64(time.Hour))
		n.p.clock.exactly() // as a dial, or a wait, does
		require.Equal(t, "a#3", n.use(at("a")))
		n.check()
	})
}
