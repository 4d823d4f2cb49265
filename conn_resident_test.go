package connpool

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// ADO-01: a client's read that began in Setup has the deadline of the dial. The socket may meet
// that deadline a moment before the ctx of Setup is done; then the dial has failed.
func TestAClientThatMayHaveTimedOutInSetupIsNotLent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var n *testnet
		n = open(t, Config{DialTimeout: time.Second, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			err := nc.SetReadDeadline(time.Time{}) // the deadline of the dial is on the socket from now on
			n.p.clock.Read = func() time.Time { return time.Now().Add(time.Second) }
			return Resident(nc, nil), err
		}})
		require.ErrorIs(t, n.fail(bg, at("a")), context.DeadlineExceeded)
		n.p.clock.Read = time.Now
		n.closed(reasons{ClosedSetupFailed: 1})
	})
}

// ADO-02: where no watcher tells of the end of a carried client's socket, a look at the socket
// before each loan does, and in each sweep. Bytes that wait there are the client's.
func TestTheEndOfACarriedClientsSocketIsSeenWithoutAWatcher(t *testing.T) {
	if !sock.CanPeek {
		t.Skip("this system cannot look into a socket")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	n.addr.Transport = "carried"
	for _, noProbe := range []bool{false, true} {
		p := n.pool(t, func(c *Config) {
			c.NoProbe = noProbe
			c.SweepInterval = time.Hour // sweeps come when the test says so
			c.Dialers = map[Transport]DialFunc{"carried": func(ctx context.Context, a Addr) (net.Conn, error) {
				a.Transport = TCP
				nc, err := dialFrom(ctx, new(net.Dialer), a)
				if err != nil {
					return nil, err
				}
				return Carry(nc, nil, nc), nil
			}}
		})
		p.watching.off = true
		use := func() (client net.Conn) {
			t.Helper()
			require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
				client = State[net.Conn](c)
				return nil
			}))
			return client
		}
		look := func(nc net.Conn) (seen sock.Seen) {
			raw, err := nc.(*net.TCPConn).SyscallConn()
			require.NoError(t, err)
			raw.Control(func(fd uintptr) { seen = sock.Peek(fd) })
			return seen
		}
		first := use()
		require.Same(t, first, use())
		_, err := ask(first, newToken())
		require.NoError(t, err)
		n.srv.CutIdle(-1, faultnet.FIN)
		soon(t, "the end has come", func() bool { return look(first).Err != nil })
		if noProbe {
			require.Same(t, first, use(), "the borrower finds out")
			sweepAll(p)
			require.Zero(t, settled(t, p).Closed[ClosedStale])
			continue
		}
		second := use()
		require.NotSame(t, first, second)
		_, err = ask(second, newToken())
		require.NoError(t, err)
		n.srv.CutIdle(-1, faultnet.FIN)
		soon(t, "the end has come", func() bool { return look(second).Err != nil })
		sweepAll(p)
		soon(t, "the sweep closes it", func() bool { return p.Stats().Closed[ClosedStale] == 2 })

		third := use()
		_, err = third.Write([]byte(newToken() + "\n"))
		require.NoError(t, err)
		soon(t, "the reply waits", func() bool { return look(third).Bytes })
		sweepAll(p)
		require.Same(t, third, use())
	}
}

// slowToHear is a connection whose SetDeadline takes its time.
type slowToHear struct {
	*faultnet.Conn
	called chan struct{}
}

func (s *slowToHear) SetDeadline(t time.Time) error {
	if !t.IsZero() && s.called != nil {
		close(s.called)
		s.called = nil
		time.Sleep(20 * time.Millisecond)
	}
	return s.Conn.SetDeadline(t)
}

// ADO-01: a Setup may return while the deadline of its ctx is being set.
func TestTheDeadlineOfTheDialDoesNotOutlastItOnTheConnectionOfAClient(t *testing.T) {
	bubble(t, func(t *testing.T) {
		called, read := make(chan struct{}), make(chan error, 1)
		n := (*testnet)(nil)
		n = open(t, Config{DialTimeout: time.Second, IdleTimeout: -1,
			Dialers: map[Transport]DialFunc{at("a").Transport: func(ctx context.Context, a Addr) (net.Conn, error) {
				nc, err := n.Dial(ctx, a.Host)
				if err != nil {
					return nil, err
				}
				return &slowToHear{nc.(*faultnet.Conn), called}, nil
			}},
			Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				go func() {
					_, err := nc.Read(make([]byte, 1))
					read <- err
				}()
				<-called
				return Resident(nc, nil), nil
			}})
		n.use(at("a"))
		n.check()
		time.Sleep(2 * time.Second)
		select {
		case err := <-read:
			t.Fatal("the read of the client ended: ", err)
		default:
		}
		n.Host("a").Conns()[0].Close()
		require.Equal(t, io.EOF, <-read)
	})
}
