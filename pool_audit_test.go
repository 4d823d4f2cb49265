package connpool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// check fails the test if the books contradict themselves. It may run at any
// moment; the stronger promises of a pool at rest are in checkAtRest.
func (p *Pool) check(t testing.TB) {
	t.Helper()
	if err := p.inconsistency(); err != nil {
		t.Fatal(err)
	}
}

// inconsistency is auditLocked, and what is not started although it could be.
func (p *Pool) inconsistency() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.auditLocked(); err != nil {
		return err
	}
	return p.unstartedLocked()
}

// unstartedLocked says of a reserve or a Warm what could be dialled and is not. A test
// asks it where the last section has given room away; between sections a pool may owe
// such a dial for a while, so the audit does not ask.
func (b *books) unstartedLocked() error {
	for s := range b.sites.all() {
		if x := s.prefill; x != nil && s.n[phaseClosing] == 0 && x.missing != b.missingLocked(s) {
			return fmt.Errorf("%v wants %d spare ones, and should want %d", s.addr, x.missing, b.missingLocked(s))
		}
	}
	if b.n[phaseClosing] > 0 { // the end of a close that takes its time starts what is owed
		return nil
	}
	if b.deficit.Len() == 0 || b.closed || b.want > 0 || b.n.open() >= b.limitLocked() || int(b.n[phaseDialing]) >= b.limits.MaxDialing {
		return nil
	}
	if b.deficit.Front().Value.(*site).warming() != nil || b.spareableLocked() {
		return fmt.Errorf("%d addresses are short, and dials could start", b.deficit.Len())
	}
	return nil
}

// every lists all connections, least recently used first.
func (p *Pool) every() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recency.all()
}

// In debug mode a pool whose books are wrong says so at the next give-back, and
// when it is asked for its Stats. Else nobody looks.
func TestInDebugModeThePoolAuditsItsBooks(t *testing.T) {
	for _, debug := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{Debug: debug})
			p := n.p
			n.idle(at("a"), 1)
			p.mu.Lock()
			p.eager++
			p.mu.Unlock()
			const says = "connpool: the books contradict themselves: 0 wanted by addresses that answer, the pool counts 1"
			for _, use := range []func(){
				func() { p.With(bg, at("a"), func(Conn) error { return nil }) },
				func() { p.Stats() },
			} {
				if debug {
					require.PanicsWithValue(t, says, use)
				} else {
					require.NotPanics(t, use)
				}
			}
			require.ErrorContains(t, p.inconsistency(), "0 wanted")
			p.mu.Lock()
			p.eager--
			p.mu.Unlock()
			n.idle(at("b"), 2)
			n.check()
		})
	}
}

// An audit looks at all the books, so a large pool is audited the more seldom.
func TestALargePoolIsAuditedTheMoreSeldom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 200, MaxIdle: 200, MaxDialing: 200, Debug: true})
		n.idle(at("a"), 100)
		n.p.Stats()
		audits := 0
		for last, k := 0, 0; k < 12; k++ {
			n.use(at("a"))
			n.p.mu.Lock()
			if n.p.auditIn > last {
				audits++
			}
			last = n.p.auditIn
			n.p.mu.Unlock()
		}
		require.Equal(t, 3, audits)
	})
}

// A pool may owe a dial for a reserve between two critical sections. That is no
// contradiction, whoever has made the room for it.
func TestTheAuditAllowsAReserveThatIsOwedADial(t *testing.T) {
	owed := func(t *testing.T, cfg Config) *testnet { // a and b have an idle one each, and c has no room for its own
		cfg.Debug, cfg.MinIdlePerAddr, cfg.MaxIdle, cfg.SweepInterval = true, 1, 2, time.Hour
		n := open(t, cfg)
		n.use(at("a"))
		synctest.Wait()
		n.use(at("b"))
		synctest.Wait()
		n.borrow(bg, at("c")).conn()
		synctest.Wait()
		n.gauges(1, 2, 0)
		return n
	}
	for name, makeRoom := range map[string]func(n *testnet){
		"Retire":    func(n *testnet) { n.p.Retire(at("a")) },
		"CloseIdle": func(n *testnet) { n.p.CloseIdle() },
		"EvictLRU":  func(n *testnet) { n.p.EvictLRU() },
		"lifetime":  func(n *testnet) { time.Sleep(2 * time.Minute); n.p.sweep() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := owed(t, Config{MaxLifetime: time.Minute})
				require.NotPanics(t, func() { makeRoom(n); n.p.Stats() })
				synctest.Wait()
				n.check()
			})
		})
	}
	t.Run("Check", func(t *testing.T) { // of a connection that nobody has had yet
		bubble(t, func(t *testing.T) {
			var n *testnet
			checked := 0
			n = open(t, Config{Debug: true, MinIdlePerAddr: 1, MaxIdle: 1, SweepInterval: time.Hour, CheckAfterIdle: time.Hour, Check: func(context.Context, Conn) error {
				checked++
				require.NotPanics(t, func() { n.p.Stats() })
				return nil
			}})
			n.Host("a").SetLatency(time.Second)
			ctx, cancel := context.WithTimeout(bg, time.Millisecond)
			defer cancel()
			n.fail(ctx, at("a"))
			time.Sleep(2 * time.Second)
			b := n.borrow(bg, at("b"))
			b.conn()
			synctest.Wait()
			sweepAll(n.p)
			synctest.Wait()
			require.Equal(t, 1, checked)
			require.NoError(t, b.giveBack())
		})
	})
	t.Run("more handles", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			limit := 4
			sys := realSystem
			sys.handleLimit = func() (int, bool) { return limit, true }
			n := open(t, Config{Debug: true, MinIdlePerAddr: 1})
			n.p.sys = &sys
			n.p.handles.refresh(&sys)
			a, b := n.borrow(bg, at("a")), n.borrow(bg, at("b"))
			a.conn()
			b.conn()
			synctest.Wait()
			limit = 8
			n.p.handles.refresh(&sys)
			require.NotPanics(t, func() { n.p.Stats() })
			require.NoError(t, a.giveBack())
			require.NoError(t, b.giveBack())
			n.check()
		})
	})
}

// An address whose only dial was broken off for another one is not silent: it has no
// dial that could be.
func TestAnAddressWithoutADialIsNotSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Debug: true, MaxOpen: 1})
		n.Host("a").BlackHole(true)
		ctx, cancel := context.WithCancel(bg)
		warmed := make(chan error, 1)
		go func() { warmed <- n.p.Warm(ctx, at("a"), 1) }()
		time.Sleep(2 * silence)
		synctest.Wait()
		require.NotPanics(t, func() { n.use(at("b")) })
		n.check()
		cancel()
		require.Error(t, <-warmed)
	})
}

// What Push has is counted before Push runs, so that a full reserve wants no other.
func TestAConnectionInPushCountsForItsReserveAtOnce(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	seen := make(chan error, 1)
	var p *Pool
	p = n.pool(t, func(c *Config) {
		c.MinIdlePerAddr, c.MaxOpen, c.SweepInterval = 1, 2, sweepWhereNothingListens
		c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
		c.Push = func(_ context.Context, c Conn) error {
			err := p.inconsistency()
			_, e := State[*bufio.Reader](c).ReadString('\n')
			seen <- errors.Join(err, e)
			return e
		}
	})
	other := hold(t, p, scoped(n.addr, "other")) // with which the pool is full
	require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
		if _, err := c.Write([]byte("left\n")); err != nil {
			return err
		}
		_, err := State[*bufio.Reader](c).ReadByte() // of a reply
		return err
	}))
	require.NoError(t, inTime(t, seen))
	require.NoError(t, other.end(nil))
	p.check(t)
}
