package connpool

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// MarkDead finds a connection wherever it is at that moment.

// marking is a pool on the made-up system, whose first connection is the same
// socket as one that the test holds.
type marking struct {
	*fakeSystem
	t         *testing.T
	p         *Pool
	elsewhere *fakeSock // that socket under another number
	inLook    func()    // called once, in the next look into a socket
}

var home = fakeAddr("home")

// mark says that the first connection is driven by two.
func (m *marking) mark() {
	m.t.Helper()
	require.Equal(m.t, 1, m.p.MarkDead(m.elsewhere))
}

func (m *marking) use(ctx context.Context) error {
	return m.p.With(ctx, home, func(c Conn) error { return echo(c, "x") })
}

func newMarking(t *testing.T, cfg Config) *marking {
	var a, b sock.ID
	if !twoSockets(t, &a, &b) || a == b {
		t.Skip("this system does not tell two sockets apart")
	}
	f := newFakeSystem(t)
	m := &marking{fakeSystem: f, t: t, elsewhere: &fakeSock{sys: f, fd: fakeNumber + 100}}
	m.p = f.pool(t, cfg)
	m.p.sys.identify = func(fd uintptr) (sock.ID, bool) {
		if fd == fakeNumber || fd == m.elsewhere.fd {
			return a, true
		}
		return b, true
	}
	look := m.p.sys.peek
	m.p.sys.peek = func(fd uintptr) sock.Seen {
		if f := m.inLook; f != nil {
			m.inLook = nil
			f()
		}
		return look(fd)
	}
	return m
}

// TRY-43
func TestMarkDeadTakesEffectWhereverTheConnectionIs(t *testing.T) {
	inHook := func(m **marking, times *int) func(context.Context, Conn) error {
		return func(_ context.Context, c Conn) error {
			if *times++; *times == 1 {
				(*m).mark()
			}
			return nil
		}
	}
	for name, c := range map[string]struct {
		cfg    func(m **marking) Config
		scene  func(t *testing.T, m *marking)
		reason CloseReason
	}{
		"idle": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			m.mark()
		}, ClosedMarkedDead},
		"in a session between two uses, before its end": {nil, func(t *testing.T, m *marking) {
			ctx, end := m.p.Session(bg)
			require.NoError(t, m.use(ctx))
			m.mark()
			end()
		}, ClosedMarkedDead},
		"in a session between two uses, before the next": {nil, func(t *testing.T, m *marking) {
			ctx, end := m.p.Session(bg)
			defer end()
			require.NoError(t, m.use(ctx))
			m.mark()
			require.ErrorIs(t, m.use(ctx), ErrSessionLost)
			require.NoError(t, m.use(ctx), "told once")
		}, ClosedMarkedDead},
		"in a session, in the look before a use": {nil, func(t *testing.T, m *marking) {
			ctx, end := m.p.Session(bg)
			defer end()
			require.NoError(t, m.use(ctx))
			m.inLook = m.mark
			require.NoError(t, m.use(ctx))
			require.Nil(t, m.inLook)
		}, ClosedBroken},
		"in a session that was forgotten": {nil, func(t *testing.T, m *marking) {
			ctx, end := m.p.Session(bg)
			defer end()
			require.NoError(t, m.use(ctx))
			m.mark()
			ctx.Value(sessionKey{m.p}).(*session).leakedSession()
		}, ClosedLeaked},
		"in the look before a loan": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			m.inLook = m.mark
			require.NoError(t, m.use(bg))
			require.Nil(t, m.inLook)
		}, ClosedBroken},
		"in the look of a sweep": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			c := m.p.every()[0]
			m.inLook = m.mark
			idleRef{c, c.generation()}.examine(true)
			require.Nil(t, m.inLook)
		}, ClosedMarkedDead},
		"taken for a look": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			c := m.take()
			m.mark()
			reason, _ := c.whyUnfit(bg)
			require.Equal(t, ClosedMarkedDead, reason)
			c.discard(reason, nil)
		}, ClosedMarkedDead},
		"with a waiter that gave up": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			c := m.take()
			m.mark()
			(&waiter{c: c}).noteDeclined()
		}, ClosedMarkedDead},
		"on its way to a waiter": {func(**marking) Config { return Config{MaxPerAddr: 1} }, func(t *testing.T, m *marking) {
			second := make(chan error)
			require.NoError(t, m.p.With(bg, home, func(c Conn) error {
				go func() { second <- m.use(bg) }()
				soon(t, "a waiter", func() bool { return m.p.Stats().Waiting == 1 })
				m.inLook = m.mark
				return echo(c, "x")
			}))
			require.NoError(t, <-second)
			require.Nil(t, m.inLook)
		}, ClosedBroken},
		"fresh from its dial, with a waiter": {func(**marking) Config { return Config{MaxPerAddr: 1} }, func(t *testing.T, m *marking) {
			c, _, err := m.p.borrow(bg, &home, nil)
			require.NoError(t, err)
			second := make(chan error)
			go func() { second <- m.use(bg) }()
			soon(t, "a waiter", func() bool { return m.p.Stats().Waiting == 1 })
			m.mark()
			require.False(t, c.releaseFrom(fromDial))
			require.NoError(t, <-second)
		}, ClosedMarkedDead},
		"warmed": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.p.Warm(bg, home, 1))
			m.mark()
		}, ClosedMarkedDead},
		"in use": {nil, func(t *testing.T, m *marking) {
			require.NoError(t, m.p.With(bg, home, func(c Conn) error {
				require.NoError(t, echo(c, "x"))
				m.mark()
				return nil
			}))
		}, ClosedBroken},
		"in a lease": {nil, func(t *testing.T, m *marking) {
			l, err := m.p.Lease(bg, home)
			require.NoError(t, err)
			m.mark()
			require.NoError(t, l.Return())
		}, ClosedBroken},
		"in the Do of a lease": {nil, func(t *testing.T, m *marking) {
			l, err := m.p.Lease(bg, home)
			require.NoError(t, err)
			require.NoError(t, l.Do(bg, func(Conn) error { m.mark(); return nil }))
			require.ErrorIs(t, l.Do(bg, func(Conn) error { return nil }), net.ErrClosed)
			require.NoError(t, l.Return())
		}, ClosedBroken},
		"before the Do of a lease": {nil, func(t *testing.T, m *marking) {
			l, err := m.p.Lease(bg, home)
			require.NoError(t, err)
			m.mark()
			require.NoError(t, l.Do(bg, func(Conn) error { return nil }))
			require.NoError(t, l.Return())
		}, ClosedBroken},
		"in Reset": {func(m **marking) Config { return Config{Reset: inHook(m, new(int))} }, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
		}, ClosedResetFailed},
		"in Check": {func(m **marking) Config { return Config{CheckAfterIdle: -1, Check: inHook(m, new(int))} }, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			require.NoError(t, m.use(bg))
		}, ClosedCheckFailed},
		"before Push": {func(**marking) Config {
			return Config{Push: func(_ context.Context, c Conn) error { return errors.New("called") }}
		}, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			c := m.take()
			m.mark()
			c.ensureCold().pushback = &pushback{bytes: []byte("x")}
			c.push()
		}, ClosedMarkedDead},
		"after Push": {func(m **marking) Config {
			return Config{Push: func(_ context.Context, c Conn) error {
				(*m).inLook = (*m).mark // the look that follows
				_, err := io.ReadFull(c, make([]byte, 1))
				return err
			}}
		}, func(t *testing.T, m *marking) {
			require.NoError(t, m.use(bg))
			c := m.take()
			c.ensureCold().pushback = &pushback{bytes: []byte("x")}
			c.push()
		}, ClosedMarkedDead},
	} {
		t.Run(name, func(t *testing.T) {
			var m *marking
			var cfg Config
			if c.cfg != nil {
				cfg = c.cfg(&m)
			}
			cfg.SweepInterval = -1
			m = newMarking(t, cfg)
			c.scene(t, m)
			soon(t, "the close", func() bool { closed, _ := m.sock(0).state(); return closed })
			soon(t, "its reason", func() bool { return m.p.Stats().Closed[c.reason] == 1 })
			require.NoError(t, m.p.With(bg, home, func(c Conn) error {
				require.NotEqual(t, uint64(1), c.Info().ID, "it was lent again")
				return nil
			}))
			settled(t, m.p)
			require.Len(t, m.p.Stats().Closed, 1)
			m.p.check(t)
		})
	}
}

// take makes the test the owner of the idle connection.
func (m *marking) take() *conn {
	c := m.p.every()[0]
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	m.p.takeLocked(c)
	return c
}

// TRY-43
func TestMarkDeadOfAConnectionInSetupFailsItsDial(t *testing.T) {
	var m *marking
	setups := 0
	m = newMarking(t, Config{Setup: func(context.Context, Addr, net.Conn) (any, error) {
		if setups++; setups == 1 {
			m.mark()
		}
		return nil, nil
	}})
	err := m.use(bg)
	var pe *Error
	require.ErrorAs(t, err, &pe)
	require.Equal(t, StageSetup, pe.Stage)
	require.ErrorIs(t, err, errMarkedDead)
	require.NoError(t, m.use(bg))
	soon(t, "the close", func() bool { closed, _ := m.sock(0).state(); return closed })
	settled(t, m.p)
}

// What a borrower detached is not the pool's, and what is somebody else's cannot
// be detached.
//
// TRY-43
func TestOfMarkDeadAndDetachTheFirstWins(t *testing.T) {
	m := newMarking(t, Config{})
	require.NoError(t, m.p.With(bg, home, func(c Conn) error {
		_, err := c.leaveFor(flagGone | flagDetached) // the first half of Detach
		require.NoError(t, err)
		require.Zero(t, m.p.MarkDead(m.elsewhere))
		c.c.word.And(^uint64(flagGone | flagDetached))
		nc, err := c.Detach()
		require.NoError(t, err)
		require.Zero(t, m.p.MarkDead(m.elsewhere))
		return nc.Close()
	}))
	m = newMarking(t, Config{})
	require.NoError(t, m.p.With(bg, home, func(c Conn) error {
		m.p.mu.Lock()
		require.True(t, m.p.markStolenLocked(c.c, new(agenda)))
		require.False(t, m.p.markStolenLocked(c.c, new(agenda)))
		m.p.mu.Unlock()
		_, err := c.Detach()
		require.ErrorIs(t, err, errStolen)
		return nil
	}))
	require.Equal(t, reasons{ClosedQuarantined: 1}, m.p.Stats().Closed)
	closed, _ := m.sock(0).state()
	require.False(t, closed)
}

// What the pool itself has lent has the number of its connection, and is the
// same socket: neither dead nor driven by two.
//
// TRY-43
func TestMarkDeadOfThePoolsOwnHandleHarmsNothing(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"by identity":           func(*Config) {},
		"identity switched off": func(c *Config) { c.NoFDCheck = true },
	} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, "tcp", faultnet.Options{})
			var guarded []int
			var p *Pool
			p = n.pool(t, func(c *Config) {
				change(c)
				c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
					guarded = append(guarded, p.MarkDead(nc.(Conn)))
					return nil, nil
				}
			})
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				require.Zero(t, p.MarkDead(c))
				if name == "by identity" {
					require.Zero(t, p.MarkDead(struct{ syscall.Conn }{c}), "however it is wrapped")
				}
				_, err := ask(c, newToken())
				return err
			}))
			l, err := p.Lease(t.Context(), n.addr)
			require.NoError(t, err)
			require.Zero(t, p.MarkDead(l))
			_, err = ask(l, newToken())
			require.NoError(t, err)
			require.NoError(t, l.Return())
			require.Equal(t, []int{0}, guarded)
			require.Empty(t, p.Stats().Closed)
			require.Equal(t, 1, p.Stats().Idle)
			require.EqualValues(t, 1, p.Stats().Dials)

			network, address := n.target()
			nc, err := p.DialContext(t.Context(), network, address)
			require.NoError(t, err)
			require.Zero(t, p.MarkDead(nc.(syscall.Conn)))
			_, err = ask(nc, newToken())
			require.NoError(t, err)
			require.NoError(t, nc.Close())
			require.Zero(t, p.Stats().Closed[ClosedQuarantined])
		})
	}
}

// BETA-23, TDBC-20: MarkDead is 0, and SameConn an error, for what has no descriptor,
// however that shows; the connection under the number 0 is left alone.
func TestMarkDeadOfWhatHasNoDescriptorHarmsNothing(t *testing.T) {
	f := newFakeSystem(t)
	f.next = 0 // the number that nothing shown could be taken for
	p := f.pool(t, Config{})
	require.NoError(t, p.With(bg, fakeAddr("a"), func(c Conn) error { return echo(c, "mine") }))
	for name, nc := range map[string]syscall.Conn{
		"a RawConn that shows nothing": &uselessPipe{},
		"one that says so":             &uselessPipe{err: errors.ErrUnsupported},
		"no RawConn":                   noRaw{},
		"a nil connection":             (*net.TCPConn)(nil),
	} {
		require.Zero(t, p.MarkDead(nc), name)
		_, err := SameConn(nc, nc)
		require.Error(t, err, name)
	}
	require.NoError(t, p.With(bg, fakeAddr("a"), func(c Conn) error { return echo(c, "mine") }))
	require.EqualValues(t, 1, p.Stats().Dials)
}

type noRaw struct{}

func (noRaw) SyscallConn() (syscall.RawConn, error) { return nil, nil }
