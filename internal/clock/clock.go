// Package clock measures time for a pool, cheaply: while Now is called often, it is an
// atomic load of a value that is, as a rule, at most one tick (10 ms) old.
//
// The package holds the monotonic clock, a timer that runs only while Now is called more
// than once a tick, and the steps of the wall clock against the monotonic one, from which
// Age knows that the machine has slept; and AtTick, which visits values one tick after they
// were added.
//
// Nothing here blocks. The mutex is held for one reading of the real clock; under it no
// other lock is taken and no foreign code runs, except Clock.Read.
//
// The zero value of a Clock is ready once Read is set. The zero Instant is no moment: no
// reading returns it, so it may stand for "never".
package clock

import (
	"sync"
	"sync/atomic"
	"time"
)

// Instant is a moment on a pool's clock, in nanoseconds. 0 is no moment. Instants of two
// clocks cannot be compared.
type Instant int64

// Sub returns the time from u to t; it is negative if t is earlier.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// Tick is the period of the coarse clock.
const Tick = 10 * time.Millisecond

// Clock measures time for a pool. It follows the monotonic clock, so that durations which
// the pool measures and reports (waits, holds, ages, dial times) do not change when
// somebody sets the wall clock.
//
// Staleness needs the wall clock as well. After a laptop slept, its connections are
// stale, although the monotonic clock stood still and only the wall clock went on. Clock
// therefore remembers when the wall clock ran ahead of the monotonic one, and by how
// much, and Age counts that as time. Clock cannot tell sleep from somebody setting the
// wall clock. So the steps that a connection has lived through do not add up: Age adds
// only the largest of them. A wall clock that is set back and forth for ever does not
// expire connections for ever.
//
// Two readings of the real clock would cost a loan more than all of its bookkeeping, so
// Now is coarse. While Now is called more than once a tick, a timer reads the real clock
// each tick, and Now is a load. The timer stops after a tick in which Now was not called;
// while it is stopped, Now reads the real clock. Now is late by up to a tick plus the
// time that the timer waits for a processor: none on a machine that has one to spare,
// some tenths of a second on an overloaded one. Now never goes back, and is never behind
// an earlier result of Exactly. Clock learns that the machine has slept at the first
// reading of the real clock after the machine woke: one tick later, if the timer was
// running when the machine fell asleep.
type Clock struct {
	Read  func() time.Time // time.Now, except in tests; must not change while somebody reads the clock
	Exact bool             // Now always reads the real clock; set before the first reading

	latest atomic.Int64            // the last tick; 0: the timer is stopped
	asked  atomic.Bool             // Now was called since the last tick
	steps  atomic.Pointer[[]sleep] // steps of the wall clock, see remember; usually nil. The slice is never written after it is stored

	base time.Time // what Read returned first; written once, under mu, before any reading is known

	mu    sync.Mutex // guards the fields below; nothing else happens under it
	at    Instant    // the latest reading
	then  time.Time  // what Read returned at that reading
	timer *time.Timer
}

// sleep records that, at a moment, the wall clock was found further ahead of the
// monotonic one than before.
type sleep struct {
	at Instant
	by time.Duration
}

// The wall clock is slewed, and the two readings in one time.Time are a moment apart, so
// a difference below leastStep is no step. A step above longestStep counts as
// longestStep, so that an age can be added to any duration of a Config. At most maxSteps
// steps are remembered.
const (
	leastStep   = Tick
	longestStep = 100 * 365 * 24 * time.Hour
	maxSteps    = 16
)

// Now returns the time, as a rule to within a tick.
func (k *Clock) Now() Instant {
	if t := k.latest.Load(); t != 0 {
		if !k.asked.Load() {
			k.asked.Store(true)
		}
		return Instant(t)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	before := k.at
	now := k.advance()
	if !k.Exact && k.latest.Load() == 0 && now.Sub(before) < Tick {
		k.latest.Store(int64(now))
		k.asked.Store(false)
		if k.timer == nil {
			k.timer = time.AfterFunc(Tick, k.beat)
		} else {
			k.timer.Reset(Tick)
		}
	}
	return now
}

// Until returns how long it is until t, as late as Now is. A t without a reading of the
// monotonic clock is compared by the wall clock, and may be off by what that was set since
// the first reading.
func (k *Clock) Until(t time.Time) time.Duration {
	now := k.Now()
	left := t.Sub(k.base)
	if left < 0 { // long ago: the difference may be the least there is
		return left
	}
	return left - now.Sub(1)
}

// Exactly returns the time from the real clock. Use it for a time that somebody may
// compare with a clock of their own.
func (k *Clock) Exactly() Instant {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.advance()
}

// Age returns the time from then to now for something left alone in between: the
// difference of the two, plus the longest step of the wall clock between them.
func (k *Clock) Age(then, now Instant) time.Duration {
	steps := k.steps.Load()
	if steps == nil {
		return now.Sub(then)
	}
	return now.Sub(then) + longestAfter(*steps, then)
}

// longestAfter returns the longest of the steps after then. steps is in order of time,
// and each is longer than all later ones, so the first after then is the longest. A step
// whose moment is then came before it.
func longestAfter(steps []sleep, then Instant) time.Duration {
	for _, s := range steps {
		if s.at > then {
			return s.by
		}
	}
	return 0
}

// advance reads the real clock. The caller holds mu.
func (k *Clock) advance() Instant {
	t := k.Read()
	if k.at == 0 {
		k.at, k.base = 1, t
	} else {
		passed := max(0, t.Sub(k.then)) // without a monotonic clock this difference may be negative too
		k.at += Instant(passed)
		if by := t.Round(0).Sub(k.then.Round(0)) - passed; by >= leastStep {
			k.at++ // so that a moment before the step differs from one after it
			k.remember(sleep{k.at, min(by, longestStep)})
		}
	}
	k.then = t
	if k.latest.Load() != 0 { // Now is never more than a tick behind an exact reading
		k.latest.Store(int64(k.at))
	}
	return k.at
}

// remember adds a step of the wall clock. The caller holds mu. It drops shorter earlier
// steps, because longestAfter would never return them. If there are still too many, it
// merges the two oldest into one that is as long as the longer and as late as the later.
// A connection from between the two then counts as older than it is, by no more than a
// step that did happen.
func (k *Clock) remember(s sleep) {
	var steps []sleep
	if old := k.steps.Load(); old != nil {
		for _, o := range *old {
			if o.by > s.by {
				steps = append(steps, o)
			}
		}
	}
	if steps = append(steps, s); len(steps) > maxSteps {
		steps[1].by = steps[0].by
		steps = steps[1:]
	}
	k.steps.Store(&steps)
}

func (k *Clock) beat() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.asked.Swap(false) {
		k.latest.Store(0)
		return
	}
	k.advance()
	k.timer.Reset(Tick)
}
