//go:build linux

package handles

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// useUp takes every file handle that the process may still have, under a limit
// that is not far away. release frees some of them; the test's end frees all,
// and puts the limit back. (G-06)
func useUp(t *testing.T) (giveBack func(n int)) {
	t.Helper()
	var was syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was))
	low := was
	low.Cur = uint64(highestDescriptor(t) + 9)
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low))
	var taken []int
	giveBack = func(n int) {
		for ; n > 0 && len(taken) > 0; n-- {
			unix.Close(taken[len(taken)-1])
			taken = taken[:len(taken)-1]
		}
	}
	t.Cleanup(func() {
		require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was))
		giveBack(len(taken))
	})
	for {
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			require.Equal(t, syscall.EMFILE, err)
			return giveBack
		}
		taken = append(taken, fd)
	}
}

func highestDescriptor(t *testing.T) (highest int) {
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range entries {
		var fd int
		fmt.Sscan(e.Name(), &fd)
		highest = max(highest, fd)
	}
	return highest
}

// open lists the server's connections by number, oldest first.
func open(n *pooltest.SockNet) (serials []int) {
	for _, p := range n.Server.Peers() {
		serials = append(serials, p.Serial())
	}
	return serials
}

// BETA-05, BETA-31, BETA-33
func TestRunningOutOfHandlesClosesTheOldestIdleConnection(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "unix"} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{})
			p := n.Pool(t, func(c *connpool.Config) { c.MaxOpen = -1 })
			for _, scope := range []int{1, 2, 3, 4, 1} {
				pooltest.Loan(t, p, pooltest.Scoped(n.Addr, scope))
			}
			useUp(t)
			require.Equal(t, 5, pooltest.Loan(t, p, pooltest.Scoped(n.Addr, "new")).Serial)
			patience.Soon(t, "the end of the oldest at the server", func() bool { return n.Server.Open() == 4 })
			require.Equal(t, []int{1, 3, 4, 5}, open(n))
			require.Equal(t, 6, pooltest.Loan(t, p, pooltest.Scoped(n.Addr, "newer")).Serial)
			patience.Soon(t, "the end of the next oldest", func() bool { return n.Server.Open() == 4 })
			require.Equal(t, []int{1, 4, 5, 6}, open(n))
			st := pooltest.Settled(t, p)
			require.Equal(t, map[connpool.CloseReason]uint64{connpool.ClosedEvicted: 2}, st.Closed)
			require.Zero(t, st.DialErrors)
			require.EqualValues(t, 6, st.Dials) // a second try is not a second dial
		})
	}
}

const exhaustByName = "CONNPOOL_TEST_EXHAUST_BY_NAME"

// BETA-05, G-05: without a free handle not even localhost has an address, and
// package net says that there is no such host. A process that has not looked
// up anything yet has no cache that helps.
func TestRunningOutOfHandlesIsSeenThroughTheResolver(t *testing.T) {
	if os.Getenv(exhaustByName) == "" {
		patience.NothingLeaks(t)
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.v", "-test.timeout=1m")
		child.Env = append(os.Environ(), exhaustByName+"=1")
		out, err := child.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "--- PASS: "+t.Name())
		return
	}
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) { c.MaxOpen = -1 })
	for scope := range 8 {
		pooltest.Loan(t, p, pooltest.Scoped(n.Addr, scope))
	}
	useUp(t)

	_, err := net.Dial("tcp", fmt.Sprintf("localhost:%d", n.Server.Port()))
	require.Error(t, err)
	t.Logf("without a pool: %v; is it EMFILE? %v", err, errors.Is(err, syscall.EMFILE))

	byName := n.Addr
	byName.Host = "localhost"
	require.Equal(t, 9, pooltest.Loan(t, p, byName).Serial)
	evicted := pooltest.Settled(t, p).Closed[connpool.ClosedEvicted]
	require.Positive(t, evicted)
	require.LessOrEqual(t, evicted, uint64(4))
	for serial := range 4 { // the newest four have stayed
		require.Contains(t, open(n), 8-serial)
	}
}

// G-05: that is for exhaustion only.
func TestAnUnknownNameEvictsNothing(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, nil)
	pooltest.Loan(t, p, n.Addr)
	var pe *connpool.Error
	require.ErrorAs(t, p.With(t.Context(), unknownName(t, n.Addr), func(connpool.Conn) error { return nil }), &pe)
	require.Equal(t, connpool.KindLookup, pe.Kind)
	require.Equal(t, 1, p.Stats().Idle)
}

// BETA-X05 (resource), BETA-34, BETA-35, BETA-36
func TestNothingRemovableIsAnErrorAndNotTheEnd(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	var asked atomic.Int32
	var free func(int)
	generous := false
	p := n.Pool(t, func(c *connpool.Config) {
		c.MaxOpen = -1
		c.NoneRemovable = func(e *connpool.Error) bool {
			asked.Add(1)
			require.ErrorIs(t, e, connpool.ErrNoneRemovable)
			if generous {
				free(2)
			}
			return generous
		}
	})
	out := []pooltest.Held{pooltest.Hold(t, p, pooltest.Scoped(n.Addr, 1)), pooltest.Hold(t, p, pooltest.Scoped(n.Addr, 2))}
	for _, h := range out {
		_, err := faultnet.Ask(h, faultnet.NewToken())
		require.NoError(t, err)
	}
	free = useUp(t)

	start := time.Now()
	err := p.With(context.Background(), pooltest.Scoped(n.Addr, 3), func(connpool.Conn) error { return nil })
	var pe *connpool.Error
	require.ErrorAs(t, err, &pe)
	require.Equal(t, [...]any{connpool.StageDial, connpool.KindResource}, [...]any{pe.Stage, pe.Kind})
	require.ErrorIs(t, err, connpool.ErrNoneRemovable)
	require.ErrorIs(t, err, syscall.EMFILE)
	require.EqualValues(t, 1, asked.Load())
	require.Less(t, time.Since(start), patience.Bounded/2)
	pooltest.Check(t, p)

	// In use connections were not touched, and when one is given back it
	// makes room.
	for _, h := range out {
		_, err := faultnet.Ask(h, faultnet.NewToken())
		require.NoError(t, err)
	}
	require.NoError(t, out[0].End(nil))
	require.Equal(t, 3, pooltest.Loan(t, p, pooltest.Scoped(n.Addr, 3)).Serial)
	require.EqualValues(t, 1, pooltest.Settled(t, p).Closed[connpool.ClosedEvicted])

	// A hook that frees something gets one more try.
	out[0] = pooltest.Hold(t, p, pooltest.Scoped(n.Addr, 3))
	generous = true
	require.Equal(t, 4, pooltest.Loan(t, p, pooltest.Scoped(n.Addr, 4)).Serial)
	require.EqualValues(t, 2, asked.Load())
	for _, h := range out {
		require.NoError(t, h.End(nil))
	}
}

// The default MaxOpen is what the handle limit leaves, and follows it.
func TestTheHandleLimitIsTheDefaultForMaxOpen(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, nil)
	var was syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was))
	t.Cleanup(func() { require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was)) })
	low := was
	low.Cur = uint64(max(96, highestDescriptor(t)+64))
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low))
	pooltest.Loan(t, p, n.Addr)
	limit := p.Stats().Limit
	require.Less(t, limit, int(low.Cur))
	require.GreaterOrEqual(t, limit, int(low.Cur)*3/4)
}

// BETA-01: asked of the kernel, for every socket of the process.
func TestThePoolNeverListens(t *testing.T) {
	listening := func() (n int) {
		entries, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		for _, e := range entries {
			var fd int
			fmt.Sscan(e.Name(), &fd)
			if yes, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && yes != 0 {
				n++
			}
		}
		return n
	}
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		require.Equal(t, 1, listening(), "the server's own")
		p := n.Pool(t, nil)
		for range 3 {
			h := pooltest.Hold(t, p, n.Addr)
			require.Equal(t, 1, listening())
			require.NoError(t, h.End(nil))
			require.Equal(t, 1, listening())
		}
	})
}

// established says which of the server's connections the client has not ended,
// as the kernel sees it.
func established(n *pooltest.SockNet) map[int]bool {
	live := make(map[int]bool)
	for _, p := range n.Server.Peers() {
		raw, err := p.Conn.(syscall.Conn).SyscallConn()
		if err != nil {
			continue
		}
		raw.Control(func(fd uintptr) {
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil && info.State == unix.BPF_TCP_ESTABLISHED {
				live[p.Serial()] = true
			}
		})
	}
	return live
}

// PLT-12, BETA-X01
func TestTheServerNeverSeesMoreConnectionsThanTheLimit(t *testing.T) {
	const limit = 6
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) { c.MaxOpen = limit })
	stop := chaos(t, n, p, 24)
	most := 0
	for range 150 {
		// A connection never comes back to life: what lives in both looks
		// lived all at once in the time between.
		first, both := established(n), 0
		for serial := range established(n) {
			if first[serial] {
				both++
			}
		}
		most = max(most, both)
		require.LessOrEqual(t, p.Stats().Open, limit)
		n.Server.CutIdle(1, faultnet.RST)
		<-time.After(time.Millisecond)
	}
	stop()
	require.LessOrEqual(t, most, limit)
	require.GreaterOrEqual(t, most, limit/2, "there was no pressure, so nothing was shown")
	require.Equal(t, limit, p.Stats().PeakOpen)
}

// chaos borrows from many goroutines, for several addresses, with failures of
// every kind, until it is told to stop.
func chaos(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, workers int) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{}, workers)
	for w := range workers {
		go func() {
			defer func() { over <- struct{}{} }()
			for i := 0; ctx.Err() == nil; i++ {
				p.With(ctx, pooltest.Scoped(n.Addr, (w+i)%5), func(c connpool.Conn) error {
					if i%7 == 0 {
						return errors.New("no good")
					}
					if _, err := faultnet.Ask(c, faultnet.NewToken()); err != nil {
						return err
					}
					if i%11 == 0 {
						return c.Close()
					}
					return nil
				})
			}
		}()
	}
	return func() {
		cancel()
		for range workers {
			<-over
		}
		pooltest.Settled(t, p)
	}
}

// PLT-01
func TestTheServersOwnLimitIsKeptOrReported(t *testing.T) {
	const limit = 5
	var inside atomic.Int32
	n := pooltest.StartSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) {
		if inside.Add(1) > limit {
			inside.Add(-1)
			fmt.Fprintln(p, "1040 too many connections")
			return
		}
		defer inside.Add(-1)
		fmt.Fprintln(p, "welcome")
		faultnet.Tokens(p)
	}})
	greeted := func(c *connpool.Config) {
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			b := make([]byte, 64)
			k, err := nc.Read(b)
			if err == nil && !strings.HasPrefix(string(b[:k]), "welcome") {
				err = errors.New(strings.TrimSpace(string(b[:k])))
			}
			return nil, err
		}
	}
	swarm := func(p *connpool.Pool) (failed []error) {
		results := make(chan error, 50)
		for range cap(results) {
			go func() {
				results <- p.With(context.Background(), n.Addr, func(c connpool.Conn) error {
					_, err := faultnet.Ask(c, faultnet.NewToken())
					<-time.After(2 * time.Millisecond)
					return err
				})
			}()
		}
		for range cap(results) {
			if err := <-results; err != nil {
				failed = append(failed, err)
			}
		}
		return failed
	}
	t.Run("MaxPerAddr says so", func(t *testing.T) {
		p := n.Pool(t, func(c *connpool.Config) { greeted(c); c.MaxPerAddr = limit })
		require.Empty(t, swarm(p))
		require.LessOrEqual(t, pooltest.Settled(t, p).PeakOpen, limit)
	})
	patience.Soon(t, "the server empty", func() bool { return inside.Load() == 0 })
	t.Run("MaxPerAddr unset", func(t *testing.T) {
		before := patience.OpenDescriptors()
		p := n.Pool(t, greeted)
		failed := swarm(p)
		require.NotEmpty(t, failed, "the server refused nobody")
		for _, err := range failed {
			var pe *connpool.Error
			require.ErrorAs(t, err, &pe)
			require.ErrorContains(t, err, "1040 too many connections")
			require.Contains(t, []connpool.Stage{connpool.StageSetup, connpool.StageBackoff}, pe.Stage)
			require.Equal(t, n.Addr, pe.Addr)
			require.GreaterOrEqual(t, pe.Open, pe.InUse+pe.Idle)
		}
		st := pooltest.Settled(t, p)
		require.LessOrEqual(t, st.Open, limit)
		require.NoError(t, p.Close())
		patience.Soon(t, "no descriptor lost", func() bool { return patience.OpenDescriptors() <= before })
	})
}

// unknownName is an address whose host no resolver knows. Names that end in a
// hyphen are not even asked for, so that no packet leaves the machine.
func unknownName(t *testing.T, a connpool.Addr) connpool.Addr {
	t.Helper()
	was := net.DefaultResolver.PreferGo
	net.DefaultResolver.PreferGo = true
	t.Cleanup(func() { net.DefaultResolver.PreferGo = was })
	a.Host = "nobody-"
	return a
}
