package connpooltest_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpooltest"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/race"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// found is the failure that err is.
func found(t *testing.T, err error) *connpooltest.Failure {
	t.Helper()
	var f *connpooltest.Failure
	require.True(t, errors.As(err, &f), "not found: %v", err)
	return f
}

// executions is how many random scripts a client plays that must pass.
func executions() int {
	n := short.Of(200, 50)
	if race.Enabled {
		n /= 10
	}
	return n * patience.Stress()
}

// ADO-13
func TestTheHarnessFindsTheMistakeOfEachBrokenClient(t *testing.T) {
	for what, b := range broken {
		t.Run(what, func(t *testing.T) {
			f := found(t, b.client().Search(t))
			require.Equal(t, connpooltest.Misdelivered, f.Kind, "%v", f)
			require.Contains(t, f.Text, "reached the wrong borrower")
			require.Equal(t, b.script, f.Script.String(), "%v", f)
			require.Equal(t, 1, f.Step)
			require.NotEqual(t, f.Asked, f.Got)
			require.NotEmpty(t, f.Log)
		})
	}
}

// The scripts with which a search begins are no more than a start.
func TestTheMistakesAreFoundAtRandom(t *testing.T) {
	for what, b := range broken {
		t.Run(what, func(t *testing.T) {
			h := b.client()
			for h.Seed = range 3 {
				f := found(t, connpooltest.SearchAtRandom(h, t))
				require.LessOrEqual(t, len(f.Script), 3, "%v", f)
			}
		})
	}
}

func TestAScriptFailsInTheSameWayEachTime(t *testing.T) {
	for what, b := range broken {
		t.Run(what, func(t *testing.T) {
			script := connpooltest.MustParseScript(b.script)
			first := found(t, b.client().Run(t, script))
			for range 20 {
				again := found(t, b.client().Run(t, script))
				require.Equal(t, []any{first.Kind, first.Step, first.Asked}, []any{again.Kind, again.Step, again.Asked})
			}
		})
	}
}

func TestGoodClientsPass(t *testing.T) {
	for what, client := range goods {
		t.Run(what, func(t *testing.T) {
			h := client()
			var mu sync.Mutex
			closed := make(map[connpool.CloseReason]int)
			reused := 0
			h.Config.Trace = &connpool.Trace{
				Closed: func(c connpool.CloseInfo) {
					mu.Lock()
					defer mu.Unlock()
					closed[c.Reason]++
				},
				GotConn: func(g connpool.GotInfo) {
					mu.Lock()
					defer mu.Unlock()
					if g.Reused {
						reused++
					}
				},
			}
			h.Executions, h.Seed = executions(), 7
			require.NoError(t, h.Search(t))
			t.Log(reused, "loans of a connection lent before;", closed)

			// Was the hazard there?
			require.NotZero(t, reused)
			require.NotZero(t, closed[connpool.ClosedStale])
			require.NotZero(t, closed[connpool.ClosedDirty])
			require.NotZero(t, closed[connpool.ClosedCanceled])
		})
	}
}

func TestTheHarnessWorksOnLoopback(t *testing.T) {
	patience.NothingLeaks(t)
	for what, b := range broken {
		t.Run(what, func(t *testing.T) {
			h := b.client()
			h.Loopback = true
			script := connpooltest.MustParseScript(b.script)
			patience.Soon(t, "the mistake was found", func() bool {
				err := h.Run(nil, script)
				return err != nil && found(t, err).Kind == connpooltest.Misdelivered
			})
		})
	}
	t.Run("good", func(t *testing.T) {
		h := good()
		h.Loopback = true
		for _, text := range []string{"ok cut@3 reset@3 late@3 cancel@3 ok", "ok& hang@0& split@5 drip@2 ok", "extra ok ahead ok wrong ok",
			"ok& ok cutidle unasked ok refuse", "cutidle hangup ok"} {
			require.NoError(t, h.Run(nil, connpooltest.MustParseScript(text)))
		}
	})
	t.Run("a search that shrinks", func(t *testing.T) {
		h := readersBeside()
		h.Loopback, h.Executions = true, -1
		h.Borrowers = 1
		f := found(t, h.Shrink(nil, found(t, h.Run(nil, connpooltest.MustParseScript("cut@2 extra ok ok")))))
		require.Equal(t, "extra ok", f.Script.String())
	})
}

// plain is a harness with a client that only answers.
func plain(exchange connpooltest.Exchange) connpooltest.Harness {
	h := good()
	h.Client = func(*connpool.Pool, connpool.Addr) (connpooltest.Exchange, func()) { return exchange, nil }
	return h
}

func TestEachKindOfFailureIsSeen(t *testing.T) {
	for kind, c := range map[connpooltest.FailureKind]struct {
		h    connpooltest.Harness
		says string
	}{
		connpooltest.Unanswered: {plain(func(context.Context, string) (string, error) { return "", nil }), "without its reply"},
		connpooltest.Unseen:     {plain(func(_ context.Context, token string) (string, error) { return token, nil }), "no request contained"},
		connpooltest.Crashed:    {plain(func(context.Context, string) (string, error) { panic("boom") }), "boom"},
		connpooltest.Stuck: {plain(func(context.Context, string) (string, error) {
			time.Sleep(time.Hour)
			return "", nil
		}), "a minute after the end of its ctx"},
		connpooltest.NotReturned: {leaksALease(), "connections in use: 1"},
		connpooltest.Leaked:      {leaksAGoroutine(), "leaksAGoroutine"},
	} {
		t.Run(kind.String(), func(t *testing.T) {
			f := found(t, c.h.Search(t))
			require.Equal(t, kind, f.Kind, "%v", f)
			require.Contains(t, f.Text, c.says)
			require.Equal(t, "ok", f.Script.String(), "%v", f)
			require.True(t, strings.HasPrefix(f.Error(), "connpooltest: "+f.Text))
		})
	}
	f := found(t, plain(func(context.Context, string) (string, error) {
		runtime.Goexit()
		return "", nil
	}).Run(t, connpooltest.Script{{}}))
	require.Equal(t, connpooltest.Crashed, f.Kind)
	require.Contains(t, f.Text, "ended its goroutine")
}

func leaksALease() connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		var held []*connpool.Lease // and so the garbage collector finds none
		return func(ctx context.Context, _ string) (string, error) {
			lease, err := pool.Lease(ctx, addr)
			if err == nil {
				held = append(held, lease)
			}
			return "", errors.New("gives up")
		}, nil
	}
	return h
}

func leaksAGoroutine() connpooltest.Harness {
	h := good()
	inner := h.Client
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		never := make(chan int)
		go func() { <-never }()
		return inner(pool, addr)
	}
	return h
}

// A client that tells replies by what they say must not take a wrong one.
func TestMatchedAsksForMore(t *testing.T) {
	checks := good()
	inner := checks.Client
	checks.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		ask, end := inner(pool, addr)
		return func(ctx context.Context, key string) (string, error) {
			value, err := ask(ctx, key)
			if err == nil && value != values(key)+"\n" {
				err = errors.New("not my reply")
			}
			return value, err
		}, end
	}
	checks.Matched, checks.Executions = true, executions()
	require.NoError(t, checks.Search(t))

	trusts := good()
	trusts.Matched = true
	f := found(t, trusts.Search(t))
	require.Equal(t, connpooltest.Unanswered, f.Kind)
	require.Equal(t, "wrong", f.Script.String())
}

// A probe is what protects a client that reads no further than its reply: without the
// probe the harness has something to find.
func TestTheHarnessSeesThatTheProbeIsOff(t *testing.T) {
	h := readsByteByByte()
	h.Config.NoProbe = true
	f := found(t, h.Search(t))
	require.Equal(t, "extra ok", f.Script.String())
}

func TestAConfigThatCannotBeUsedIsAnErrorOfItsOwn(t *testing.T) {
	h := good()
	h.Config.MaxOpen, h.Config.MaxPerAddr = 1, 2
	err := h.Search(t)
	require.ErrorContains(t, err, "contradict each other")
	require.False(t, errors.As(err, new(*connpooltest.Failure)))
	require.ErrorContains(t, good().Run(t, make(connpooltest.Script, 1000)), strconv.Itoa(1000))
	require.Panics(t, func() { connpooltest.Harness{}.Run(t, nil) })
}

func TestDesyncPassesAGoodClient(t *testing.T) {
	h := good()
	h.Executions = executions()
	connpooltest.Desync(t, h)
}

// What a run of a target on a broken client ends with, in a process of its own.
func TestAFailedTargetPrintsTheShortestScript(t *testing.T) {
	if os.Getenv("CONNPOOLTEST_CHILD") != "" {
		connpooltest.Desync(t, keepsOnTimeout())
		return
	}
	if !synctest.Available {
		t.Skip("a target plays its scripts in bubbles, which need Go 1.25")
	}
	out, err := child(t, "-test.run=^TestAFailedTargetPrintsTheShortestScript$")
	require.Error(t, err)
	require.Contains(t, out, "a reply reached the wrong borrower: step 1 asked for t001")
	require.Contains(t, out, "script: late@0 ok\n")
	require.Equal(t, 1, strings.Count(out, "script: "), out)
}
