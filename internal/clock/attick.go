package clock

import (
	"sync"
	"time"
)

// AtTick calls Do for each value that was added, one tick after the first of them at the
// latest. Its timer runs only while there are values. Do runs on the goroutine of that timer,
// for one value after the other, so it must not block. Values that are added meanwhile wait
// for the next tick.
type AtTick[T any] struct {
	Do func(T) // set before the first Add

	mu     sync.Mutex // guards the fields below; nothing else happens under it
	values []T
	spare  []T // an empty slice, to be used again
	timer  *time.Timer
}

// keptValues is the capacity up to which a slice of values is used again.
const keptValues = 1 << 12

// Add makes v one of the values of the next tick.
func (a *AtTick[T]) Add(v T) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.values = append(a.values, v)
	switch {
	case len(a.values) > 1: // the timer runs
	case a.timer == nil:
		a.timer = time.AfterFunc(Tick, a.Beat)
	default:
		a.timer.Reset(Tick)
	}
}

// Beat is the tick: it calls Do for each value.
func (a *AtTick[T]) Beat() {
	a.mu.Lock()
	due := a.values
	a.values, a.spare = a.spare, nil
	a.mu.Unlock()
	for _, v := range due {
		a.Do(v)
	}
	clear(due) // the garbage collector may have them
	if cap(due) <= keptValues {
		a.mu.Lock()
		a.spare = due[:0]
		a.mu.Unlock()
	}
}
