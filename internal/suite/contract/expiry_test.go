package contract

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// login is what a connection logged in with.
type login struct{ until time.Time }

func (l login) Expires() time.Time { return l.until }

// ADO-11: a thousand connections whose tokens end in the same moment are not closed in one
// second. None is lent or kept after that moment.
func TestAThousandConnectionsDoNotExpireInOneSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := faultnet.NewMem()
		defer mem.Close()
		const lasts, k = 10 * time.Minute, 1000
		end := time.Now().Add(lasts)
		var mu sync.Mutex
		perSecond := map[time.Duration]int{}
		closed := 0
		p, addr := memPool(t, mem, connpool.Config{
			MaxOpen: -1, IdleTimeout: -1, SweepInterval: time.Second, NoProbe: true, MaxDialing: -1, MaxDialingPerAddr: -1,
			Setup: func(context.Context, connpool.Addr, net.Conn) (any, error) { return login{end}, nil },
			Trace: &connpool.Trace{Closed: func(i connpool.CloseInfo) {
				mu.Lock()
				defer mu.Unlock()
				if i.Reason == connpool.ClosedExpired {
					closed++
					perSecond[i.Age/time.Second]++
				}
			}},
		})
		require.NoError(t, p.Warm(t.Context(), addr, k))
		time.Sleep(lasts * 89 / 100)
		require.Zero(t, closed, "at most a tenth is subtracted")
		time.Sleep(lasts*11/100 + 2*time.Second)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Equal(t, k, closed)
		for second, n := range perSecond {
			require.Less(t, n, k/20, "in second %d", second)
		}
		require.NoError(t, p.Close())
	})
}
