//go:build unix

package clients

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// carriedClient is a client that dials for itself, with all that Carry takes.
type carriedClient interface {
	io.Closer
	alive() error
	socket() net.Conn
}

// library is a client library whose clients dial for themselves, and what its tests need to know.
type library struct {
	kind     realserver.Kind
	prepare  func(t *testing.T, srv *realserver.Server) // runs before the first dial; nil: there is nothing to do
	dial     func(ctx context.Context, addr connpool.Addr) (carriedClient, error)
	exchange func(k carriedClient, n int) error             // an error if the reply is not that of n
	refused  func(k carriedClient) error                    // an exchange that the server refuses; the error has a mark of Keep
	endless  func(k carriedClient, begun func()) error      // an exchange that only the end of the client ends
	abandon  []func(k carriedClient) error                  // exchanges that are given up, without an error
	goodbyes func(t *testing.T, srv *realserver.Server) int // how many clients have said goodbye to the server
}

// counted is a client that counts how often it was closed.
type counted struct {
	carriedClient
	closes atomic.Int32
}

func (k *counted) Close() error {
	k.closes.Add(1)
	return k.carriedClient.Close()
}

// roll has all clients that were dialled.
type roll struct {
	mu  sync.Mutex // guards all
	all []*counted
}

func (r *roll) add(k carriedClient) *counted {
	c := &counted{carriedClient: k}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, c)
	return c
}

// closed says how many clients were closed, and panics if one was closed twice.
func (r *roll) closed() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.all {
		switch k.closes.Load() {
		case 0:
		case 1:
			n++
		default:
			panic("a client was closed twice")
		}
	}
	return n
}

func (r *roll) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// orNil is k, or no client if there is an error.
func orNil[K carriedClient](k K, err error) (carriedClient, error) {
	if err != nil {
		return nil, err
	}
	return k, nil
}

// logOf returns a file that the server writes.
func logOf(t *testing.T, srv *realserver.Server, name string) string {
	text, err := os.ReadFile(filepath.Join(srv.Dir, name))
	require.NoError(t, err)
	return string(text)
}

// start starts the server, and returns when it lets clients in.
func (l *library) start(t *testing.T) *realserver.Server {
	t.Helper()
	srv := realserver.Start(t, l.kind)
	if l.prepare != nil {
		l.prepare(t, srv)
	}
	l.await(t, srv)
	eventually(t, "its goodbye is heard", func() bool { return l.goodbyes(t, srv) == 1 })
	return srv
}

// await waits until the server lets clients in. The client that finds out says goodbye.
func (l *library) await(t *testing.T, srv *realserver.Server) {
	t.Helper()
	require.Eventually(t, func() bool {
		k, err := l.dial(t.Context(), addrOf(t, srv, "carried"))
		if err == nil {
			k.Close()
		}
		return err == nil
	}, time.Minute, 10*time.Millisecond, "the server lets nobody in")
}

// pool opens a pool for the server, with at most 4 connections unless change says otherwise.
func (l *library) pool(t *testing.T, srv *realserver.Server, change func(*connpool.Config)) (*connpool.Pool, connpool.Addr, *roll) {
	t.Helper()
	clients := new(roll)
	cfg := connpool.Config{MaxOpen: 4, Dialers: map[connpool.Transport]connpool.DialFunc{
		"carried": func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			k, err := l.dial(ctx, addr)
			if err != nil {
				return nil, err
			}
			return connpool.Carry(clients.add(k), k.alive, k.socket()), nil
		},
	}}
	if change != nil {
		change(&cfg)
	}
	p, err := connpool.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { p.Close() })
	return p, addrOf(t, srv, "carried"), clients
}

// closedFor waits until the pool has closed n connections for this reason.
func closedFor(t *testing.T, p *connpool.Pool, reason connpool.CloseReason, n uint64) {
	t.Helper()
	eventually(t, reason.String(), func() bool { return p.Stats().Closed[reason] == n })
}

// over makes an exchange one of a loan.
func over(exchange func(k carriedClient, n int) error) func(c connpool.Conn, n int) error {
	return func(c connpool.Conn, n int) error {
		return exchange(connpool.State[*counted](c).carriedClient, n)
	}
}

func scoped(addr connpool.Addr, scope string) connpool.Addr {
	addr.Scope = scope
	return addr
}

// open returns how many descriptors this process has, 0 where the system does not say.
func open() int {
	all, _ := os.ReadDir("/proc/self/fd")
	return len(all)
}

// test runs all tests of the library.
func (l *library) test(t *testing.T) {
	srv := l.start(t)
	fds, goroutines := open(), runtime.NumGoroutine()
	for _, part := range []struct {
		what string
		test func(*testing.T, *realserver.Server)
	}{
		{"1,000 exchanges by 16 borrowers", l.testThousand},
		{"a refusal that is harmless", l.testKeep},
		{"limits and the order of closes", l.testLimits},
		{"lifetimes", l.testLifetime},
		{"Retire", l.testRetire},
		{"an exchange that was given up", l.testAbandon},
		{"the end of a ctx", l.testCtx},
		{"a restart of the server", l.testRestart},
	} {
		t.Run(part.what, func(t *testing.T) { part.test(t, srv) })
	}
	eventually(t, "no descriptor and no goroutine is left", func() bool {
		return open() <= fds && runtime.NumGoroutine() <= goroutines
	})
}

// settled ends the pool: each client has said goodbye, was closed once, and nothing is left.
// before is how many had said goodbye when the test began.
func (l *library) settled(t *testing.T, srv *realserver.Server, p *connpool.Pool, clients *roll, before int) {
	t.Helper()
	require.NoError(t, p.Shutdown(t.Context()))
	require.Zero(t, p.Stats().Open)
	require.Equal(t, clients.len(), clients.closed())
	eventually(t, "the server has heard the goodbyes", func() bool {
		return l.goodbyes(t, srv)-before == clients.len()
	})
	require.Zero(t, p.Stats().AbandonedCalls)
}

func (l *library) testThousand(t *testing.T, srv *realserver.Server) {
	before := l.goodbyes(t, srv)
	p, addr, clients := l.pool(t, srv, nil)
	thousand(t, p, addr, over(l.exchange))
	st := p.Stats()
	require.LessOrEqual(t, st.Dials, uint64(4))
	require.Empty(t, st.Closed)
	require.Equal(t, st.Open, st.Residents)
	require.Zero(t, st.Unprobed)
	l.settled(t, srv, p, clients, before)
}

func (l *library) testKeep(t *testing.T, srv *realserver.Server) {
	before := l.goodbyes(t, srv)
	p, addr, clients := l.pool(t, srv, nil)
	for range 3 {
		require.Error(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
			return over(func(k carriedClient, _ int) error { return l.refused(k) })(c, 0)
		}))
		require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error { return over(l.exchange)(c, 5) }))
	}
	require.Equal(t, 1, clients.len())
	l.settled(t, srv, p, clients, before)
}

func (l *library) testAbandon(t *testing.T, srv *realserver.Server) {
	for i, abandon := range l.abandon {
		p, addr, clients := l.pool(t, srv, func(c *connpool.Config) { c.MaxOpen = 1 })
		require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
			return over(func(k carriedClient, _ int) error { return abandon(k) })(c, 0)
		}))
		for n := range 3 {
			require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error { return over(l.exchange)(c, n) }))
		}
		closedFor(t, p, connpool.ClosedStale, 1)
		require.NoError(t, p.Shutdown(t.Context()))
		require.Equal(t, 2, clients.len(), i)
		require.Equal(t, 2, clients.closed(), i)
	}
}

func (l *library) testCtx(t *testing.T, srv *realserver.Server) {
	p, addr, clients := l.pool(t, srv, func(c *connpool.Config) { c.MaxOpen = 1 })
	const times = 5
	for n := range times {
		ctx, cancel := context.WithCancel(t.Context())
		err := p.With(ctx, addr, func(c connpool.Conn) error {
			return over(func(k carriedClient, _ int) error { return l.endless(k, cancel) })(c, 0)
		})
		require.Error(t, err) // the client's
		require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error { return over(l.exchange)(c, n) }))
		p.CloseIdle()
	}
	eventually(t, "each is closed", func() bool { return clients.closed() == 2*times })
	require.Equal(t, 2*times, clients.len())
	closedFor(t, p, connpool.ClosedCanceled, times)
	require.NoError(t, p.Shutdown(t.Context()))
	require.Zero(t, p.Stats().AbandonedCalls)
}

func (l *library) testLimits(t *testing.T, srv *realserver.Server) {
	before := l.goodbyes(t, srv)
	p, addr, clients := l.pool(t, srv, func(c *connpool.Config) { c.MaxOpen, c.MaxPerAddr, c.WhenFull = 3, 2, connpool.FullFail })
	use := func(scope string) {
		t.Helper()
		require.NoError(t, p.With(t.Context(), scoped(addr, scope), func(c connpool.Conn) error { return over(l.exchange)(c, 1) }))
	}
	use("a")
	use("b")
	use("c")
	use("a")
	use("d") // b is the one that was used least recently
	closedFor(t, p, connpool.ClosedEvicted, 1)
	clients.mu.Lock()
	evicted := clients.all[1]
	clients.mu.Unlock()
	eventually(t, "the right one is closed", func() bool { return evicted.closes.Load() == 1 && clients.closed() == 1 })
	one, err := p.Lease(t.Context(), scoped(addr, "e"))
	require.NoError(t, err)
	two, err := p.Lease(t.Context(), scoped(addr, "e"))
	require.NoError(t, err)
	_, err = p.Lease(t.Context(), scoped(addr, "e"))
	require.ErrorIs(t, err, connpool.ErrExhausted)
	one.Return()
	two.Return()
	require.LessOrEqual(t, p.Stats().PeakOpen, 3)
	l.settled(t, srv, p, clients, before)
}

func (l *library) testLifetime(t *testing.T, srv *realserver.Server) {
	before := l.goodbyes(t, srv)
	p, addr, clients := l.pool(t, srv, func(c *connpool.Config) {
		c.MaxLifetime, c.SweepInterval = 100*time.Millisecond, 10*time.Millisecond
	})
	hold(t, p, addr, 4)
	closedFor(t, p, connpool.ClosedLifetime, 4)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		for born := time.Now(); time.Since(born) < 110*time.Millisecond; {
			if err := over(l.exchange)(c, 3); err != nil { // a loan is never cut
				return err
			}
		}
		return nil
	}))
	eventually(t, "an old one is closed when it is given back", func() bool { return clients.closed() == 5 })
	l.settled(t, srv, p, clients, before)

	before = l.goodbyes(t, srv)
	p, addr, clients = l.pool(t, srv, func(c *connpool.Config) { c.MaxUses, c.MaxOpen = 3, 1 })
	for n := range 9 {
		require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error { return over(l.exchange)(c, n) }))
	}
	closedFor(t, p, connpool.ClosedMaxUses, 3)
	l.settled(t, srv, p, clients, before)
}

func (l *library) testRetire(t *testing.T, srv *realserver.Server) {
	before := l.goodbyes(t, srv)
	p, addr, clients := l.pool(t, srv, nil)
	hold(t, p, addr, 3)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		p.Retire(addr)
		eventually(t, "the idle ones are closed", func() bool { return clients.closed() == 2 })
		return over(l.exchange)(c, 4) // the one in use is not
	}))
	eventually(t, "nor is it kept", func() bool { return clients.closed() == 3 })
	closedFor(t, p, connpool.ClosedRetired, 3)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error { return over(l.exchange)(c, 4) }))
	require.EqualValues(t, 4, p.Stats().Dials)
	l.settled(t, srv, p, clients, before)
}

func (l *library) testRestart(t *testing.T, srv *realserver.Server) {
	p, addr, clients := l.pool(t, srv, nil)
	var failed atomic.Int32
	for range 3 {
		hold(t, p, addr, 4)
		require.Equal(t, 4, p.Stats().Idle)
		srv.Restart(t)
		l.await(t, srv)
		eventually(t, "the ends are heard", func() bool { return p.Stats().Open == 0 })
		thousand(t, p, addr, func(c connpool.Conn, n int) error {
			err := over(l.exchange)(c, n)
			if err != nil {
				failed.Add(1)
			}
			return err
		})
	}
	require.Zero(t, failed.Load())
	require.LessOrEqual(t, p.Stats().PeakOpen, 4)
	require.NoError(t, p.Shutdown(t.Context()))
	require.Equal(t, clients.len(), clients.closed())

	// A server that is gone: the borrower gets the error of the dial, and no dead client.
	p, addr, _ = l.pool(t, srv, nil)
	hold(t, p, addr, 2)
	srv.Stop()
	eventually(t, "the ends are heard", func() bool { return p.Stats().Open == 0 })
	err := p.With(t.Context(), addr, func(connpool.Conn) error { return errors.New("lent") })
	var e *connpool.Error
	require.ErrorAs(t, err, &e, fmt.Sprint(err))
	require.Equal(t, connpool.StageDial, e.Stage)
}
