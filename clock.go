package connpool

import (
	"sync"
	"sync/atomic"
	"time"
)

// instant is a moment on a pool's clock, in nanoseconds. 0 is no moment.
type instant int64

func (t instant) sub(u instant) time.Duration { return time.Duration(t - u) }

// tick is how far the coarse clock may lag behind.
const tick = 10 * time.Millisecond

// clock tells how time passes for a pool. It advances by the longer of what the
// monotonic and the wall clock say: a laptop that slept has stale connections
// although its monotonic clock stood still.
//
// Two readings of the real clock would cost a loan more than all its books, so
// now is coarse: while it is asked more than once a tick, a timer reads the
// real clock each tick, and now is a load. A tick in which nobody asked is the
// last one; a pool that rests, or is used now and then, has no timer, and its
// clock is exact.
type clock struct {
	read  func() time.Time // time.Now, but for tests
	exact bool             // now never lags

	latest atomic.Int64 // as of the last tick; 0: nothing ticks
	asked  atomic.Bool  // since the last tick

	mu    sync.Mutex // guards what follows; nothing else happens under it
	at    instant    // the latest reading
	then  time.Time  // what read said at it
	timer *time.Timer
}

// now is the time, to within a tick.
func (k *clock) now() instant {
	if t := k.latest.Load(); t != 0 {
		if !k.asked.Load() {
			k.asked.Store(true)
		}
		return instant(t)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	before := k.at
	now := k.advance()
	if !k.exact && k.latest.Load() == 0 && now.sub(before) < tick {
		k.latest.Store(int64(now))
		k.asked.Store(false)
		if k.timer == nil {
			k.timer = time.AfterFunc(tick, k.beat)
		} else {
			k.timer.Reset(tick)
		}
	}
	return now
}

// exactly is the time for what somebody may compare with a clock of his own.
func (k *clock) exactly() instant {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.advance()
}

// advance reads the real clock; it needs mu.
func (k *clock) advance() instant {
	t := k.read()
	if k.at == 0 {
		k.at = 1
	} else {
		k.at += instant(max(0, t.Sub(k.then), t.Round(0).Sub(k.then.Round(0))))
	}
	k.then = t
	if k.latest.Load() != 0 { // what was read exactly is never ahead of now by more than a tick
		k.latest.Store(int64(k.at))
	}
	return k.at
}

func (k *clock) beat() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.asked.Swap(false) {
		k.latest.Store(0)
		return
	}
	k.advance()
	k.timer.Reset(tick)
}
