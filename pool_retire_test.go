package connpool

import (
	"context"
	"fmt"
	"maps"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// retire retires a, in every other step through RetireFunc, whose count it checks, or some of the
// connections of a, each by itself (ADO-12).
func (w *world) retire(a Addr) {
	if w.steps%8 < 3 {
		var some []followedConn
		for i, c := range w.pool.every() {
			if c.site.addr == a && i%3 > 0 {
				some = append(some, followedConn{c: c})
			}
		}
		w.pool.follow.retire(a.Host, some)
		return
	}
	if w.steps%2 == 0 {
		w.pool.Retire(a)
		return
	}
	want := 0
	for b, s := range w.pool.Addrs() {
		if a == b {
			want = s.Open - s.Closing
		}
	}
	if n := w.pool.RetireFunc(func(b Addr) bool { return a == b }); n != want {
		w.failed("RetireFunc says %d for %v, of which %d are open", n, a, want)
	}
}

// ADO-11
func TestRetireFuncRetiresTheAddressesThatMatch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for _, host := range []string{"a1", "a2", "b1"} {
			n.idle(at(host), 2)
		}
		held, heldB := n.borrow(bg, at("a1")), n.borrow(bg, at("b1"))
		held.conn()
		heldB.conn()
		n.Host("a3").SetLatency(time.Second)
		dialing := n.borrow(bg, at("a3"))
		synctest.Wait()

		asked := map[Addr]int{}
		require.Equal(t, 5, n.p.RetireFunc(func(a Addr) bool {
			asked[a]++
			n.p.Stats() // match may use the pool
			return a.Host[0] == 'a'
		}))
		require.Equal(t, map[Addr]int{at("a1"): 1, at("a2"): 1, at("a3"): 1, at("b1"): 1}, asked)
		n.closed(reasons{ClosedRetired: 3})
		require.Equal(t, "a1#3", n.use(at("a1")), "what is opened from now on is good")
		require.Len(t, n.Host("b1").Conns(), 2, "other addresses are not concerned")
		require.NoError(t, held.giveBack())
		n.closed(reasons{ClosedRetired: 4})
		dialing.conn()
		require.NoError(t, dialing.giveBack())
		n.closed(reasons{ClosedRetired: 5})
		n.check()

		require.Zero(t, n.p.RetireFunc(func(Addr) bool { return false }))
		require.Equal(t, 4, n.p.RetireFunc(nil), "two of b1, and what was dialled since")
		require.NoError(t, heldB.giveBack())
		n.closed(reasons{ClosedRetired: 9})
		n.gauges(0, 0, 0)
	})
	require.Zero(t, new(Pool).RetireFunc(nil))
	p, err := New(Config{})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.Zero(t, p.RetireFunc(func(Addr) bool { return true }))
}

// ADO-11
func TestAMatchThatPanicsRetiresNothing(t *testing.T) {
	for name, ends := range map[string]func(){"panic": func() { panic(errBoom) }, "Goexit": runtime.Goexit} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{})
			for i := range 5 {
				n.use(at(fmt.Sprint("h", i)))
			}
			calls := 0
			var got any
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer func() { got = recover() }()
				n.p.RetireFunc(func(Addr) bool {
					if calls++; calls == 4 {
						ends()
					}
					return true
				})
			}()
			<-done
			if name == "panic" {
				require.Equal(t, errBoom, got)
			}
			n.gauges(0, 5, 0)
			n.check()
			require.Equal(t, 5, n.p.RetireFunc(nil))
			n.gauges(0, 0, 0)
		})
	}
}

// ADO-11: the TLS sessions of a retired address are forgotten, also if the pool has no
// connection to it any more; those of other addresses are not.
func TestRetireFuncForgetsTLSSessions(t *testing.T) {
	for _, name := range bothTLS {
		t.Run(name, func(t *testing.T) {
			n, of := clientCerts(t, name)
			var mu sync.Mutex
			resumed := map[string][]bool{} // by scope
			p := n.pool(t, func(c *Config) {
				c.TLS = of("old")
				c.Setup = func(_ context.Context, a Addr, nc net.Conn) (any, error) {
					_, err := seenBy(nc) // which reads the tickets
					mu.Lock()
					defer mu.Unlock()
					resumed[a.Scope] = append(resumed[a.Scope], nc.(Conn).ConnectionState().DidResume)
					return nil, err
				}
			})
			both := []Addr{scoped(n.addr, "a"), scoped(n.addr, "b")}
			use := func() {
				t.Helper()
				for _, a := range both {
					require.NoError(t, p.With(bg, a, Conn.Close))
				}
			}
			use()
			use()
			soon(t, "no address has books", func() bool { return p.Stats().Addrs == 0 })
			require.ElementsMatch(t, both, slices.Collect(maps.Keys(p.sessions.addrs())))
			require.Zero(t, p.RetireFunc(func(a Addr) bool { return a.Scope == "a" }))
			use()
			require.Zero(t, p.RetireFunc(nil))
			use()
			require.Equal(t, map[string][]bool{"a": {false, true, false, false}, "b": {false, true, true, false}}, resumed)
		})
	}
}
