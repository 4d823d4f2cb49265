package clock

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestEachValueIsVisitedOnceAtTheNextTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var visited []int
		began := time.Now()
		a := &AtTick[int]{}
		a.Do = func(v int) {
			visited = append(visited, v)
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
		require.Equal(t, []int{1, 2}, visited)
		time.Sleep(3 * Tick)
		synctest.Wait()
		require.Equal(t, []int{1, 2}, visited, "the timer rests")
		a.Add(3)
		time.Sleep(Tick)
		synctest.Wait()
		require.Equal(t, []int{1, 2, 3}, visited)
		time.Sleep(Tick)
		synctest.Wait()
		require.Equal(t, []int{1, 2, 3, 4}, visited)
	})
}

// Values that came once in great number are not kept for ever.
func TestAListThatWasLongOnceIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &AtTick[*int]{Do: func(*int) {}}
		for range keptValues + 1 {
			a.Add(new(int))
		}
		time.Sleep(Tick)
		synctest.Wait()
		require.Zero(t, cap(a.values)+cap(a.spare))
		a.Add(new(int))
		time.Sleep(Tick)
		synctest.Wait()
		require.NotZero(t, cap(a.spare))
		require.Nil(t, a.spare[:1][0], "the garbage collector may have it")
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
