package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// Torture: a scenario that touches everything the pool does is run again and
// again, and in the k-th run the k-th call that the pool makes into foreign
// code (dialer, hook, any method of the connection) goes wrong, in each way in
// which it can. Afterwards nothing may be lost: no slot, waiter, socket or
// goroutine (the bubble sees to those), and the pool must serve everybody.

type failure int

const (
	returnsError failure = iota
	panics
	exits
	hangs // for good, if nothing interrupts it
	numFailures
)

func (f failure) String() string { return [...]string{"error", "panic", "goexit", "hang"}[f] }

var errTorture = errors.New("torture")

type torture struct {
	mode   failure
	target atomic.Int64 // fails the call of this number
	calls  atomic.Int64
	hit    atomic.Value  // what was hit
	thaw   chan struct{} // ends what hangs
	opened atomic.Int64
	closed atomic.Int64
}

// call is where every foreign call passes. ctx interrupts a call that hangs, if
// it is one that must honour it.
func (x *torture) call(ctx context.Context, what string) error {
	if x.calls.Add(1) != x.target.Load() {
		return nil
	}
	x.hit.Store(what)
	switch x.mode {
	case panics:
		panic(errTorture)
	case exits:
		runtime.Goexit()
	case hangs:
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-x.thaw:
		}
	}
	return errTorture
}

// tortured is a connection each of whose calls may be the one.
type tortured struct {
	*faultnet.Conn
	x    *torture
	once atomic.Bool
}

func (c *tortured) Read(b []byte) (int, error) {
	if c.x.mode != hangs { // a Read that ignores its deadline is beyond what net.Conn allows
		if err := c.x.call(context.Background(), "Read"); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(b)
}

func (c *tortured) Write(b []byte) (int, error) {
	if c.x.mode != hangs {
		if err := c.x.call(context.Background(), "Write"); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(b)
}

func (c *tortured) SetDeadline(t time.Time) error {
	if c.x.mode != hangs && c.x.mode != exits {
		if err := c.x.call(context.Background(), "SetDeadline"); err != nil {
			return err
		}
	}
	return c.Conn.SetDeadline(t)
}

func (c *tortured) Probe() error {
	if c.x.mode != hangs && c.x.mode != exits { // Probe must not block
		if err := c.x.call(context.Background(), "Probe"); err != nil {
			return err
		}
	}
	return c.Conn.Probe()
}

func (c *tortured) Close() error {
	if c.once.CompareAndSwap(false, true) {
		c.x.closed.Add(1)
	}
	c.Conn.Close() // whatever else happens, the socket is closed
	return c.x.call(context.Background(), "Close")
}

func TestNothingIsLostWhicheverForeignCallFails(t *testing.T) {
	for mode := range numFailures {
		t.Run(mode.String(), func(t *testing.T) {
			hits := make(map[string]int)
			for k := int64(1); ; k++ {
				x := &torture{mode: mode}
				x.target.Store(k)
				var err error
				synctest.Test(t, func(t *testing.T) { err = x.run() })
				if err != nil {
					t.Fatalf("call %d (%v) failed by %v: %v", k, x.hit.Load(), mode, err)
				}
				if x.hit.Load() == nil {
					t.Logf("%d calls tortured: %v", k-1, hits)
					if k < 30 {
						t.Fatalf("the scenario makes only %d calls", k-1)
					}
					return
				}
				hits[x.hit.Load().(string)]++
			}
		})
	}
}

func (x *torture) run() error {
	x.thaw = make(chan struct{})
	mem := faultnet.NewMem()
	defer mem.Close()
	var addrs []Addr
	for _, name := range []string{"a", "b", "c"} {
		mem.Host(name).Serve(func(c *faultnet.Conn) {
			b := make([]byte, 64)
			for {
				n, err := c.Read(b)
				if err != nil {
					return
				}
				if _, err := c.Write(b[:n]); err != nil {
					return
				}
			}
		})
		addrs = append(addrs, Addr{Transport: "mem", Host: name})
	}
	hook := func(what string) func(context.Context, Conn) error {
		return func(ctx context.Context, c Conn) error {
			if err := x.call(ctx, what); err != nil {
				return err
			}
			return echo(c, what)
		}
	}
	p, err := New(Config{
		MaxOpen: 3, MaxPerAddr: 2, CheckInterval: 10 * time.Second, TrustIdle: 15 * time.Second, IdleTimeout: time.Minute,
		DialTimeout: time.Second, HookTimeout: time.Second, HoldWarn: 5 * time.Millisecond,
		Dialers: map[Transport]DialFunc{"mem": func(ctx context.Context, a Addr) (net.Conn, error) {
			if err := x.call(ctx, "dial"); err != nil {
				return nil, err
			}
			nc, err := mem.Dial(ctx, a.Host)
			if err != nil {
				return nil, err
			}
			x.opened.Add(1)
			return &tortured{Conn: nc.(*faultnet.Conn), x: x}, nil
		}},
		Setup: func(ctx context.Context, a Addr, nc net.Conn) (any, error) {
			if err := x.call(ctx, "Setup"); err != nil {
				return nil, err
			}
			return nil, echo(nc, "hello")
		},
		Reset: hook("Reset"),
		Check: hook("Check"),
		Trace: &Trace{
			Wait:     func(WaitInfo) { x.observed("Trace.Wait") },
			DialDone: func(DialInfo) { x.observed("Trace.DialDone") },
			Closed:   func(CloseInfo) { x.observed("Trace.Closed") },
			PutConn:  func(PutInfo) { x.observed("Trace.PutConn") },
			GotConn:  func(GotInfo) { x.observed("Trace.GotConn") },
			GetConn:  func(Addr) { x.observed("Trace.GetConn") },
			HeldLong: func(HeldInfo) { x.observed("Trace.HeldLong") },
		},
	})
	if err != nil {
		return err
	}

	// The scenario. Its calls of With may fail, panic or end their goroutine
	// where the torture does; they may not hang, nor harm each other.
	with := func(ctx context.Context, a Addr, fn func(Conn) error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { recover() }()
			p.With(ctx, a, fn)
		}()
		<-done
	}
	exchange := func(c Conn) error { return echo(c, "x") }
	for _, a := range []Addr{addrs[0], addrs[0], addrs[1], addrs[2]} {
		with(context.Background(), a, exchange)
	}
	impatient, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	with(impatient, addrs[0], func(c Conn) error { // interrupted
		_, err := c.Read(make([]byte, 1))
		return err
	})
	cancel()
	// Two hold what there may be for one address; four more queue, one of
	// them in vain; a fifth needs room that only an eviction makes.
	release := make(chan struct{})
	over := make(chan struct{}, 8)
	patient, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	for i := range 6 {
		ctx := patient
		if i == 4 {
			var stop context.CancelFunc
			ctx, stop = context.WithTimeout(patient, time.Millisecond)
			defer stop()
		}
		go func() {
			defer func() { over <- struct{}{} }()
			with(ctx, addrs[0], func(c Conn) error { <-release; return exchange(c) })
		}()
		synctest.Wait()
	}
	with(patient, addrs[1], exchange)
	with(patient, addrs[2], exchange)
	time.Sleep(10 * time.Millisecond)
	close(release)
	for range 6 {
		<-over
	}
	for _, part := range []func(){
		func() { // a lease, used directly and through Do
			l, err := p.Lease(patient, addrs[0])
			if err != nil {
				return
			}
			defer l.Return()
			l.Do(patient, exchange)
			echo(l, "direct")
			l.Do(patient, func(c Conn) error { l.Return(); return exchange(c) })
		},
		func() { // a session, with a use inside a use, at two addresses
			ctx, end := p.Session(patient)
			defer end()
			for range 2 {
				p.With(ctx, addrs[0], func(c Conn) error {
					p.With(patient, addrs[1], exchange)
					inner, cancel := context.WithTimeout(ctx, time.Minute)
					defer cancel()
					if err := p.With(inner, addrs[0], exchange); err != nil {
						return err
					}
					return exchange(c)
				})
			}
			p.With(ctx, addrs[1], exchange)
		},
		func() { // a session that ends with its ctx, while it is in use
			parent, cancel := context.WithCancel(patient)
			defer cancel()
			ctx, _ := p.Session(parent)
			p.With(ctx, addrs[2], exchange)
			p.With(ctx, addrs[1], func(c Conn) error { cancel(); return exchange(c) })
		},
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { recover() }()
			part()
		}()
		<-done
	}
	time.Sleep(35 * time.Second) // sweeps, with pings
	p.EvictLRU()
	with(context.Background(), addrs[1], exchange)
	p.Retire(addrs[1])
	time.Sleep(2 * time.Minute) // everything expires

	if err := p.inconsistency(); err != nil {
		return err
	}
	if n := p.inSession.Load(); n != 0 {
		return fmt.Errorf("%d sessions have not ended", n)
	}
	if err := p.holdsInconsistency(); err != nil {
		return err
	}
	if st := p.Stats(); st.InUse != 0 || st.Dialing != 0 || st.Waiting != 0 || st.Closing != 0 {
		return fmt.Errorf("something is lost: %v", st)
	}
	// All slots are there, at once.
	x.target.Store(-1)
	full := make(chan error, 3)
	hold := make(chan struct{})
	for _, a := range []Addr{addrs[0], addrs[0], addrs[1]} {
		go func() {
			full <- p.With(patient, a, func(c Conn) error {
				<-hold
				return exchange(c)
			})
		}()
	}
	synctest.Wait()
	if st := p.Stats(); st.InUse != 3 {
		return fmt.Errorf("three should be in use: %v", st)
	}
	close(hold)
	for range 3 {
		if err := <-full; err != nil {
			return fmt.Errorf("the pool is not usable: %w", err)
		}
	}
	close(x.thaw)
	if err := p.Shutdown(patient); err != nil {
		return err
	}
	synctest.Wait()
	if err := p.inconsistency(); err != nil {
		return err
	}
	if st := p.Stats(); st.Open != 0 || st.Addrs != 0 {
		return fmt.Errorf("left over: %v", st)
	}
	if x.opened.Load() != x.closed.Load() {
		return fmt.Errorf("%d opened, %d closed", x.opened.Load(), x.closed.Load())
	}
	return nil
}

// observed is a Trace function that fails. It cannot return an error, and must
// not block.
func (x *torture) observed(what string) {
	if x.mode == panics {
		x.call(context.Background(), what)
	}
}

func echo(c net.Conn, text string) error {
	if _, err := c.Write([]byte(text)); err != nil {
		return err
	}
	b := make([]byte, len(text))
	for got := 0; got < len(b); {
		n, err := c.Read(b[got:])
		if err != nil {
			return err
		}
		got += n
	}
	if string(b) != text {
		return fmt.Errorf("sent %q, got %q", text, b)
	}
	return nil
}
