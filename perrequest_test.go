package connpool

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// APR-02: the oldest way, a connection for each request, is two settings away
// and the same calls: n loans are n connections that the server accepted, and n
// that it saw closed.
func TestOneConnectionPerRequestRemainsPossible(t *testing.T) {
	requests := short.Of(20, 8)
	for name, change := range map[string]func(*Config){
		"MaxUses 1":  func(c *Config) { c.MaxUses = 1 },
		"MaxIdle -1": func(c *Config) { c.MaxIdle = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
				p := n.pool(t, change)
				for i := range requests {
					r := loan(t, p, n.addr)
					require.Equal(t, i+1, r.serial, "a connection of its own")
					require.Equal(t, 1, r.seq)
					p.check(t)
				}
				require.Equal(t, requests, n.srv.Accepts())
				soon(t, "the server sees all of them closed", func() bool { return n.srv.Open() == 0 })
				st := settled(t, p)
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
