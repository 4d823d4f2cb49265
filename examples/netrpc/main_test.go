package main

import (
	"context"
	"net"
	"net/rpc"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out))
	require.Equal(t, "84 / 2 = 42, <nil>\n1 / 0 = 0, division by zero\n100 / 7 = 14, <nil>\nconnections opened: 1\n", out.String())
}

// Slow delays its answers on request.
type Slow struct{ release chan struct{} }

// Wait answers late if Late is set.
func (s Slow) Wait(q struct {
	Late bool
	N    int
}, n *int) error {
	if q.Late {
		<-s.release
	}
	*n = q.N
	return nil
}

func TestLateReplyMeetsNobody(t *testing.T) {
	slow := Slow{make(chan struct{})}
	server := rpc.NewServer()
	require.NoError(t, server.Register(slow))
	s, err := loopback.Start(func(nc net.Conn) { server.ServeConn(nc) })
	require.NoError(t, err)
	defer s.Close()
	c, err := newClient(s.Addr())
	require.NoError(t, err)
	defer c.pool.Close()
	type question struct {
		Late bool
		N    int
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	var n int
	require.ErrorIs(t, c.call(ctx, "Slow.Wait", question{true, 1}, &n), context.DeadlineExceeded)
	close(slow.release)
	require.NoError(t, c.call(t.Context(), "Slow.Wait", question{false, 2}, &n))
	require.Equal(t, 2, n)
	require.Equal(t, 2, s.Accepted())
}

func TestManyCallsOverFewConnectionsDescribeTheirTypesOnce(t *testing.T) {
	server := rpc.NewServer()
	require.NoError(t, server.Register(Arith{}))
	s, err := loopback.Start(func(nc net.Conn) { server.ServeConn(nc) })
	require.NoError(t, err)
	defer s.Close()
	c, err := newClient(s.Addr())
	require.NoError(t, err)
	defer c.pool.Close()
	var all sync.WaitGroup
	for worker := range 16 {
		all.Go(func() {
			for i := 1; i <= 50; i++ {
				var q int
				if err := c.call(t.Context(), "Arith.Divide", Pair{worker * i, i}, &q); err != nil || q != worker {
					t.Errorf("%d, %v", q, err)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, c.pool.Stats().PeakOpen, 4)
	require.Less(t, s.Accepted(), 20, "of 800 calls")
	dials := c.pool.Stats().Dials
	for range 3 {
		require.Error(t, c.call(t.Context(), "Arith.Nothing", Pair{}, new(int)))
	}
	require.Equal(t, dials, c.pool.Stats().Dials, "an unknown method costs no connection")
}
