package pooltest

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// The harness rots unseen: a Check would pass as well if nobody looked.
func TestAPoolThatNobodyAuditsIsNoProof(t *testing.T) {
	p, err := connpool.New(connpool.Config{})
	require.NoError(t, err)
	defer p.Close()
	require.ErrorContains(t, Inconsistency(p), "nobody audits")
	p, err = New(connpool.Config{})
	require.NoError(t, err)
	defer p.Close()
	require.NoError(t, Inconsistency(p))
}

func TestBorrowersDoWhatTheyAreTold(t *testing.T) {
	Bubble(t, func(t *testing.T) {
		n := Open(t, connpool.Config{MaxPerAddr: 1})
		n.Host("a").Serve(faultnet.EchoLines)
		first := n.Borrow(context.Background(), At("a"))
		first.Conn()
		require.True(t, first.Holds())
		queued := n.Queue(2, At("a"))
		n.Gauges(1, 0, 2)
		require.NoError(t, first.GiveBack())
		require.Equal(t, "a#1", Who(queued[0].Conn()))
		require.ErrorIs(t, queued[0].Finish(func(connpool.Conn) error { return ErrBoom }), ErrBoom)
		require.True(t, queued[0].Ended())
		require.Equal(t, "a#2", Who(queued[1].Conn()))
		require.NoError(t, queued[1].GiveBack())
		require.Equal(t, "a#2", n.Use(At("a")))
		synctest.Wait()
		n.Closed(map[connpool.CloseReason]uint64{connpool.ClosedFnError: 1})
		n.Idle(At("b"), 1)
		n.Check()
	})
}
