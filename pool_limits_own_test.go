package connpool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// Limits of one address (Config.LimitsFor).

// ownAnswers is a LimitsFor whose answers a test may change.
type ownAnswers struct {
	mu    sync.Mutex
	by    map[string]AddrLimits
	err   error
	do    func(Addr) // called first, without mu
	asked map[Addr]int
}

func (a *ownAnswers) limitsFor(addr Addr) (AddrLimits, error) {
	a.mu.Lock()
	if a.asked == nil {
		a.asked = make(map[Addr]int)
	}
	a.asked[addr]++
	do := a.do
	l, err := a.by[addr.Host], a.err // what was true when the call began
	a.mu.Unlock()
	if do != nil {
		do(addr)
	}
	return l, err
}

func (a *ownAnswers) set(host string, l AddrLimits) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.by == nil {
		a.by = make(map[string]AddrLimits)
	}
	a.by[host] = l
}

func (a *ownAnswers) fails(err error, do func(Addr)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err, a.do = err, do
}

func (a *ownAnswers) times(addr Addr) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[addr]
}

// change gives a host other limits and tells the pool.
func (a *ownAnswers) change(n *testnet, host string, l AddrLimits) {
	n.t.Helper()
	a.set(host, l)
	n.change(func(*Limits) {})
}

// openTo is how many of k borrowers of host get a connection at once. It gives them back.
func (n *testnet) openTo(host string, k int) (open int) {
	n.t.Helper()
	var all []*scripted
	for range k {
		all = append(all, n.borrow(bg, at(host)))
		synctest.Wait()
	}
	for _, b := range all {
		if b.holds() {
			open++
		}
	}
	n.check()
	for _, b := range all {
		b.conn()
		require.NoError(n.t, b.giveBack())
	}
	synctest.Wait()
	n.check()
	return open
}

// ADO-06
func TestAnAddressHasTheLimitsThatLimitsForGives(t *testing.T) {
	for name, tc := range map[string]struct {
		pool Config
		own  AddrLimits
		one  func(t *testing.T, n *testnet) // for the host "own"
		all  func(t *testing.T, n *testnet) // for the host "other", which has none
	}{
		"MaxOpen is higher": {Config{MaxPerAddr: 2}, AddrLimits{MaxOpen: 4}, openTo("own", 4), openTo("other", 2)},
		"MaxOpen is lower":  {Config{MaxPerAddr: 2}, AddrLimits{MaxOpen: 1}, openTo("own", 1), openTo("other", 2)},
		"MaxOpen is off":    {Config{MaxPerAddr: 2}, AddrLimits{MaxOpen: -1}, openTo("own", 6), openTo("other", 2)},
		"MaxOpen is within that of the pool": {Config{MaxOpen: 3, MaxPerAddr: 2}, AddrLimits{MaxOpen: 8},
			openTo("own", 3), openTo("other", 2)},
		"MaxIdle is higher": {Config{MaxIdlePerAddr: 2}, AddrLimits{MaxIdle: 4}, idleAt("own", 4), idleAt("other", 2)},
		"MaxIdle is lower":  {Config{MaxIdlePerAddr: 2}, AddrLimits{MaxIdle: 1}, idleAt("own", 1), idleAt("other", 2)},
		"MaxIdle is none":   {Config{}, AddrLimits{MaxIdle: -1}, idleAt("own", 0), idleAt("other", 6)},
		"MinIdle":           {Config{}, AddrLimits{MinIdle: 3}, keptInReserve("own", 4, 3), keptInReserve("other", 1, 0)},
		"MinIdle is none":   {Config{MinIdlePerAddr: 3}, AddrLimits{MinIdle: -1}, keptInReserve("own", 1, 0), keptInReserve("other", 4, 3)},
		"MinIdle gives way to MaxIdle": {Config{MaxIdlePerAddr: 2}, AddrLimits{MinIdle: 3},
			keptInReserve("own", 2, 2), keptInReserve("other", 1, 0)},
		"MinIdle gives way to MaxOpen": {Config{MinIdlePerAddr: 3}, AddrLimits{MaxOpen: 2},
			keptInReserve("own", 2, 1), keptInReserve("other", 4, 3)},
		"MaxDialing": {Config{MaxDialing: 5, MaxDialingPerAddr: 2}, AddrLimits{MaxDialing: 3},
			dialsTo("own", 3), dialsTo("other", 2)},
		"MaxDialing is off": {Config{MaxDialing: 5, MaxDialingPerAddr: 2}, AddrLimits{MaxDialing: -1},
			dialsTo("own", 5), dialsTo("other", 2)},
		"MaxWaiters": {Config{MaxPerAddr: 1, MaxWaiters: 2}, AddrLimits{MaxWaiters: 1},
			waitersOf("own", 1, "1 of 1 waiting; raise the MaxWaiters that Config.LimitsFor gives"),
			waitersOf("other", 2, "2 of 2 waiting; raise MaxWaiters")},
		"MaxWaiters is off": {Config{MaxPerAddr: 1, MaxWaiters: 2}, AddrLimits{MaxWaiters: -1},
			waitersOf("own", 5, ""), waitersOf("other", 2, "2 of 2 waiting; raise MaxWaiters")},
	} {
		t.Run(name, func(t *testing.T) {
			for _, one := range []func(*testing.T, *testnet){tc.one, tc.all} {
				bubble(t, func(t *testing.T) {
					a := new(ownAnswers)
					a.set("own", tc.own)
					tc.pool.LimitsFor = a.limitsFor
					n := open(t, tc.pool)
					one(t, n)
				})
			}
		})
	}
}

func openTo(host string, want int) func(*testing.T, *testnet) {
	return func(t *testing.T, n *testnet) { require.Equal(t, want, n.openTo(host, 6)) }
}

func idleAt(host string, want int) func(*testing.T, *testnet) {
	return func(t *testing.T, n *testnet) {
		n.idle(at(host), 6)
		n.gauges(0, want, 0)
	}
}

// keptInReserve checks how many connections are idle after one use, and how many outlive
// IdleTimeout.
func keptInReserve(host string, idle, kept int) func(*testing.T, *testnet) {
	return func(t *testing.T, n *testnet) {
		n.use(at(host))
		n.gauges(0, idle, 0)
		n.check()
		time.Sleep(3 * defaultIdleTimeout)
		n.gauges(0, kept, 0)
		n.check()
	}
}

func dialsTo(host string, want int) func(*testing.T, *testnet) {
	return func(t *testing.T, n *testnet) {
		n.Host(host).SetLatency(20 * time.Millisecond)
		for range 6 {
			n.borrow(bg, at(host))
		}
		synctest.Wait()
		require.Equal(t, want, n.p.Stats().Dialing)
		n.check()
	}
}

func waitersOf(host string, want int, text string) func(*testing.T, *testnet) {
	return func(t *testing.T, n *testnet) {
		n.borrow(bg, at(host)).conn()
		n.queue(want, at(host))
		if text == "" {
			return
		}
		e := n.fail(bg, at(host))
		require.ErrorIs(t, e, ErrExhausted)
		require.Equal(t, "MaxWaiters", e.LimitName)
		require.Equal(t, want, e.Limit)
		require.ErrorContains(t, e, text)
		n.check()
	}
}

// ADO-06: what a wait was in vain for names the limit of the address.
func TestAWaitInVainNamesTheLimitOfItsAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		a.set("own", AddrLimits{MaxOpen: 1})
		n := open(t, Config{MaxPerAddr: 3, LimitsFor: a.limitsFor})
		n.borrow(bg, at("own")).conn()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		e := n.fail(ctx, at("own"))
		require.Equal(t, [2]any{1, "MaxPerAddr"}, [2]any{e.Limit, e.LimitName})
		require.ErrorContains(t, e, "1 of 1 in use, 0 waiting; raise the MaxOpen that Config.LimitsFor gives")
		for range 3 {
			n.borrow(bg, at("other")).conn()
		}
		ctx, cancel = context.WithTimeout(bg, time.Second)
		defer cancel()
		e = n.fail(ctx, at("other"))
		require.ErrorContains(t, e, "3 of 3 in use, 0 waiting; raise MaxPerAddr")

		require.ErrorContains(t, n.p.Warm(bg, at("own"), 2), "the MaxOpen that Config.LimitsFor gives allows 1 (warm fewer, or raise it)")
		require.ErrorContains(t, n.p.Warm(bg, at("fourth"), 4), "MaxPerAddr allows 3 (warm fewer, or raise it)")
		n.check()
	})
}

// ADO-06
func TestLimitsForIsAskedWhenTheBooksAreMadeAndAfterSetLimits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		n := open(t, Config{LimitsFor: a.limitsFor, IdleTimeout: time.Second, SweepInterval: time.Second})
		for range 5 {
			n.use(at("a"))
		}
		require.NoError(t, n.p.Warm(bg, at("a"), 2))
		require.Equal(t, 1, a.times(at("a")))
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Zero(t, n.p.Stats().Addrs, "the pool has forgotten the address")
		n.use(at("a"))
		require.Equal(t, 2, a.times(at("a")))
		n.change(func(*Limits) {})
		require.Equal(t, 3, a.times(at("a")), "SetLimits has asked")
		n.use(at("a"))
		require.Equal(t, 3, a.times(at("a")))
		require.NoError(t, n.p.Warm(bg, at("b"), 1))
		n.use(at("b"))
		require.Equal(t, 1, a.times(at("b")))

		n.fail(bg, Addr{Transport: "nobody's", Host: "x"})
		require.Len(t, a.asked, 2, "nothing is asked for an address that cannot be dialled")
		_, err := n.p.DialContext(bg, "tcp", "127.0.0.1:1")
		require.Error(t, err)
		require.Len(t, a.asked, 2, "nor for DialContext")
	})
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		dialers := map[Transport]DialFunc{TCP: newTestnet(t).dial}
		n := open(t, Config{LimitsFor: a.limitsFor, Dialers: dialers})
		n.use(Addr{Transport: TCP, Host: "HOST.", Port: 1})
		require.Equal(t, map[Addr]int{{Transport: TCP, Host: "host", Port: 1}: 1}, a.asked, "with the canonical address")
	})
}

// ADO-06: an answer that is lower closes idle connections without a borrower; one that is
// higher lets borrowers go on.
func TestSetLimitsAppliesNewAnswersAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		a.set("a", AddrLimits{MaxOpen: 4})
		n := open(t, Config{LimitsFor: a.limitsFor})
		n.Host("a").Serve(echoLines)
		n.idle(at("a"), 4)
		n.idle(at("b"), 4)
		holder := n.borrow(bg, at("a"))
		holder.conn()
		a.change(n, "a", AddrLimits{MaxOpen: 2})
		n.gauges(1, 5, 0)
		require.Len(t, n.Host("a").Conns(), 2)
		a.change(n, "a", AddrLimits{MaxIdle: -1})
		n.gauges(1, 4, 0)
		n.closed(reasons{ClosedSurplus: 3})
		_, err := askLine(holder.conn(), "still mine")
		require.NoError(t, err)

		a.change(n, "a", AddrLimits{MaxOpen: 1})
		waiters := n.queue(3, at("a"))
		a.change(n, "a", AddrLimits{MaxOpen: 3})
		require.Equal(t, []bool{true, true, false}, []bool{waiters[0].holds(), waiters[1].holds(), waiters[2].holds()})
		require.NoError(t, holder.giveBack())
		for _, w := range waiters {
			w.conn()
			require.NoError(t, w.giveBack())
		}

		a.change(n, "b", AddrLimits{MinIdle: 6})
		n.use(at("b"))
		synctest.Wait()
		require.GreaterOrEqual(t, len(n.Host("b").Conns()), 6)
		a.change(n, "b", AddrLimits{MinIdle: -1})
		time.Sleep(3 * defaultIdleTimeout)
		synctest.Wait()
		require.Zero(t, n.p.Stats().Addrs, "a reserve that is no more keeps no address")
	})
}

// ADO-06: where LimitsFor has set nothing, SetLimits changes the limit of the address, also
// if LimitsFor fails.
func TestSetLimitsChangesWhatLimitsForLeftOpen(t *testing.T) {
	for _, err := range []error{nil, errBoom} {
		bubble(t, func(t *testing.T) {
			a := new(ownAnswers)
			a.set("a", AddrLimits{MaxOpen: 4})
			n := open(t, Config{LimitsFor: a.limitsFor})
			n.idle(at("a"), 4)
			a.fails(err, nil)
			n.change(func(l *Limits) { l.MaxIdlePerAddr, l.MaxPerAddr = 2, 3 })
			n.gauges(0, 2, 0)
			n.change(func(l *Limits) { l.MaxIdlePerAddr, l.MaxPerAddr = 0, 1 })
			a.fails(nil, nil)
			require.Equal(t, 4, n.openTo("a", 6))
			require.Equal(t, 1, n.openTo("b", 6))
		})
	}
}

// ADO-06: the new answer may be lower, so nothing is opened under the old one because the
// limits of the pool have risen.
func TestNoLimitOfAnAddressRisesBeforeLimitsForWasAsked(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		n := open(t, Config{LimitsFor: a.limitsFor, MaxPerAddr: 2})
		holders := []*scripted{n.borrow(bg, at("a")), n.borrow(bg, at("a"))}
		holders[0].conn()
		holders[1].conn()
		waiters := n.queue(4, at("a"))
		a.set("a", AddrLimits{MaxOpen: 1})
		n.change(func(l *Limits) { l.MaxPerAddr = 6 })
		require.Equal(t, 2, n.Host("a").Accepts(), "what was open before")
		a.set("a", AddrLimits{})
		a.fails(errBoom, nil)
		n.change(func(l *Limits) { l.MaxPerAddr = 8 })
		require.Equal(t, 2, n.Host("a").Accepts())
		a.fails(nil, nil)
		n.change(func(l *Limits) {})
		require.Equal(t, 6, n.Host("a").Accepts())
		for _, b := range append(holders, waiters...) {
			b.conn()
			require.NoError(t, b.giveBack())
		}
	})
}

// ADO-06: if SetLimits got no answer, a borrower brings it, also for those who wait already.
func TestTheAnswerOfABorrowerLetsThoseBeforeItGoOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		a.set("a", AddrLimits{MaxOpen: 1, MaxWaiters: 3})
		n := open(t, Config{LimitsFor: a.limitsFor})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		waiters := n.queue(3, at("a"))
		a.fails(errBoom, nil)
		a.change(n, "a", AddrLimits{MaxOpen: 3, MaxWaiters: 1})
		n.gauges(1, 0, 3)
		a.fails(nil, nil)
		require.ErrorIs(t, n.fail(bg, at("a")), ErrExhausted, "two may wait without a dial")
		n.gauges(3, 0, 1)
		require.True(t, waiters[0].holds() && waiters[1].holds())
		for _, b := range append(waiters, holder) {
			b.quit()
		}
	})
}

// ADO-06: under MaxIdle, the reserve of an address is filled when the idle connection of
// another address that was in its way is lent.
func TestALoanLeavesRoomForTheReserveOfAnotherAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		a.set("a", AddrLimits{MinIdle: 1})
		n := open(t, Config{LimitsFor: a.limitsFor, MaxIdle: 1})
		n.idle(at("b"), 1)
		holder := n.borrow(bg, at("a"))
		holder.conn()
		n.gauges(1, 1, 0)
		require.Len(t, n.Host("a").Conns(), 1, "there is no room for its reserve")
		other := n.borrow(bg, at("b"))
		other.conn()
		n.gauges(2, 1, 0)
		require.Len(t, n.Host("a").Conns(), 2)
		require.NoError(t, holder.giveBack())
		require.NoError(t, other.giveBack())
	})
}

// ADO-06: a Warm that asks for more than the new answer allows ends.
func TestANewAnswerRefusesAWarm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		n := open(t, Config{LimitsFor: a.limitsFor})
		n.Host("a").BlackHole(true)
		done := make(chan error, 1)
		go func() { done <- n.p.Warm(bg, at("a"), 3) }()
		synctest.Wait()
		a.change(n, "a", AddrLimits{MaxOpen: 2})
		require.ErrorContains(t, <-done, "3 connections can never be kept: the MaxOpen that Config.LimitsFor gives allows 2")
	})
}

// ADO-06
func TestASenselessAnswerIsTheBorrowersError(t *testing.T) {
	handles := int(^uint(0) >> 1)
	for _, tc := range []struct {
		own  AddrLimits
		full FullPolicy
		text string
	}{
		{AddrLimits{MaxOpen: 2, MaxIdle: 3}, FullWait, "MaxIdle 3 and MaxOpen 2: lower MaxIdle, or raise MaxOpen"},
		{AddrLimits{MaxIdle: -1, MinIdle: 1}, FullWait, "MinIdle 1 and a negative MaxIdle, which keeps no connection: leave one of them 0"},
		{AddrLimits{MaxOpen: 2, MinIdle: 2}, FullWait, "MinIdle 2 and MaxOpen 2, but MinIdle is kept beside at least one in use: lower MinIdle, or raise MaxOpen"},
		{AddrLimits{MaxIdle: 2, MinIdle: 3}, FullWait, "MinIdle 3 and MaxIdle 2: lower MinIdle, or raise MaxIdle"},
		{AddrLimits{MinIdle: 1 << 16}, FullWait, "MinIdle 65536 for one address: use 65535 at most"},
		{AddrLimits{MinIdle: 50_000}, FullWait, "MinIdle 50000, but the process's limit on open files has room for"},
		{AddrLimits{MaxWaiters: 1}, FullFail, "MaxWaiters 1, but under Config.WhenFull FullFail nobody waits for a limit: leave MaxWaiters 0"},
	} {
		bubble(t, func(t *testing.T) {
			a := new(ownAnswers)
			a.set("a", tc.own)
			n := open(t, Config{LimitsFor: a.limitsFor, WhenFull: tc.full})
			n.p.handles.Store(1000)
			for range 2 {
				e := n.fail(bg, at("a"))
				require.Equal(t, StageLimits, e.Stage)
				require.Equal(t, KindUsage, e.Kind)
				require.ErrorIs(t, e, fs.ErrInvalid)
				require.True(t, strings.HasPrefix(e.Error(), "connpool: limits mem://a: Config.LimitsFor gave "+tc.text), e.Error())
			}
			err := n.p.Warm(bg, at("a"), 1)
			require.ErrorContains(t, err, tc.text)
			require.Zero(t, n.p.Stats().Addrs, "an address without an answer has no books")
			require.Zero(t, n.p.Stats().Dials)
			n.check()
			n.use(at("b"))
			a.set("a", AddrLimits{})
			n.use(at("a"))
		})
		require.NoError(t, AddrLimits{MaxOpen: math.MaxInt, MaxIdle: math.MaxInt, MaxDialing: math.MaxInt, MaxWaiters: math.MaxInt}.senseless(FullWait, handles))
		require.NoError(t, AddrLimits{MaxOpen: 3, MaxIdle: 3, MinIdle: 2, MaxDialing: 99}.senseless(FullFail, handles))
		require.NoError(t, AddrLimits{MaxOpen: -1, MaxIdle: -1, MinIdle: -1, MaxDialing: -1, MaxWaiters: -1}.senseless(FullFail, handles))
	}
}

// ADO-06: whatever LimitsFor does is the error of the borrower for whom it ran.
func TestWhatLimitsForDoesCostsItsBorrowerOnly(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		do   func(thaw chan struct{}) func(Addr)
		kind Kind
		text string
	}{
		"fails":             {errBoom, nil, KindUnknown, "Config.LimitsFor: boom"},
		"fails with a Keep": {Keep(errBoom), nil, KindUnknown, "Config.LimitsFor: boom"},
		"panics": {nil, func(chan struct{}) func(Addr) { return func(Addr) { panic("no limits here") } },
			KindInternal, "Config.LimitsFor panicked: no limits here"},
		"ends its goroutine": {nil, func(chan struct{}) func(Addr) { return func(Addr) { runtime.Goexit() } },
			KindInternal, "Config.LimitsFor ended its goroutine (runtime.Goexit)"},
		"does not return": {nil, func(thaw chan struct{}) func(Addr) { return func(Addr) { <-thaw } },
			KindTimeout, "Config.LimitsFor did not return"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				thaw := make(chan struct{})
				defer close(thaw)
				var do func(Addr)
				if tc.do != nil {
					do = tc.do(thaw)
				}
				a := new(ownAnswers)
				a.set("a", AddrLimits{MaxOpen: 2})
				n := open(t, Config{LimitsFor: a.limitsFor, MaxOpen: 4})
				fails := func() {
					t.Helper()
					a.fails(tc.err, do)
					began := time.Now()
					e := n.fail(bg, at("a"))
					require.LessOrEqual(t, time.Since(began), foreignPatience)
					require.Equal(t, StageLimits, e.Stage)
					require.Equal(t, tc.kind, e.Kind)
					require.ErrorContains(t, e, tc.text)
					require.ErrorContains(t, n.p.Warm(bg, at("a"), 1), tc.text)
					if tc.err != nil {
						require.ErrorIs(t, e, errBoom)
						require.False(t, isKept(e))
					}
					n.check()
					a.fails(nil, nil)
				}
				fails()
				require.Zero(t, n.p.Stats().Open)
				n.idle(at("a"), 2)
				a.fails(tc.err, do)
				n.change(func(l *Limits) { l.MaxIdle = 1 })
				n.gauges(0, 1, 0)
				fails()
				n.gauges(0, 1, 0) // it lost no connection
				require.Equal(t, 2, n.openTo("a", 4), "the pool goes on")
				require.Equal(t, 4, n.openTo("b", 4))
			})
		})
	}
}

// ADO-06: an answer from before the last SetLimits does not count.
func TestAnAnswerFromBeforeSetLimitsIsNotUsed(t *testing.T) {
	for _, known := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			a := new(ownAnswers)
			a.set("a", AddrLimits{MaxOpen: 4})
			n := open(t, Config{LimitsFor: a.limitsFor})
			if known {
				n.use(at("a"))
				a.fails(errBoom, nil) // SetLimits gets no answer, so the borrower has to ask
				n.change(func(*Limits) {})
			}
			asked := a.times(at("a"))
			a.fails(nil, func(Addr) { time.Sleep(100 * time.Millisecond) })
			slow := n.borrow(bg, at("a"))
			time.Sleep(50 * time.Millisecond)
			a.set("a", AddrLimits{MaxOpen: 1})
			a.fails(nil, nil)
			n.change(func(*Limits) {})
			slow.conn()
			require.GreaterOrEqual(t, a.times(at("a")), asked+2, "the borrower or SetLimits has asked again")
			require.Equal(t, 1, n.p.limitsAt(n.p.sites.find(at("a"))).MaxOpen)
			require.NoError(t, slow.giveBack())
			require.Equal(t, 1, n.openTo("a", 3))
		})
	}
}

// ADO-06: an old answer that comes late does not replace a new one.
func TestALateAnswerReplacesNoNewerOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := new(ownAnswers)
		a.set("a", AddrLimits{MaxOpen: 4})
		n := open(t, Config{LimitsFor: a.limitsFor})
		slow := make(chan struct{})
		a.fails(nil, func(Addr) { <-slow })
		late := n.borrow(bg, at("a"))
		synctest.Wait()
		a.set("a", AddrLimits{MaxOpen: 1})
		a.fails(nil, nil)
		n.change(func(*Limits) {})
		holder := n.borrow(bg, at("a"))
		holder.conn()
		asked := a.times(at("a"))
		close(slow)
		synctest.Wait()
		require.True(t, late.waits(), "the old answer would let it dial")
		require.NoError(t, holder.giveBack())
		late.conn()
		require.NoError(t, late.giveBack())
		require.Equal(t, asked, a.times(at("a")), "the books have the newest answer")
		require.Equal(t, 1, n.openTo("a", 3))
	})
}

// ADO-06: LimitsFor may use the pool; if it calls SetLimits each time, that ends.
func TestALimitsForThatUsesThePoolComesToAnEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var n *testnet
		var calls atomic.Int32
		n = open(t, Config{LimitsFor: func(addr Addr) (AddrLimits, error) {
			calls.Add(1)
			for range n.p.Addrs() {
				n.p.Stats()
			}
			n.p.Retire(addr)
			n.p.CloseIdle()
			return AddrLimits{MaxOpen: 2}, n.p.SetLimits(n.p.Limits())
		}})
		require.Equal(t, 2, n.openTo("a", 4))
		require.Less(t, calls.Load(), int32(100))
		require.NoError(t, n.p.SetLimits(n.p.Limits()))
		n.check()
	})
}

// ADO-06: SetLimits asks for a second at most, and borrowers go on meanwhile.
func TestSetLimitsDoesNotAskForEver(t *testing.T) {
	for name, tc := range map[string]struct {
		pause, bound time.Duration
		most         int
	}{
		"slow":               {20 * time.Millisecond, askPatience + 20*time.Millisecond, 51},
		"does not return":    {time.Hour, foreignPatience, 1},
		"as quick as can be": {0, 0, 1000},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				a := new(ownAnswers)
				n := open(t, Config{LimitsFor: a.limitsFor, IdleTimeout: -1, SweepInterval: -1})
				for i := range 300 {
					n.use(at(fmt.Sprint("h", i)))
				}
				before, all := 300, 0
				a.fails(nil, func(Addr) { time.Sleep(tc.pause) })
				began := time.Now()
				require.NoError(t, n.p.SetLimits(Limits{MaxIdle: 200}))
				require.LessOrEqual(t, time.Since(began), tc.bound)
				a.mu.Lock()
				for _, k := range a.asked {
					all += k
				}
				a.mu.Unlock()
				require.LessOrEqual(t, all-before, min(tc.most, 200))
				if tc.pause == 0 {
					require.Equal(t, 200, all-before)
				}
				require.Positive(t, all-before)
				n.gauges(0, 200, 0)
				a.fails(nil, nil)
				if tc.pause == time.Hour {
					time.Sleep(2 * tc.pause)
				}
				for addr := range n.p.Addrs() {
					n.use(addr)
				}
				n.gauges(0, 200, 0)
			})
		})
	}
}

// A borrow that finds its address pays nothing for LimitsFor, and a pool without it nothing at all.
func TestALoanWithLimitsForAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	a := new(ownAnswers)
	n := open(t, Config{LimitsFor: a.limitsFor})
	addr := at("a")
	n.use(addr)
	fn := func(Conn) error { return nil }
	require.Zero(t, patience.Allocs(100, func() { n.p.With(bg, addr, fn) }))
	require.Equal(t, 1, a.times(addr))
}

// ADO-06: answers change while everything else goes on.
func TestStressAnswersOfLimitsForChangeUnderTraffic(t *testing.T) {
	var turn atomic.Int64
	n := open(t, Config{MaxOpen: 6, LimitsFor: func(Addr) (AddrLimits, error) {
		switch k := turn.Add(1); k % 7 {
		case 0:
			return AddrLimits{}, errBoom
		case 1:
			panic("no limits")
		case 2:
			return AddrLimits{MaxOpen: 1, MinIdle: 1}, nil
		default:
			return AddrLimits{MaxOpen: int(k%5) - 1, MaxIdle: int(k%3) - 1}, nil
		}
	}})
	var wg, mover tasks.Group
	stop := make(chan struct{})
	mover.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				n.p.SetLimits(n.p.Limits())
			}
		}
	})
	for w := range 8 {
		wg.Go(func() {
			for i := range 200 {
				err := n.p.With(bg, at(fmt.Sprint("h", (w+i)%3)), func(Conn) error { return nil })
				var pe *Error
				if err != nil && (!errors.As(err, &pe) || pe.Stage != StageLimits) {
					t.Error(err)
				}
				if err := n.p.inconsistency(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	mover.Wait()
}
