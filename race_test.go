package connpool

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// Each pair of operations that may meet is made to meet, over and over, with a
// little chance in who comes first. After each meeting, when everything has
// come to rest, no slot may be lost, no connection lent twice or closed twice,
// and the pool must still serve. Meetings take place in a bubble, which knows
// when everything is at rest, and where a wait without end is a failure and
// not a test that hangs.

// A ring is the network of these tests: its connections do nothing but watch
// over who uses them.
type ring struct {
	opened, closed, twice, shared atomic.Int64
	gate                          chan struct{} // if not nil, dials wait for it
	fail                          func() error  // if not nil, may fail a dial
}

func (r *ring) dial(ctx context.Context, _ Addr) (net.Conn, error) {
	if gate := r.gate; gate != nil {
		<-gate
	}
	if r.fail != nil {
		if err := r.fail(); err != nil {
			return nil, err
		}
	}
	return &ringConn{ring: r, number: r.opened.Add(1)}, nil
}

// A ringConn adds to its fields with no lock. Two goroutines that own it at
// once, with nothing that orders them, are a data race, and the race detector
// says so.
type ringConn struct {
	ring          *ring
	number        int64
	reads, writes int
	closes        int
	dead          atomic.Bool
	users         atomic.Int32
	deadline      atomic.Value
}

func (c *ringConn) Read(b []byte) (int, error)       { c.reads++; return len(b), nil }
func (c *ringConn) Write(b []byte) (int, error)      { c.writes++; return len(b), nil }
func (c *ringConn) SetDeadline(t time.Time) error    { c.deadline.Store(t); return nil }
func (c *ringConn) SetReadDeadline(time.Time) error  { return nil }
func (c *ringConn) SetWriteDeadline(time.Time) error { return nil }
func (c *ringConn) LocalAddr() net.Addr              { return nil }
func (c *ringConn) RemoteAddr() net.Addr             { return nil }

func (c *ringConn) Probe() error {
	c.reads++
	c.writes++
	if c.dead.Load() {
		return io.EOF
	}
	return nil
}

func (c *ringConn) Close() error {
	if c.closes++; c.closes > 1 {
		c.ring.twice.Add(1)
		return net.ErrClosed
	}
	c.ring.closed.Add(1)
	return nil
}

func ringConnOf(c Conn) *ringConn { return c.c.nc.(*ringConn) }

// busy is what a borrower does: it uses the connection, and looks whether it
// is alone.
func busy(c Conn) error {
	rc := ringConnOf(c)
	if rc.users.Add(1) != 1 {
		rc.ring.shared.Add(1)
	}
	c.Write([]byte{1})
	c.Read(make([]byte, 1))
	rc.users.Add(-1)
	return nil
}

// An arena is a pool over a ring, for one round or many.
type arena struct {
	*testing.T
	rng  *rand.Rand
	ring *ring
	p    *Pool
	addr Addr
}

var ringAddr = Addr{Transport: "ring", Host: "a"}

func (a *arena) open(cfg Config) {
	a.ring, a.addr = new(ring), ringAddr
	cfg.Dialers = map[Transport]DialFunc{"ring": a.ring.dial}
	p, err := New(cfg)
	require.NoError(a, err)
	a.p = p
}

// meet lets all of them go at once, but for a moment.
func (a *arena) meet(fs ...func()) {
	var wg tasks.Group
	start := make(chan struct{})
	for _, f := range fs {
		yields, spins := a.rng.IntN(3), a.rng.IntN(300)
		wg.Go(func() {
			<-start
			for range yields {
				runtime.Gosched()
			}
			for range spins {
				_ = start
			}
			f()
		})
	}
	close(start)
	wg.Wait()
}

// rest waits until nothing moves, and looks at the books.
func (a *arena) rest() Stats {
	synctest.Wait()
	a.p.check(a)
	st := a.p.Stats()
	if st.Dialing+st.InUse+st.Closing+st.Waiting != 0 || a.ring.opened.Load()-a.ring.closed.Load() != int64(st.Open)+int64(st.Detached) ||
		a.ring.twice.Load()+a.ring.shared.Load() != 0 {
		a.Fatalf("at rest: %v, %d detached; %d opened, %d closed, %d closed twice, %d lent twice",
			st, st.Detached, a.ring.opened.Load(), a.ring.closed.Load(), a.ring.twice.Load(), a.ring.shared.Load())
	}
	return st
}

// serves shows that no slot was lost: a pool that lost its last one would let
// the borrower wait until the bubble's clock runs.
func (a *arena) serves() (number int64) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	require.NoError(a, a.p.With(ctx, a.addr, func(c Conn) error {
		number = ringConnOf(c).number
		return busy(c)
	}))
	return number
}

// gone shows that a closed pool is closed altogether.
func (a *arena) gone() {
	require.Zero(a, a.rest().Open)
	require.ErrorIs(a, a.p.With(context.Background(), a.addr, busy), ErrClosed)
}

// guest borrows in a goroutine of its own, and has met the pool (waits for a
// connection, or is served) when this returns.
func (a *arena) guest(ctx context.Context) (ran *bool, result chan error) {
	ran, result = new(bool), make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(ctx, time.Hour) // to wait for ever is to fail
		defer cancel()
		result <- a.p.With(ctx, a.addr, func(c Conn) error {
			*ran = true
			return busy(c)
		})
	}()
	synctest.Wait()
	return ran, result
}

// servedOrCanceled is what may come of a borrower that was canceled.
func (a *arena) servedOrCanceled(ran bool, err error) {
	if err != nil && (ran || !errors.Is(err, context.Canceled)) {
		a.Fatalf("ran: %v, then %v", ran, err)
	}
}

// BETA-X15, TDBC-21
func TestRaceOfEachPairOfOperations(t *testing.T) {
	sorry := errors.New("sorry")
	one := Config{MaxPerAddr: 1}
	for name, duel := range map[string]struct {
		cfg   Config
		fresh bool // a new pool for each round
		round func(a *arena)
	}{
		"return and Close": {one, true, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { require.NoError(a, a.p.Close()) })
			a.gone()
		}},
		"return and Retire": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			number := ringConnOf(h.Conn).number
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { a.p.Retire(a.addr) })
			require.Zero(a, a.rest().Open)
			require.NotEqual(a, number, a.serves())
		}},
		"return and CloseIdle": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			a.meet(func() { require.NoError(a, h.end(nil)) }, a.p.CloseIdle)
			a.rest()
			a.serves()
		}},
		"return and EvictLRU": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			evicted := false
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { _, evicted = a.p.EvictLRU() })
			require.Equal(a, evicted, a.rest().Idle == 0)
			a.serves()
		}},
		"return and Shutdown": {one, true, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { require.NoError(a, a.p.Shutdown(context.Background())) })
			a.gone()
		}},
		"return and Conn.Close": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			var err error
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { err = h.Close() })
			if err != nil {
				require.ErrorIs(a, err, ErrReturned)
			}
			require.Equal(a, err == nil, a.rest().Open == 0)
			a.serves()
		}},
		"two returns and one waiter": {Config{MaxPerAddr: 2}, false, func(a *arena) {
			h, g := hold(a.T, a.p, a.addr), hold(a.T, a.p, a.addr)
			_, result := a.guest(context.Background())
			a.meet(func() { require.NoError(a, h.end(nil)) }, func() { require.NoError(a, g.end(nil)) })
			require.NoError(a, <-result)
			require.Equal(a, 2, a.rest().Idle)
		}},
		"cancel and delivery": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			ctx, cancel := context.WithCancel(context.Background())
			ran, result := a.guest(ctx)
			a.meet(func() { require.NoError(a, h.end(nil)) }, cancel)
			a.servedOrCanceled(*ran, <-result)
			if st := a.rest(); !*ran {
				require.Equal(a, 1, st.Idle, "what a waiter was handed too late is kept")
			}
			a.serves()
		}},
		"cancel and the end of a dial": {one, false, func(a *arena) {
			a.p.CloseIdle()
			a.ring.gate = make(chan struct{})
			ctx, cancel := context.WithCancel(context.Background())
			ran, result := a.guest(ctx)
			a.meet(func() { close(a.ring.gate) }, cancel)
			a.servedOrCanceled(*ran, <-result)
			a.ring.gate = nil
			if st := a.rest(); !*ran {
				require.Equal(a, 1, st.Idle, "a dial that nobody waits for is kept")
			}
			a.serves()
		}},
		"cancel, Close and return": {one, true, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			ctx, cancel := context.WithCancel(context.Background())
			ran, result := a.guest(ctx)
			a.meet(func() { require.NoError(a, h.end(nil)) }, cancel, func() { require.NoError(a, a.p.Close()) })
			if err := <-result; !errors.Is(err, ErrClosed) {
				a.servedOrCanceled(*ran, err)
			}
			a.gone()
		}},
		"Retire and a dial": {one, false, func(a *arena) {
			a.p.CloseIdle()
			a.ring.gate = make(chan struct{})
			number := a.ring.opened.Load() + 1
			_, result := a.guest(context.Background())
			a.meet(func() { close(a.ring.gate) }, func() { a.p.Retire(a.addr) })
			require.NoError(a, <-result)
			a.ring.gate = nil
			a.rest()
			require.NotEqual(a, number, a.serves(), "what was being opened outlived Retire")
		}},
		"Close and a dial": {one, true, func(a *arena) {
			a.ring.gate = make(chan struct{})
			_, result := a.guest(context.Background())
			a.meet(func() { close(a.ring.gate) }, func() { require.NoError(a, a.p.Close()) })
			if err := <-result; err != nil {
				require.ErrorIs(a, err, ErrClosed)
			}
			a.gone()
		}},
		"EvictLRU and a borrow": {one, false, func(a *arena) {
			before := a.serves()
			evicted := false
			a.meet(func() { a.serves() }, func() { _, evicted = a.p.EvictLRU() })
			a.rest()
			if after := a.serves(); !evicted {
				require.Equal(a, before, after)
			}
		}},
		"EvictLRU and EvictLRU": {Config{MaxPerAddr: 2}, false, func(a *arena) {
			idle := 1 + a.rng.IntN(2)
			h := hold(a.T, a.p, a.addr)
			if idle == 2 {
				a.serves()
			}
			require.NoError(a, h.end(nil))
			var n atomic.Int32
			evict := func() {
				if addr, ok := a.p.EvictLRU(); ok {
					require.Equal(a, a.addr, addr)
					n.Add(1)
				}
			}
			a.meet(evict, evict)
			require.EqualValues(a, idle, n.Load())
			require.Zero(a, a.rest().Open)
		}},
		"a sweep and a borrow": {one, false, func(a *arena) {
			before := a.serves()
			a.meet(func() { a.serves() }, a.p.sweep)
			a.rest()
			require.Equal(a, before, a.serves(), "the sweep made the pool look empty")
		}},
		"a sweep and the borrow of a dead one": {one, false, func(a *arena) {
			before := int64(0)
			require.NoError(a, a.p.With(context.Background(), a.addr, func(c Conn) error {
				before = ringConnOf(c).number
				ringConnOf(c).dead.Store(true)
				return nil
			}))
			a.meet(func() { require.NotEqual(a, before, a.serves()) }, a.p.sweep)
			require.Equal(a, 1, a.rest().Open)
		}},
		"a discard and a newcomer": {one, false, func(a *arena) {
			h := hold(a.T, a.p, a.addr)
			number := ringConnOf(h.Conn).number
			a.meet(func() { require.ErrorIs(a, h.end(sorry), sorry) }, func() { require.NotEqual(a, number, a.serves()) })
			require.Equal(a, 1, a.rest().Open)
		}},
		"newcomers at the limit": {one, false, func(a *arena) {
			before := a.serves()
			a.meet(func() { a.serves() }, func() { a.serves() }, func() { require.Equal(a, before, a.serves()) })
			require.Equal(a, 1, a.rest().Open)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := &arena{T: t, rng: rand.New(rand.NewPCG(1, 2))}
				a.open(duel.cfg)
				for range rounds() {
					duel.round(a)
					if duel.fresh {
						a.open(duel.cfg)
					}
				}
				require.NoError(t, a.p.Close())
				a.gone()
			})
		})
	}
}

// rounds is how often each pair meets.
func rounds() int {
	switch {
	case os.Getenv("CONNPOOL_STRESS") != "":
		return 100_000
	case raceEnabled:
		return short.Of(1000, 200)
	}
	return short.Of(2000, 150)
}

// BETA-21
func TestRaceOfDetachAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &arena{T: t, rng: rand.New(rand.NewPCG(3, 4))}
		a.open(Config{MaxPerAddr: 1})
		taken := uint64(0)
		for i := range rounds() {
			ctx, cancel := context.WithCancel(context.Background())
			require.NoError(t, a.p.With(ctx, a.addr, func(c Conn) error {
				var nc net.Conn
				var err error
				if i%2 == 0 {
					a.p.young.Beat()
					synctest.Wait() // the ctx is watched
					a.meet(func() { nc, err = c.Detach() }, cancel)
				} else {
					a.meet(func() { nc, err = c.Detach() }, cancel, a.p.young.Beat)
				}
				if err != nil {
					require.ErrorIs(t, err, context.Canceled)
					require.Nil(t, nc)
					return nil
				}
				synctest.Wait()
				require.Zero(t, nc.(*ringConn).closes)
				if set, ok := nc.(*ringConn).deadline.Load().(time.Time); ok {
					require.Zero(t, set, "the ctx reached a connection that had left")
				}
				taken++
				return nil // nc is ours, and stays open
			}))
			require.Equal(t, taken, a.rest().Detached)
			a.serves()
		}
		require.NoError(t, a.p.Close())
		a.gone()
	})
}
