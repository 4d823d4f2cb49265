package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// ORA-77: pooled against unpooled, on a user's own peer.
func TestLoadComparesOnAPeerOfTheUsers(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"load", "-to", "tcp://" + startEcho(t), "-probe", "line:hello", "-workers", "4", "-n", "400", "-rounds", "4", "-json"}, &out, &errs)
	require.Equal(t, exitOK, status, errs.String())
	assert.Contains(t, errs.String(), "4 workers")
	var r struct {
		loadReport
		Ways []struct {
			Name            string
			Answers, Opened uint64
			Held            int
			Mean            float64 `json:"mean_s"`
			P50             float64 `json:"p50_s"`
			P99             float64 `json:"p99_s"`
			PerSecond       float64 `json:"per_second"`
			Errors          map[string]uint64
		} `json:"ways"`
	}
	require.NoError(t, json.Unmarshal(out.Bytes(), &r))
	require.Len(t, r.Ways, 3)
	for i, name := range []string{"pool", "dial", "one per worker"} {
		w := r.Ways[i]
		assert.Equal(t, name, w.Name)
		assert.EqualValues(t, 400, w.Answers)
		assert.Empty(t, w.Errors)
		assert.LessOrEqual(t, w.P50, w.P99)
		assert.Positive(t, w.Mean)
		assert.Positive(t, w.PerSecond)
		assert.LessOrEqual(t, w.Held, 4)
	}
	assert.Less(t, r.Ways[0].Opened, uint64(20), "of 400 requests")
	assert.EqualValues(t, 400, r.Ways[1].Opened)
	assert.EqualValues(t, 4, r.Ways[2].Opened)
	assert.InEpsilon(t, r.Ways[0].PerSecond/r.Ways[1].PerSecond, r.Ratio, 1e-6)
	assert.Equal(t, 4, r.Rounds)
}

func TestLoadNeedsNoArguments(t *testing.T) {
	require.NoError(t, openNetpoller())
	before := footprintNow()
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"load", "-for", "150ms", "-rounds", "2", "-workers", "2"}, &out, &errs)
	require.Equal(t, exitOK, status, errs.String())
	for _, part := range []string{"an echo server of its own", "requests/s", "p99", "opened", "held", "ratio", "what to do with it"} {
		assert.Contains(t, out.String(), part)
	}
	assert.True(t, eventually(time.Minute, func() bool {
		left := footprintNow().beyond(before)
		return left.goroutines == 0 && left.descriptors <= 0
	}), "nothing is left over: %+v", footprintNow().beyond(before))
}

// benchIn runs load in a bubble, with the given service time, against a peer whose
// connections take as long to open as dial says.
func benchIn(t *testing.T, w *workshop, o loadOptions) (*loadReport, error) {
	t.Helper()
	o.target = w.target(t)
	return comparing(t.Context(), o, newNotices(io.Discard, true))
}

// ORA-77: the meaning of the figures, where they are known beforehand.
func TestLoadCountsTheDialInEachRequestOfDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 100, 10*time.Millisecond)
		w.mem.Host("peer").SetLatency(40 * time.Millisecond)
		r, err := benchIn(t, w, loadOptions{workers: 8, span: 30 * time.Second, rounds: 5})
		require.NoError(t, err)
		pool, dial, keep := r.Ways[0], r.Ways[1], r.Ways[2]
		assert.InEpsilon(t, 0.010, pool.Mean, 0.05)
		assert.InEpsilon(t, 0.050, dial.Mean, 0.02)
		assert.InEpsilon(t, 0.010, keep.Mean, 0.05)
		assert.InEpsilon(t, 800, pool.PerSecond, 0.05)
		assert.InEpsilon(t, 5, r.Ratio, 0.05)
		assert.InEpsilon(t, 0.040, r.Saved, 0.05)
		assert.EqualValues(t, 8, pool.Opened)
		assert.Equal(t, dial.Answers, dial.Opened)
		assert.EqualValues(t, 8, keep.Held)
		assert.LessOrEqual(t, r.RatioRange[0], r.RatioRange[1])
		require.NotNil(t, r.BreakEven)
		assert.InDelta(t, 0.35, r.BreakEven.PerMinute, 0.01)
		synctest.Wait()
		assert.Empty(t, w.mem.Host("peer").Conns(), "nothing is left over")
	})
}

// Workers that pause hold fewer connections of a pool than of their own.
func TestPoolHoldsNoMoreThanWorkersAtWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 100, time.Millisecond)
		r, err := benchIn(t, w, loadOptions{workers: 20, span: 6 * time.Second, rounds: 2, think: 19 * time.Millisecond, maxPerAddr: 5})
		require.NoError(t, err)
		assert.LessOrEqual(t, r.Ways[0].Held, 5)
		assert.Equal(t, 20, r.Ways[2].Held)
		assert.InEpsilon(t, r.Ways[2].PerSecond, r.Ways[0].PerSecond, 0.1)
	})
}

func TestInterruptedLoadReportsItsWholeRounds(t *testing.T) {
	// A turn takes two thirds of a second, a round two seconds. Round 4 counts if each
	// way had its turn, even a short one.
	for after, rounds := range map[time.Duration]int{6500 * time.Millisecond: 3, 7 * time.Second: 3, 7605 * time.Millisecond: 4} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorkshop(t, 100, 10*time.Millisecond)
			ctx, cancel := context.WithTimeout(t.Context(), after)
			defer cancel()
			o := loadOptions{target: w.target(t), workers: 4, span: 20 * time.Second, rounds: 10}
			r, err := comparing(ctx, o, newNotices(io.Discard, true))
			require.NoError(t, err)
			assert.True(t, r.Interrupted)
			assert.Equal(t, rounds, r.Rounds)
			assert.InDelta(t, after.Seconds(), r.Seconds, 0.1)
			assert.Contains(t, r.text(), "interrupted")
			for _, p := range r.Ways {
				assert.Empty(t, p.Errors, "what the interrupt cut is no error of the peer")
			}
			synctest.Wait()
			assert.Empty(t, w.mem.Host("peer").Conns())
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 100, 10*time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := comparing(ctx, loadOptions{target: w.target(t), workers: 4, span: time.Hour, rounds: 1}, newNotices(io.Discard, true))
		require.ErrorIs(t, err, errNothingMeasured)
	})
}

func TestLoadOfAPeerThatIsDownSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 1, time.Millisecond)
		w.mem.Host("peer").Down()
		_, err := benchIn(t, w, loadOptions{workers: 2, span: 3 * time.Second, rounds: 1})
		require.ErrorContains(t, err, "refused")
		assert.Equal(t, connpool.KindRefused, connpool.KindOf(err))
	})
}

func TestErrorsOfSomeRequestsAreCountedByKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 100, time.Millisecond)
		w.mem.Host("peer").FailNext(errors.New("one"), errors.New("two"))
		r, err := benchIn(t, w, loadOptions{workers: 2, span: 3 * time.Second, rounds: 1})
		require.NoError(t, err)
		total := uint64(0)
		for _, p := range r.Ways {
			total += p.failed()
		}
		assert.EqualValues(t, 2, total)
		assert.Contains(t, r.text(), "the first: ")
	})
}

func TestBadFlagsOfLoadAreRefusedWithAdvice(t *testing.T) {
	for _, c := range []struct {
		args string
		says string
	}{
		{"-workers 0", "-workers"},
		{"-for -1s", "-for"},
		{"-n -1", "-n"},
		{"-n 5 -for 1s", "contradict"},
		{"-n 3", "rounds"},
		{"-rounds 0", "-rounds"},
		{"-think -1s", "-think"},
		{"-max-per-addr -1", "-max-per-addr"},
		{"-probe redis", "-to"},
		{"-to nowhere", "-to"},
		{"now", `"now"`},
		{"-nonsense", "nonsense"},
	} {
		var out, errs bytes.Buffer
		status := run(t.Context(), append([]string{"load"}, strings.Fields(c.args)...), &out, &errs)
		assert.Equal(t, exitUsage, status, c.args)
		assert.Contains(t, errs.String(), c.says, c.args)
		assert.Contains(t, errs.String(), "connpool load -h")
		assert.Empty(t, out.String())
	}
}
