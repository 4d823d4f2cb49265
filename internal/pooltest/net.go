package pooltest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Memory is the transport of the hosts of a Net.
const Memory connpool.Transport = "mem"

// At is an address of a Net's host.
func At(host string) connpool.Addr { return connpool.Addr{Transport: Memory, Host: host} }

// Net is a network in memory and a pool that dials into it. What it made
// is checked and taken down at the end of the test.
type Net struct {
	*faultnet.Mem
	T    testing.TB
	Pool *connpool.Pool

	Dialing, PeakDialing atomic.Int64

	mu        sync.Mutex // guards what follows
	dialed    []*faultnet.Conn
	borrowers []*Borrower
}

// Bubble runs f in a synctest bubble. Its end proves that no goroutine is left.
func Bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// NewNet is for a test that makes the pool later, with Open.
func NewNet(t testing.TB) *Net {
	return &Net{T: t, Mem: faultnet.NewMem()}
}

// Open makes the pool. A dialer for Memory is added if cfg has none.
func Open(t testing.TB, cfg connpool.Config) *Net {
	t.Helper()
	return NewNet(t).Open(cfg)
}

// Open makes the pool, as the function Open does.
func (n *Net) Open(cfg connpool.Config) *Net {
	n.T.Helper()
	if cfg.Dialers[Memory] == nil {
		dialers := map[connpool.Transport]connpool.DialFunc{Memory: n.DialAddr}
		for tr, d := range cfg.Dialers {
			dialers[tr] = d
		}
		cfg.Dialers = dialers
	}
	p, err := New(cfg)
	require.NoError(n.T, err)
	n.Pool = p
	hangs := time.AfterFunc(Forever, func() { panic("the test hangs") })
	n.T.Cleanup(func() {
		hangs.Stop()
		n.takeDown()
	})
	return n
}

// DialAddr is the DialFunc of Memory.
func (n *Net) DialAddr(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
	now := n.Dialing.Add(1)
	defer n.Dialing.Add(-1)
	for peak := n.PeakDialing.Load(); now > peak && !n.PeakDialing.CompareAndSwap(peak, now); {
		peak = n.PeakDialing.Load()
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
func (n *Net) takeDown() {
	n.mu.Lock()
	borrowers := n.borrowers
	n.mu.Unlock()
	for _, b := range borrowers {
		b.Quit()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := n.Pool.Shutdown(ctx)
	for _, b := range borrowers {
		<-b.Done
	}
	n.Mem.Close()
	SettleBubble()
	if n.T.Failed() {
		return
	}
	require.NoError(n.T, err)
	n.Check()
	st := n.Pool.Stats()
	require.Zero(n.T, st.Open, "open at the end: %v", st)
	require.Zero(n.T, st.Addrs, "books at the end: %v", st)
	require.Zero(n.T, st.Unprobed)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.dialed {
		require.True(n.T, c.Closed(), "connection %v was dialed, and never closed", c.LocalAddr())
	}
}

// SettleBubble lets every goroutine of a bubble run until it blocks. Elsewhere
// it does nothing.
func SettleBubble() {
	defer func() { _ = recover() }()
	synctest.Wait()
}

// Check looks into the books and, from outside, that no connection got lost: those
// opened less those gone are those open.
func (n *Net) Check() {
	n.T.Helper()
	Check(n.T, n.Pool)
	st := n.Pool.Stats()
	require.Equal(n.T, st.Open, st.Dialing+st.Idle+st.InUse+st.Closing)
	closed := st.Detached
	for _, k := range st.Closed {
		closed += k
	}
	require.Equal(n.T, st.Open, int(st.Dials-st.DialErrors-closed), "%v %v", st, st.Closed) // TRY-53
}

// Gauges checks what the pool is at the moment.
func (n *Net) Gauges(inUse, idle, waiting int) {
	n.T.Helper()
	st := n.Pool.Stats()
	require.Equal(n.T, [3]int{inUse, idle, waiting}, [3]int{st.InUse, st.Idle, st.Waiting}, "in use, idle, waiting")
}

// Closed checks how often connections were closed, by reason.
func (n *Net) Closed(want map[connpool.CloseReason]uint64) {
	n.T.Helper()
	require.Equal(n.T, want, n.Pool.Stats().Closed)
}

// Forever ends a test that would hang otherwise: a bubble in which a timer is
// left, as that of the sweep, does not notice.
const Forever = 1000 * time.Hour

// Who names the connection behind c as its host does: "host#1" is the first
// that the host accepted.
func Who(c connpool.Conn) string { return c.LocalAddr().String() }

// Use borrows once, and says which connection it was.
func (n *Net) Use(addr connpool.Addr) string {
	n.T.Helper()
	var name string
	require.NoError(n.T, n.Pool.With(context.Background(), addr, func(c connpool.Conn) error {
		name = Who(c)
		return nil
	}))
	return name
}

// Idle makes k idle connections of addr.
func (n *Net) Idle(addr connpool.Addr, k int) {
	n.T.Helper()
	var held []*Borrower
	for range k {
		b := n.Borrow(context.Background(), addr)
		b.Conn()
		held = append(held, b)
	}
	for _, b := range held {
		require.NoError(n.T, b.GiveBack())
	}
}

// Borrower is a borrower: a goroutine in With. Its fn blocks until it is told how to end.
type Borrower struct {
	Got  chan connpool.Conn
	Name string // of its connection, see Who; readable after Conn
	End  chan func(connpool.Conn) error
	Done chan struct{} // With has ended

	// Readable when Done is closed.
	Err      error
	Panicked any // what came out of With instead of Err
	Exited   bool
}

// Borrow starts a borrower. It does not wait for it.
func (n *Net) Borrow(ctx context.Context, addr connpool.Addr) *Borrower {
	b := &Borrower{Got: make(chan connpool.Conn, 1), End: make(chan func(connpool.Conn) error, 1), Done: make(chan struct{})}
	n.mu.Lock()
	n.borrowers = append(n.borrowers, b)
	n.mu.Unlock()
	go func() {
		defer close(b.Done)
		b.Exited = true
		defer func() {
			if b.Panicked = recover(); b.Panicked != nil {
				b.Exited = false
			}
		}()
		b.Err = n.Pool.With(ctx, addr, func(c connpool.Conn) error {
			b.Name = Who(c)
			b.Got <- c
			return (<-b.End)(c)
		})
		b.Exited = false
	}()
	return b
}

// Queue starts k borrowers, one after another, that have to wait.
func (n *Net) Queue(k int, addr connpool.Addr) []*Borrower {
	n.T.Helper()
	var bs []*Borrower
	for range k {
		b := n.Borrow(context.Background(), addr)
		synctest.Wait()
		require.True(n.T, b.Waits())
		bs = append(bs, b)
	}
	return bs
}

// Conn waits until fn runs.
func (b *Borrower) Conn() connpool.Conn {
	select {
	case c := <-b.Got:
		b.Got <- c
		return c
	case <-b.Done:
		panic(fmt.Sprintf("With ended without running fn: %v %v\n%s", b.Err, b.Panicked, debug.Stack()))
	case <-time.After(Forever):
		panic("With has neither run fn nor ended")
	}
}

// Holds reports whether fn is running.
func (b *Borrower) Holds() bool { return len(b.Got) == 1 && !b.Ended() }

// Waits reports whether With has neither run fn nor ended.
func (b *Borrower) Waits() bool { return len(b.Got) == 0 && !b.Ended() }

// Ended reports whether With has returned.
func (b *Borrower) Ended() bool {
	select {
	case <-b.Done:
		return true
	default:
		return false
	}
}

// Finish makes fn end with how, and gives what With returned.
func (b *Borrower) Finish(how func(connpool.Conn) error) error {
	b.End <- how
	return b.Result()
}

// GiveBack makes fn return nil, and gives what With returned.
func (b *Borrower) GiveBack() error { return b.Finish(func(connpool.Conn) error { return nil }) }

// Result waits until With returns.
func (b *Borrower) Result() error {
	select {
	case <-b.Done:
	case <-time.After(Forever):
		panic("With has not ended")
	}
	return b.Err
}

// Quit makes fn return as soon as it runs, whatever else it was told.
func (b *Borrower) Quit() {
	select {
	case b.End <- func(connpool.Conn) error { return nil }:
	default:
	}
}

// ErrBoom is an error that is nobody else's.
var ErrBoom = errors.New("boom")
