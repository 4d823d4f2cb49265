package main

import (
	"bytes"
	"context"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/thrift/lib/go/thrift"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out))
	require.Equal(t, "84 / 2 = 42, <nil>\n1 / 0 = 0, division by zero\n100 / 7 = 14, <nil>\nconnections opened: 1\n", out.String())
}

func clientOf(t *testing.T, serve func(net.Conn)) (*client, *loopback.Server) {
	t.Helper()
	s, err := loopback.Start(serve)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	c, err := newClient(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { c.pool.Close() })
	return c, s
}

func TestOneClientServesManyGoroutines(t *testing.T) {
	c, s := clientOf(t, serveCalculator)
	var all sync.WaitGroup
	for worker := range int32(16) {
		all.Go(func() {
			for i := int32(1); i <= 50; i++ {
				if q, err := divide(t.Context(), c, worker*i, i); err != nil || q != worker {
					t.Errorf("%d, %v", q, err)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, c.pool.Stats().PeakOpen, 4)
	require.Less(t, s.Accepted(), 20, "of 800 calls")
	require.Zero(t, c.pool.Stats().InUse)
}

func TestExceptionCostsNoConnection(t *testing.T) {
	c, s := clientOf(t, serveCalculator)
	for range 3 {
		_, err := c.Call(t.Context(), "nothing", &numbers{}, &numbers{})
		var e thrift.TApplicationException
		require.ErrorAs(t, err, &e)
		require.EqualValues(t, thrift.UNKNOWN_METHOD, e.TypeId())
	}
	require.Equal(t, 1, s.Accepted())
}

// slowFirst answers the first request when it is released.
type slowFirst struct {
	net.Conn
	late chan struct{}
	once *atomic.Bool
}

func (s *slowFirst) Write(b []byte) (int, error) {
	if s.once.CompareAndSwap(false, true) {
		<-s.late
	}
	return s.Conn.Write(b)
}

func TestLateAnswerMeetsNobody(t *testing.T) {
	late, once := make(chan struct{}), new(atomic.Bool)
	c, s := clientOf(t, func(nc net.Conn) { serveCalculator(&slowFirst{nc, late, once}) })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := divide(ctx, c, 10, 2)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	close(late)
	q, err := divide(t.Context(), c, 21, 3)
	require.NoError(t, err)
	require.EqualValues(t, 7, q)
	require.Equal(t, 2, s.Accepted())
}

// The server answers with the id of another call.
func TestAnswerToAnotherCallCostsTheConnection(t *testing.T) {
	c, s := clientOf(t, func(nc net.Conn) { serveCalculator(&miscounting{nc}) })
	for range 2 {
		_, err := divide(t.Context(), c, 4, 2)
		require.Error(t, err)
		require.Zero(t, c.pool.Stats().Idle)
	}
	require.Equal(t, 2, s.Accepted())
}

type miscounting struct{ net.Conn }

// Write changes the sequence id, which follows the name of the method.
func (m *miscounting) Write(b []byte) (int, error) {
	if i := bytes.Index(b, []byte("divide")); i >= 0 {
		b = bytes.Clone(b)
		b[i+len("divide")+3] ^= 0x55
	}
	return m.Conn.Write(b)
}

// The server answers twice. The second answer belongs to no call.
func TestAnswerTooManyCostsTheConnection(t *testing.T) {
	c, s := clientOf(t, func(nc net.Conn) { serveCalculator(&stuttering{nc}) })
	for range 3 {
		q, err := divide(t.Context(), c, 21, 3)
		require.NoError(t, err)
		require.EqualValues(t, 7, q)
	}
	require.Equal(t, 3, s.Accepted())
	require.Zero(t, c.pool.Stats().Idle)
}

type stuttering struct{ net.Conn }

func (s *stuttering) Write(b []byte) (int, error) {
	return s.Conn.Write(append(b[:len(b):len(b)], b...))
}
