package clock

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

func TestEachValueIsVisitedOnceAtTheNextTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		visits := make(chan int, 16)
		visited := func() (all []int) {
			for len(visits) > 0 {
				all = append(all, <-visits)
			}
			return all
		}
		began := time.Now()
		a := &AtTick[int]{}
		a.Do = func(v int) {
			visits <- v
			require.Zero(t, time.Since(began)%Tick, "at a tick")
			if v == 3 {
				a.Add(4) // waits for the tick after this one
			}
		}
		a.Add(1)
		time.Sleep(Tick / 2)
		a.Add(2)
		time.Sleep(Tick / 2)
		synctest.Wait()
		require.Equal(t, []int{1, 2}, visited())
		time.Sleep(3 * Tick)
		synctest.Wait()
		require.Empty(t, visited(), "the timer rests")
		a.Add(3)
		time.Sleep(Tick)
		synctest.Wait()
		require.Equal(t, []int{3}, visited())
		time.Sleep(Tick)
		synctest.Wait()
		require.Equal(t, []int{4}, visited())
	})
}

// Values that came once in great number are not kept for ever.
func TestAListThatWasLongOnceIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &AtTick[*int]{Do: func(*int) {}}
		held := func() (capacity int, first *int) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if cap(a.spare) > 0 {
				first = a.spare[:1][0]
			}
			return cap(a.values) + cap(a.spare), first
		}
		for range keptValues + 1 {
			a.Add(new(int))
		}
		time.Sleep(Tick)
		synctest.Wait()
		capacity, _ := held()
		require.Zero(t, capacity)
		a.Add(new(int))
		time.Sleep(Tick)
		synctest.Wait()
		capacity, first := held()
		require.NotZero(t, capacity)
		require.Nil(t, first, "the garbage collector may have it")
	})
}

func TestUntilIsAsLateAsNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newClock()
		k.Now()
		k.Now()
		require.Negative(t, k.Until(time.Time{}.Add(1)), "long ago")
		until := time.Now().Add(time.Second)
		for range 100 {
			time.Sleep(Tick / 3)
			late := k.Until(until) - time.Until(until)
			require.GreaterOrEqual(t, late, time.Duration(0))
			require.LessOrEqual(t, late, Tick)
		}
	})
}
