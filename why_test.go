package connpool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What the error of a wait tells.

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(bg, d)
	t.Cleanup(cancel)
	return ctx
}

// TRY-36: while an address backs off, each of its errors has the cause in it.
func TestAWaitInBackOffNamesTheLastDialsError(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.Host("a").Down()
		waits := 0
		for range 40 {
			pe := n.fail(deadline(t, 20*time.Millisecond), at("a"))
			require.ErrorIs(t, pe, syscall.ECONNREFUSED)
			require.ErrorContains(t, pe, "connection refused")
			if pe.Stage == StageWait {
				waits++
				require.ErrorIs(t, pe, context.DeadlineExceeded)
				require.Equal(t, KindTimeout, pe.Kind, "what the last dial said is no kind of this error")
				require.Equal(t, KindTimeout, KindOf(pe.Err))
				require.True(t, pe.Timeout())
				require.ErrorContains(t, pe, "the next dial is not due after")
			}
		}
		require.Greater(t, waits, 5)
		err := n.p.Warm(deadline(t, 20*time.Millisecond), at("a"), 2)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	})
}

// TRY-36: a dial under way is told with its stage and age.
func TestAWaitForADialSaysHowFarItIs(t *testing.T) {
	slow := func(ctx context.Context, _ Addr, _ net.Conn) (any, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Setup: slow})
		n.Host("hole").BlackHole(true)
		for host, stage := range map[string]string{"hole": "(dial)", "a": "(setup)"} {
			pe := n.fail(deadline(t, 200*time.Millisecond), at(host))
			require.ErrorContains(t, pe, "a dial has been under way for 200ms "+stage)
			pe = n.fail(deadline(t, 200*time.Millisecond), at(host))
			require.ErrorContains(t, pe, "a dial has been under way for ")
			err := n.p.Warm(deadline(t, 200*time.Millisecond), at(host), 3)
			require.ErrorContains(t, err, "a dial has been under way for ")
		}
	})
	bubble(t, func(t *testing.T) { // the one before failed, this one hangs
		n := open(t, Config{})
		n.Host("a").Down()
		require.Equal(t, StageDial, n.fail(bg, at("a")).Stage)
		n.Host("a").Up()
		n.Host("a").BlackHole(true)
		pe := n.fail(deadline(t, time.Second), at("a"))
		require.ErrorIs(t, pe, syscall.ECONNREFUSED)
		require.ErrorContains(t, pe, "a dial has been under way for 1s (dial); the previous dial failed: ")
	})
}

// TRY-36: a limit is told with what fills it: for how long, and, where that is
// written down, by whom.
func TestAWaitForALimitSaysWhoHoldsIt(t *testing.T) {
	for name, c := range map[string]struct {
		cfg   Config
		limit string
		place bool
	}{
		"MaxPerAddr":             {Config{MaxPerAddr: 2}, "MaxPerAddr", false},
		"MaxPerAddr, HoldWarn":   {Config{MaxPerAddr: 2, HoldWarn: time.Millisecond}, "MaxPerAddr", true}, // also when it has been reported
		"MaxPerAddr, Debug":      {Config{MaxPerAddr: 2, Debug: true}, "MaxPerAddr", true},
		"MaxOpen":                {Config{MaxOpen: 2}, "MaxOpen", false},
		"MaxOpen, HoldWarn":      {Config{MaxOpen: 2, HoldWarn: time.Hour}, "MaxOpen", true},
		"MaxOpen, canceled wait": {Config{MaxOpen: 2}, "MaxOpen", false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, c.cfg)
				n.borrow(bg, at("a")).conn()
				time.Sleep(time.Second)
				n.borrow(bg, at("a")).conn()
				ctx, cancel := context.WithCancel(deadline(t, 2*time.Second))
				if strings.HasSuffix(name, "canceled wait") {
					time.AfterFunc(2*time.Second-1, cancel)
				}
				defer cancel()
				pe := n.fail(ctx, at("a"))
				require.Equal(t, c.limit, pe.LimitName)
				require.ErrorContains(t, pe, "the longest loan has lasted 3s")
				require.Equal(t, c.place, strings.Contains(pe.Error(), "testnet_test.go:"), "%v", pe)
				require.Equal(t, pe.Kind == KindTimeout, strings.Contains(pe.Error(), "give ctx longer"), "%v", pe)
				require.NotContains(t, pe.Error(), "Session")
			})
		})
	}
	bubble(t, func(t *testing.T) { // a lease is always written down
		n := open(t, Config{MaxPerAddr: 1})
		l := n.lease(at("a"))
		pe := n.fail(deadline(t, time.Second), at("a"))
		require.ErrorContains(t, pe, "lease_test.go:")
		require.NoError(t, l.Return())
	})
	bubble(t, func(t *testing.T) { // dials fill a limit, too
		n := open(t, Config{MaxDialing: 2, MaxDialingPerAddr: 1})
		n.Host("a").BlackHole(true)
		n.Host("b").BlackHole(true)
		first, second := n.borrow(deadline(t, time.Minute), at("a")), n.borrow(deadline(t, time.Minute), at("b"))
		synctest.Wait()
		pe := n.fail(deadline(t, time.Second), at("a"))
		require.Equal(t, "MaxDialingPerAddr", pe.LimitName)
		require.ErrorContains(t, pe, "(1 dials of 1 under way, 1 waiting; raise MaxDialingPerAddr")
		require.ErrorContains(t, pe, "a dial has been under way for")
		pe = n.fail(deadline(t, time.Second), at("c"))
		require.Equal(t, "MaxDialing", pe.LimitName)
		require.Error(t, first.result())
		require.Error(t, second.result())
	})
}

// TRY-36: whoever waits for what his own goroutine holds is told of Session.
func TestAWithInsideAWithThatWaitsForItIsToldOfSession(t *testing.T) {
	for _, cfg := range []Config{{MaxPerAddr: 1}, {MaxOpen: 1}} {
		bubble(t, func(t *testing.T) {
			n := open(t, cfg)
			ctx := deadline(t, time.Second)
			err := n.p.With(ctx, at("a"), func(Conn) error { return n.p.With(ctx, at("a"), nil2) })
			require.ErrorContains(t, err, "Session")
			require.NoError(t, n.p.With(bg, at("a"), func(Conn) error {
				other := n.borrow(deadline(t, time.Second), at("a")) // another goroutine is not inside
				require.Error(t, other.result())
				require.NotContains(t, other.err.Error(), "Session")
				return nil
			}))
		})
	}
}

// TRY-36: the advice fits the cause.
func TestTheAdviceFitsTheCause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1, WhenFull: FullFail})
		require.NoError(t, n.p.With(bg, at("a"), func(Conn) error {
			pe := n.fail(bg, at("a"))
			require.ErrorIs(t, pe, ErrExhausted)
			require.NotContains(t, pe.Error(), "ctx", "nobody waits under Fail")
			require.ErrorContains(t, pe, "(1 of 1 in use, 0 waiting; raise MaxPerAddr")
			return nil
		}))
	})
	bubble(t, func(t *testing.T) { // who comes with a ctx that is done has not met the limit
		n := open(t, Config{MaxPerAddr: 1})
		n.borrow(bg, at("a")).conn()
		ctx, cancel := context.WithCancel(bg)
		cancel()
		pe := n.fail(ctx, at("a"))
		require.Equal(t, "connpool: wait mem://a: context canceled", pe.Error())
		require.EqualError(t, n.p.Warm(ctx, at("a"), 1), pe.Error())
	})
	require.NotContains(t, ErrNoneRemovable.Error(), "in use")
	none := &Error{Stage: StageDial, Err: &noHandle{syscall.EMFILE}, elsewhere: true}
	require.ErrorContains(t, none, "none of them is the pool's")
	require.NotContains(t, none.Error(), "lower MaxOpen")
}

// TRY-36: with no handle to be had and nothing open, nobody is told that the pool
// has them.
func TestHandlesThatOthersHaveAreNotThePools(t *testing.T) {
	bubble(t, func(t *testing.T) {
		full := true
		n := newTestnet(t)
		n.open(Config{Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
			if full {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.EMFILE}
			}
			return n.dial(ctx, a)
		}}})
		own := *n.p.sys
		own.noHandleFree = func() bool { return full }
		n.p.sys = &own
		pe := n.fail(bg, at("a"))
		require.ErrorIs(t, pe, ErrNoneRemovable)
		require.ErrorContains(t, pe, "none of them is the pool's")
		full = false
		b := n.borrow(bg, at("a"))
		b.conn()
		full = true
		pe = n.fail(bg, at("a"))
		require.ErrorIs(t, pe, ErrNoneRemovable)
		require.ErrorContains(t, pe, "lower MaxOpen")
		require.NoError(t, b.giveBack())
	})
}

type twoLines struct{}

func (twoLines) Error() string { return "one\r\n  two\nthree" }

// TRY-36: a message is one line, whatever goes into it.
func TestEveryMessageIsOneLine(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		fail := error(twoLines{})
		var mu sync.Mutex // guards closed
		var closed error
		n.open(Config{MaxPerAddr: 1,
			Setup: func(_ context.Context, a Addr, _ net.Conn) (any, error) {
				if a == at("panics") {
					panic("one\ntwo")
				}
				return nil, nil
			},
			Reset: func(context.Context, Conn) error { return errors.Join(errBoom, fail) },
			Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
				if a == at("fails") {
					return nil, errors.Join(fail, errBoom)
				}
				if a == at("handles") {
					return nil, fmt.Errorf("%w\nand more", syscall.EMFILE)
				}
				return n.dial(ctx, a)
			}},
			Trace: &Trace{Closed: func(i CloseInfo) { // several at a time
				mu.Lock()
				defer mu.Unlock()
				closed = cmp.Or(i.Err, closed)
			}},
		})
		cause, cancel := context.WithCancelCause(bg)
		cancel(fail)
		late, stop := context.WithTimeoutCause(bg, time.Second, errors.Join(errBoom, fail))
		defer stop()
		var read error
		errs := map[string]func() error{
			"a cause":  func() error { return n.fail(cause, at("a")) },
			"a dial":   func() error { return n.fail(bg, at("fails")) },
			"a panic":  func() error { return n.fail(bg, at("panics")) },
			"handles":  func() error { return n.fail(bg, at("handles")) },
			"back-off": func() error { n.fail(bg, at("fails")); n.fail(bg, at("fails")); return n.fail(late, at("fails")) },
			"a wait": func() error {
				n.p.With(late, at("a"), func(c Conn) error { _, read = c.Read(make([]byte, 1)); return read })
				return read
			},
			"closed": func() error {
				n.p.With(bg, at("b"), nil2)
				synctest.Wait()
				mu.Lock()
				defer mu.Unlock()
				return closed
			},
			"last": func() error {
				var last error
				for a, st := range n.p.Addrs() {
					if a == at("fails") {
						last = st.LastErr
					}
				}
				return &Error{Stage: StageBackoff, Err: last}
			},
			"PanicError": func() error { return &PanicError{Where: "x", Value: fail} },
			"shutdown": func() error {
				q := open(t, Config{})
				b := q.borrow(bg, at("x"))
				b.conn()
				defer b.giveBack()
				return q.p.Shutdown(cause)
			},
		}
		for name, of := range errs {
			err := of()
			require.Error(t, err, name)
			require.False(t, strings.ContainsAny(err.Error(), "\r\n"), "%s: %q", name, err)
		}
	})
}

// TRY-36: Shutdown names the place of each borrow that is known.
func TestShutdownNamesThePlaceOfEachBorrow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{HoldWarn: time.Minute})
		l := n.lease(at("a"))
		time.Sleep(2 * time.Second)
		b := n.borrow(bg, at("a"))
		b.conn()
		ctx, end := n.session(bg)
		n.useUnder(ctx, at("b"))
		err := n.p.Shutdown(deadline(t, time.Second))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		for _, part := range []string{
			"2 in use for mem://a (for 3s) borrowed 3s ago by ", "lease_test.go:", ", and 1s ago by ", "testnet_test.go:",
			"1 in use for mem://b (for 1s) borrowed 1s ago by ", "session_test.go:",
		} {
			require.ErrorContains(t, err, part)
		}
		end()
		require.NoError(t, l.Return())
		require.NoError(t, b.giveBack())
		require.Nil(t, n.p.loanLog.oldest, "what came back is forgotten")
	})
}
