package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// BETA-13
func TestHooksOfOneUseAddToThePools(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var order []string
		told := func(who string) *Trace {
			return &Trace{DialDone: func(i DialInfo) { order = append(order, who+" "+KindOf(i.Err).String()) }}
		}
		n := open(t, Config{Trace: told("pool")})
		n.Host("a").Down()
		ctx := WithTrace(bg, told("outer"))
		fail := func(ctx context.Context) []string {
			order = nil
			require.Equal(t, KindRefused, n.fail(ctx, at("a")).Kind)
			synctest.Wait()
			return order
		}
		require.Equal(t, []string{"pool refused", "outer refused", "use refused"}, fail(WithTrace(ctx, told("use"))))
		require.Equal(t, []string{"pool refused", "outer refused"}, fail(ctx))
		require.Equal(t, []string{"pool refused"}, fail(bg), "the next use is not affected")
	})
}

// BETA-X07: of those that decide, the one given closest to the use decides; of
// those that observe, all see it.
func TestTheHookClosestToTheUseDecides(t *testing.T) {
	exhausted := &net.OpError{Op: "dial", Net: "mem", Err: syscall.EMFILE}
	for name, c := range map[string]struct {
		pool, outer, inner string // "": not given
		asked              []string
		works              bool
	}{
		"none":                  {"", "", "", nil, false},
		"the pool's":            {"yes", "", "", []string{"pool"}, true},
		"the ctx's alone":       {"", "yes", "", []string{"outer"}, true},
		"the ctx's, no":         {"yes", "no", "", []string{"outer"}, false},
		"the inner one's":       {"no", "no", "yes", []string{"inner"}, true},
		"the inner one's, no":   {"yes", "yes", "no", []string{"inner"}, false},
		"the inner one is nil":  {"yes", "yes", "nil", nil, false},
		"the ctx's after a nil": {"yes", "nil", "yes", []string{"inner"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var asked []string
				decide := func(who, answer string) func(*Error) bool {
					if answer == "nil" {
						return nil
					}
					return func(e *Error) bool {
						asked = append(asked, who)
						require.ErrorIs(t, e, ErrNoneRemovable)
						return answer == "yes"
					}
				}
				cfg := Config{}
				if c.pool != "" {
					cfg.NoneRemovable = decide("pool", c.pool)
				}
				n := open(t, cfg)
				ctx := bg
				if c.outer != "" {
					ctx = WithNoneRemovable(ctx, decide("outer", c.outer))
				}
				if c.inner != "" {
					ctx = WithNoneRemovable(ctx, decide("inner", c.inner))
				}
				// Once at first, and for as long as the pool waits for a handle.
				fails := 0
				n.p.cfg.Dialers[memory] = func(ctx context.Context, a Addr) (net.Conn, error) {
					if fails++; len(asked) == 0 {
						return nil, exhausted
					}
					return n.dial(ctx, a)
				}
				err := n.p.With(ctx, at("a"), func(Conn) error { return nil })
				require.Equal(t, c.asked, asked)
				require.Greater(t, fails, 0)
				if c.works {
					require.NoError(t, err)
				} else {
					require.ErrorIs(t, err, ErrNoneRemovable)
				}
				n.check()
			})
		})
	}
}

// ORA-24
func TestASmallFixedLimitWithWaiting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 3})
		var busy []*scripted
		for range 3 {
			b := n.borrow(bg, at("a"))
			b.conn()
			busy = append(busy, b)
		}
		fourth := n.queue(1, at("a"))[0]
		n.gauges(3, 0, 1)
		require.NoError(t, busy[1].giveBack())
		require.Equal(t, busy[1].name, who(fourth.conn()), "the first that comes back")
		n.gauges(3, 0, 0)
		for _, b := range []*scripted{busy[0], busy[2], fourth} {
			require.NoError(t, b.giveBack())
		}
		require.EqualValues(t, 3, n.p.Stats().Dials)
		n.check()
	})
}

// ORA-35
func TestThePolicyDecidesWhatTheFourthOfThreeMeets(t *testing.T) {
	for policy, after := range map[FullPolicy]reasons{FullWait: {}, FullFail: {}, FullOverflow: {ClosedSurplus: 1}} {
		for name, borrow := range map[string]func(*testnet, context.Context) (func() error, error){
			"With": func(n *testnet, ctx context.Context) (func() error, error) {
				b := n.borrow(ctx, at("a"))
				select {
				case c := <-b.got:
					b.got <- c
					return b.giveBack, nil
				case <-b.done:
					return nil, b.err
				}
			},
			"Lease": func(n *testnet, ctx context.Context) (func() error, error) {
				l, err := n.p.Lease(ctx, at("a"))
				if err != nil {
					return nil, err
				}
				return l.Return, nil
			},
			"session": func(n *testnet, ctx context.Context) (func() error, error) {
				ctx, end := n.session(ctx)
				return func() error { end(); return nil }, n.p.With(ctx, at("a"), func(Conn) error { return nil })
			},
		} {
			t.Run(policy.String()+"/"+name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := open(t, Config{MaxPerAddr: 3, WhenFull: policy})
					var back []func() error
					for range 3 {
						giveBack, err := borrow(n, bg)
						require.NoError(t, err)
						back = append(back, giveBack)
					}
					start := time.Now()
					first := back[0]
					time.AfterFunc(time.Second, func() { first() })
					giveBack, err := borrow(n, bg)
					switch policy {
					case FullWait:
						require.NoError(t, err)
						require.Equal(t, time.Second, time.Since(start))
						n.gauges(3, 0, 0)
					case FullFail:
						require.ErrorIs(t, err, ErrExhausted)
						require.Equal(t, time.Duration(0), time.Since(start))
					case FullOverflow:
						require.NoError(t, err)
						require.Equal(t, time.Duration(0), time.Since(start))
						n.gauges(4, 0, 0)
					}
					if err == nil {
						back = append(back, giveBack)
					}
					time.Sleep(time.Second)
					for _, giveBack := range back[1:] {
						require.NoError(t, giveBack())
					}
					synctest.Wait()
					n.gauges(0, 3, 0)
					n.closed(after)
					n.check()
				})
			})
		}
	}
}

// ORA-34: for each connection: opened, then borrowed and kept in turn, until a
// last event that says how it left.
func TestTheLifeOfEachConnectionCanBeFollowed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex
		lives := make(map[uint64][]string)
		note := func(id uint64, what string) {
			mu.Lock()
			defer mu.Unlock()
			lives[id] = append(lives[id], what)
		}
		n := open(t, Config{MaxOpen: 3, MaxUses: 7, Trace: &Trace{
			DialDone: func(i DialInfo) { note(i.ID, "new") },
			GotConn:  func(i GotInfo) { note(i.ID, "borrow") },
			PutConn:  func(i PutInfo) { note(i.ID, "return") },
			Detached: func(i PutInfo) { note(i.ID, "detached") },
			Closed:   func(i CloseInfo) { note(i.ID, "close("+i.Reason.String()+")") },
		}})
		n.Host("a").Serve(echoLines)
		n.Host("b").Serve(echoLines)
		fns := []func(Conn) error{
			func(Conn) error { return nil }, func(c Conn) error { _, err := askLine(c, "x"); return err },
			func(Conn) error { return Keep(errBoom) }, discard, func(Conn) error { panic(errBoom) },
			func(Conn) error { runtime.Goexit(); return nil }, Conn.Close, Conn.CloseWrite,
			func(c Conn) error { nc, err := c.Detach(); n.t.Cleanup(func() { nc.Close() }); return err },
		}
		addrs := []Addr{at("a"), at("b")}
		for i := range 300 {
			addr, fn := addrs[i%2], fns[i/3%len(fns)]
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer func() { recover() }()
				switch i % 3 {
				case 0:
					n.p.With(bg, addr, fn)
				case 1:
					l, err := n.p.Lease(bg, addr)
					if err != nil {
						panic(err)
					}
					defer l.Return()
					l.Do(bg, fn)
				case 2:
					ctx, end := n.p.Session(bg)
					defer end()
					n.p.With(ctx, addr, func(Conn) error { return nil })
					n.p.With(ctx, addr, func(c Conn) error { return n.p.With(ctx, addr, fn) })
				}
			}()
			<-done
			synctest.Wait()
			n.check()
		}
		l := n.lease(at("a"))
		forget(l)
		require.NoError(t, n.p.Close())
		synctest.Wait()
		require.EqualValues(t, n.p.Stats().Dials, len(lives))
		for id, life := range lives {
			story := strings.Join(life, " ")
			require.NoError(t, wellFormed(life), "connection %d: %s", id, story)
		}
	})
}

func wellFormed(life []string) error {
	// The dial tells of itself on its own goroutine, when it has delivered.
	opening := slices.Index(life, "new")
	if opening < 0 {
		return errors.New("its opening is missing")
	}
	life = slices.Delete(slices.Clone(life), opening, opening+1)
	out, over := false, false
	for _, e := range life {
		switch {
		case over:
			return fmt.Errorf("%s after its end", e)
		case e == "new":
			return errors.New("opened twice")
		case e == "borrow":
			if out {
				return errors.New("borrowed while it was out")
			}
			out = true
		case e == "return":
			if !out {
				return errors.New("returned, but not borrowed")
			}
			out = false
		case e == "detached" && !out:
			return errors.New("detached by nobody")
		default:
			over = true
		}
	}
	if !over {
		return errors.New("its end is missing")
	}
	return nil
}

// USE-03: observers that do nothing cost a loan no allocation, also two of them.
func TestALoanThatIsObservedAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a sync.Pool forgets at random")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	var got, put, inCtx atomic.Int64
	watch := &Trace{GotConn: func(GotInfo) { got.Add(1) }, PutConn: func(PutInfo) { put.Add(1) }}
	ctx := WithTrace(context.Background(), &Trace{GotConn: func(GotInfo) { inCtx.Add(1) }})
	for name, c := range map[string]struct {
		pools *Trace
		ctx   context.Context
	}{
		"the pool's": {watch, context.Background()}, "the ctx's": {nil, ctx}, "both": {watch, ctx},
	} {
		p := n.pool(t, func(cfg *Config) { cfg.Trace = c.pools })
		loan(t, p, n.addr)
		before, runs := [2]int64{got.Load() + put.Load(), inCtx.Load()}, int64(0)
		require.Zero(t, patience.Allocs(100, func() {
			runs++
			if err := p.With(c.ctx, n.addr, func(Conn) error { return nil }); err != nil {
				t.Error(err)
			}
		}), name)
		if c.pools != nil {
			require.Equal(t, before[0]+2*runs, got.Load()+put.Load(), name)
		}
		if c.ctx == ctx {
			require.Equal(t, before[1]+runs, inCtx.Load(), name)
		}
	}
}

func TestTwoCtxsAreObservedByTheirOwnTraces(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var told []string
		tell := func(who string) *Trace {
			return &Trace{GotConn: func(GotInfo) { told = append(told, who) }}
		}
		n := open(t, Config{Trace: tell("pool")})
		one, two := WithTrace(bg, tell("one")), WithTrace(bg, tell("two"))
		for _, ctx := range []context.Context{one, two, bg, one} {
			require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { return nil }))
		}
		require.Equal(t, strings.Fields("pool one pool two pool pool one"), told)
	})
}
