package connpool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Torture: a scenario that touches everything the pool does is run again and
// again, and in the k-th run the k-th call that the pool makes into foreign
// code (dialer, hook, observer, log, callback of crypto/tls, any method of the
// connection, its state or a ctx) goes wrong, in each way in which it can.
// Afterwards nothing may be lost: no slot, waiter, socket, sweep or goroutine (the
// bubble sees to those), the pool must serve everybody, and whoever did it must be
// named. TRY-45

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
	twice  atomic.Int64 // closes of what was closed

	mu   sync.Mutex // guards said
	said strings.Builder
}

// says collects errors, panics and log lines, in which the culprit must be named.
func (x *torture) says(v any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	fmt.Fprintln(&x.said, v)
}

// culprits are the names by which what may be tortured must be told. What runs in
// its borrower's own time, as fn does, needs none where the borrower sees it.
var culprits = map[string]string{
	"dial": "Config.Dialers", "Setup": "Config.Setup", "Reset": "Config.Reset", "Check": "Config.Check", "Push": "Config.Push",
	"NoneRemovable": "Config.NoneRemovable", "TLSFor": "Config.TLSFor", "VerifyConnection": "a callback of tls.Config",
	"GetClientCertificate": "a callback of tls.Config", "VerifyPeerCertificate": "a callback of tls.Config",
	"SetDeadline": "SetDeadline of the connection", "Probe": "Probe", "Close": "Close of the connection",
	"NetConn": "NetConn of the connection", "SyscallConn": "SyscallConn",
	"state.Close": "Close of the state", "state.Buffered": "Buffered of the state",
	"Trace.Wait": "Trace.Wait", "Trace.DialDone": "Trace.DialDone", "Trace.Closed": "Trace.Closed", "Trace.Detached": "Trace.Detached",
	"Trace.Leaked": "Trace.Leaked", "Trace.HeldLong": "Trace.HeldLong",
	"Trace.GetConn": "Trace.GetConn", "Trace.GotConn": "Trace.GotConn", "Trace.PutConn": "Trace.PutConn",
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

// ownTime is call for what runs in its borrower's own time, as fn does: who hangs
// there hangs as long as it does, and nobody else does.
func (x *torture) ownTime(what string) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	x.call(ctx, what)
}

// tortured is a connection each of whose calls may be the one.
type tortured struct {
	*faultnet.Conn
	x    *torture
	once atomic.Bool
}

func (c *tortured) Read(b []byte) (int, error) {
	if err := c.x.call(context.Background(), "Read"); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c *tortured) Write(b []byte) (int, error) {
	if err := c.x.call(context.Background(), "Write"); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *tortured) SetDeadline(t time.Time) error {
	if err := c.x.call(context.Background(), "SetDeadline"); err != nil {
		return err
	}
	return c.Conn.SetDeadline(t)
}

func (c *tortured) Probe() error {
	if err := c.x.call(context.Background(), "Probe"); err != nil {
		return err
	}
	err := c.Conn.Probe()
	if err == faultnet.ErrUnread {
		return ErrUnread
	}
	return err
}

func (c *tortured) LocalAddr() net.Addr {
	if c.x.call(context.Background(), "LocalAddr") != nil {
		return nil
	}
	return c.Conn.LocalAddr()
}

func (c *tortured) RemoteAddr() net.Addr {
	if c.x.call(context.Background(), "RemoteAddr") != nil {
		return nil
	}
	return c.Conn.RemoteAddr()
}

func (c *tortured) NetConn() net.Conn {
	if c.x.call(context.Background(), "NetConn") != nil {
		return nil
	}
	return descriptorless{c.Conn, c.x}
}

// descriptorless is what is below a tortured connection.
type descriptorless struct {
	net.Conn
	x *torture
}

func (c descriptorless) SyscallConn() (syscall.RawConn, error) {
	if err := c.x.call(context.Background(), "SyscallConn"); err != nil {
		return nil, err
	}
	return nil, errors.ErrUnsupported
}

// torturedState is what Setup returns.
type torturedState struct{ x *torture }

func (s *torturedState) Buffered() int {
	s.x.ownTime("state.Buffered")
	return 0
}

func (s *torturedState) Close() error { return s.x.call(context.Background(), "state.Close") }

// torturedLog is a slog.Handler.
type torturedLog struct{ x *torture }

func (h torturedLog) Enabled(context.Context, slog.Level) bool { return true }
func (h torturedLog) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h torturedLog) WithGroup(string) slog.Handler            { return h }
func (h torturedLog) Handle(_ context.Context, r slog.Record) error {
	h.x.says(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "stack" {
			h.x.says(a)
		}
		return true
	})
	return h.x.call(context.Background(), "Logger")
}

func (c *tortured) closeQuietly() {
	c.once.Store(true)
	c.x.closed.Add(1)
	c.Conn.Close()
}

func (c *tortured) Close() error {
	if c.once.CompareAndSwap(false, true) {
		c.x.closed.Add(1)
	} else {
		c.x.twice.Add(1)
	}
	c.Conn.Close() // whatever else happens, the socket is closed
	return c.x.call(context.Background(), "Close")
}

func TestNothingIsLostWhicheverForeignCallFails(t *testing.T) {
	for mode := range numFailures {
		t.Run(mode.String(), func(t *testing.T) {
			hits := make(map[string]int)
			// The brief run tortures one call in forty-eight, in each way others.
			for k := 1 + short.Of(0, int64(mode)*4); ; k += short.Of[int64](1, 48) {
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
	thaw := sync.OnceFunc(func() { close(x.thaw) })
	defer thaw()
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
	ca := faultnet.NewCA()
	server := &tls.Config{Certificates: []tls.Certificate{ca.Server("t")}, ClientAuth: tls.RequestClientCert}
	mem.Host("t").Serve(func(c *faultnet.Conn) {
		tc := tls.Server(c, server)
		io.Copy(tc, tc)
	})
	overTLS := Addr{Transport: TLS, Host: "t", Port: 1}
	none := Addr{Transport: "none", Host: "n"}
	hook := func(what string) func(context.Context, Conn) error {
		return func(ctx context.Context, c Conn) error {
			if err := x.call(ctx, what); err != nil {
				return err
			}
			return echo(c, what)
		}
	}
	dial := func(ctx context.Context, a Addr) (net.Conn, error) {
		if err := x.call(ctx, "dial"); err != nil {
			return nil, err
		}
		nc, err := mem.Dial(ctx, a.Host)
		if err != nil {
			return nil, err
		}
		x.opened.Add(1)
		return &tortured{Conn: nc.(*faultnet.Conn), x: x}, nil
	}
	p, err := New(Config{
		MaxOpen: 3, MaxPerAddr: 2, SweepInterval: 10 * time.Second, CheckAfterIdle: 15 * time.Second, IdleTimeout: time.Minute,
		DialTimeout: time.Second, HookTimeout: time.Second, HoldWarn: 5 * time.Millisecond,
		Dialers: map[Transport]DialFunc{"mem": dial, TCP: dial, none.Transport: func(context.Context, Addr) (net.Conn, error) {
			return nil, os.NewSyscallError("socket", sock.ErrProcessFiles)
		}},
		TLSFor: func(Addr) (*tls.Config, error) {
			if err := x.call(context.Background(), "TLSFor"); err != nil {
				return nil, err
			}
			return &tls.Config{
				RootCAs: ca.Pool(),
				VerifyPeerCertificate: func([][]byte, [][]*x509.Certificate) error {
					return x.call(context.Background(), "VerifyPeerCertificate")
				},
				VerifyConnection: func(tls.ConnectionState) error { return x.call(context.Background(), "VerifyConnection") },
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					return new(tls.Certificate), x.call(context.Background(), "GetClientCertificate")
				},
			}, nil
		},
		Setup: func(ctx context.Context, a Addr, nc net.Conn) (any, error) {
			if err := x.call(ctx, "Setup"); err != nil {
				return nil, err
			}
			return &torturedState{x}, echo(nc, "hello")
		},
		Reset: hook("Reset"),
		Check: hook("Check"),
		Push: func(ctx context.Context, c Conn) error {
			if err := x.call(ctx, "Push"); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1))
			return err
		},
		NoneRemovable: func(*Error) bool { return x.call(context.Background(), "NoneRemovable") == nil },
		Logger:        slog.New(torturedLog{x}),
		Trace: &Trace{
			Wait:     func(WaitInfo) { x.call(context.Background(), "Trace.Wait") },
			DialDone: func(DialInfo) { x.call(context.Background(), "Trace.DialDone") },
			Closed:   func(CloseInfo) { x.call(context.Background(), "Trace.Closed") },
			Detached: func(PutInfo) { x.call(context.Background(), "Trace.Detached") },
			Leaked:   func(HeldInfo) { x.call(context.Background(), "Trace.Leaked") },
			HeldLong: func(HeldInfo) { x.call(context.Background(), "Trace.HeldLong") },
			PutConn:  func(PutInfo) { x.ownTime("Trace.PutConn") },
			GotConn:  func(GotInfo) { x.ownTime("Trace.GotConn") },
			GetConn:  func(Addr) { x.ownTime("Trace.GetConn") },
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
			defer func() { x.says(recover()) }()
			ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
			defer cancel()
			x.says(p.With(ctx, a, fn))
		}()
		<-done
	}
	exchange := func(c Conn) error {
		c.LocalAddr()
		c.RemoteAddr()
		return echo(c, "x")
	}
	for _, a := range []Addr{addrs[0], addrs[0], addrs[1], overTLS, overTLS, addrs[2]} {
		with(context.Background(), a, exchange)
	}
	for _, peer := range mem.Host("c").Conns() { // a message for Push
		peer.Write([]byte("!"))
	}
	with(context.Background(), addrs[2], exchange)
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
	patient, cancel := context.WithTimeout(context.Background(), 100*time.Hour)
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
	for _, part := range []func(context.Context){
		func(patient context.Context) { // a lease, used directly and through Do
			l, err := p.Lease(patient, addrs[0])
			if err != nil {
				return
			}
			defer l.Return()
			l.Do(patient, exchange)
			if x.mode != hangs { // no ctx would end it
				echo(l, "direct")
			}
			l.Do(patient, func(c Conn) error { l.Return(); return exchange(c) })
		},
		func(patient context.Context) { // a session, with a use inside a use, at two addresses
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
		func(patient context.Context) { // a session that ends with its ctx, while it is in use
			parent, cancel := context.WithCancel(patient)
			defer cancel()
			ctx, _ := p.Session(parent)
			p.With(ctx, addrs[2], exchange)
			p.With(ctx, addrs[1], func(c Conn) error { cancel(); return exchange(c) })
		},
		func(patient context.Context) { // one that leaves the pool, and one that is forgotten
			p.With(patient, addrs[2], func(c Conn) error {
				if nc, err := c.Detach(); err == nil {
					nc.(*tortured).closeQuietly() // it is no call of the pool's
				}
				return nil
			})
			if l, err := p.Lease(patient, addrs[2]); err == nil {
				l.cleanup.Stop()
				leakedLease(l.c)
			}
		},
		func(patient context.Context) { x.says(p.With(patient, none, exchange)) }, // out of handles
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { x.says(recover()) }()
			patient, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
			defer cancel()
			part(patient)
		}()
		<-done
	}
	time.Sleep(35 * time.Second) // sweeps, with pings
	p.EvictLRU()
	for range 2 {
		with(context.Background(), overTLS, exchange)
	}
	with(context.Background(), addrs[1], exchange)
	p.Retire(addrs[1])
	time.Sleep(20 * time.Minute) // everything expires, and what hung is over

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
	if hit, _ := x.hit.Load().(string); culprits[hit] != "" && (x.mode == panics || x.mode == exits) {
		x.mu.Lock()
		said := x.said.String()
		if !strings.Contains(said, culprits[hit]) {
			defer x.mu.Unlock()
			return fmt.Errorf("nobody says that it was %s:\n%s", culprits[hit], x.said.String())
		}
		x.mu.Unlock()
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
	thaw()
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
	if n := x.twice.Load(); n > 0 {
		return fmt.Errorf("%d connections were closed twice", n)
	}
	if x.opened.Load() != x.closed.Load() {
		return fmt.Errorf("%d opened, %d closed", x.opened.Load(), x.closed.Load())
	}
	return nil
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
