//go:build linux

package connpool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// File handles run out only in processes of their own, see inChild; what can be
// shown with made-up numbers and errors is shown with those.

// fewHandles lowers the limit of this process, which Go raised at its start.
func fewHandles(t *testing.T, limit uint64) {
	t.Helper()
	var r unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &r))
	r.Cur = limit
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &r))
	now, ok := sock.FileLimit()
	require.True(t, ok)
	require.Equal(t, int(limit), now, "the pool sees the limit of the moment")
}

// hoard takes handles, all that there are if max is negative.
type hoard []int

func (h *hoard) take(max int) error {
	for ; max != 0; max-- {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		*h = append(*h, fd)
	}
	return nil
}

func (h *hoard) release(n int) {
	for range min(n, len(*h)) {
		unix.Close((*h)[len(*h)-1])
		*h = (*h)[:len(*h)-1]
	}
}

// BETA-05
func TestPressureFollowsTheNumberOfTheNewestDescriptor(t *testing.T) {
	for _, c := range []struct {
		limit, low, critical int // the first number at which it is so
		reserve              int
	}{
		{64, 54, 58, 16},
		{256, 240, 248, 32},
		{1024, 960, 992, 128},
		{20_000, 18_750, 19_375, 2500},
		{20, 10, 14, 10},
		{4, 0, 0, 2},
		{1, 0, 0, 0},
	} {
		require.Equal(t, c.reserve, reserveOf(c.limit), "limit %d", c.limit)
		for fd := range c.limit {
			want := handlesPlenty
			switch {
			case fd >= c.critical:
				want = handlesCritical
			case fd >= c.low:
				want = handlesLow
			}
			require.Equal(t, want, pressureAt(uintptr(fd), c.limit), "number %d of %d", fd, c.limit)
		}
		require.Equal(t, handlesCritical, pressureAt(uintptr(c.limit+5), c.limit), "the limit was lowered below what is open")
	}
}

// BETA-05, BETA-31, BETA-32
func TestLowHandlesStopKeepingAndCriticalOnesCostOneIdleForEachNew(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{NoProbe: true}) // or the made-up numbers would be watched
	p.sys.handleLimit = func() (int, bool) { return 64, true }
	ctx := context.Background()
	visit := func(host string, fd uintptr) error {
		f.mu.Lock()
		f.next = fd
		f.mu.Unlock()
		err := p.With(ctx, fakeAddr(host), func(c Conn) error { return echo(c, host) })
		require.NoError(t, err)
		require.Eventually(t, func() bool { return p.Stats().Closing == 0 }, time.Minute, time.Millisecond)
		p.check(t)
		return err
	}
	idle := func(want ...string) {
		t.Helper()
		var here []string
		for a, s := range p.Addrs() {
			if s.Idle > 0 {
				here = append(here, a.Host)
			}
		}
		require.ElementsMatch(t, want, here)
	}
	visit("used", 9)
	require.NoError(t, p.With(ctx, fakeAddr("used"), func(c Conn) error {
		visit("a", 10)
		visit("b", 11)
		visit("c", 12)
		visit("a", 0) // idle: no dial
		idle("a", "b", "c")

		visit("d", 54)
		idle("a", "b", "c")
		require.Equal(t, uint64(1), p.Stats().Closed[ClosedLowHandles], "what is given back is not kept")
		visit("b", 0)
		idle("a", "c")
		require.Equal(t, uint64(2), p.Stats().Closed[ClosedLowHandles], "whichever it is")

		visit("e", 58)
		idle("a")
		require.Equal(t, uint64(4), p.Stats().Closed[ClosedLowHandles], "the new one, and the least recently used")
		visit("g", 60)
		idle()
		visit("h", 60)
		require.Equal(t, uint64(7), p.Stats().Closed[ClosedLowHandles], "one in use is never touched")

		visit("i", 20) // somebody released handles
		visit("k", 21)
		idle("i", "k")
		return echo(c, "undisturbed")
	}))
	idle("i", "k", "used")

	unlimited := f.pool(t, Config{NoProbe: true, MaxOpen: -1})
	unlimited.sys.handleLimit = func() (int, bool) { return 64, true }
	f.mu.Lock()
	f.next = 62
	f.mu.Unlock()
	require.NoError(t, unlimited.With(ctx, fakeAddr("a"), func(Conn) error { return nil }))
	require.Equal(t, 1, unlimited.Stats().Idle, "MaxOpen < 0 switches the budget off")
}

func TestABorrowerWhoWaitsIsServedUnderLowHandles(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{NoProbe: true, MaxPerAddr: 1})
	p.sys.handleLimit = func() (int, bool) { return 64, true }
	f.next = 60
	ctx := context.Background()
	next := make(chan error, 1)
	require.NoError(t, p.With(ctx, fakeAddr("a"), func(Conn) error {
		go func() { next <- p.With(ctx, fakeAddr("a"), func(c Conn) error { return echo(c, "x") }) }()
		require.Eventually(t, func() bool { return p.Stats().Waiting == 1 }, time.Minute, time.Millisecond)
		return nil
	}))
	require.NoError(t, <-next)
	require.Equal(t, uint64(1), p.Stats().Dials, "the connection that somebody waits for is not closed")
	p.check(t)
}

// The limit of the process is looked at by every dial.
func TestMaxOpenFollowsTheLimitOnHandles(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{NoProbe: true})
	var limit atomic.Int64
	p.sys.handleLimit = func() (int, bool) { return int(limit.Load()), limit.Load() > 0 }
	for i, want := range [][2]int{{0, 0}, {64, 48}, {1 << 20, 1<<20 - 1<<17}, {2, 1}, {0, 0}} {
		limit.Store(int64(want[0]))
		require.NoError(t, p.With(context.Background(), fakeAddr("h"+strconv.Itoa(i)), func(Conn) error { return nil }))
		require.Equal(t, want[1], p.Stats().Limit)
	}
	require.Equal(t, int64(math.MaxInt), p.handles.Load())
}

func dialFails(errno syscall.Errno) error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", errno)}
}

// starved is a pool whose dials fail with err while it is set.
func starved(t *testing.T, cfg Config) (p *Pool, err *atomic.Pointer[error], dials *atomic.Int64) {
	f := newFakeSystem(t)
	p = f.pool(t, cfg)
	err, dials = new(atomic.Pointer[error]), new(atomic.Int64)
	p.sys.dial = func(ctx context.Context, a Addr) (net.Conn, error) {
		dials.Add(1)
		if e := err.Load(); e != nil {
			return nil, *e
		}
		return f.dial(ctx, a)
	}
	p.sys.noHandleFree = func() bool { return err.Load() != nil }
	return p, err, dials
}

func visitAll(t *testing.T, p *Pool, hosts ...string) {
	t.Helper()
	for _, host := range hosts {
		require.NoError(t, p.With(context.Background(), fakeAddr(host), func(c Conn) error { return echo(c, host) }))
	}
}

// BETA-35, BETA-36
func TestPermanentExhaustionIsTriedOncePerConnectionRemoved(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE} {
		t.Run(errno.Error(), func(t *testing.T) {
			p, fails, dials := starved(t, Config{})
			visitAll(t, p, "a", "b", "c", "d", "e")
			err := dialFails(errno)
			fails.Store(&err)
			for round := range 5 { // nor does it make the address back off
				before := dials.Load()
				removed := uint64(p.Stats().Idle)
				got := p.With(context.Background(), fakeAddr("new"), func(Conn) error { panic("with what?") })
				var e *Error
				require.ErrorAs(t, got, &e)
				require.Equal(t, StageDial, e.Stage)
				require.Equal(t, KindResource, e.Kind)
				require.ErrorIs(t, got, ErrNoneRemovable)
				require.ErrorIs(t, got, errno)
				require.ErrorContains(t, got, "limit on open files")
				require.LessOrEqual(t, uint64(dials.Load()-before), removed+1)
				require.Equal(t, []uint64{5, 0, 0, 0, 0}[round], removed)
				require.Equal(t, 0, p.Stats().Open)
				p.check(t)
			}
			require.Equal(t, uint64(5), p.Stats().Closed[ClosedEvicted])
			fails.Store(nil)
			visitAll(t, p, "new", "a")
		})
	}
}

// BETA-34, BETA-35
func TestWithEverythingInUseExhaustionEndsSoonAndLeavesThePoolUsable(t *testing.T) {
	p, fails, dials := starved(t, Config{})
	err := dialFails(syscall.EMFILE)
	ctx := context.Background()
	require.NoError(t, p.With(ctx, fakeAddr("a"), func(c Conn) error {
		_, found := p.EvictLRU()
		require.False(t, found)
		fails.Store(&err)
		before, began := dials.Load(), time.Now()
		got := p.With(ctx, fakeAddr("b"), func(Conn) error { return nil })
		require.ErrorIs(t, got, ErrNoneRemovable)
		require.LessOrEqual(t, dials.Load()-before, int64(8), "a few tries in handlePatience, no loop")
		require.Less(t, time.Since(began), bounded/2)

		// The caller's own time counts meanwhile.
		quickOnce(t, handlePatience, func() {
			hasty, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			require.ErrorIs(t, p.With(hasty, fakeAddr("b"), func(Conn) error { return nil }), context.DeadlineExceeded)
		})
		require.Equal(t, 1, p.Stats().InUse)
		return echo(c, "undisturbed")
	}))
	fails.Store(nil)
	visitAll(t, p, "b", "a")
	p.check(t)
}

// BETA-05, BETA-35
func TestADialWithoutAHandleTakesThatOfTheNextReturn(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{})
	tried := make(chan struct{}, 16)
	p.sys.noHandleFree = func() bool { return p.Stats().Closed[ClosedEvicted] == 0 }
	p.sys.dial = func(ctx context.Context, a Addr) (net.Conn, error) {
		if a.Host == "b" && p.Stats().Closed[ClosedEvicted] == 0 {
			tried <- struct{}{}
			return nil, dialFails(syscall.EMFILE)
		}
		return f.dial(ctx, a)
	}
	ctx := context.Background()
	got := make(chan error, 1)
	require.NoError(t, p.With(ctx, fakeAddr("a"), func(c Conn) error {
		go func() { got <- p.With(ctx, fakeAddr("b"), func(c Conn) error { return echo(c, "b") }) }()
		<-tried
		return echo(c, "a")
	}))
	require.NoError(t, <-got)
	closedSoon(t, p, map[CloseReason]uint64{ClosedEvicted: 1})
	p.check(t)
}

// BETA-34, BETA-X06
func TestNoneRemovableIsAskedOnceAndItsYesIsOneMoreTry(t *testing.T) {
	for name, c := range map[string]struct {
		answer, frees bool
		dials         int64
		works         bool
	}{
		"no":                  {false, false, 1, false},
		"no, though it could": {false, true, 1, false},
		"yes, in vain":        {true, false, 2, false},
		"yes":                 {true, true, 2, true},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			exhausted := dialFails(syscall.EMFILE)
			free := func() {}
			p, fails, dials := starved(t, Config{NoneRemovable: func(e *Error) bool {
				asked++
				require.ErrorIs(t, e, ErrNoneRemovable)
				require.ErrorIs(t, e, syscall.EMFILE)
				require.Equal(t, KindResource, e.Kind)
				require.Equal(t, "a", e.Addr.Host)
				if c.frees {
					free()
				}
				return c.answer
			}})
			free = func() { fails.Store(nil) }
			fails.Store(&exhausted)
			ran := false
			err := p.With(context.Background(), fakeAddr("a"), func(Conn) error { ran = true; return nil })
			require.Equal(t, 1, asked)
			require.Equal(t, c.works, ran)
			require.Equal(t, c.dials, dials.Load())
			if !c.works {
				require.ErrorIs(t, err, ErrNoneRemovable)
			} else {
				require.NoError(t, err)
			}
			p.check(t)
		})
	}
}

// A truly unknown name is no want of handles.
//
// G-05
func TestATrulyUnknownNameEvictsNothing(t *testing.T) {
	p, fails, dials := starved(t, Config{})
	p.sys.noHandleFree = sock.NoFileFree
	visitAll(t, p, "a", "b")
	var err error = &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "nowhere.invalid", IsNotFound: true}}
	fails.Store(&err)
	before := dials.Load()
	got := p.With(context.Background(), fakeAddr("nowhere.invalid"), func(Conn) error { return nil })
	require.Equal(t, KindLookup, KindOf(got))
	require.NotErrorIs(t, got, ErrNoneRemovable)
	require.Equal(t, before+1, dials.Load())
	require.Equal(t, 2, p.Stats().Idle)

	p.sys.noHandleFree = func() bool { return true }
	got = p.With(context.Background(), fakeAddr("nowhere.invalid"), func(Conn) error { return nil })
	require.ErrorIs(t, got, ErrNoneRemovable, "without a handle nobody can say that the name is unknown")
	require.Equal(t, KindResource, KindOf(got))
	require.Equal(t, before+4, dials.Load())
	p.check(t)
}

// When NoneRemovable has made room, an unknown name is an unknown name again.
func TestAnUnknownNameEvictsNothingWhenRoomWasMadeForIt(t *testing.T) {
	entered, leave, left := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var fails *atomic.Pointer[error]
	unknown := error(&net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "nowhere.invalid", IsNotFound: true}})
	p, f, _ := starved(t, Config{NoneRemovable: func(*Error) bool {
		close(leave)
		<-left // there is an idle connection now
		fails.Store(&unknown)
		return true
	}})
	fails = f
	p.sys.noHandleFree = func() bool { e := fails.Load(); return e != nil && *e != unknown }
	go func() {
		defer close(left)
		p.With(context.Background(), fakeAddr("a"), func(c Conn) error {
			close(entered)
			<-leave
			return echo(c, "a")
		})
	}()
	<-entered
	err := dialFails(syscall.EMFILE)
	fails.Store(&err)
	got := p.With(context.Background(), fakeAddr("nowhere.invalid"), func(Conn) error { return nil })
	require.Equal(t, KindLookup, KindOf(got), got)
	require.NotErrorIs(t, got, ErrNoneRemovable)
	require.Equal(t, 1, p.Stats().Idle)
	p.check(t)
}

// BETA-X05
func TestExhaustedLocalPortsAreTheirOwnErrorAndEvictNothing(t *testing.T) {
	p, fails, dials := starved(t, Config{})
	visitAll(t, p, "a", "b")
	var err error = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.EADDRNOTAVAIL)}
	fails.Store(&err)
	before := dials.Load()
	for range 5 {
		got := p.With(context.Background(), fakeAddr("c"), func(Conn) error { return nil })
		require.ErrorIs(t, got, syscall.EADDRNOTAVAIL)
		require.Equal(t, KindResource, KindOf(got))
		require.ErrorContains(t, got, "no local port is left")
		require.NotErrorIs(t, got, ErrNoneRemovable)
	}
	require.Equal(t, before+5, dials.Load(), "each once, and no back-off: the peer is not to blame")
	require.Equal(t, 2, p.Stats().Idle)
	p.check(t)
}

// BETA-05, BETA-33, G-06: real handles, and the server says who was closed.
func TestOutOfHandlesTheLeastRecentlyUsedMakeRoomInExactOrder(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr {
		return map[string]Addr{"tcp": startNamed(t, TCP, "tcp", "127.0.0.1").addr}
	})
	if !child {
		return
	}
	control, err := net.Dial("tcp4", net.JoinHostPort(peers["tcp"].Host, strconv.Itoa(int(peers["tcp"].Port))))
	require.NoError(t, err)
	p, err := New(Config{MaxOpen: -1, SweepInterval: -1}) // no other limit than the system's
	require.NoError(t, err)
	defer p.Close()
	serials := make(map[int]string) // by address
	visit := func(i int) {
		t.Helper()
		addr := peers["tcp"]
		addr.Scope = strconv.Itoa(i)
		require.NoError(t, p.With(context.Background(), addr, func(c Conn) error {
			reply, err := enquire(c, "x")
			serials[i] = strings.Fields(reply + " ? ?")[1]
			return err
		}))
		p.check(t)
	}
	const room = 12
	visit(0) // with the watcher
	fewHandles(t, 64)
	var rest hoard
	require.ErrorIs(t, rest.take(-1), syscall.EMFILE)
	rest.release(room - 1)
	for i := range room {
		visit(i)
	}
	require.Equal(t, room, p.Stats().Idle)
	require.Zero(t, p.Stats().Closed[ClosedEvicted])
	require.ErrorIs(t, new(hoard).take(1), syscall.EMFILE)

	order := rand.Perm(room)
	for _, i := range order {
		visit(i)
	}
	var want []string
	for k, i := range order {
		want = append(want, serials[i])
		visit(1000 + k)
		require.Equal(t, room, p.Stats().Open)
		soon(t, "the server sees "+strings.Join(want, ","), func() bool {
			reply, err := enquire(control, "gone?")
			require.NoError(t, err)
			return strings.HasSuffix(reply, " "+strings.Join(want, ","))
		})
	}
	closedSoon(t, p, map[CloseReason]uint64{ClosedEvicted: room})
}

// G-05: without a free handle the name cannot even be looked up, and package net
// says that there is no such host.
func TestExhaustionHiddenBehindTheLookupOfANameEvicts(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr {
		return map[string]Addr{"tcp": startNamed(t, TCP, "tcp", "127.0.0.1").addr}
	})
	if !child {
		return
	}
	p, err := New(Config{MaxOpen: -1, SweepInterval: -1})
	require.NoError(t, err)
	defer p.Close()
	for i := range 8 {
		addr := peers["tcp"]
		addr.Scope = strconv.Itoa(i)
		require.NoError(t, p.With(context.Background(), addr, func(c Conn) error { return askNamed(c, "tcp") }))
	}
	fewHandles(t, 64)
	var rest hoard
	require.ErrorIs(t, rest.take(-1), syscall.EMFILE)

	byName := peers["tcp"]
	byName.Host = "localhost"
	_, err = (&net.Dialer{}).Dial("tcp4", net.JoinHostPort("localhost", strconv.Itoa(int(byName.Port))))
	t.Logf("what package net says: %v", err)
	require.Error(t, err)
	require.NoError(t, p.With(context.Background(), byName, func(c Conn) error { return askNamed(c, "tcp") }))
	st := p.Stats()
	require.GreaterOrEqual(t, st.Closed[ClosedEvicted], uint64(1))
	require.Greater(t, st.Idle, 1, "no more than it needs")
	p.check(t)
}

// BETA-05, BETA-32, G-06
func TestAThousandAddressesUnderSixtyFourHandlesNeverFailACaller(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr {
		peers := make(map[string]Addr)
		for i := range 4 {
			n := strconv.Itoa(i)
			peers["tcp"+n] = startNamed(t, TCP, "tcp"+n, "127.0.0."+strconv.Itoa(10+i)).addr
			peers["tls"+n] = startNamed(t, TLS, "tls"+n, "127.0.0."+strconv.Itoa(10+i)).addr
		}
		return peers
	})
	if !child {
		return
	}
	span := short.Of(3*time.Second, 200*time.Millisecond)
	if stress() > 1 {
		span = time.Minute
	}
	fewHandles(t, 64)
	for _, hoarded := range []int{0, 30} {
		t.Run(fmt.Sprintf("%d hoarded", hoarded), func(t *testing.T) { stormHandles(t, peers, span, hoarded) })
	}
}

// stormHandles has many callers visit many more addresses than there are
// handles. With a hoarder, who takes handles and gives them back, others in the
// process may find none; callers of the pool never do.
func stormHandles(t *testing.T, peers map[string]Addr, span time.Duration, hoarded int) {
	before := descriptorsOpen(t)
	p := newWatched(t, Config{})
	ctx, cancel := context.WithTimeout(context.Background(), span)
	defer cancel()
	var (
		all    tasks.Group
		served atomic.Int64
		opened atomic.Int64
		failed = make(chan error, 1)
	)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
		cancel()
	}
	var names []string
	for name := range peers {
		names = append(names, name)
	}
	const least = 200 // loans, however busy the machine
	for range 200 {
		all.Go(func() {
			for ctx.Err() == nil || served.Load() <= least && len(failed) == 0 {
				i := rand.N(1000)
				name := names[i%len(names)]
				addr := peers[name]
				addr.Scope = strconv.Itoa(i)
				one, done := context.WithTimeout(context.Background(), bounded)
				err := p.With(one, addr, func(c Conn) error {
					for range 2 {
						if err := askNamed(c, name); err != nil {
							return fmt.Errorf("a connection in use: %w", err)
						}
					}
					return nil
				})
				done()
				if err != nil {
					fail(err)
					return
				}
				served.Add(1)
			}
		})
	}
	all.Go(func() { // the rest of the process
		for ctx.Err() == nil {
			var h hoard
			if err := h.take(1); err == nil {
				opened.Add(1)
			} else if hoarded == 0 {
				fail(fmt.Errorf("elsewhere in the process: %w", err))
			}
			h.release(1)
		}
	})
	if hoarded > 0 {
		all.Go(func() {
			var h hoard
			for ctx.Err() == nil {
				h.take(rand.N(hoarded - len(h) + 1)) // as many as there are
				wait := time.NewTimer(rand.N(20 * time.Millisecond))
				select {
				case <-wait.C:
				case <-ctx.Done():
				}
				h.release(rand.N(len(h) + 1))
			}
			h.release(len(h))
		})
	}
	all.Wait()
	select {
	case err := <-failed:
		t.Fatalf("%v; %v; closed %v", err, p.Stats(), p.Stats().Closed)
	default:
	}
	p.check(t)
	st := p.Stats()
	t.Logf("%d loans, %d opened elsewhere, peak %d of %d, closed %v", served.Load(), opened.Load(), st.PeakOpen, st.Limit, st.Closed)
	require.Equal(t, 48, st.Limit)
	require.LessOrEqual(t, st.PeakOpen, 48)
	require.Greater(t, served.Load(), int64(least))
	require.Greater(t, st.Closed[ClosedEvicted]+st.Closed[ClosedLowHandles], uint64(100), "there was pressure")
	for reason := range st.Closed {
		require.Contains(t, []CloseReason{ClosedEvicted, ClosedLowHandles}, reason)
	}
	require.NoError(t, p.Close())
	soon(t, "all handles are back", func() bool { return descriptorsOpen(t) <= before })
}

// TRY-14: a want of handles that is told when there are handles in plenty.
func TestAWantOfHandlesThatIsOverEvictsOneConnectionAtMost(t *testing.T) {
	stale := x509.SystemRootsError{Err: &fs.PathError{Op: "open", Path: "/etc/ssl/certs", Err: syscall.EMFILE}}
	for name, c := range map[string]struct {
		dial, tlsFor, verify error
		evicted              int
	}{
		"a dialer's, put aside":       {stale, nil, nil, 0},
		"a dialer's, wrapped":         {fmt.Errorf("as before: %w", dialFails(syscall.EMFILE)), nil, nil, 0},
		"a dialer's, as it was":       {dialFails(syscall.EMFILE), nil, nil, 1},
		"TLSFor":                      {nil, stale, nil, 0},
		"TLSFor, as from the system":  {nil, dialFails(syscall.ENFILE), nil, 0},
		"the verification":            {nil, nil, stale, 0},
		"the verification, an errno":  {nil, nil, syscall.EMFILE, 0},
		"a key that cannot be opened": {nil, &fs.PathError{Op: "open", Path: "/key", Err: syscall.EMFILE}, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ca := faultnet.NewCA()
			srv, err := faultnet.Start(faultnet.Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{ca.Server("localhost")}}})
			require.NoError(t, err)
			defer srv.Close()
			plain, err := faultnet.Start(faultnet.Options{})
			require.NoError(t, err)
			defer plain.Close()
			verifying := &tls.Config{RootCAs: ca.Pool(), VerifyConnection: func(tls.ConnectionState) error { return c.verify }}
			cfg := Config{
				TLS:     verifying,
				Dialers: map[Transport]DialFunc{"mine": func(context.Context, Addr) (net.Conn, error) { return nil, c.dial }},
			}
			if c.tlsFor != nil {
				cfg.TLSFor = func(Addr) (*tls.Config, error) { return nil, c.tlsFor }
			}
			p, err := New(cfg)
			require.NoError(t, err)
			defer p.Close()
			for i := range 8 {
				loan(t, p, scoped(Addr{Transport: TCP, Host: plain.Host(), Port: plain.Port()}, i))
			}
			to := Addr{Transport: TLS, Host: srv.Host(), Port: srv.Port(), ServerName: "localhost"}
			if c.dial != nil {
				to = Addr{Transport: "mine", Host: "h"}
			}
			got := p.With(bg, to, func(Conn) error { return nil })
			require.Error(t, got)
			require.NotErrorIs(t, got, ErrNoneRemovable, "handles are there")
			require.EqualValues(t, c.evicted, p.Stats().Closed[ClosedEvicted], "%v", got)
			require.Equal(t, 8-c.evicted, p.Stats().Idle)
			p.check(t)
		})
	}
}

// TRY-14: the first certificate that is verified in the life of a process comes
// when handles are gone, and the next ones when they are back.
func TestATLSDialWithoutAHandleSpoilsNoLaterOne(t *testing.T) {
	peers, child := inChild(t, func() map[string]Addr {
		srv, err := faultnet.Start(faultnet.Options{Network: "tls"})
		require.NoError(t, err)
		t.Cleanup(srv.Close)
		return map[string]Addr{
			"tls": {Transport: TLS, Host: srv.Host(), Port: srv.Port(), ServerName: "localhost"},
			"tcp": startNamed(t, TCP, "tcp", "127.0.0.1").addr,
		}
	})
	if !child {
		return
	}
	p, err := New(Config{MaxOpen: -1})
	require.NoError(t, err)
	defer p.Close()
	visit := func(to string) error {
		return p.With(bg, peers[to], func(c Conn) error { _, err := enquire(c, "x"); return err })
	}
	require.NoError(t, visit("tcp")) // with the watcher
	p.CloseIdle()
	before, _ := sock.FileLimit()
	fewHandles(t, 64)
	var rest hoard
	require.ErrorIs(t, rest.take(-1), syscall.EMFILE)
	for left := range 4 {
		rest.release(min(left, 1))
		require.Error(t, visit("tls"))
	}
	fewHandles(t, uint64(before))
	require.NoError(t, visit("tcp"))
	for range 2 {
		err := visit("tls")
		var unknown x509.UnknownAuthorityError
		require.ErrorAs(t, err, &unknown, "the roots are there, and this server is none of theirs: %v", err)
		require.Zero(t, p.Stats().Closed[ClosedEvicted])
	}
}
