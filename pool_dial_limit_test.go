package connpool

import (
	"context"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The limit of each address alone would let twelve dials run here.
//
// ORA-70
func TestMaxDialingBoundsTheDialsToAllAddressesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := faultnet.NewMem()
		defer mem.Close()
		p, err := New(Config{MaxDialing: 3, MaxDialingPerAddr: 3, Dialers: map[Transport]DialFunc{
			"mem": func(ctx context.Context, a Addr) (net.Conn, error) { return mem.Dial(ctx, a.Host) },
		}})
		require.NoError(t, err)
		const round = silence * 4 / 5 // addresses that take longer have to share, at the price of dials that are broken off
		var all tasks.Group
		for n := range 12 {
			host := "h" + strconv.Itoa(n%4)
			mem.Host(host).SetLatency(round)
			all.Go(func() {
				err := p.With(context.Background(), Addr{Transport: "mem", Host: host}, func(Conn) error {
					time.Sleep(time.Minute) // so that nobody is served by a return
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		for n := range 4 {
			synctest.Wait()
			p.check(t)
			require.Equal(t, 3, p.Stats().Dialing, "in round %d", n)
			time.Sleep(round)
		}
		synctest.Wait()
		require.Zero(t, p.Stats().Dialing)
		require.Equal(t, 12, p.Stats().InUse)
		all.Wait()
		require.NoError(t, p.Close())
	})
}
