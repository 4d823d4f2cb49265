package transports

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// APR-02: the oldest way, a connection for each request, is two settings away
// and the same calls: n loans are n connections that the server accepted, and n
// that it saw closed.
func TestOneConnectionPerRequestRemainsPossible(t *testing.T) {
	requests := short.Of(20, 8)
	for name, change := range map[string]func(*connpool.Config){
		"MaxUses 1":  func(c *connpool.Config) { c.MaxUses = 1 },
		"MaxIdle -1": func(c *connpool.Config) { c.MaxIdle = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
				p := n.Pool(t, change)
				for i := range requests {
					r := pooltest.Loan(t, p, n.Addr)
					require.Equal(t, i+1, r.Serial, "a connection of its own")
					require.Equal(t, 1, r.Seq)
					pooltest.Check(t, p)
				}
				require.Equal(t, requests, n.Server.Accepts())
				patience.Soon(t, "the server sees all of them closed", func() bool { return n.Server.Open() == 0 })
				st := pooltest.Settled(t, p)
				closed := uint64(0)
				for _, k := range st.Closed {
					closed += k
				}
				require.EqualValues(t, requests, closed)
				require.EqualValues(t, requests, st.Dials)
				require.EqualValues(t, requests, st.Loans)
				require.Zero(t, st.Reused)
				require.Zero(t, st.Open)
			})
		})
	}
}
