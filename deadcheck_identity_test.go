package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// Here the logic of identity is tested on every system, by a pool whose system
// calls are made up: sockets are numbers, and what a number means is a table.

// fakeSystem is the table.
type fakeSystem struct {
	mem *faultnet.Mem

	mu     sync.Mutex // guards what follows
	next   uintptr
	stolen map[uintptr]bool // the number means another socket than it did
	socks  []*fakeSock
	peeks  map[uintptr]int
	looks  int // identities asked for, first or again
}

// fakeSock is a connection in memory that claims to have a descriptor.
type fakeSock struct {
	net.Conn
	sys *fakeSystem
	fd  uintptr

	mu     sync.Mutex // guards what follows
	closed bool
	wrong  []string // what was done to the descriptor after it had become a stranger's
}

// fakeNumber is where the made-up numbers begin: beyond any real one, for the
// real system calls that tests leave in place must not hit anything.
const fakeNumber = 1 << 30

func newFakeSystem(t testing.TB) *fakeSystem {
	f := &fakeSystem{mem: faultnet.NewMem(), next: fakeNumber, stolen: make(map[uintptr]bool), peeks: make(map[uintptr]int)}
	t.Cleanup(f.mem.Close)
	return f
}

// pool makes a pool on the made-up system.
func (f *fakeSystem) pool(t testing.TB, cfg Config) *Pool {
	t.Helper()
	p, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { p.Close() })
	p.sys = &system{
		dial: f.dial,
		identify: func(uintptr) (sock.ID, bool) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.looks++
			return *new(sock.ID), true
		},
		stillIs: func(fd uintptr, _ sock.ID) bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.looks++
			return !f.stolen[fd]
		},
		peek: func(fd uintptr) sock.Seen {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.peeks[fd]++
			if f.stolen[fd] {
				panic("a stranger's socket was looked into")
			}
			return sock.Seen{}
		},
		readNow:      func(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported },
		handleLimit:  func() (int, bool) { return 0, false },
		noHandleFree: func() bool { return false },
	}
	p.handles.refresh(p.sys)
	return p
}

func (f *fakeSystem) dial(ctx context.Context, a Addr) (net.Conn, error) {
	f.mem.Host(a.Host).Serve(func(c *faultnet.Conn) {
		b := make([]byte, 64)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			c.Write(b[:n])
		}
	})
	nc, err := f.mem.Dial(ctx, a.Host)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &fakeSock{Conn: nc, sys: f, fd: f.next}
	f.next++
	f.socks = append(f.socks, s)
	return s, nil
}

// steal makes the number of s a stranger's.
func (f *fakeSystem) steal(s *fakeSock) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stolen[s.fd] = true
}

func (f *fakeSystem) sock(i int) *fakeSock {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.socks[i]
}

// touch notes what is done to the descriptor.
func (s *fakeSock) touch(what string) {
	s.sys.mu.Lock()
	stolen := s.sys.stolen[s.fd]
	s.sys.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if stolen {
		s.wrong = append(s.wrong, what)
	}
	s.closed = s.closed || what == "Close"
}

func (s *fakeSock) Read(b []byte) (int, error)  { s.touch("Read"); return s.Conn.Read(b) }
func (s *fakeSock) Write(b []byte) (int, error) { s.touch("Write"); return s.Conn.Write(b) }
func (s *fakeSock) Close() error                { s.touch("Close"); return s.Conn.Close() }

func (s *fakeSock) SyscallConn() (syscall.RawConn, error) { return fakeRaw{s}, nil }

func (s *fakeSock) state() (closed bool, wrong []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed, s.wrong
}

type fakeRaw struct{ s *fakeSock }

func (r fakeRaw) Control(f func(uintptr)) error { f(r.s.fd); return nil }
func (fakeRaw) Read(func(uintptr) bool) error   { return errors.ErrUnsupported }
func (fakeRaw) Write(func(uintptr) bool) error  { return errors.ErrUnsupported }

func fakeAddr(host string) Addr { return Addr{Transport: TCP, Host: host, Port: 1} }

var errVerdict = errors.New("verdict")

// BETA-25, BETA-26, G-01: whatever the pool is about to do with a connection, it
// finds the theft first and does nothing to the descriptor.
func TestEachStepFindsTheTheftBeforeItTouchesTheDescriptor(t *testing.T) {
	home := fakeAddr("home")
	ctx := context.Background()
	use := func(p *Pool) error {
		return p.With(ctx, home, func(c Conn) error { return echo(c, "mine") })
	}
	type world struct {
		p   *Pool
		f   *fakeSystem
		rob func() // steals the first connection
	}
	idleSteps := map[string]func(t *testing.T, w world){
		"loan":      func(t *testing.T, w world) { require.NoError(t, use(w.p)) },
		"EvictLRU":  func(t *testing.T, w world) { w.p.EvictLRU() },
		"make room": func(t *testing.T, w world) { w.p.With(ctx, fakeAddr("other"), func(Conn) error { return nil }) },
		"sweep":     func(t *testing.T, w world) { sweepAll(w.p) },
		"expiry": func(t *testing.T, w world) {
			w.p.clock.Read = func() time.Time { return time.Now().Add(time.Hour) }
			sweepAll(w.p)
		},
		"Retire":    func(t *testing.T, w world) { w.p.Retire(home) },
		"CloseIdle": func(t *testing.T, w world) { w.p.CloseIdle() },
		"Close":     func(t *testing.T, w world) { require.NoError(t, w.p.Close()) },
		"Shutdown":  func(t *testing.T, w world) { require.NoError(t, w.p.Shutdown(ctx)) },
	}
	for name, step := range idleSteps {
		for _, check := range []string{"", " with Check"} {
			t.Run("idle, "+name+check, func(t *testing.T) {
				f := newFakeSystem(t)
				cfg := Config{MaxOpen: 1}
				if check != "" {
					cfg.CheckAfterIdle = -1
					cfg.Check = func(_ context.Context, c Conn) error { return echo(c, "ping") }
				}
				p := f.pool(t, cfg)
				require.NoError(t, use(p))
				f.steal(f.sock(0))
				step(t, world{p: p, f: f})
				closed, wrong := f.sock(0).state()
				require.False(t, closed)
				require.Empty(t, wrong)
				require.Equal(t, uint64(1), p.Stats().Closed[ClosedQuarantined])
				p.check(t)
				require.NoError(t, p.Close())
				closed, _ = f.sock(0).state()
				require.False(t, closed)
			})
		}
	}
	loanSteps := map[string]func(w world, ctx context.Context, c Conn) error{
		"nil, then close":   func(w world, _ context.Context, c Conn) error { w.rob(); return nil },
		"Keep, then close":  func(w world, _ context.Context, c Conn) error { w.rob(); return Keep(errVerdict) },
		"error":             func(w world, _ context.Context, c Conn) error { w.rob(); return errVerdict },
		"panic":             func(w world, _ context.Context, c Conn) error { w.rob(); panic(errVerdict) },
		"Goexit":            func(w world, _ context.Context, c Conn) error { w.rob(); runtime.Goexit(); return nil },
		"Conn.Close":        func(w world, _ context.Context, c Conn) error { w.rob(); c.Close(); return nil },
		"ctx done":          func(w world, ctx context.Context, c Conn) error { w.rob(); <-ctx.Done(); return ctx.Err() },
		"closed meanwhile":  func(w world, _ context.Context, c Conn) error { w.rob(); w.p.Close(); return nil },
		"retired meanwhile": func(w world, _ context.Context, c Conn) error { w.rob(); w.p.Retire(home); return nil },
	}
	for name, fn := range loanSteps {
		for _, reset := range []bool{false, true} {
			t.Run(fmt.Sprintf("borrowed, %s, Reset=%v", name, reset), func(t *testing.T) {
				f := newFakeSystem(t)
				cfg := Config{MaxOpen: 1}
				if reset {
					cfg.Reset = func(_ context.Context, c Conn) error { return echo(c, "reset") }
				}
				p := f.pool(t, cfg)
				w := world{p, f, func() { f.steal(f.sock(0)) }}
				done := make(chan struct{})
				go func() {
					defer close(done)
					defer func() { recover() }()
					ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
					if name != "ctx done" {
						ctx, cancel = context.WithCancel(context.Background())
					}
					defer cancel()
					p.With(ctx, home, func(c Conn) error {
						if err := echo(c, "mine"); err != nil {
							return err
						}
						return fn(w, ctx, c)
					})
				}()
				<-done
				if reset {
					require.Equal(t, uint64(1), p.Stats().Closed[ClosedQuarantined], "found when it is given back")
				}
				p.CloseIdle()
				require.Equal(t, uint64(1), p.Stats().Closed[ClosedQuarantined])
				require.Equal(t, 0, p.Stats().Open)
				closed, wrong := f.sock(0).state()
				require.False(t, closed)
				require.Empty(t, wrong)
				p.check(t)
			})
		}
	}
	for _, outcome := range []error{nil, errVerdict} {
		t.Run(fmt.Sprintf("in Setup, which returns %v", outcome), func(t *testing.T) {
			f := newFakeSystem(t)
			first := true
			p := f.pool(t, Config{MaxOpen: 1, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				if err := echo(nc, "login"); err != nil || !first {
					return nil, err
				}
				first = false
				f.steal(f.sock(0))
				return nil, outcome
			}})
			err := use(p)
			if outcome != nil {
				require.ErrorIs(t, err, outcome)
			}
			closed, wrong := f.sock(0).state()
			require.False(t, closed)
			require.Empty(t, wrong)
			soon(t, "the stolen one in quarantine", func() bool { return p.Stats().Closed[ClosedQuarantined] == 1 })
			require.NoError(t, use(p))
			p.check(t)
		})
	}
}

// G-01: a look into the socket comes after the proof that it is ours; the table
// above panics otherwise. That the proof is asked for at each loan, and not when
// it is switched off, is counted here.
func TestIdentityIsAskedAtEachLoanUnlessSwitchedOff(t *testing.T) {
	for _, off := range []bool{false, true} {
		f := newFakeSystem(t)
		p := f.pool(t, Config{NoFDCheck: off})
		home := fakeAddr("home")
		for range 10 {
			require.NoError(t, p.With(context.Background(), home, func(c Conn) error { return echo(c, "x") }))
		}
		f.mu.Lock()
		if off {
			require.Zero(t, f.looks)
		} else {
			require.GreaterOrEqual(t, f.looks, 10)
		}
		require.GreaterOrEqual(t, f.peeks[fakeNumber], 9, "the other look is not switched off with it")
		f.mu.Unlock()
		require.Equal(t, uint64(1), p.Stats().Dials)
		p.check(t)
	}
}

// The socket of a system that tells nothing about it is taken for itself.
func TestASocketWithoutIdentityIsLentByItsLook(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{})
	p.sys.identify = func(uintptr) (sock.ID, bool) { return *new(sock.ID), false }
	p.sys.stillIs = func(uintptr, sock.ID) bool { panic("there is nothing to compare") }
	for range 3 {
		require.NoError(t, p.With(context.Background(), fakeAddr("home"), func(c Conn) error { return echo(c, "x") }))
	}
	require.Equal(t, uint64(1), p.Stats().Dials)
	require.NoError(t, p.Close())
	closed, _ := f.sock(0).state()
	require.True(t, closed)
}

// BETA-28: the pool's own dial gets the number of a connection that a borrower
// has just been promised.
func TestDisownedBetweenTheLookAndTheLoanIsStillStolen(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{})
	ctx := context.Background()
	home, other := fakeAddr("home"), fakeAddr("other")
	require.NoError(t, p.With(ctx, home, func(c Conn) error { return echo(c, "mine") }))
	look := p.sys.peek
	p.sys.peek = func(fd uintptr) sock.Seen {
		seen := look(fd)
		p.sys.peek = look
		f.mu.Lock()
		f.next = fd // closed behind the pool's back just now
		f.mu.Unlock()
		require.NoError(t, p.With(ctx, other, func(c Conn) error { return echo(c, "other's") }))
		f.steal(f.sock(0))
		return seen
	}
	p.With(ctx, home, func(c Conn) error { return echo(c, "mine") })
	p.sys.stillIs = func(uintptr, sock.ID) bool { return true } // of the second, whose number is the same
	closed, wrong := f.sock(0).state()
	require.Empty(t, wrong)
	require.False(t, closed)
	require.Equal(t, uint64(1), p.Stats().Closed[ClosedQuarantined])
	p.check(t)
}

// BETA-25: what is somebody else's cannot be taken away from them either.
func TestAStolenConnectionCannotBeDetached(t *testing.T) {
	f := newFakeSystem(t)
	p := f.pool(t, Config{})
	require.NoError(t, p.With(context.Background(), fakeAddr("home"), func(c Conn) error {
		f.steal(f.sock(0))
		nc, err := c.Detach()
		require.Nil(t, nc)
		require.ErrorIs(t, err, errStolen)
		return nil
	}))
	closed, wrong := f.sock(0).state()
	require.Empty(t, wrong)
	require.False(t, closed)
	st := p.Stats()
	require.Equal(t, uint64(1), st.Closed[ClosedQuarantined])
	require.Zero(t, st.Open)
	require.Zero(t, st.Detached)
	p.check(t)
}

// BETA-23, BETA-27
func TestMarkDeadGoesByNumberAndByIdentity(t *testing.T) {
	var a, b sock.ID
	if !twoSockets(t, &a, &b) || a == b {
		t.Skip("this system does not tell two sockets apart")
	}
	f := newFakeSystem(t)
	p := f.pool(t, Config{})
	who := make(map[uintptr]sock.ID)
	p.sys.identify = func(fd uintptr) (sock.ID, bool) { return who[fd], true }
	p.sys.stillIs = func(fd uintptr, id sock.ID) bool { return who[fd] == id }
	ctx := context.Background()
	who[fakeNumber], who[fakeNumber+1] = a, b
	for _, host := range []string{"one", "two"} {
		require.NoError(t, p.With(ctx, fakeAddr(host), func(c Conn) error { return echo(c, host) }))
	}
	require.Equal(t, 2, p.Stats().Idle)

	// The same socket under another number: the pool closes its own.
	elsewhere := &fakeSock{sys: f, fd: fakeNumber + 100}
	who[elsewhere.fd] = a
	require.Equal(t, 1, p.MarkDead(elsewhere))
	at := func(open int) func() bool { return func() bool { return p.Stats().Open == open } }
	require.Eventually(t, at(1), time.Minute, time.Millisecond) // a foreign connection is closed beside
	require.Equal(t, map[CloseReason]uint64{ClosedMarkedDead: 1}, p.Stats().Closed)
	closed, _ := f.sock(0).state()
	require.True(t, closed)
	require.Equal(t, 0, p.MarkDead(elsewhere))
	p.check(t)

	// Another socket under the same number: the pool touches nothing.
	thief := &fakeSock{sys: f, fd: fakeNumber + 1}
	who[thief.fd] = a
	require.Equal(t, 1, p.MarkDead(thief))
	require.Equal(t, map[CloseReason]uint64{ClosedMarkedDead: 1, ClosedQuarantined: 1}, p.Stats().Closed)
	closed, _ = f.sock(1).state()
	require.False(t, closed)
	require.Equal(t, 0, p.MarkDead(thief))
	p.check(t)

	// A borrowed one goes when it is given back, by closing the pool's own
	// descriptor.
	who[fakeNumber+2] = b
	elsewhere.fd = fakeNumber + 101
	who[elsewhere.fd] = b
	require.NoError(t, p.With(ctx, fakeAddr("three"), func(c Conn) error {
		require.Equal(t, 1, p.MarkDead(elsewhere))
		require.Equal(t, 1, p.Stats().InUse)
		return nil
	}))
	require.Equal(t, 0, p.Stats().Idle)
	require.Eventually(t, at(0), time.Minute, time.Millisecond)
	closed, _ = f.sock(2).state()
	require.True(t, closed)
	p.check(t)

	// Nothing to say about a connection without a descriptor, or nobody.
	require.Equal(t, 0, p.MarkDead(nil))
	require.Equal(t, 0, p.MarkDead(noDescriptor{}))
	require.Equal(t, 0, new(Pool).MarkDead(thief))
	require.NoError(t, p.Close())
	require.Equal(t, 0, p.MarkDead(thief))
}

type noDescriptor struct{}

func (noDescriptor) SyscallConn() (syscall.RawConn, error) { return nil, errors.ErrUnsupported }

// twoSockets finds two identities that differ.
func twoSockets(t *testing.T, a, b *sock.ID) bool {
	t.Helper()
	ok := true
	for _, id := range []*sock.ID{a, b} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return false
		}
		defer ln.Close()
		raw, err := ln.(*net.TCPListener).SyscallConn()
		require.NoError(t, err)
		raw.Control(func(fd uintptr) {
			who, known := realSystem.identify(fd)
			*id, ok = who, ok && known
		})
	}
	return ok
}

// BETA-30, G-02
func TestSameConnSeesThroughDuplicatesAndWrappers(t *testing.T) {
	if !twoSockets(t, new(sock.ID), new(sock.ID)) {
		t.Skip("this system does not tell what socket a descriptor is")
	}
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			s, err := faultnet.Start(faultnet.Options{Network: network})
			require.NoError(t, err)
			defer s.Close()
			var below net.Conn // what the pool's connection runs on
			p, err := New(Config{TLS: s.ClientTLS(), Dialers: map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (nc net.Conn, err error) {
				below, err = dialSocket(ctx, a)
				return below, err
			}}})
			require.NoError(t, err)
			defer p.Close()
			addr := Addr{Transport: Transport(network), Host: s.Host(), Port: s.Port()}
			same := func(a, b any) bool {
				t.Helper()
				ca, ok := a.(syscall.Conn)
				require.True(t, ok, "%T shows no descriptor", a)
				cb, ok := b.(syscall.Conn)
				require.True(t, ok, "%T shows no descriptor", b)
				yes, err := SameConn(ca, cb)
				require.NoError(t, err)
				again, err := SameConn(cb, ca)
				require.NoError(t, err)
				require.Equal(t, yes, again)
				return yes
			}
			require.NoError(t, p.With(context.Background(), addr, func(c Conn) error {
				first := below
				require.True(t, same(c, c))
				require.True(t, same(c, first), "the pooled Conn and the socket it runs on")
				if f, ok := first.(interface{ File() (*os.File, error) }); ok && runtime.GOOS != "windows" {
					file, err := f.File()
					require.NoError(t, err)
					defer file.Close()
					require.True(t, same(c, file), "a duplicate")
					again, err := net.FileConn(file)
					require.NoError(t, err)
					defer again.Close()
					require.True(t, same(c, again), "a connection made of a duplicate")
				}
				require.NoError(t, p.With(context.Background(), addr, func(second Conn) error {
					require.False(t, same(c, second), "two connections to one server")
					require.False(t, same(first, below))
					return nil
				}))
				nc, err := c.Detach()
				require.NoError(t, err)
				defer nc.Close()
				if over, ok := nc.(interface{ NetConn() net.Conn }); ok {
					require.True(t, same(over.NetConn(), first), "a tls.Conn is asked through its NetConn")
				} else {
					require.True(t, same(nc, first))
				}
				_, err = SameConn(c, first.(syscall.Conn))
				require.ErrorIs(t, err, ErrReturned)
				return nil
			}))
			_, err = SameConn(nil, nil)
			require.Error(t, err)
			_, err = SameConn(noDescriptor{}, noDescriptor{})
			require.ErrorIs(t, err, errors.ErrUnsupported)
		})
	}
}
