package clock

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

func newClock() *Clock { return &Clock{Read: time.Now} }

func (k *Clock) ticks() bool { return k.latest.Load() != 0 }

func TestTheCoarseClockLagsByATickAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.Exactly(), time.Now()
		for i := range 2000 {
			time.Sleep(time.Duration(i%7) * time.Millisecond)
			lag := time.Since(start) - k.Now().Sub(begin)
			require.GreaterOrEqual(t, lag, time.Duration(0))
			require.LessOrEqual(t, lag, Tick)
			require.Equal(t, time.Since(start), k.Exactly().Sub(begin))
			require.Equal(t, time.Since(start), k.Now().Sub(begin), "what was read exactly is known")
		}
		require.True(t, k.ticks())
		time.Sleep(2*Tick + 1) // lets the timer stop
		synctest.Wait()
		require.False(t, k.ticks())
	})
}

func TestAClockThatIsSeldomAskedIsExactAndDoesNotTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		begin, start := k.Exactly(), time.Now()
		for range 100 {
			time.Sleep(Tick)
			require.Equal(t, time.Since(start), k.Now().Sub(begin))
			require.False(t, k.ticks())
		}
		k.Now()
		require.True(t, k.ticks(), "asked twice within a tick")
	})
}

func TestAClockThatMustBeExactNeverTicks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		k.Exact = true
		begin, start := k.Exactly(), time.Now()
		for range 100 {
			time.Sleep(time.Microsecond)
			require.Equal(t, time.Since(start), k.Now().Sub(begin))
			require.False(t, k.ticks())
		}
	})
}

// stepped is a clock that a test sets: both its readings, or the wall clock's alone.
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

// TRY-21: measured durations follow the monotonic clock. An age may be longer: the
// monotonic clock stands still while a laptop sleeps, and only the wall clock shows it. A
// wall clock that is set back makes nothing younger.
func TestTheClockMeasuresByOneHandAndAgesByBoth(t *testing.T) {
	real := &stepped{now: time.Now()}
	k := newClock()
	k.Read = real.read
	begin := k.Exactly()
	step := func(monotonic, wall time.Duration) (passed, aged time.Duration) {
		before := k.Exactly()
		real.step(monotonic, wall)
		now := k.Exactly()
		return now.Sub(before).Round(time.Millisecond), k.Age(before, now).Round(time.Millisecond)
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
	now := k.Exactly()
	require.Equal(t, 4*time.Second, now.Sub(begin).Round(time.Millisecond))
	require.Equal(t, 4*time.Second+time.Hour, k.Age(begin, now).Round(time.Second), "the two hours do not add up")
	require.Zero(t, k.Age(now, now), "what begins after a step is not aged by it")
}

// TRY-21: however the wall clock is set, the age of something is never less than the time
// that has passed, and never more than that time plus the largest step in it.
func TestStepsOfTheWallClockNeverAddUp(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 5))
		real := &stepped{now: time.Now()}
		k := newClock()
		k.Read = real.read
		type moment struct {
			at      Instant
			largest time.Duration // of the steps since
		}
		var moments []moment
		steps := 0
		for range 200 {
			moments = append(moments, moment{at: k.Exactly()})
			run, jump := time.Duration(r.IntN(1000))*time.Millisecond, time.Duration(0)
			if r.IntN(3) == 0 {
				jump = time.Duration(r.IntN(7200)-3600) * time.Second
			}
			real.step(run, run+jump)
			now := k.Exactly()
			if jump > 0 {
				steps++
			}
			for i := range moments {
				m := &moments[i]
				m.largest = max(m.largest, jump)
				age := k.Age(m.at, now)
				if want := now.Sub(m.at) + m.largest; age < want-time.Second || steps <= maxSteps && age > want+time.Second {
					t.Fatalf("seed %d: the age is %v, not %v", seed, age, want)
				}
			}
		}
		require.LessOrEqual(t, len(*k.steps.Load()), maxSteps)
	}
	// One after another, each shorter: the list is full, and the longest step counts.
	real := &stepped{now: time.Now()}
	k := newClock()
	k.Read = real.read
	begin := k.Exactly()
	for i := range 3 * maxSteps {
		real.step(time.Second, time.Second+time.Duration(1000-i)*time.Second)
		k.Exactly()
	}
	now := k.Exactly()
	require.Len(t, *k.steps.Load(), maxSteps)
	require.Equal(t, now.Sub(begin)+1000*time.Second, k.Age(begin, now))
}

// TRY-49: many readings, however close together, add up to no more time than few
// readings. (The two readings of one time.Time are taken one after the other, so the wall
// clock seems to run ahead by some nanoseconds each time.)
func TestAClockThatIsReadOftenRunsNoFaster(t *testing.T) {
	now := time.Now()
	k := newClock()
	reads := 0
	k.Read = func() time.Time {
		reads++
		now = now.Add(50 * time.Nanosecond)
		if reads%2 == 0 {
			return onTheWallBy(now, 20*time.Microsecond)
		}
		return now
	}
	from, start := k.Exactly(), now
	for range 1_000_000 {
		k.Exactly()
	}
	told, real := k.Exactly().Sub(from), now.Sub(start)
	require.InDelta(t, real.Seconds(), told.Seconds(), real.Seconds()/1000)
	require.Equal(t, real, k.Age(from, from+Instant(real)))

	// The same with the real clock, which runs meanwhile.
	k = newClock()
	start, from = time.Now(), k.Exactly()
	for range 1_000_000 {
		k.Exactly()
	}
	told = k.Exactly().Sub(from)
	require.LessOrEqual(t, told, time.Since(start))
}

// TRY-49: the lag is one tick, also after the machine slept: the first reading of the
// real clock after the sleep shows the sleep.
func TestATickAfterASleepTheClockKnows(t *testing.T) {
	real := &stepped{now: time.Now()}
	k := newClock()
	k.Read = real.read
	then := k.Now()
	k.Now()
	require.True(t, k.ticks())
	real.step(0, time.Hour)
	require.Zero(t, k.Age(then, k.Now()), "not yet")
	k.beat()
	require.Equal(t, time.Hour, k.Age(then, k.Now()).Round(time.Second))
	k.timer.Stop()
}

// onTheWall returns t with d added to its wall clock and not to its monotonic clock.
// Package time has no function for that. (The wall clock's seconds begin at bit 30 of the
// first word, as long as there is a monotonic reading.)
func onTheWall(t time.Time, d time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t))
	*wall += uint64(int64(d/time.Second) << 30)
	return t
}

// onTheWallBy is onTheWall for less than a second, without a carry into the seconds.
func onTheWallBy(t time.Time, d time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t))
	if uint64(*wall&(1<<30-1))+uint64(d) < uint64(time.Second) {
		*wall += uint64(d)
	}
	return t
}
