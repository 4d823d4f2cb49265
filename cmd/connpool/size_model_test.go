package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/big"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
)

// tenThousand is the example of the old documents, which derive 100 connections from it.
var tenThousand = closedModel{users: 10_000, think: 10, service: 0.1}

// ORA-08: the mean alone would make most requests wait.
func TestTenThousandUsersNeedMoreThanTheMean(t *testing.T) {
	require.InDelta(t, 99.0, tenThousand.offered(), 0.05)
	for conns, want := range map[int]struct{ wait, response float64 }{
		100: {0.83, 0.144},
		110: {0.19, 0.102},
		120: {0.03, 0.100},
		130: {0.00, 0.100},
	} {
		s := tenThousand.with(conns)
		assert.InDelta(t, want.wait, s.WaitShare, 0.005, conns)
		assert.InDelta(t, want.response, s.MeanResponse, 0.0006, conns)
	}
}

// ORA-08: the formulas against users followed one by one.
func TestSimulationAgreesWithTheModelWithinATenth(t *testing.T) {
	cases := []struct {
		m               closedModel
		conns, requests int
	}{
		{tenThousand, 100, 4_000_000},
		{tenThousand, 110, 4_000_000},
		{tenThousand, 120, 2_000_000},
		{closedModel{users: 100, think: 0.4, service: 0.1}, 20, 500_000},
		{closedModel{users: 100, think: 0.4, service: 0.1}, 15, 500_000},
		{closedModel{users: 30, think: 0.1, service: 1}, 5, 200_000}, // there is always a queue
		{closedModel{users: 5, think: 1, service: 1}, 1, 200_000},
		{closedModel{users: 5, think: 1, service: 1}, 5, 200_000},
		{closedModel{users: 7, think: 0, service: 1}, 3, 200_000},
	}
	for _, c := range cases[short.Of(0, 3):] { // fewer requests would not approach the model
		t.Run(fmt.Sprintf("%+v, %d", c.m, c.conns), func(t *testing.T) {
			t.Parallel()
			want := c.m.with(c.conns)
			got, err := c.m.simulate(t.Context(), c.conns, c.requests, 1)
			require.NoError(t, err)
			near := func(what string, want, got float64) {
				if want < 1e-12 {
					assert.Zero(t, got, what)
					return
				}
				assert.InEpsilon(t, want, got, 0.10, what)
			}
			near("share that waits", want.WaitShare, got.WaitShare)
			near("mean wait", want.MeanWait, got.MeanWait)
			near("p99 wait", want.P99Wait, got.P99Wait)
			near("mean response", want.MeanResponse, got.MeanResponse)
			near("throughput", want.PerSecond, got.PerSecond)
		})
	}
}

// ORA-61: the same seed, the same numbers.
func TestSimulationFollowsFromItsSeed(t *testing.T) {
	m := closedModel{users: 50, think: 1, service: 0.1}
	sim := func(seed uint64) simulated {
		s, err := m.simulate(t.Context(), 5, 20_000, seed)
		require.NoError(t, err)
		return s
	}
	assert.Equal(t, sim(7), sim(7))
	assert.NotEqual(t, sim(7), sim(8))
}

func TestSimulationEndsWithItsCtx(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err := tenThousand.simulate(ctx, 100, 1_000_000_000, 1)
	require.ErrorIs(t, err, why)
}

// exactly solves the model with fractions of any size: no rounding at all.
func exactly(m closedModel, conns int) (waitShare, meanWait float64) {
	a := new(big.Rat).Quo(new(big.Rat).SetFloat64(m.service), new(big.Rat).SetFloat64(m.think))
	users := m.users - 1
	w, sum := big.NewRat(1, 1), new(big.Rat)
	share, wait := new(big.Rat), new(big.Rat)
	for k := 0; k <= users; k++ {
		sum.Add(sum, w)
		if k >= conns {
			share.Add(share, w)
			wait.Add(wait, new(big.Rat).Mul(w, big.NewRat(int64(k-conns+1), int64(conns))))
		}
		w = new(big.Rat).Mul(w, new(big.Rat).Mul(a, big.NewRat(int64(users-k), int64(min(k+1, conns)))))
	}
	waitShare, _ = share.Quo(share, sum).Float64()
	meanWait, _ = wait.Quo(wait, sum).Float64()
	return waitShare, meanWait * m.service
}

func TestModelEqualsItsSolutionInFractions(t *testing.T) {
	for _, m := range []closedModel{
		{1, 2, 1}, {2, 1, 1}, {10, 1, 0.5}, {60, 4, 0.25}, {60, 0.25, 4}, {200, 8, 0.5},
	} {
		for _, conns := range []int{1, 2, 5, 13, 60} {
			if conns > m.users {
				continue
			}
			share, wait := exactly(m, conns)
			s := m.with(conns)
			assert.InDelta(t, share, s.WaitShare, 1e-12, "%+v %d", m, conns)
			assert.InDelta(t, wait, s.MeanWait, 1e-9*(1+wait), "%+v %d", m, conns)
		}
	}
}

// What every model must satisfy: Little's law, and the two lines that bound the
// throughput.
func TestModelIsStableForManyUsers(t *testing.T) {
	for _, m := range []closedModel{tenThousand, {1_000_000, 100, 0.1}, {1_000_000, 0.001, 10}, {100_000, 1, 1e-6}} {
		for _, conns := range []int{1, 10, 100, 1000, 2000} {
			s := m.with(conns)
			for _, v := range []float64{s.WaitShare, s.MeanWait, s.P99Wait, s.MeanResponse, s.PerSecond} {
				require.False(t, math.IsNaN(v) || math.IsInf(v, 0) || v < 0, "%+v %d: %+v", m, conns, s)
			}
			ceiling := min(float64(conns)/m.service, float64(m.users)/(m.think+m.service))
			require.LessOrEqual(t, s.PerSecond, ceiling*(1+1e-9), "%+v %d", m, conns)
			require.LessOrEqual(t, s.WaitShare, 1.0)
			// The mean over the distribution, which with does not compute.
			o := m.occupancy(m.users, conns)
			mean, sum := 0.0, 0.0
			for i, p := range o.p {
				mean += p * float64(o.from+i)
				sum += p
			}
			require.InDelta(t, 1, sum, 1e-9)
			require.InEpsilon(t, mean, s.PerSecond*s.MeanResponse, 1e-6, "%+v %d: Little's law", m, conns)
		}
	}
}

func TestMoreConnectionsNeverWaitLonger(t *testing.T) {
	m := closedModel{users: 300, think: 5, service: 0.2}
	last := m.with(1)
	for conns := 2; conns <= 60; conns++ {
		s := m.with(conns)
		require.LessOrEqual(t, s.WaitShare, last.WaitShare)
		require.LessOrEqual(t, s.MeanWait, last.MeanWait)
		require.LessOrEqual(t, s.P99Wait, last.P99Wait*(1+1e-9))
		require.GreaterOrEqual(t, s.PerSecond, last.PerSecond)
		last = s
	}
}

func TestFewestIsTheFirstThatMeetsTheTarget(t *testing.T) {
	for _, m := range []closedModel{tenThousand, {100, 0.4, 0.1}, {1, 1, 1}, {3, 0, 1}} {
		for _, mayWait := range []float64{0, 0.001, 0.01, 0.2, 1} {
			n := m.fewest(mayWait)
			require.LessOrEqual(t, n, m.users)
			if n < m.users {
				require.LessOrEqual(t, m.with(n).WaitShare, mayWait)
			}
			if n > 1 {
				require.Greater(t, m.with(n-1).WaitShare, mayWait)
			}
		}
	}
}

// One connection and two users: a request that waits, waits for one service
// time, which is exponential.
func TestP99OfTheWaitIsThatOfItsDistribution(t *testing.T) {
	m := closedModel{users: 2, think: 1, service: 1}
	s := m.with(1)
	require.InDelta(t, 0.5, s.WaitShare, 1e-12)
	require.InEpsilon(t, math.Log(50), s.P99Wait, 1e-9) // 0.5 e^-t = 0.01
}
