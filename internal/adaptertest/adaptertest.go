//go:build unix

// Package adaptertest is what each adapter in the folder adapters must pass, against a real
// server: many exchanges over few connections, a restart of the server, cut connections, and
// borrowers that give up while their reply is on the way. Only the tests of the adapters import
// it.
package adaptertest

import (
	"context"
	"errors"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

const (
	connections = 4
	borrowers   = 16
	exchanges   = 1000
)

// Client is an adapter over a pool of its own.
type Client struct {
	Pool *connpool.Pool // with the Config that Run gave, and the adapter's Setup and other hooks
	Addr connpool.Addr

	// Exchange makes an exchange that no other n makes, and fails if the reply is not its own.
	Exchange func(ctx context.Context, n int) error
	// Refused makes an exchange that the server refuses in its protocol, which is no reason
	// to close a connection. It returns what the adapter says.
	Refused func(ctx context.Context) error
	// IsRefusal says whether that is what Refused should return.
	IsRefusal func(error) bool
	// Hasty is like Exchange, with a time-out of the client's own of some milliseconds. nil: the
	// client has no time-out of its own.
	Hasty func(ctx context.Context, n int) error
	// IgnoresCtx says that the end of a ctx does not end an exchange that has begun. Then there
	// must be a Hasty.
	IgnoresCtx bool
	// Resident says that the client reads its connection all the time. The pool hears of the
	// end from the client then, and this takes a moment.
	Resident bool
}

// Run tests an adapter. The server listens at hostPort, also after restart. open makes an adapter
// that reaches the server at host and port: directly, or over a wire that the test can cut.
func Run(t *testing.T, hostPort string, restart func(testing.TB), open func(t *testing.T, cfg connpool.Config, host string, port uint16) Client) {
	start := func(t *testing.T, hostPort string) Client {
		host, port, err := net.SplitHostPort(hostPort)
		require.NoError(t, err)
		n, err := strconv.ParseUint(port, 10, 16)
		require.NoError(t, err)
		c := open(t, connpool.Config{MaxOpen: connections, Debug: true}, host, uint16(n))
		t.Cleanup(func() {
			st := c.Pool.Stats()
			require.Zero(t, st.InUse, "everything was given back")
			require.NoError(t, c.Pool.Shutdown(context.Background()))
			require.Zero(t, c.Pool.Stats().Open)
		})
		return c
	}
	// A server that is started again has another goroutine that waits for its end.
	server := goleak.IgnoreAnyFunction("github.com/seed-ecb488c9/connpool/internal/realserver.(*Server).run.func1")
	direct := func(t *testing.T) Client {
		patience.NothingLeaks(t, server)
		return start(t, hostPort)
	}
	wired := func(t *testing.T) (Client, *wire) {
		patience.NothingLeaks(t)
		w := newWire(t, hostPort)
		return start(t, w.l.Addr().String()), w
	}

	t.Run("a thousand exchanges on four connections", func(t *testing.T) {
		c := direct(t)
		c.exchangeAll(t, 0, exchanges)
		st := c.Pool.Stats()
		require.LessOrEqual(t, st.Dials, uint64(connections))
		require.Empty(t, st.Closed)
	})
	t.Run("a restart of the server with idle connections", func(t *testing.T) {
		c := direct(t)
		c.fill(t, nil)
		restart(t)
		c.heard(t)
		c.exchangeAll(t, 0, exchanges)
		c.lostIdle(t, connections)
	})
	for _, how := range []faultnet.Cut{faultnet.FIN, faultnet.RST} {
		t.Run("idle connections are cut by "+how.String(), func(t *testing.T) {
			c, w := wired(t)
			for round := range 5 {
				c.fill(t, w)
				require.Equal(t, connections, w.cut(how))
				c.heard(t)
				c.exchangeAll(t, round*100, 100)
			}
			c.lostIdle(t, 5*connections)
		})
	}
	t.Run("a ctx is cancelled in the middle of an exchange", func(t *testing.T) {
		c, w := wired(t)
		if c.IgnoresCtx {
			t.Skip("it does not end the exchange")
		}
		for n := range 10 {
			c.fill(t, w)
			release := w.hold()
			ctx, cancel := context.WithCancel(t.Context())
			var broken tasks.Group
			var err error
			broken.Go(func() { err = c.Exchange(ctx, n) })
			patience.InTime(t, w.asked)
			cancel()
			broken.Wait() // it does not wait for the reply
			require.ErrorIs(t, err, context.Canceled)
			release() // the reply comes late
			c.exchangeAll(t, 100*(n+1), 2*connections)
		}
		require.Zero(t, c.Pool.Stats().InUse)
	})
	t.Run("the time of a ctx runs out before the reply comes", func(t *testing.T) {
		c, w := wired(t)
		if c.IgnoresCtx {
			t.Skip("it does not end the exchange")
		}
		c.fill(t, w)
		for n := range 5 {
			release := w.hold()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			require.ErrorIs(t, c.Exchange(ctx, n), context.DeadlineExceeded)
			cancel()
			release()
			c.exchangeAll(t, 100*(n+1), 2*connections)
		}
	})
	t.Run("the client's own time runs out before the reply comes", func(t *testing.T) {
		c, w := wired(t)
		if c.Hasty == nil {
			require.False(t, c.IgnoresCtx, "something must end an exchange")
			t.Skip("the client has no time-out of its own")
		}
		c.fill(t, w)
		for n := range 5 {
			release := w.hold()
			require.Error(t, c.Hasty(t.Context(), n))
			release()
			c.exchangeAll(t, 100*(n+1), 2*connections)
		}
	})
	t.Run("what the server refuses costs no connection", func(t *testing.T) {
		c := direct(t)
		for n := range 20 {
			err := c.Refused(t.Context())
			require.True(t, c.IsRefusal(err), "%v", err)
			require.NoError(t, c.Exchange(t.Context(), n))
		}
		st := c.Pool.Stats()
		require.EqualValues(t, 1, st.Dials)
		require.Empty(t, st.Closed)
	})
	t.Run("a server that is away", func(t *testing.T) {
		w := newWire(t, hostPort)
		c := start(t, w.l.Addr().String())
		w.l.Close()
		var e *connpool.Error
		require.True(t, errors.As(c.Exchange(t.Context(), 1), &e), "nothing was sent")
		require.Equal(t, connpool.StageDial, e.Stage)
	})
}

// exchangeAll is n exchanges by 16 borrowers.
func (c Client) exchangeAll(t *testing.T, first, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var all tasks.Group
	for b := range borrowers {
		all.Go(func() {
			for i := b; i < n; i += borrowers {
				if err := c.Exchange(ctx, first+i); err != nil {
					t.Errorf("exchange %d: %v", first+i, err)
				}
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// fill has as many connections open and idle as there may be, each of them over w if there is one.
func (c Client) fill(t *testing.T, w *wire) {
	t.Helper()
	patience.Soon(t, "all are idle", func() bool {
		for range connections { // a connection that was never lent would be a sign of a server in trouble
			l, err := c.Pool.Lease(t.Context(), c.Addr)
			require.NoError(t, err)
			defer l.Return()
		}
		return w == nil || w.count() == connections
	})
	require.Equal(t, connections, c.Pool.Stats().Idle)
}

// heard waits until a client that reads all the time has heard of the end of its connection.
func (c Client) heard(t *testing.T) {
	t.Helper()
	if c.Resident {
		patience.Soon(t, "the ends are heard", func() bool { return c.Pool.Stats().Open == 0 })
	}
}

// lostIdle waits until n connections have been closed since their peer ended them between two
// loans, and requires that no other was closed. A server that says goodbye is one that spoke
// unasked.
func (c Client) lostIdle(t *testing.T, n uint64) {
	t.Helper()
	closed := func() map[connpool.CloseReason]uint64 { return c.Pool.Stats().Closed }
	patience.Soon(t, "all ends are known", func() bool {
		return closed()[connpool.ClosedStale]+closed()[connpool.ClosedDirty] >= n
	})
	var all uint64
	for _, m := range closed() {
		all += m
	}
	require.Equal(t, n, all, "%v", closed())
}
