package connpool

import (
	"context"
	"io"
	"net"
	"net/textproto"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// What is built on a lease, and what becomes of one that was forgotten.

// ORA-51: a layer that owns its connection, and one that lives with it.
func TestALayerOnALeaseGivesBackByClosing(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) {
			c.MaxOpen = 1
			c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				return &layer{textproto.NewConn(nc)}, nil
			}
		})
		l, err := p.Lease(t.Context(), n.addr)
		require.NoError(t, err)
		own := textproto.NewConn(l)
		require.NoError(t, own.PrintfLine("hello"))
		line, err := own.ReadLine()
		require.NoError(t, err)
		require.Equal(t, "1 1 hello", line)
		require.NoError(t, own.Close())
		require.Equal(t, 1, p.Stats().Idle)
		_, err = own.Cmd("stray")
		require.ErrorIs(t, err, net.ErrClosed)

		talk := func(leave bool) {
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				tp := State[*layer](c)
				if err := tp.PrintfLine("a\nb"); err != nil { // two requests
					return err
				}
				if _, err := tp.ReadLine(); err != nil {
					return err
				}
				if leave {
					_, err := tp.R.Peek(len("1 1 b\n")) // the second answer is in the layer's buffer
					return err
				}
				_, err := tp.ReadLine()
				return err
			}))
			settled(t, p)
		}
		talk(false)
		require.Empty(t, p.Stats().Closed)
		talk(true)
		require.Equal(t, reasons{ClosedDirty: 1}, p.Stats().Closed)
		require.Equal(t, 2, loan(t, p, n.addr).serial)
	})
}

// layer is a protocol's layer that tells what it has in its buffer.
type layer struct{ *textproto.Conn }

func (l *layer) Buffered() int { return l.R.Buffered() }

// splicer is a connection that notes the other end of a copy.
type splicer struct {
	*faultnet.Conn
	from, to any
}

func (s *splicer) ReadFrom(r io.Reader) (int64, error) {
	s.from = r
	return 0, nil
}

func (s *splicer) WriteTo(w io.Writer) (int64, error) {
	s.to = w
	return 0, nil
}

func TestTheKernelSeesBothSocketsOfTwoLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &splicer{Conn: c} })})
		a, b := n.lease(at("a")), n.lease(at("b"))
		_, err := io.Copy(a, b)
		require.NoError(t, err)
		require.Same(t, a.c.nc, b.c.nc.(*splicer).to)
		_, err = a.ReadFrom(b)
		require.NoError(t, err)
		require.Same(t, b.c.nc, a.c.nc.(*splicer).from)
		require.NoError(t, n.p.With(bg, at("c"), func(c Conn) error {
			_, err := c.ReadFrom(a)
			require.Same(t, a.c.nc, c.c.nc.(*splicer).from)
			return err
		}))
	})
}

// ORA-33, PLT-02
func TestAForgottenLeaseIsTakenBack(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		told := make(chan HeldInfo, 2)
		closes := make(chan CloseInfo, 2)
		p := n.pool(t, func(c *Config) {
			c.MaxOpen = 1
			c.Trace = &Trace{Leaked: func(i HeldInfo) { told <- i }, Closed: func(i CloseInfo) { closes <- i }}
		})
		borrowAndForget(t, p, n.addr)
		require.Equal(t, 1, p.Stats().InUse)
		// The next one waits for the only slot, and gets it.
		serial := make(chan int, 1)
		go func() {
			err := p.With(t.Context(), n.addr, func(c Conn) error {
				r, err := ask(c, newToken())
				serial <- r.serial
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}()
		queued(t, p, 1)
		soon(t, "the collector to find it", func() bool { runtime.GC(); return p.Stats().Leaked == 1 })
		require.Equal(t, 2, inTime(t, serial))
		require.Equal(t, ClosedLeaked, inTime(t, closes).Reason)
		info := inTime(t, told)
		require.Equal(t, uint64(1), info.ID)
		require.Equal(t, n.addr.Host, info.Addr.Host)
		require.Contains(t, info.Place, "borrowAndForget")
		require.Contains(t, info.Stack, "lease_use_test.go")
		require.NotContains(t, info.Stack, "(*Pool)")
		soon(t, "the server to see the end", func() bool { return n.srv.Open() == 1 })
		runtime.GC()
		require.Empty(t, told, "told once")
		require.Equal(t, reasons{ClosedLeaked: 1}, settled(t, p).Closed)
		p.check(t)
	})
}

//go:noinline
func borrowAndForget(t *testing.T, p *Pool, addr Addr) {
	l, err := p.Lease(t.Context(), addr)
	require.NoError(t, err)
	_, err = ask(l, newToken())
	require.NoError(t, err)
}

func TestWhoeverIsBlockedInALeaseHasNotForgottenIt(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	read := make(chan error, 1)
	var raw interface{ Control(func(uintptr)) error }
	func() {
		l, err := p.Lease(t.Context(), n.addr)
		require.NoError(t, err)
		_, err = io.WriteString(l, "half a req")
		require.NoError(t, err)
		go func() { _, err := l.Read(make([]byte, 1)); read <- err }()
		other, err := p.Lease(t.Context(), scoped(n.addr, 1))
		require.NoError(t, err)
		raw, err = other.SyscallConn()
		require.NoError(t, err)
		// Neither a lease given back nor one that lost its connection can leak.
		over, err := p.Lease(t.Context(), scoped(n.addr, 2))
		require.NoError(t, err)
		require.NoError(t, over.Return())
		lost, err := p.Lease(t.Context(), scoped(n.addr, 3))
		require.NoError(t, err)
		require.Error(t, lost.Do(t.Context(), discard))
	}()
	for range 5 {
		runtime.GC()
	}
	require.Zero(t, p.Stats().Leaked)
	require.NoError(t, raw.Control(func(uintptr) {}))
	require.Equal(t, 2, p.Stats().InUse)
	raw = nil
	soon(t, "the other to be found", func() bool { runtime.GC(); return p.Stats().Leaked == 1 })
	require.Empty(t, read)
	soon(t, "its slot free", func() bool { return p.Stats().InUse == 1 })
	for _, c := range n.srv.Peers() {
		c.Close()
	}
	require.Error(t, inTime(t, read))
	soon(t, "the reader's to be found, too", func() bool { runtime.GC(); return p.Stats().Leaked == 2 })
	p.check(t)
}
