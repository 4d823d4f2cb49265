// Package clock tells how time passes for a pool, at little cost: while it
// is asked often, Now is an atomic load, as a rule at most one tick (10 ms) behind.
//
// Behind the door are the monotonic clock, a timer that runs only while more than
// one reading a tick is asked for, and the steps of the wall clock against the
// monotonic one, from which Age knows of a machine that slept.
//
// Nothing here blocks. A mutex is held for the time of one reading of the real
// clock; no other lock is taken under it and no foreign code runs under it, except
// Clock.Read.
//
// The zero value of a Clock is ready once Read is set. The zero Instant is no
// moment: no reading ever gives it, so it may stand for "never".
package clock

import (
	"sync"
	"sync/atomic"
	"time"
)

// Instant is a moment on a pool's clock, in nanoseconds. 0 is no moment. Instants
// of two clocks have nothing to do with each other.
type Instant int64

// Sub is the time from u to t; it is negative if t comes first.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// Tick is the period of the coarse clock.
const Tick = 10 * time.Millisecond

// Clock tells how time passes for a pool. It is the monotonic clock: what the
// pool measures and tells (waits, holds, ages, how long a dial took) does not
// change because somebody sets the wall clock.
//
// Whether something is stale is another question. A laptop that slept has stale
// connections, although its monotonic clock stood still meanwhile and only the
// wall clock went on. So the clock also remembers by how much the wall clock ran
// ahead of the monotonic one and when, and Age counts that. What was sleep and
// what was somebody's hand cannot be told apart. Therefore the steps that a
// connection has lived through never add up: it is older by the largest of them,
// and a wall clock that is set back and forth for ever expires nothing for ever.
//
// Two readings of the real clock would cost a loan more than all its books, so
// Now is coarse: while it is asked more than once a tick, a timer reads the
// real clock each tick, and Now is a load. A tick in which nobody asked is the
// last one; a pool that rests, or is used now and then, has no timer, and its
// clock is exact. Now is behind by a tick, and by the time that the timer waits
// for a processor: none on a machine with one to spare, up to some tenths of a
// second on one that is overloaded. It never goes back, and what was read exactly
// is known to it at once. That the machine has slept is known at the first
// reading of the real clock after it woke: a tick later, if the clock ticked when
// it fell asleep.
type Clock struct {
	Read  func() time.Time // time.Now, but for tests; never changed while somebody reads
	Exact bool             // Now never lags; set before the first reading

	latest atomic.Int64            // as of the last tick; 0: nothing ticks
	asked  atomic.Bool             // since the last tick
	steps  atomic.Pointer[[]sleep] // of the wall clock, see remember; nil as a rule. What it points to is never written again

	mu    sync.Mutex // guards what follows; nothing else happens under it
	at    Instant    // the latest reading
	then  time.Time  // what Read said at it
	timer *time.Timer
}

// sleep is a moment at which the wall clock was found ahead of the monotonic one
// by more than before.
type sleep struct {
	at Instant
	by time.Duration
}

// The wall clock is slewed, and the two readings of one time.Time are a moment
// apart: less than leastStep is no step. One of more than longestStep counts as that long, so that an age can be
// added to any duration of a Config. No more than maxSteps are remembered.
const (
	leastStep   = Tick
	longestStep = 100 * 365 * 24 * time.Hour
	maxSteps    = 16
)

// Now is the time, to within a tick as a rule.
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

// Exactly is the time for what somebody may compare with a clock of his own.
func (k *Clock) Exactly() Instant {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.advance()
}

// Age is how long ago then was, as far as what has been left alone since then is
// concerned: now less then, and the longest sleep in between.
func (k *Clock) Age(then, now Instant) time.Duration {
	steps := k.steps.Load()
	if steps == nil {
		return now.Sub(then)
	}
	return now.Sub(then) + longestAfter(*steps, then)
}

// longestAfter is the longest of the steps that came after then. They are in
// order of time, and each is longer than all that came later. (What has the
// moment of a step came after it.)
func longestAfter(steps []sleep, then Instant) time.Duration {
	for _, s := range steps {
		if s.at > then {
			return s.by
		}
	}
	return 0
}

// advance reads the real clock; it needs mu.
func (k *Clock) advance() Instant {
	t := k.Read()
	if k.at == 0 {
		k.at = 1
	} else {
		passed := max(0, t.Sub(k.then)) // where there is no monotonic clock, that too may go back
		k.at += Instant(passed)
		if by := t.Round(0).Sub(k.then.Round(0)) - passed; by >= leastStep {
			k.at++ // what came before the step is told from what came after it
			k.remember(sleep{k.at, min(by, longestStep)})
		}
	}
	k.then = t
	if k.latest.Load() != 0 { // what was read exactly is never ahead of Now by more than a tick
		k.latest.Store(int64(k.at))
	}
	return k.at
}

// remember adds a step of the wall clock; it needs mu. A shorter one before it
// will never be asked for again. If there are too many all the same, the oldest
// two become one, which is as long as the longer and as late as the later of
// them: what came in between counts as older than it is, but by no more than a
// step that there was.
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
