package connpool

import (
	"context"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// In this file the sweep is off: what is noticed is noticed by the watcher.

// watchServer serves until the test ends.
func watchServer(t *testing.T, network string) (*faultnet.Server, Addr) {
	t.Helper()
	s, err := faultnet.Start(faultnet.Options{Network: network})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	transport := TCP
	switch network {
	case "tls":
		transport = TLS
	case "unix", "unix-abstract":
		transport = Unix
	}
	return s, Addr{Transport: transport, Host: s.Host(), Port: s.Port()}
}

func watchPool(t *testing.T, cfg Config, tlsOf *faultnet.Server) *Pool {
	t.Helper()
	cfg.SweepInterval = -1
	if tlsOf != nil {
		cfg.TLS = tlsOf.ClientTLS()
	}
	p, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// descriptorsOpen counts those of the process.
func descriptorsOpen(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}

// fillIdle makes n idle connections to addr, each of which has had an exchange,
// and returns them.
func fillIdle(t *testing.T, p *Pool, addr Addr, n int) []*conn {
	t.Helper()
	var here []*conn
	var lend func(int) error
	lend = func(left int) error {
		if left == 0 {
			return nil
		}
		return p.With(context.Background(), addr, func(c Conn) error {
			here = append(here, c.c)
			if _, err := enquire(c, "hello"); err != nil {
				return err
			}
			return lend(left - 1)
		})
	}
	require.NoError(t, lend(n))
	return here
}

// TDBC-14 (at once), BETA-24
func TestServersThatHangUpEmptyTheIdleListUnasked(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix", "unix-abstract"} {
		for _, how := range []faultnet.Cut{faultnet.FIN, faultnet.RST, faultnet.HalfClose} {
			t.Run(network+" "+how.String(), func(t *testing.T) {
				s, addr := watchServer(t, network)
				p := watchPool(t, Config{}, s)
				fillIdle(t, p, addr, 1)
				require.Equal(t, 1, s.CutIdle(-1, faultnet.FIN))
				soon(t, "the first is gone", func() bool { return p.Stats().Open == 0 && s.Open() == 0 })
				before := descriptorsOpen(t) // with the watcher's

				fillIdle(t, p, addr, 5)
				require.Equal(t, 5, p.Stats().Idle)
				require.Equal(t, 5, s.CutIdle(-1, how))
				soon(t, "nothing is idle", func() bool { return p.Stats().Idle == 0 })
				soon(t, "the slots are free", func() bool { return p.Stats().Open == 0 })
				p.check(t)
				require.Equal(t, map[CloseReason]uint64{ClosedStale: 6}, p.Stats().Closed)
				soon(t, "the descriptors are released", func() bool { return descriptorsOpen(t) <= before })
				require.Equal(t, uint64(6), p.Stats().Dials, "nobody asked for a new one")
				for range p.Addrs() {
					t.Fatal("books were kept")
				}
			})
		}
	}
}

// TDBC-14 (at once)
func TestARestartOfAServerEmptiesItsAddressAndNoOther(t *testing.T) {
	a, addrA := watchServer(t, "tcp")
	_, addrB := watchServer(t, "tcp")
	p := watchPool(t, Config{}, nil)
	fillIdle(t, p, addrA, 10)
	fillIdle(t, p, addrB, 10)
	require.NoError(t, a.Restart())
	soon(t, "the address is empty", func() bool {
		for at := range p.Addrs() {
			if at == addrA {
				return false
			}
		}
		return true
	})
	require.Equal(t, 10, p.Stats().Idle)
	p.check(t)
	fillIdle(t, p, addrA, 1)
	require.Equal(t, uint64(21), p.Stats().Dials)
}

// Data does not wake the watcher: neither that of an exchange, nor that which
// arrives while a connection is idle. An end does, and data before it does not
// hide it.
func TestDataDoesNotWakeTheWatcher(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	p := watchPool(t, Config{}, nil)
	busy := fillIdle(t, p, addr, 1)[0]
	for range 1000 {
		require.NoError(t, p.With(context.Background(), addr, func(c Conn) error {
			_, err := enquire(c, "data")
			return err
		}))
		require.Zero(t, busy.word.Load()&flagHungUp)
	}
	require.Equal(t, 1, s.PushIdle(-1, []byte("unasked")))
	other, addrOther := watchServer(t, "tcp")
	fillIdle(t, p, addrOther, 1)
	require.Equal(t, 1, other.CutIdle(-1, faultnet.FIN)) // is heard after the data, if that is heard at all
	soon(t, "the other is gone", func() bool { return p.Stats().Idle == 1 })
	require.Zero(t, busy.word.Load()&flagHungUp)
	p.check(t)
	require.Equal(t, 1, s.CutIdle(-1, faultnet.FIN))
	soon(t, "both are gone", func() bool { return p.Stats().Open == 0 })
	require.Equal(t, map[CloseReason]uint64{ClosedStale: 1, ClosedDirty: 1}, p.Stats().Closed)
}

// silentListener accepts without a goroutine for each connection.
func silentListener(t *testing.T) (Addr, func()) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	var running tasks.Group
	var ends []net.Conn
	running.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			ends = append(ends, nc)
		}
	})
	stop := sync.OnceFunc(func() {
		ln.Close()
		running.Wait()
		for _, nc := range ends {
			nc.Close()
		}
	})
	t.Cleanup(stop)
	at := ln.Addr().(*net.TCPAddr)
	return Addr{Transport: TCP, Host: "127.0.0.1", Port: uint16(at.Port)}, stop
}

func TestOneGoroutineWatchesFiveHundredConnections(t *testing.T) {
	files := descriptorsOpen(t)
	addr, stop := silentListener(t)
	goroutines, listening := runtime.NumGoroutine(), descriptorsOpen(t)
	p := watchPool(t, Config{MaxOpen: -1}, nil)
	for i := range 500 {
		at := addr
		at.Scope = strconv.Itoa(i)
		require.NoError(t, p.With(context.Background(), at, func(Conn) error { return nil }))
	}
	require.Equal(t, 500, p.Stats().Idle)
	soon(t, "one goroutine more", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	soon(t, "one descriptor more", func() bool { return descriptorsOpen(t) <= listening+1000+1 })
	p.check(t)
	require.NoError(t, p.Close())
	require.Nil(t, p.watching.watcher)
	soon(t, "the watcher has ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	soon(t, "the pool's are closed", func() bool { return descriptorsOpen(t) <= listening+500 })
	stop()
	soon(t, "all are closed", func() bool { return descriptorsOpen(t) <= files })
}

func TestAPoolWithoutConnectionsWatchesNothing(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	s.Stop() // refuses
	mem := faultnet.NewMem()
	defer mem.Close()
	mem.Host("m")
	goroutines, files := runtime.NumGoroutine(), descriptorsOpen(t)

	p := watchPool(t, Config{Dialers: map[Transport]DialFunc{"mem": func(ctx context.Context, a Addr) (net.Conn, error) {
		return mem.Dial(ctx, a.Host)
	}}}, nil)
	require.Error(t, p.With(context.Background(), addr, func(Conn) error { return nil }))
	require.Nil(t, p.watching.watcher, "no connection was made")
	require.NoError(t, p.With(context.Background(), Addr{Transport: "mem", Host: "m"}, func(Conn) error { return nil }))
	require.Nil(t, p.watching.watcher, "there is no descriptor to watch")
	require.NoError(t, p.Close())

	require.NoError(t, s.Restart())
	trusting := watchPool(t, Config{NoProbe: true}, nil)
	fillIdle(t, trusting, addr, 1)
	require.Nil(t, trusting.watching.watcher, "the look into the socket is switched off")
	require.NoError(t, trusting.Close())
	s.Close()
	mem.Close()
	soon(t, "nothing is left", func() bool { return runtime.NumGoroutine() <= goroutines && descriptorsOpen(t) <= files })
}

func TestADetachedConnectionIsNotWatched(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	p := watchPool(t, Config{}, nil)
	var inner *conn
	var nc net.Conn
	require.NoError(t, p.With(context.Background(), addr, func(c Conn) (err error) {
		inner = c.c
		nc, err = c.Detach()
		return err
	}))
	defer nc.Close()
	require.True(t, stillWatched(t, p, nc) == false, "the kernel does not know it")
	_, err := enquire(nc, "mine")
	require.NoError(t, err)
	require.Equal(t, 1, s.CutIdle(-1, faultnet.FIN))
	_, err = nc.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	// The watcher has heard what came later, but nothing of this.
	fillIdle(t, p, addr, 1)
	require.Equal(t, 1, s.CutIdle(-1, faultnet.FIN))
	soon(t, "the second is gone", func() bool { return p.Stats().Open == 0 })
	require.Zero(t, inner.word.Load()&flagHungUp)
	p.check(t)
}

// stillWatched asks the kernel, and leaves things as they were.
func stillWatched(t *testing.T, p *Pool, nc net.Conn) bool {
	t.Helper()
	p.mu.Lock()
	w := p.watching.watcher
	p.mu.Unlock()
	require.NotNil(t, w)
	raw, err := nc.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	return w.Rearm(raw, false) == nil
}

func TestAHangUpDuringALoanClosesTheConnectionOnItsReturn(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix"} {
		t.Run(network, func(t *testing.T) {
			s, addr := watchServer(t, network)
			p := watchPool(t, Config{}, s)
			require.NoError(t, p.With(context.Background(), addr, func(c Conn) error {
				if _, err := enquire(c, "hello"); err != nil {
					return err
				}
				require.Equal(t, 1, s.CutIdle(-1, faultnet.HalfClose))
				soon(t, "the hang-up is heard", func() bool { return c.c.word.Load()&flagHungUp != 0 })
				require.Equal(t, 1, p.Stats().InUse, "nothing is taken from a borrower")
				p.check(t)
				// The borrower goes on; its own direction is open.
				_, err := c.Write([]byte("farewell\n"))
				return err
			}))
			require.Equal(t, 0, p.Stats().Idle, "it is closed now, not when its turn comes")
			require.Equal(t, uint64(1), p.Stats().Closed[ClosedStale])
			soon(t, "the slot is free", func() bool { return p.Stats().Open == 0 })
			p.check(t)
		})
	}
}

// The look before a loan finds nothing, and the peer hangs up before the loan
// begins.
func TestAHangUpBetweenTheLookAndTheLoanIsNotForgotten(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	p := watchPool(t, Config{}, nil)
	sys := realSystem
	p.sys = &sys
	var inner *conn
	sys.peek = func(fd uintptr) sock.Seen {
		seen := sock.Peek(fd)
		if inner != nil && seen == (sock.Seen{}) && s.CutIdle(-1, faultnet.HalfClose) == 1 {
			soon(t, "the hang-up is heard", func() bool { return inner.word.Load()&flagHungUp != 0 })
		}
		return seen
	}
	inner = fillIdle(t, p, addr, 1)[0]
	require.NoError(t, p.With(context.Background(), addr, func(Conn) error { return nil }))
	soon(t, "it is gone", func() bool { return p.Stats().Open == 0 })
	require.Equal(t, map[CloseReason]uint64{ClosedStale: 1}, p.Stats().Closed)
	p.check(t)
}

func TestAHangUpDuringSetupIsNotForgotten(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p := watchPool(t, Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
		if _, err := enquire(nc, "login"); err != nil {
			return nil, err
		}
		if s.CutIdle(-1, faultnet.FIN) != 1 {
			return nil, io.ErrNoProgress
		}
		soon(t, "the hang-up is heard", func() bool { return nc.(Conn).c.word.Load()&flagHungUp != 0 })
		cancel() // nobody waits for the connection any more
		return nil, nil
	}}, nil)
	require.ErrorIs(t, p.With(ctx, addr, func(Conn) error { return nil }), context.Canceled)
	soon(t, "it is gone", func() bool { return p.Stats().Open == 0 })
	p.check(t)
}

// A descriptor that was duplicated keeps its old entry in the kernel's books
// after the pool closed its own. Its hang-up comes under a number that belongs to
// another connection by then.
func TestAHangUpOfAnEarlierOwnerOfTheNumberHurtsNobody(t *testing.T) {
	first, addrFirst := watchServer(t, "tcp")
	_, addrNext := watchServer(t, "tcp")
	for range 20 {
		p := watchPool(t, Config{}, nil)
		sys, looks := realSystem, new(atomic.Int64)
		sys.peek = func(fd uintptr) sock.Seen { looks.Add(1); return sock.Peek(fd) }
		p.sys = &sys
		var copied *os.File
		number := -1
		old := fillIdle(t, p, addrFirst, 1)[0]
		require.NoError(t, p.With(context.Background(), addrFirst, func(c Conn) (err error) {
			number = numberOf(c)
			copied, err = c.c.nc.(*net.TCPConn).File()
			return err
		}))
		p.CloseIdle()
		require.Equal(t, 0, p.Stats().Open)
		next := fillIdle(t, p, addrNext, 1)[0]
		if int(next.sock.fd()) != number { // somebody else was quicker
			copied.Close()
			require.NoError(t, p.Close())
			continue
		}
		looks.Store(0)
		require.Equal(t, 1, first.CutIdle(-1, faultnet.FIN))
		soon(t, "the hang-up is heard", func() bool { return looks.Load() > 0 })
		require.Zero(t, old.word.Load()&flagHungUp)
		soon(t, "it was looked at", func() bool { return p.Stats().Idle == 1 })
		p.check(t)
		require.NoError(t, p.With(context.Background(), addrNext, func(c Conn) error {
			require.True(t, c.Info().Reused)
			_, err := enquire(c, "still there")
			return err
		}))
		require.Equal(t, map[CloseReason]uint64{ClosedOnRequest: 1}, p.Stats().Closed)
		copied.Close()
		return
	}
	t.Fatal("the number was never given to the next connection")
}

// Idle connections die while they are borrowed, given back and counted.
func TestHangUpsRaceWithLoansAndNothingIsLost(t *testing.T) {
	s, addr := watchServer(t, "tcp")
	p := watchPool(t, Config{MaxPerAddr: 4}, nil)
	stop := make(chan struct{})
	var chaos, workers tasks.Group
	chaos.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				s.CutIdle(1+i%3, faultnet.Cut(i%3))
			}
		}
	})
	for range 8 {
		workers.Go(func() {
			for range short.Of(300, 100) * stress() {
				// A connection that is cut in the middle of a loan is the
				// borrower's problem, as a Keep cannot make it good.
				p.With(context.Background(), addr, func(c Conn) error {
					_, err := enquire(c, "x")
					return err
				})
				if err := p.inconsistency(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	close(stop)
	chaos.Wait()
	soon(t, "everything is gone", func() bool {
		s.CutIdle(-1, faultnet.FIN) // a connection may be so young that the server has not seen it
		return p.Stats().Open == 0
	})
	p.check(t)
}
