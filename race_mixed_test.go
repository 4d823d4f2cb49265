package connpool

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// TDBC-01, BETA-X15, APR-13
func TestRaceOfSixtyFourGoroutinesAndEveryOperation(t *testing.T) {
	steps := short.Of(200, 100)
	if os.Getenv("CONNPOOL_STRESS") != "" {
		steps = 5000
	}
	synctest.Test(t, func(t *testing.T) {
		a := &arena{T: t, rng: rand.New(rand.NewPCG(5, 6))}
		a.open(Config{MaxOpen: 10, MaxPerAddr: 4, MaxIdle: 7, MaxUses: 50, MaxDialing: 3,
			MaxLifetime: time.Second, IdleTimeout: 100 * time.Millisecond, SweepInterval: 50 * time.Millisecond})
		a.ring.fail = func() error {
			if rand.IntN(10) == 0 {
				return errors.New("no luck")
			}
			time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
			return nil
		}
		sorry := errors.New("sorry")
		var detached sync.Map
		var wg tasks.Group
		for w := range 64 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 99))
				for range steps {
					time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond) // or a back-off would eat all the steps
					addr := ringAddr
					addr.Scope = string(rune('a' + rng.IntN(4)))
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(50))*time.Millisecond)
					if rng.IntN(4) == 0 {
						time.AfterFunc(time.Duration(rng.IntN(5))*time.Millisecond, cancel)
					}
					with := func(end func(c Conn) error) {
						defer func() {
							if v := recover(); v != nil && v != any(sorry) {
								panic(v)
							}
						}()
						a.p.With(ctx, addr, func(c Conn) error {
							busy(c)
							time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
							return end(c)
						})
					}
					switch rng.IntN(16) {
					case 0:
						a.p.EvictLRU()
					case 1:
						a.p.Retire(addr)
					case 2:
						if rng.IntN(8) == 0 {
							a.p.CloseIdle()
						}
					case 3:
						if err := a.p.inconsistency(); err != nil {
							t.Error(err)
						}
						for range a.p.Addrs() {
						}
					case 4:
						with(func(Conn) error { panic(sorry) })
					case 5:
						with(func(Conn) error { return sorry })
					case 6:
						with(Conn.Close)
					case 7:
						with(func(c Conn) error {
							if nc, err := c.Detach(); err == nil {
								detached.Store(nc, true)
							}
							return nil
						})
					case 8:
						with(func(c Conn) error {
							ringConnOf(c).dead.Store(true)
							return nil
						})
					case 9:
						with(func(Conn) error { return Keep(sorry) })
					default:
						with(func(Conn) error { return nil })
					}
					cancel()
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute) // back-offs end, the idle expire
		st := a.rest()
		require.Zero(t, st.Open, st)
		require.LessOrEqual(t, st.PeakOpen, 10)
		require.Greater(t, st.Loans, uint64(64*steps/10))
		a.ring.fail = nil
		a.serves()
		require.NoError(t, a.p.Close())
		a.gone()
		detached.Range(func(nc, _ any) bool {
			require.NoError(t, nc.(net.Conn).Close()) // nobody else had closed it
			return true
		})
		require.Equal(t, a.ring.opened.Load(), a.ring.closed.Load())
	})
}
