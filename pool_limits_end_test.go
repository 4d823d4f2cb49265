package connpool

import (
	"context"
	"math"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What a limit causes ends with the limit.

// TRY-50: with MaxOpen the budget of handles is given up, and with it what the pool
// does when handles are short.
func TestWithoutMaxOpenThereIsNoPressureOfHandles(t *testing.T) {
	short := func(t *testing.T, n *sockNet) (p *Pool, limit *atomic.Int64) {
		p = n.pool(t, func(c *Config) { c.NoFDCheck, c.NoProbe = true, true })
		limit = new(atomic.Int64)
		limit.Store(8) // a test binary's descriptors have larger numbers
		low := realSystem
		low.handleLimit = func() (int, bool) { return int(limit.Load()), limit.Load() > 0 }
		p.sys = &low
		loan(t, p, n.addr)
		loan(t, p, n.addr)
		require.Equal(t, map[CloseReason]uint64{ClosedLowHandles: 2}, p.Stats().Closed, "the state that has to end")
		return p, limit
	}
	n := startSock(t, "tcp", faultnet.Options{})
	for name, end := range map[string]func(p *Pool, limit *atomic.Int64){
		"the limit is switched off": func(p *Pool, _ *atomic.Int64) {
			l := p.Limits()
			l.MaxOpen = -1
			require.NoError(t, p.SetLimits(l))
		},
		"the system has no limit any more": func(_ *Pool, limit *atomic.Int64) { limit.Store(0) },
	} {
		t.Run(name, func(t *testing.T) {
			p, limit := short(t, n)
			held := hold(t, p, n.addr)
			end(p, limit)
			if limit.Load() > 0 { // else the next dial will tell
				require.NoError(t, held.end(nil))
				require.Equal(t, 1, p.Stats().Idle, "it is known at once")
			}
			before := p.Stats().Dials
			for range 10 {
				loan(t, p, n.addr)
			}
			require.LessOrEqual(t, p.Stats().Dials-before, uint64(1))
			require.Equal(t, 1, p.Stats().Idle)
			if limit.Load() == 0 {
				require.NoError(t, held.end(nil))
			}
		})
	}
}

// TRY-50: connections without a descriptor say nothing of the handles, and a pool that
// makes no others would believe the last word for ever.
func TestPressureIsDoubtedWhereNoDescriptorTells(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		sys := realSystem
		var none atomic.Bool
		sys.noHandleFree = none.Load
		n.p.sys = &sys
		n.p.mu.Lock()
		n.p.pressure = handlesLow // as a descriptor told once
		n.p.mu.Unlock()
		none.Store(true)
		n.use(at("a"))
		synctest.Wait()
		n.closed(reasons{ClosedLowHandles: 1})
		time.Sleep(10 * time.Minute)
		n.use(at("a"))
		synctest.Wait()
		n.closed(reasons{ClosedLowHandles: 2})
		none.Store(false)
		l := n.borrow(bg, at("b")) // so that there are books to sweep
		l.conn()
		time.Sleep(time.Minute)
		n.use(at("a"))
		synctest.Wait()
		n.closed(reasons{ClosedLowHandles: 2})
		n.gauges(1, 1, 0)
		require.NoError(t, l.giveBack())
	})
}

// TRY-50
func TestAConnectionIsNoReserveAnyMoreWhenThereIsNone(t *testing.T) {
	for _, handedOver := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{IdleTimeout: time.Minute, MinIdlePerAddr: 1, SweepInterval: -1, MaxPerAddr: 2})
			n.use(at("a"))
			synctest.Wait()
			time.Sleep(2 * time.Minute)
			// Lent beyond IdleTimeout, as one of the reserve.
			b := n.borrow(bg, at("a"))
			b.conn()
			require.NoError(t, b.giveBack())
			synctest.Wait()
			n.change(func(l *Limits) { l.MinIdlePerAddr = 0 })
			time.Sleep(time.Hour)
			before := n.p.Stats()
			if handedOver {
				// It is being looked at when the borrower comes.
				n.p.mu.Lock()
				c := n.p.sites.find(at("a")).top
				at := idleRef{c, c.generation()}
				n.p.mu.Unlock()
				at.examine(false)
			}
			n.use(at("a"))
			st := n.p.Stats()
			require.Equal(t, before.Dials+1, st.Dials, "one that was idle for an hour is not lent")
			require.Positive(t, st.Closed[ClosedIdleTimeout])
			n.check()
		})
	}
}

// TRY-50: a connection of the reserve that was being looked at when a borrower came is
// lent, however long it was idle; what was one in an earlier loan is one no more.
func TestAReserveThatIsHandedOverIsLentAndNothingElse(t *testing.T) {
	for _, reserve := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{IdleTimeout: time.Minute, MinIdlePerAddr: 1, SweepInterval: -1, MaxPerAddr: 2})
			n.idle(at("a"), 2)
			time.Sleep(2 * time.Minute)
			n.use(at("a"))
			synctest.Wait()
			if !reserve {
				n.change(func(l *Limits) { l.MinIdlePerAddr = 0 })
			}
			time.Sleep(2 * time.Minute)
			var looked []*conn
			for _, c := range n.p.every() {
				n.p.mu.Lock()
				n.p.takeLocked(c)
				c.lendAtLocked(n.p.clock.Now())
				n.p.setCheckingLocked(c, true)
				n.p.mu.Unlock()
				looked = append(looked, c)
			}
			require.NotEmpty(t, looked)
			n.Host("a").SetLatency(5 * time.Second)
			expired := n.p.Stats().Closed[ClosedIdleTimeout]
			b := n.queue(1, at("a"))[0]
			looked[0].releaseFrom(fromCheck)
			synctest.Wait()
			require.Equal(t, reserve, b.holds(), "lent, or closed, and a dial serves the borrower")
			for _, c := range looked[1:] {
				c.releaseFrom(fromCheck)
			}
			b.conn()
			synctest.Wait()
			require.Equal(t, reserve, n.p.Stats().Closed[ClosedIdleTimeout] == expired)
			require.NoError(t, b.giveBack())
			n.check()
		})
	}
}

// TRY-50: what was looked at while there was no reserve is not taken for a part of
// the reserve that comes later.
func TestALookThatIsOverCountsForNoReserve(t *testing.T) {
	bubble(t, func(t *testing.T) {
		looking := make(chan struct{}, 100)
		n := open(t, Config{SweepInterval: time.Minute, IdleTimeout: -1, Check: func(context.Context, Conn) error {
			looking <- struct{}{}
			time.Sleep(time.Second)
			return nil
		}})
		require.NoError(t, n.p.Warm(bg, at("a"), 3))
		time.Sleep(2*time.Minute + time.Second)
		require.NotEmpty(t, looking)
		time.Sleep(10 * time.Second)
		n.check()
		n.change(func(l *Limits) { l.MinIdlePerAddr = 3 })
		b := n.borrow(bg, at("a"))
		b.conn()
		synctest.Wait()
		n.gauges(1, 3, 0)
		// And a limit that goes while a look is under way.
		time.Sleep(time.Minute - 10*time.Second)
		for len(looking) > 0 {
			<-looking
		}
		<-looking
		n.change(func(l *Limits) { l.MinIdlePerAddr = 0 })
		time.Sleep(30 * time.Second)
		n.check()
		n.p.mu.Lock()
		require.Zero(t, n.p.checking)
		n.p.mu.Unlock()
		require.NoError(t, b.giveBack())
	})
}

// TRY-50: a waiter that gets a connection from a look had to wait for it, and holds it
// from then on; the connection had been idle, and is as old as it is.
func TestALookHandsOverWithTheRightTimes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		checking := make(chan struct{})
		var put PutInfo
		var got GotInfo
		n := open(t, Config{MaxPerAddr: 1, SweepInterval: time.Minute, CheckAfterIdle: 2 * time.Minute, IdleTimeout: -1,
			Check: func(ctx context.Context, c Conn) error { <-checking; return nil },
			Trace: &Trace{PutConn: func(i PutInfo) { put = i }, GotConn: func(i GotInfo) { got = i }}})
		n.use(at("a"))
		time.Sleep(time.Minute + time.Second) // the sweep's Check runs
		b := n.borrow(bg, at("a"))
		synctest.Wait()
		require.True(t, b.waits())
		require.Contains(t, n.p.stillOut(), "(for 1s)", "the look is what holds it")
		time.Sleep(time.Second)
		close(checking)
		c := b.conn()
		require.Equal(t, time.Minute+2*time.Second, got.IdleFor)
		require.Equal(t, time.Second, got.Waited)
		require.Equal(t, time.Minute+2*time.Second, c.Info().IdleFor)
		time.Sleep(time.Second)
		require.Contains(t, n.p.stillOut(), "(for 1s)")
		require.NoError(t, b.giveBack())
		require.Equal(t, time.Second, put.Held)
		n.check()
	})
}

// TRY-50: a look does not make a connection younger, and neither does a waiter that gave
// up as it was handed over.
func TestALookThatFindsNothingLeavesTheAgeAsItIs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{IdleTimeout: time.Minute, SweepInterval: -1, MaxPerAddr: 1})
		n.use(at("a"))
		c := n.p.every()[0]
		since := c.since
		for range 5 {
			time.Sleep(10 * time.Second)
			idleRef{c, c.generation()}.examine(false)
			require.Equal(t, since, c.since)
		}
		// To a waiter, which has gone when it looks.
		n.p.mu.Lock()
		n.p.takeLocked(c)
		c.lendAtLocked(n.p.clock.Now())
		s := c.site
		w := &waiter{seq: 1, ctx: bg, since: c.since, ready: make(chan struct{}, 1)}
		s.queueLocked().push(w)
		n.p.refreshLocked(s)
		n.p.mu.Unlock()
		time.Sleep(time.Second)
		c.releaseFrom(fromCheck)
		<-w.ready
		require.Equal(t, 51*time.Second, c.idleFor)
		w.noteDeclined()
		require.Equal(t, since, c.since)
		time.Sleep(9 * time.Second)
		require.Equal(t, "a#2", n.use(at("a")), "a minute has passed since its last loan")
		n.check()
	})
}

// TRY-50: an excess is for the pool's own borrowers, who give it back; a library would
// keep it.
func TestDialContextKeepsMaxOpenUnderOverflow(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxOpen, c.WhenFull = 2, FullOverflow })
	network, address := n.target()
	var own []net.Conn
	for range 2 {
		nc, err := p.DialContext(t.Context(), network, address)
		require.NoError(t, err)
		own = append(own, nc)
	}
	got := make(chan net.Conn, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		nc, err := p.DialContext(ctx, network, address)
		if err != nil {
			t.Error(err)
		}
		got <- nc
	}()
	queued(t, p, 1)
	// Borrowers go past it, into the excess.
	var all []held
	for i := range 3 {
		all = append(all, hold(t, p, scoped(n.addr, i)))
		require.Equal(t, 3+i, p.Stats().Open)
		require.Equal(t, 2, p.Stats().Tracked)
		p.check(t)
	}
	for _, h := range all {
		require.NoError(t, h.end(nil))
	}
	soon(t, "the excess is closed", func() bool { return p.Stats().Open == 2 })
	require.Equal(t, 1, p.Stats().Waiting, "there is still no slot for it")
	require.NoError(t, own[0].Close())
	own[0] = inTime(t, got)
	require.Equal(t, 2, p.Stats().Open)
	p.check(t)
	for _, nc := range own {
		require.NoError(t, nc.Close())
	}
}

// TRY-49: counts near the end of their range are compared, not added to.
func TestAReserveThatIsAsLargeAsCanBeIsCompared(t *testing.T) {
	for _, cfg := range []Config{
		{MaxOpen: 10, MinIdlePerAddr: math.MaxInt},
		{MaxPerAddr: 10, MinIdlePerAddr: math.MaxInt},
		{MaxOpen: 10, MinIdlePerAddr: 10},
		{MaxPerAddr: math.MaxInt, MinIdlePerAddr: math.MaxInt},
	} {
		_, err := New(cfg)
		require.ErrorContains(t, err, "MinIdlePerAddr", "%+v", cfg.limits())
	}
	for _, cfg := range []Config{
		{MaxOpen: 1}, {MaxPerAddr: 1}, {MaxOpen: 1, MinIdlePerAddr: -1}, {MaxOpen: 10, MinIdlePerAddr: 9}, {MaxOpen: math.MaxInt, MinIdlePerAddr: 3},
	} {
		p, err := New(cfg)
		require.NoError(t, err, "%+v", cfg.limits())
		require.NoError(t, p.Close())
	}
}
