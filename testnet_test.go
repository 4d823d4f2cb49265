package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// memory is the transport of testnet's hosts.
const memory Transport = "mem"

func at(host string) Addr { return Addr{Transport: memory, Host: host} }

var bg = context.Background()

// testnet is a network in memory and a pool that dials into it. What it made
// is checked and taken down at the end of the test.
type testnet struct {
	*faultnet.Mem
	t testing.TB
	p *Pool

	dialing, peakDialing atomic.Int64

	mu        sync.Mutex // guards what follows
	dialed    []*faultnet.Conn
	borrowers []*scripted
}

// bubble runs f in a synctest bubble. Its end proves that no goroutine is left.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func newTestnet(t testing.TB) *testnet {
	return &testnet{t: t, Mem: faultnet.NewMem()}
}

// open makes the pool. A dialer for memory is added if cfg has none.
func open(t testing.TB, cfg Config) *testnet {
	t.Helper()
	return newTestnet(t).open(cfg)
}

func (n *testnet) open(cfg Config) *testnet {
	n.t.Helper()
	if cfg.Dialers[memory] == nil {
		dialers := map[Transport]DialFunc{memory: n.dial}
		for tr, d := range cfg.Dialers {
			dialers[tr] = d
		}
		cfg.Dialers = dialers
	}
	p, err := New(cfg)
	require.NoError(n.t, err)
	n.p = p
	hangs := time.AfterFunc(forever, func() { panic("the test hangs") })
	n.t.Cleanup(func() {
		hangs.Stop()
		n.takeDown()
	})
	return n
}

// dial is the DialFunc of memory.
func (n *testnet) dial(ctx context.Context, addr Addr) (net.Conn, error) {
	now := n.dialing.Add(1)
	defer n.dialing.Add(-1)
	for peak := n.peakDialing.Load(); now > peak && !n.peakDialing.CompareAndSwap(peak, now); {
		peak = n.peakDialing.Load()
	}
	nc, err := n.Mem.Dial(ctx, addr.Host)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dialed = append(n.dialed, nc.(*faultnet.Conn))
	return nc, nil
}

// takeDown ends whatever the test left, and checks that the pool leaves nothing.
func (n *testnet) takeDown() {
	n.mu.Lock()
	borrowers := n.borrowers
	n.mu.Unlock()
	for _, b := range borrowers {
		b.quit()
	}
	ctx, cancel := context.WithTimeout(bg, time.Minute)
	defer cancel()
	err := n.p.Shutdown(ctx)
	for _, b := range borrowers {
		<-b.done
	}
	n.Mem.Close()
	settleBubble()
	if n.t.Failed() {
		return
	}
	require.NoError(n.t, err)
	n.check()
	st := n.p.Stats()
	require.Zero(n.t, st.Open, "open at the end: %v", st)
	require.Zero(n.t, st.Addrs, "books at the end: %v", st)
	require.Zero(n.t, st.Unprobed)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.dialed {
		require.True(n.t, c.Closed(), "connection %v was dialed, and never closed", c.LocalAddr())
	}
}

// settleBubble lets every goroutine of a bubble run until it blocks. Elsewhere
// it does nothing.
func settleBubble() {
	defer func() { _ = recover() }()
	synctest.Wait()
}

// check is Pool.check and, from outside, that no connection got lost: those
// opened less those gone are those open.
func (n *testnet) check() {
	n.t.Helper()
	n.p.check(n.t)
	st := n.p.Stats()
	require.Equal(n.t, st.Open, st.Dialing+st.Idle+st.InUse+st.Closing)
	closed := st.Detached
	for _, k := range st.Closed {
		closed += k
	}
	require.Equal(n.t, st.Open, int(st.Dials-st.DialErrors-closed), "%v %v", st, st.Closed) // TRY-53
}

// gauges checks what the pool is when all that is under way has come to rest.
func (n *testnet) gauges(inUse, idle, waiting int) {
	n.t.Helper()
	settleBubble()
	st := n.p.Stats()
	require.Equal(n.t, [3]int{inUse, idle, waiting}, [3]int{st.InUse, st.Idle, st.Waiting}, "in use, idle, waiting")
}

// closed checks how often connections were closed, by reason. The close of a foreign connection
// has a goroutine of its own.
func (n *testnet) closed(want map[CloseReason]uint64) {
	n.t.Helper()
	settleBubble()
	require.Equal(n.t, want, n.p.Stats().Closed)
}

// forever ends a test that would hang otherwise: a bubble in which a timer is
// left, as that of the sweep, does not notice.
const forever = 1000 * time.Hour

type reasons = map[CloseReason]uint64

// who names the connection behind c as its host does: "host#1" is the first
// that the host accepted.
func who(c Conn) string { return c.LocalAddr().String() }

// peer is the other end of c.
func (n *testnet) peer(c Conn) *faultnet.Conn {
	n.t.Helper()
	host, _, _ := strings.Cut(who(c), "#")
	for _, s := range n.Host(host).Conns() {
		if s.RemoteAddr().String() == who(c) {
			return s
		}
	}
	n.t.Fatalf("%s has no other end", who(c))
	return nil
}

// use borrows once, and says which connection it was.
func (n *testnet) use(addr Addr) string {
	n.t.Helper()
	var name string
	require.NoError(n.t, n.p.With(bg, addr, func(c Conn) error {
		name = who(c)
		return nil
	}))
	return name
}

// idle makes k idle connections of addr.
func (n *testnet) idle(addr Addr, k int) {
	n.t.Helper()
	var held []*scripted
	for range k {
		b := n.borrow(bg, addr)
		b.conn()
		held = append(held, b)
	}
	for _, b := range held {
		require.NoError(n.t, b.giveBack())
	}
}

// fail borrows, and gives the error of a With that must not run its fn.
func (n *testnet) fail(ctx context.Context, addr Addr) *Error {
	n.t.Helper()
	err := n.p.With(ctx, addr, func(Conn) error {
		n.t.Error("fn ran")
		return nil
	})
	var pe *Error
	require.ErrorAs(n.t, err, &pe)
	return pe
}

// scripted is a borrower: a goroutine in With. Its fn blocks until it is told how to end.
type scripted struct {
	got  chan Conn
	name string // of its connection, see who; readable after conn
	end  chan func(Conn) error
	done chan struct{} // With has ended

	// Readable when done is closed.
	err      error
	panicked any // what came out of With instead of err
	exited   bool
}

// borrow starts a borrower. It does not wait for it.
func (n *testnet) borrow(ctx context.Context, addr Addr) *scripted {
	b := &scripted{got: make(chan Conn, 1), end: make(chan func(Conn) error, 1), done: make(chan struct{})}
	n.mu.Lock()
	n.borrowers = append(n.borrowers, b)
	n.mu.Unlock()
	go func() {
		defer close(b.done)
		b.exited = true
		defer func() {
			if b.panicked = recover(); b.panicked != nil {
				b.exited = false
			}
		}()
		b.err = n.p.With(ctx, addr, func(c Conn) error {
			b.name = who(c)
			b.got <- c
			return (<-b.end)(c)
		})
		b.exited = false
	}()
	return b
}

// queue starts k borrowers, one after another, that have to wait.
func (n *testnet) queue(k int, addr Addr) []*scripted {
	n.t.Helper()
	var bs []*scripted
	for range k {
		b := n.borrow(bg, addr)
		synctest.Wait()
		require.True(n.t, b.waits())
		bs = append(bs, b)
	}
	return bs
}

// conn waits until fn runs.
func (b *scripted) conn() Conn {
	select {
	case c := <-b.got:
		b.got <- c
		return c
	case <-b.done:
		panic(fmt.Sprintf("With ended without running fn: %v %v\n%s", b.err, b.panicked, debug.Stack()))
	case <-time.After(forever):
		panic("With has neither run fn nor ended")
	}
}

// holds reports whether fn is running.
func (b *scripted) holds() bool { return len(b.got) == 1 && !b.ended() }

// waits reports whether With has neither run fn nor ended.
func (b *scripted) waits() bool { return len(b.got) == 0 && !b.ended() }

func (b *scripted) ended() bool {
	select {
	case <-b.done:
		return true
	default:
		return false
	}
}

// finish makes fn end with how, and gives what With returned.
func (b *scripted) finish(how func(Conn) error) error {
	b.end <- how
	return b.result()
}

func (b *scripted) giveBack() error { return b.finish(func(Conn) error { return nil }) }

// result waits until With returns.
func (b *scripted) result() error {
	select {
	case <-b.done:
	case <-time.After(forever):
		panic("With has not ended")
	}
	return b.err
}

// quit makes fn return as soon as it runs, whatever else it was told.
func (b *scripted) quit() {
	select {
	case b.end <- func(Conn) error { return nil }:
	default:
	}
}

var errBoom = errors.New("boom")

func discard(Conn) error { return errBoom }

var (
	echoLines = faultnet.EchoLines
	askLine   = faultnet.AskLine
)

type journal = faultnet.Journal

// strange is a connection whose Close and Probe may be replaced.
type strange struct {
	*faultnet.Conn
	close func() error
	probe func() error
}

func (s *strange) Close() error {
	if s.close != nil {
		return s.close()
	}
	return s.Conn.Close()
}

func (s *strange) Probe() error {
	if s.probe != nil {
		return s.probe()
	}
	return s.Conn.Probe()
}

// wrapped is a dialer of memory whose connections go through wrap.
func (n *testnet) wrapped(wrap func(*faultnet.Conn) net.Conn) map[Transport]DialFunc {
	return map[Transport]DialFunc{memory: func(ctx context.Context, addr Addr) (net.Conn, error) {
		nc, err := n.dial(ctx, addr)
		if err != nil {
			return nil, err
		}
		return wrap(nc.(*faultnet.Conn)), nil
	}}
}

// hangingClose wraps connections whose Close blocks until never is closed.
func hangingClose(never <-chan struct{}) func(*faultnet.Conn) net.Conn {
	return func(c *faultnet.Conn) net.Conn {
		return &strange{Conn: c, close: func() error { <-never; return c.Close() }}
	}
}

// sweepAll makes a sweep, and waits for what it has started: the examinations that
// need an owner.
func sweepAll(p *Pool) {
	p.sweep()
	for {
		p.mu.Lock()
		lookers := p.examiners
		p.mu.Unlock()
		if lookers == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
