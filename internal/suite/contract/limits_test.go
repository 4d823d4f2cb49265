package contract

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// ADO-06: one device takes one connection, another four, in one pool with a hundred
// workers. No device ever has more, and nobody starves: in this bubble, where a loan takes
// a millisecond and nothing else takes time, nobody waits longer than all others take.
func TestADeviceThatTakesOneAndOneThatTakesFourShareAPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := faultnet.NewMem()
		defer mem.Close()
		takes := map[string]int{"one": 1, "four": 4}
		p, _ := memPool(t, mem, connpool.Config{
			MaxPerAddr: 2, // for a device that nobody has described
			LimitsFor: func(a connpool.Addr) (connpool.AddrLimits, error) {
				return connpool.AddrLimits{MaxOpen: takes[a.Host]}, nil
			},
		})
		const workers, rounds, took = 100, 20, time.Millisecond
		devices := []string{"one", "four", "unknown"}
		var mu sync.Mutex
		longest, loans := map[string]time.Duration{}, map[string]int{}
		var wg tasks.Group
		for w := range workers {
			wg.Go(func() {
				for i := range rounds {
					device := devices[(w+i)%len(devices)]
					began := time.Now()
					err := p.With(context.Background(), connpool.Addr{Transport: "mem", Host: device}, func(connpool.Conn) error {
						mu.Lock()
						longest[device] = max(longest[device], time.Since(began))
						loans[device]++
						mu.Unlock()
						time.Sleep(took)
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		for device, most := range map[string]int{"one": 1, "four": 4, "unknown": 2} {
			require.Equal(t, most, mem.Host(device).Peak(), device)
			require.Equal(t, most, mem.Host(device).Accepts(), "%s: what is open is lent again", device)
			require.Greater(t, loans[device], workers*rounds/4)
			require.LessOrEqual(t, longest[device], workers*took/time.Duration(most)+took, device)
		}
		pooltest.Check(t, p)

		takes = map[string]int{"one": 2, "four": 1} // the devices were exchanged
		require.NoError(t, p.SetLimits(p.Limits()))
		synctest.Wait()
		require.Len(t, mem.Host("four").Conns(), 1, "what is idle beyond the new limit is closed at once")
		for range workers {
			for _, device := range devices {
				wg.Go(func() {
					p.With(context.Background(), connpool.Addr{Transport: "mem", Host: device}, func(connpool.Conn) error {
						time.Sleep(took)
						return nil
					})
				})
			}
		}
		wg.Wait()
		require.Equal(t, 2, mem.Host("one").Peak())
		require.Len(t, mem.Host("four").Conns(), 1)
		require.Equal(t, 4, mem.Host("four").Accepts(), "none was opened since")
		pooltest.Check(t, p)
		require.NoError(t, p.Close())
	})
}
