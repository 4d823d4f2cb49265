package connpooltest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpooltest"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// onBoth runs a test in a bubble with a server in memory, and outside with one on
// loopback.
func onBoth(t *testing.T, test func(t *testing.T, s *connpooltest.Server)) {
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { test(t, connpooltest.NewServer(t, connpooltest.Lines(values))) })
	})
	t.Run("loopback", func(t *testing.T) {
		patience.NothingLeaks(t)
		test(t, connpooltest.NewLoopback(t, connpooltest.Lines(values)))
	})
}

// get makes one exchange, which may take wait.
func get(pool *connpool.Pool, s *connpooltest.Server, key string, wait time.Duration) (value string, err error) {
	err = pool.With(context.Background(), s.Addr(), func(c connpool.Conn) error {
		c.SetReadDeadline(time.Now().Add(wait))
		value, err = ask(c, connpool.State[*bufio.Reader](c), key)
		return err
	})
	return value, err
}

func TestAServerPlaysItsScript(t *testing.T) {
	onBoth(t, func(t *testing.T, s *connpooltest.Server) {
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		s.Play(connpooltest.MustParseScript("ok cut@3 extra reset@1 split@4 drip@2"))
		s.Play(connpooltest.MustParseScript("wrong hang@2"))
		for i, want := range []struct {
			value string
			err   error
			wait  time.Duration
		}{
			{"value of 0\n", nil, patience.Bounded},
			{"val", io.EOF, patience.Bounded},
			{"value of 2\n", nil, patience.Bounded},
			{"", syscall.ECONNRESET, patience.Bounded},
			{"value of 4\n", nil, patience.Bounded},
			{"value of 5\n", nil, patience.Bounded},
			{"value of 5\n", nil, patience.Bounded},
			{"va", context.DeadlineExceeded, 50 * time.Millisecond},
			{"value of 8\n", nil, patience.Bounded}, // the script is at its end
		} {
			value, err := get(pool, s, fmt.Sprint(i), want.wait)
			switch {
			case want.err == nil:
				require.NoError(t, err, i)
			case want.err == context.DeadlineExceeded:
				require.Equal(t, connpool.KindTimeoutInTransfer, connpool.KindOf(err), "%d: %v", i, err)
			default:
				require.ErrorIs(t, err, want.err, i)
			}
			if want.err != syscall.ECONNRESET { // a reset may lose what came before
				require.Equal(t, want.value, value, i)
			}
		}
		s.Play(connpooltest.MustParseScript("cut@end"))
		value, err := get(pool, s, "9", patience.Bounded)
		require.NoError(t, err)
		require.Equal(t, "value of 9\n", value)
		patience.Soon(t, "the connection is closed behind its reply", func() bool { return s.Open() == 0 })
		require.Panics(t, func() { s.Play(connpooltest.MustParseScript("ok cutidle")) })
	})
}

func TestALateReplyComesWhenTheClientSendsAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, s *connpooltest.Server) {
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		s.Play(connpooltest.MustParseScript("late@0"))
		require.NoError(t, pool.With(context.Background(), s.Addr(), func(c connpool.Conn) error {
			r := connpool.State[*bufio.Reader](c)
			fmt.Fprintln(c, "first")
			c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, err := r.ReadString('\n')
			require.Error(t, err)
			c.SetReadDeadline(time.Time{})
			value, err := ask(c, r, "second")
			require.NoError(t, err)
			require.Equal(t, "value of first\n", value)
			value, err = r.ReadString('\n')
			require.NoError(t, err)
			require.Equal(t, "value of second\n", value)
			return nil
		}))
	})
}

func TestIdleConnectionsAreCutAndReplaced(t *testing.T) {
	onBoth(t, func(t *testing.T, s *connpooltest.Server) {
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		require.Zero(t, s.CutIdle())
		require.NoError(t, pool.Warm(context.Background(), s.Addr(), 3))
		patience.Soon(t, "the server knows its connections", func() bool { return s.Open() == 3 })
		s.Play(connpooltest.MustParseScript("late@1"))
		require.NoError(t, pool.With(context.Background(), s.Addr(), func(c connpool.Conn) error {
			fmt.Fprintln(c, "a")
			b := make([]byte, 1)
			_, err := io.ReadFull(c, b) // and so the server owes the rest
			require.NoError(t, err)
			require.Equal(t, 2, s.CutIdle())
			require.Zero(t, s.CutIdle())
			require.Equal(t, 1, s.Open())
			value, err := ask(c, connpool.State[*bufio.Reader](c), "b")
			require.NoError(t, err)
			require.Equal(t, "alue of a\n", value)
			value, err = connpool.State[*bufio.Reader](c).ReadString('\n')
			require.NoError(t, err)
			require.Equal(t, "value of b\n", value)
			return nil
		}))
		require.Equal(t, 1, s.CutIdle())
		value, err := get(pool, s, "c", patience.Bounded)
		require.NoError(t, err)
		require.Equal(t, "value of c\n", value)
		require.Equal(t, 4, s.Accepts())
		patience.Soon(t, "three are counted as stale", func() bool { return pool.Stats().Closed[connpool.ClosedStale] == 3 })
	})
}

func TestUnaskedBytesCostAnIdleConnection(t *testing.T) {
	onBoth(t, func(t *testing.T, s *connpooltest.Server) {
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		_, err := get(pool, s, "a", patience.Bounded)
		require.NoError(t, err)
		require.Equal(t, 1, s.SendUnasked())
		patience.Soon(t, "the pool noticed", func() bool {
			value, err := get(pool, s, "b", patience.Bounded)
			return err == nil && value == "value of b\n" && pool.Stats().Closed[connpool.ClosedDirty] == 1
		})
		require.Equal(t, 2, s.Accepts())
	})
}

func TestTheNextDialsFail(t *testing.T) {
	errNoRoute := errors.New("no route")
	onBoth(t, func(t *testing.T, s *connpooltest.Server) {
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		s.FailNextDial(1, errNoRoute)
		s.FailNextDial(1, nil)
		_, err := get(pool, s, "a", patience.Bounded)
		require.ErrorIs(t, err, errNoRoute)
		_, err = get(pool, s, "a", patience.Bounded)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.Equal(t, connpool.KindRefused, connpool.KindOf(err))
		require.Zero(t, s.Accepts())
		_, err = get(pool, s, "a", patience.Bounded)
		require.NoError(t, err)

		pool.CloseIdle()
		s.HangUpNext(1)
		patience.Soon(t, "the connection after that works", func() bool {
			_, err := get(pool, s, "a", patience.Bounded)
			return err == nil
		})
		require.Equal(t, 3, s.Accepts())
	})
}

func TestOnePoolReachesSeveralServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := connpooltest.NewServer(t, connpooltest.Lines(values))
		b := connpooltest.NewServer(t, connpooltest.Lines(func(string) string { return "of b" }))
		pool := connpooltest.NewPool(t, a, b.Config(connpool.Config{Setup: reader}))
		value, err := get(pool, a, "k", patience.Bounded)
		require.NoError(t, err)
		require.Equal(t, "value of k\n", value)
		value, err = get(pool, b, "k", patience.Bounded)
		require.NoError(t, err)
		require.Equal(t, "of b\n", value)
		_, err = pool.Lease(context.Background(), connpool.Addr{Transport: connpooltest.Memory, Host: "nobody"})
		require.ErrorContains(t, err, "there is no server")
	})
}

// verdict is a test that keeps what it is told.
type verdict struct {
	testing.TB
	says string
}

func (v *verdict) Helper()           {}
func (v *verdict) Error(args ...any) { v.says += fmt.Sprint(args...) }

func TestAssertReturnedFindsALoanThatIsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := connpooltest.NewServer(t, connpooltest.Lines(values))
		pool := connpooltest.NewPool(t, s, connpool.Config{Setup: reader})
		connpooltest.AssertReturned(t, pool)
		lease, err := pool.Lease(context.Background(), s.Addr())
		require.NoError(t, err)
		v := &verdict{TB: t}
		connpooltest.AssertReturned(v, pool)
		require.Contains(t, v.says, "connections in use: 1")
		require.Contains(t, v.says, "TestAssertReturnedFindsALoanThatIsOut", "where it was borrowed")

		// It waits for one that is on its way back.
		go func() {
			time.Sleep(10 * time.Second)
			lease.Return()
		}()
		connpooltest.AssertReturned(t, pool)
	})
}
