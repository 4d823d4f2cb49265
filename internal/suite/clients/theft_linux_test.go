package clients

import (
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// fdOf is the number of the descriptor of a loan.
func fdOf(t *testing.T, c connpool.Conn) (fd int) {
	t.Helper()
	rc, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Control(func(n uintptr) { fd = int(n) }))
	return fd
}

// victim is a connection of somebody else, to a server that answers nothing.
func victim(t *testing.T) (ours, theirs *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	nc, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	other, err := ln.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { other.Close() })
	return nc.(*net.TCPConn), other.(*net.TCPConn)
}

// ADO-01: the guard of a resident whose descriptor has become another socket's touches that socket
// no more once the pool has found it out, whatever the client does.
func TestAStolenResidentTouchesNothing(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	guards := make(chan net.Conn, 10)
	p := n.Pool(t, func(c *connpool.Config) {
		c.SweepInterval = -1
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			guards <- nc
			return connpool.Resident(nc, nil), nil
		}
	})
	fd := -1
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { fd = fdOf(t, c); return nil }))
	ours, theirs := victim(t)
	raw, err := ours.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(v uintptr) { err = syscall.Dup3(int(v), fd, 0) }))
	require.NoError(t, err)
	defer syscall.Close(fd)
	require.NoError(t, p.With(bg, n.Addr, nothing))
	require.EqualValues(t, 1, p.Stats().Closed[connpool.ClosedQuarantined])
	guard := <-guards
	guard.SetDeadline(time.Now().Add(time.Minute))
	_, err = guard.Write([]byte("secret"))
	require.Error(t, err)
	_, err = theirs.Write([]byte("password"))
	require.NoError(t, err)
	_, err = guard.Read(make([]byte, 1))
	require.Error(t, err)
	theirs.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err = theirs.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "nothing arrived")
}

// ADO-03: a goodbye takes time, in which other code may close the descriptor.
func TestATheftDuringAGoodbyeClosesNothing(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	in, out := make(chan struct{}), make(chan struct{})
	p := n.Pool(t, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{nc, func() error { close(in); <-out; return nil }}, nil
		}
	})
	fd := -1
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { fd = fdOf(t, c); return nil }))
	go p.CloseIdle()
	ready(t, "the goodbye", in)
	ours, _ := victim(t)
	raw, err := ours.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(v uintptr) { err = syscall.Dup3(int(v), fd, 0) })) // the number is another socket's
	require.NoError(t, err)
	close(out)
	patience.Soon(t, "it has left the pool", func() bool { return p.Stats().Open == 0 })
	require.NoError(t, syscall.Close(fd), "the pool has not closed it")
}

// counted is a client that shows its socket.
func carryShown(ctx context.Context, a connpool.Addr, dial func(ctx context.Context, network, address string) (net.Conn, error)) (net.Conn, error) {
	nc, err := dial(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
	if err != nil {
		return nil, err
	}
	return connpool.Carry(&codec{nc, nc.Close}, nil, nc), nil
}

// ADO-02: a carried client that closes its socket is dead, and no victim of a theft.
func TestACarriedClientThatClosesItsSocketIsDead(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) {
		c.SweepInterval = -1
		c.Dialers = map[connpool.Transport]connpool.DialFunc{carriedTransport: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			return carryShown(ctx, a, new(net.Dialer).DialContext)
		}}
	})
	n.Addr.Transport = carriedTransport
	var k *codec
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { k = connpool.State[*codec](c); return nil }))
	require.NoError(t, k.nc.Close())
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
		require.NotSame(t, k, connpool.State[*codec](c))
		return nil
	}))
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
		require.NoError(t, connpool.State[*codec](c).nc.Close())
		return p.With(bg, pooltest.Scoped(n.Addr, "the next to get the number"), nothing)
	}))
	patience.Soon(t, "it is closed", func() bool { return p.Stats().Open == 1 })
	require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { return connpool.State[*codec](c).nc.Close() }))
	patience.Soon(t, "so is one whose number nobody has got", func() bool { return p.Stats().Open == 1 })
	require.Zero(t, p.Stats().Closed[connpool.ClosedQuarantined])
}

// ADO-02: a client may dial with the pool's DialContext.
func TestACarriedClientOverDialContextLeavesNoDescriptor(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	var p *connpool.Pool
	p = n.Pool(t, func(c *connpool.Config) {
		c.Dialers = map[connpool.Transport]connpool.DialFunc{carriedTransport: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			return carryShown(ctx, a, p.DialContext)
		}}
	})
	n.Addr.Transport = carriedTransport
	for range 20 {
		require.NoError(t, p.With(bg, n.Addr, nothing))
		p.CloseIdle()
		patience.Soon(t, "both are closed", func() bool { return p.Stats().Open == 0 })
	}
	require.Zero(t, p.Stats().Closed[connpool.ClosedQuarantined])
}
