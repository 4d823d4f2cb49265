package connpool

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What one address, one close or one observer does delays nobody else. TRY-47

func TestChecksThatHangDelayNoOtherAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const hung = 3 * maxCheckers
		var mu sync.Mutex
		var asked []time.Time // when b was
		n := open(t, Config{MaxOpen: -1, IdleTimeout: 50 * time.Second, SweepInterval: 20 * time.Second, Check: func(ctx context.Context, c Conn) error {
			if c.Addr() == at("b") {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, time.Now())
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}})
		for i := range hung {
			n.idle(at(fmt.Sprint("hung-", i)), 8)
		}
		n.idle(at("b"), 2)
		start := time.Now()
		time.Sleep(45 * time.Second)
		mu.Lock()
		require.Len(t, asked, 4, "each connection of b, in each of two sweeps")
		for i, when := range asked {
			due := time.Duration(1+i/2) * 20 * time.Second
			require.LessOrEqual(t, when.Sub(start), due+(hung/maxCheckers+1)*foreignPatience)
		}
		mu.Unlock()
		time.Sleep(16 * time.Second)
		synctest.Wait()
		for a, st := range n.p.Addrs() { // expired by the third sweep, whoever is at their Checks
			require.LessOrEqual(t, st.Idle, 0, a)
		}
	})
}

// A peer that gave no answer to one Check is asked again in the next sweep.
func TestAHungCheckEndsTheRoundOfItsAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var calls atomic.Int64
		n := open(t, Config{SweepInterval: 20 * time.Second, IdleTimeout: -1, Check: func(ctx context.Context, c Conn) error {
			calls.Add(1)
			<-ctx.Done()
			return ctx.Err()
		}})
		n.idle(at("a"), 10)
		time.Sleep(39 * time.Second)
		require.EqualValues(t, 1, calls.Load())
		n.gauges(0, 9, 0)
		time.Sleep(20 * time.Second)
		require.EqualValues(t, 2, calls.Load())
	})
}

func TestACloseThatHangsDelaysNobodyWhileSomethingIdleCanGo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		never := make(chan struct{})
		defer close(never)
		first := true
		n := newTestnet(t)
		n.open(Config{MaxOpen: 4, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn {
			if !first {
				return c
			}
			first = false
			return hangingClose(never)(c)
		})})
		for _, host := range []string{"a", "b", "c", "d"} {
			n.use(at(host))
			time.Sleep(time.Second)
		}
		start := time.Now()
		n.use(at("e")) // evicts a's, whose close hangs
		require.LessOrEqual(t, time.Since(start), closePatience)
		start = time.Now()
		n.use(at("f"))
		require.LessOrEqual(t, time.Since(start), closePatience, "what hangs is not counted on again")
		n.check()
	})
}

func TestATraceThatHangsDelaysNoSweep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		never := make(chan struct{})
		defer close(never)
		n := open(t, Config{IdleTimeout: 30 * time.Second, Trace: &Trace{Closed: func(CloseInfo) { <-never }}})
		n.idle(at("a"), 50)
		time.Sleep(40*time.Second + foreignPatience)
		synctest.Wait()
		n.gauges(0, 0, 0)
		require.NotZero(t, n.p.Stats().AbandonedCalls)
	})
}
