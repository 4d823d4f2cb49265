package connpool

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TRY-25: what DialContext returns for an error is what package net's dialer does,
// for whoever asserts its type, and an *Error for whoever asks for that.
func TestAnErrorOfDialContextIsThatOfADialer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	nobody := ln.Addr().String()
	require.NoError(t, ln.Close())
	p, err := New(Config{MaxOpen: 1, WhenFull: FullFail})
	require.NoError(t, err)
	defer p.Close()
	done, cancel := context.WithCancel(bg)
	cancel()
	closed, err := New(Config{})
	require.NoError(t, err)
	require.NoError(t, closed.Close())
	_, theirs := new(net.Dialer).DialContext(bg, "tcp", nobody)

	for name, c := range map[string]struct {
		pool             *Pool
		ctx              context.Context
		network, address string
		stage            Stage
		is               error
	}{
		"refused":     {p, bg, "tcp", nobody, StageDial, syscall.ECONNREFUSED},
		"no socket":   {p, bg, "unix", t.TempDir() + "/none", StageDial, syscall.ENOENT},
		"canceled":    {p, done, "tcp", nobody, StageWait, context.Canceled},
		"bad address": {p, bg, "tcp", "nonsense", StageUsage, nil},
		"bad network": {p, bg, "udp", nobody, StageUsage, nil},
		"closed":      {closed, bg, "tcp", nobody, StageWait, ErrClosed},
		"zero Pool":   {new(Pool), bg, "tcp", nobody, StageUsage, ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := c.pool.DialContext(c.ctx, c.network, c.address)
			require.Nil(t, nc)
			op, ok := err.(*net.OpError)
			require.True(t, ok, "%T", err)
			require.Equal(t, [...]string{"dial", c.network}, [...]string{op.Op, op.Net})
			require.Equal(t, c.address, op.Addr.String())
			require.Equal(t, c.network, op.Addr.Network())
			_, ok = err.(net.Error)
			require.True(t, ok)
			var pe *Error
			require.ErrorAs(t, err, &pe)
			require.Equal(t, c.stage, pe.Stage)
			require.Equal(t, pe.Kind, KindOf(err))
			require.Equal(t, pe.Timeout(), op.Timeout())
			require.Equal(t, pe.Temporary(), op.Temporary())
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
		})
	}
	_, err = p.DialContext(bg, "tcp", nobody)
	require.Equal(t, theirs.Error(), err.Error(), "the text is theirs, too")

	bubble(t, func(t *testing.T) { // a dial that takes too long
		n := open(t, Config{Dialers: map[Transport]DialFunc{TCP: func(ctx context.Context, _ Addr) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}})
		_, err := n.p.DialContext(deadline(t, time.Second), "tcp", "h:1")
		ne, ok := err.(net.Error)
		require.True(t, ok)
		require.True(t, ne.Timeout())
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
	client := &http.Client{Transport: &http.Transport{DialContext: p.DialContext}}
	_, err = client.Get("http://" + nobody)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

// TRY-25: an *Error of a borrow is a net.Error, by assertion, and errors.As finds a
// *net.OpError in it whatever went wrong.
func TestAnErrorOfABorrowServesCodeOfPackageNet(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 1})
		n.borrow(bg, at("a")).conn()
		n.Host("down").Down()
		for host, timeout := range map[string]bool{"a": true, "down": false} {
			err := error(n.fail(deadline(t, time.Second), at(host)))
			ne, ok := err.(net.Error)
			require.True(t, ok)
			require.Equal(t, timeout, ne.Timeout())
			//lint:ignore SA1019 a net.Error has it, and old clients ask
			require.Equal(t, timeout, ne.Temporary())
			var op *net.OpError
			require.ErrorAs(t, err, &op)
			require.Equal(t, "dial", op.Op)
			require.Equal(t, timeout, op.Timeout())
			require.NotEmpty(t, op.Error())
			require.Equal(t, !timeout, errors.Is(op, syscall.ECONNREFUSED))
		}
	})
	e := &Error{Addr: MustParseAddr("tls://[::1]:5"), Stage: StageHandshake, Kind: KindBadMessage, Err: errBoom}
	var op *net.OpError
	require.ErrorAs(t, error(e), &op)
	require.Equal(t, "dial tcp [::1]:5: handshake: boom", op.Error())
	require.ErrorIs(t, op, errBoom)
	require.False(t, (&Error{Kind: KindRefused}).Temporary())
	require.True(t, (&Error{Kind: KindResource}).Temporary())
}

// A borrow that a transport makes for its own ends in its own time: it is no
// deadline of the connection above.
func TestABorrowBelowAConnectionIsNoDeadlineOfIts(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	p, err := New(Config{Dialers: map[Transport]DialFunc{memory: func(context.Context, Addr) (net.Conn, error) {
		return borrows{here}, nil
	}}})
	require.NoError(t, err)
	defer p.Close()
	p.With(bg, at("a"), func(c Conn) error {
		_, err := c.Read(make([]byte, 1))
		return Keep(err)
	})
	require.Zero(t, p.Stats().Idle, "it was kept")
}

type borrows struct{ net.Conn }

func (borrows) Read([]byte) (int, error) {
	return 0, &Error{Stage: StageWait, Kind: KindTimeout, Err: context.DeadlineExceeded}
}
