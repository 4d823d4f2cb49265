package connpool

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// unknownName is an address whose host no resolver knows. Names that end in a
// hyphen are not even asked for, so that no packet leaves the machine.
func unknownName(t *testing.T, a Addr) Addr {
	t.Helper()
	was := net.DefaultResolver.PreferGo
	net.DefaultResolver.PreferGo = true
	t.Cleanup(func() { net.DefaultResolver.PreferGo = was })
	a.Host = "nobody-"
	return a
}

// notRun is for a borrow that must fail before fn.
func notRun(t *testing.T) func(Conn) error {
	return func(Conn) error {
		t.Error("fn ran")
		return nil
	}
}

// failsWith is what every error of With that is an *Error has to say.
func failsWith(t *testing.T, err error, stage Stage, kind Kind) {
	t.Helper()
	var pe *Error
	require.ErrorAs(t, err, &pe)
	require.Equal(t, stage, pe.Stage, err)
	require.Equal(t, kind, pe.Kind, err)
	require.Equal(t, kind, KindOf(err))
	require.Equal(t, kind == KindTimeout, pe.Timeout())
}

// BETA-X05: each kind, by the thing itself. (Access, address and the want of
// handles need the system's help; they are in the files for Linux.)
func TestEachKindOfErrorIsToldApart(t *testing.T) {
	with := func(t *testing.T, change func(*Config)) (*sockNet, *Pool) {
		n := startSock(t, "tcp", faultnet.Options{})
		return n, n.pool(t, change)
	}
	// In a loan, the error of an operation has a kind too, and keeps it
	// through With.
	inLoan := func(t *testing.T, n *sockNet, p *Pool, want Kind, op func(Conn) error) {
		t.Helper()
		var inside error
		err := p.With(t.Context(), n.addr, func(c Conn) error {
			inside = op(c)
			require.Equal(t, want, KindOf(inside), inside)
			return inside
		})
		require.Equal(t, inside, err)
		require.Equal(t, want, KindOf(err))
		settled(t, p)
	}

	t.Run("unknown", func(t *testing.T) {
		odd := errors.New("the moon is full")
		n, p := with(t, func(c *Config) {
			c.Setup = func(context.Context, Addr, net.Conn) (any, error) { return nil, odd }
		})
		err := p.With(t.Context(), n.addr, notRun(t))
		failsWith(t, err, StageSetup, KindUnknown)
		require.ErrorIs(t, err, odd)
		require.Equal(t, KindUnknown, KindOf(nil))
	})
	t.Run("bad message", func(t *testing.T) {
		n, p := with(t, nil)
		a := n.addr
		a.Transport = TLS // but the server speaks plainly, once it is spoken to
		failsWith(t, p.With(t.Context(), a, notRun(t)), StageHandshake, KindBadMessage)

		secure := startSock(t, "tls13", faultnet.Options{})
		failsWith(t, p.With(t.Context(), secure.addr, notRun(t)), StageHandshake, KindBadMessage) // a stranger's certificate
	})
	t.Run("broken", func(t *testing.T) {
		n, p := with(t, nil)
		loan(t, p, n.addr)
		inLoan(t, n, p, KindBroken, func(c Conn) error {
			n.srv.CutIdle(-1, faultnet.RST)
			_, err := c.Read(make([]byte, 1))
			return err
		})
	})
	t.Run("eof", func(t *testing.T) {
		n, p := with(t, nil)
		loan(t, p, n.addr)
		inLoan(t, n, p, KindEOF, func(c Conn) error {
			n.srv.CutIdle(-1, faultnet.FIN)
			_, err := c.Read(make([]byte, 1))
			require.Equal(t, io.EOF, err) // bare, as readers expect
			return err
		})
	})
	t.Run("lookup", func(t *testing.T) {
		n, p := with(t, nil)
		failsWith(t, p.With(t.Context(), unknownName(t, n.addr), notRun(t)), StageDial, KindLookup)
	})
	t.Run("internal", func(t *testing.T) {
		n, p := with(t, func(c *Config) {
			c.Setup = func(context.Context, Addr, net.Conn) (any, error) { panic("a bug in Setup") }
			c.Dialers = map[Transport]DialFunc{"x": func(context.Context, Addr) (net.Conn, error) { panic("a bug in the dialer") }}
		})
		for _, c := range []struct {
			addr  Addr
			stage Stage
			text  string
		}{
			{n.addr, StageSetup, "Config.Setup panicked: a bug in Setup"},
			{Addr{Transport: "x", Host: "h"}, StageDial, "a bug in the dialer"},
		} {
			err := p.With(t.Context(), c.addr, notRun(t))
			failsWith(t, err, c.stage, KindInternal)
			require.ErrorContains(t, err, c.text)
			var pan *PanicError
			require.ErrorAs(t, err, &pan)
			require.NotEmpty(t, pan.Stack)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		n, p := with(t, func(c *Config) { c.MaxPerAddr = 1 })
		h := hold(t, p, n.addr)
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error)
		go func() { got <- p.With(ctx, n.addr, notRun(t)) }()
		queued(t, p, 1)
		cancel()
		failsWith(t, <-got, StageWait, KindCanceled)
		failsWith(t, p.With(ctx, n.addr, notRun(t)), StageWait, KindCanceled)
		require.NoError(t, h.end(nil))

		ctx, cancel = context.WithCancel(t.Context())
		err := p.With(ctx, n.addr, func(c Conn) error {
			cancel()
			_, err := c.Read(make([]byte, 1))
			return err
		})
		require.Equal(t, KindCanceled, KindOf(err))
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("refused", func(t *testing.T) {
		for _, name := range []string{"tcp", "unix"} {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, nil)
			n.srv.Stop() // whether the socket's file is there or not
			failsWith(t, p.With(t.Context(), n.addr, notRun(t)), StageDial, KindRefused)
		}
	})
	t.Run("resource", func(t *testing.T) {
		n, p := with(t, func(c *Config) { c.MaxPerAddr, c.WhenFull = 1, FullFail })
		h := hold(t, p, n.addr)
		err := p.With(t.Context(), n.addr, notRun(t))
		failsWith(t, err, StageWait, KindResource)
		require.ErrorIs(t, err, ErrExhausted)
		require.NoError(t, h.end(nil))
	})
	t.Run("timeout", func(t *testing.T) {
		_, hasty := with(t, func(c *Config) {
			c.DialTimeout = 20 * time.Millisecond
			c.Dialers = map[Transport]DialFunc{"hole": func(ctx context.Context, _ Addr) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}}
		})
		failsWith(t, hasty.With(t.Context(), Addr{Transport: "hole", Host: "black"}, notRun(t)), StageDial, KindTimeout)

		n, p := with(t, func(c *Config) { c.MaxPerAddr = 1 })
		h := hold(t, p, n.addr)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		failsWith(t, p.With(ctx, n.addr, notRun(t)), StageWait, KindTimeout)
		require.NoError(t, h.end(nil))
		inLoan(t, n, p, KindTimeout, func(c Conn) error { // before the first byte
			c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			return err
		})
	})
	t.Run("timeout in transfer", func(t *testing.T) {
		release := make(chan struct{})
		n := startSock(t, "tcp", faultnet.Options{Handler: func(p *faultnet.Peer) {
			bufio.NewReader(p).ReadString('\n')
			io.WriteString(p, "h")
			<-release
		}})
		defer close(release)
		p := n.pool(t, nil)
		inLoan(t, n, p, KindTimeoutInTransfer, func(c Conn) error { // after the first byte
			io.WriteString(c, "\n")
			io.ReadFull(c, make([]byte, 1))
			c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			return err
		})
	})
	t.Run("usage", func(t *testing.T) {
		n, p := with(t, nil)
		failsWith(t, p.With(t.Context(), Addr{}, notRun(t)), StageUsage, KindUsage)
		failsWith(t, p.With(t.Context(), Addr{Transport: "carrier-pigeon", Host: "h"}, notRun(t)), StageUsage, KindUsage)
		failsWith(t, p.With(nil, n.addr, notRun(t)), StageUsage, KindUsage) //lint:ignore SA1012 that is the point
		failsWith(t, p.With(t.Context(), n.addr, nil), StageUsage, KindUsage)
		failsWith(t, new(Pool).With(t.Context(), n.addr, notRun(t)), StageUsage, KindUsage)
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			require.NoError(t, c.Close())
			require.Equal(t, KindUsage, KindOf(c.Close()))
			return nil
		}))
		require.NoError(t, p.Close())
		require.Equal(t, KindUsage, KindOf(p.With(t.Context(), n.addr, notRun(t))))
	})
}

// givesUp is a connection of which the system says, at each operation, that it gave
// the peer up.
type givesUp struct {
	net.Conn
	err error
}

func (g givesUp) Read([]byte) (int, error) {
	return 0, &net.OpError{Op: "read", Net: "tcp", Err: g.err}
}

func (g givesUp) Write([]byte) (int, error) {
	return 0, &net.OpError{Op: "write", Net: "tcp", Err: g.err}
}

// TRY-20: the system's ETIMEDOUT is the end of the connection, as a reset is. No
// deadline has passed, and Keep forgives nothing.
func TestTheSystemsTimeoutIsTheEndOfTheConnection(t *testing.T) {
	for _, errno := range []error{sock.ErrTimedOut, os.NewSyscallError("read", sock.ErrTimedOut), os.NewSyscallError("wsarecv", sock.ErrTimedOut)} {
		for how, verdict := range map[string]func(error) error{"Keep": Keep, "nil": func(error) error { return nil }, "wrapped": func(err error) error { return wrapOnce(Keep(err)) }} {
			for name, op := range map[string]func(Conn) error{
				"read":    func(c Conn) error { _, err := c.Read(make([]byte, 1)); return err },
				"write":   func(c Conn) error { _, err := c.Write(make([]byte, 1)); return err },
				"WriteTo": func(c Conn) error { _, err := c.WriteTo(io.Discard); return err },
				"under a deadline": func(c Conn) error {
					c.SetReadDeadline(time.Now().Add(time.Hour))
					_, err := c.Read(make([]byte, 1))
					return err
				},
			} {
				for _, ctx := range []context.Context{bg, t.Context()} {
					here, there := net.Pipe()
					defer there.Close()
					p, err := New(Config{Dialers: map[Transport]DialFunc{memory: func(context.Context, Addr) (net.Conn, error) {
						return givesUp{here, errno}, nil
					}}})
					require.NoError(t, err)
					var inside error
					p.With(ctx, at("a"), func(c Conn) error {
						inside = op(c)
						return verdict(inside)
					})
					require.ErrorIs(t, inside, sock.ErrTimedOut)
					require.Equal(t, KindBroken, KindOf(inside), "%s, %s", name, how)
					require.NoError(t, p.Close())
					require.Equal(t, reasons{ClosedBroken: 1}, p.Stats().Closed, "%s, %s", name, how)
				}
			}
		}
	}
	for _, dial := range []error{
		&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", sock.ErrTimedOut)}, os.NewSyscallError("connectex", sock.ErrTimedOut), sock.ErrTimedOut,
		&net.OpError{Op: "socks connect", Net: "tcp", Err: sock.ErrTimedOut},
	} {
		require.Equal(t, KindTimeout, KindOf(dial), "%v", dial)
	}
	require.Equal(t, KindBroken, KindOf(os.NewSyscallError("recvfrom", sock.ErrTimedOut)))
}
