package connpool

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// Addresses that differ only in what the hash leaves out share it: == decides.
func TestAddressesOfOneHashAreKeptApart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		alike := make([]Addr, 4)
		for i := range alike {
			alike[i] = at("a")
			alike[i].QoS.KeepAlive = time.Duration(i) * time.Second
			require.Equal(t, n.p.sites.hash(&alike[0]), n.p.sites.hash(&alike[i]))
			require.Equal(t, fmt.Sprintf("a#%d", i+1), n.use(alike[i]))
		}
		for range 2 {
			for i, a := range alike {
				require.Equal(t, fmt.Sprintf("a#%d", i+1), n.use(a))
				n.check()
			}
		}
		require.Equal(t, 4, n.p.Stats().Addrs)
		n.p.Retire(alike[0]) // it leaves, and those that share its hash stay
		for i, a := range alike[1:] {
			require.Equal(t, fmt.Sprintf("a#%d", i+2), n.use(a))
			n.check()
		}
		require.Equal(t, "a#5", n.use(alike[0]))
		n.check()
	})
}

func TestTheSiteTableAgreesWithAMap(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 5))
		table, want := newSiteTable(), make(map[Addr]*site)
		for range 400 {
			a := Addr{Transport: TCP, Host: fmt.Sprint("h", r.IntN(4)), Port: uint16(1 + r.IntN(2))}
			a.QoS.UserTimeout = time.Duration(r.IntN(3)) // not in the hash
			switch s := want[a]; {
			case s == nil:
				require.Nil(t, table.find(a))
				s = &site{addr: a}
				table.add(s)
				want[a] = s
			case r.IntN(3) == 0:
				table.remove(s)
				table.remove(s) // again: it is not there, and no other goes in its place
				delete(want, a)
			}
			require.Same(t, want[a], table.find(a))
			require.Equal(t, len(want), table.len())
		}
		for s := range table.all() {
			require.Same(t, want[s.addr], s)
			delete(want, s.addr)
		}
		require.Empty(t, want)
	}
}

// A hundred thousand connections to as many addresses should fit beside the rest
// of a program: see W6 and W7 in docs/performance.md.
func TestTheBooksOfAConnectionAreSmall(t *testing.T) {
	if runtime.GOOS != "linux" || unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("the sizes are those of 64-bit Linux; elsewhere an identity is larger, or a pointer smaller")
	}
	require.LessOrEqual(t, int(unsafe.Sizeof(conn{})), 240, "the next size class")
	require.LessOrEqual(t, int(unsafe.Sizeof(site{})), 224, "the next size class")
}
