package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// workshop is a peer with a number of workers, each of which takes the same time for a
// request; requests queue for a worker.
type workshop struct {
	workers chan struct{}
	service time.Duration
	mem     *faultnet.Mem

	mu      sync.Mutex // guards its records; nothing blocks under it
	pauses  []time.Duration
	unasked int // requests that came before the answer to the last one was sent
	busy    int // requests in line or at work
	most    int
}

func newWorkshop(t *testing.T, workers int, service time.Duration) *workshop {
	w := &workshop{workers: make(chan struct{}, workers), service: service, mem: faultnet.NewMem()}
	w.mem.Shared(true) // the end of a run closes connections from another goroutine
	w.mem.Host("peer").Serve(w.serve)
	t.Cleanup(w.mem.Close)
	return w
}

func (w *workshop) serve(c *faultnet.Conn) {
	in := bufio.NewReader(c)
	var answered time.Time
	for {
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		w.mu.Lock()
		if !answered.IsZero() {
			w.pauses = append(w.pauses, time.Since(answered))
		}
		w.unasked += in.Buffered()
		w.busy++
		w.most = max(w.most, w.busy)
		w.mu.Unlock()

		w.workers <- struct{}{}
		time.Sleep(w.service)
		<-w.workers

		w.mu.Lock()
		w.busy--
		w.mu.Unlock()
		answered = time.Now()
		if _, err := io.WriteString(c, "pong\n"); err != nil {
			return
		}
	}
}

// target is the workshop as a peer to measure.
func (w *workshop) target(t *testing.T) *target {
	p, err := parseProbe("line")
	require.NoError(t, err)
	return &target{addr: connpool.MustParseAddr("tcp://peer:7"), probe: p, timeout: 10 * time.Second,
		open: func(ctx context.Context, _ connpool.Addr) (net.Conn, error) { return w.mem.Dial(ctx, "peer") }}
}

func brisk(limit time.Duration) rampOptions {
	return rampOptions{limit: limit, judge: "mean", step: 2 * time.Second, max: 1000}
}

// experimenting measures the peer in a bubble, where time costs nothing.
func experimenting(t *testing.T, tgt *target, ro rampOptions, processes int) (*experiment, error) {
	t.Helper()
	o := sizeOptions{target: tgt, targetFlags: targetFlags{to: tgt.addr.String(), probe: "line"}, ramp: ro, processes: processes, loadCommand: "x"}
	return experimentOn(t.Context(), o, newNotices(io.Discard, true))
}

// ORA-39: a peer that serves forty at once.
func TestKneeOfAPeerThatServesFortyAtOnceIsForty(t *testing.T) {
	for _, service := range []time.Duration{5 * time.Millisecond, 100 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorkshop(t, 40, service)
			ro := brisk(10 * service)
			ro.step = 10 * service
			e, err := experimenting(t, w.target(t), ro, 1)
			require.NoError(t, err)
			assert.True(t, e.Knee.Reached)
			assert.GreaterOrEqual(t, e.Knee.Clients, 36)
			assert.LessOrEqual(t, e.Knee.Clients, 44)
			assert.InEpsilon(t, 40/service.Seconds(), e.Knee.Ceiling, 0.03)
			assert.InEpsilon(t, 40, e.Knee.Line, 0.03)
		})
	}
}

// ORA-41: ten workers of 100 ms and a limit of 2 s. Two hundred clients are the
// limit, and ten the capacity.
// ORA-42: both divided, and never exceeded.
func TestKneeAndLimitAreToldApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, 100*time.Millisecond)
		e, err := experimenting(t, w.target(t), brisk(2*time.Second), 3)
		require.NoError(t, err)
		assert.Equal(t, endedByResponse, e.Ended)
		assert.InDelta(t, 200, e.Within, 20)
		assert.Equal(t, 10, e.Knee.Clients)
		assert.True(t, e.Knee.Reached)
		assert.Equal(t, e.Within/3, e.LimitShare.Each)
		assert.LessOrEqual(t, e.LimitShare.Sum, e.Within)
		assert.Equal(t, 3, e.KneeShare.Each)
		text := e.text()
		assert.Contains(t, text, "knee     10 clients")
		assert.Contains(t, text, fmt.Sprintf("limit    %d clients: with more, the mean response exceeds 2.00 s", e.Within))
	})
}

// ORA-40
func TestRampRisesAndEveryClientAsksBackToBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, 100*time.Millisecond)
		r := &ramp{rampOptions: brisk(time.Second), crew: newCrew(t.Context(), w.target(t)), live: newNotices(io.Discard, true)}
		_, within, err := r.run(t.Context())
		require.NoError(t, err)
		synctest.Wait()

		// The number doubles each time, up to the first that is beyond the limit.
		var rising []int
		for i, l := range r.levels {
			if i > 0 && l.Clients < r.levels[i-1].Clients {
				break
			}
			rising = append(rising, l.Clients)
			if l.Mean > 1 {
				break
			}
		}
		assert.Equal(t, []int{1, 2, 4, 8, 16, 32, 64, 128}, rising)
		assert.LessOrEqual(t, w.most, 128, "the limit ends it")
		assert.InDelta(t, 100, within, 10)
		for _, l := range r.levels {
			assert.Zero(t, l.Errors)
			assert.GreaterOrEqual(t, l.Answers, uint64(3*l.Clients))
			assert.InEpsilon(t, float64(l.Clients), l.PerSecond*l.Mean, 0.1, "as many requests as clients are under way: %+v", l)
		}
		sorted := r.sorted()
		assert.True(t, slices.IsSortedFunc(sorted, func(a, b level) int { return a.Clients - b.Clients }))

		// Each answer triggers the next request, and no client has two requests in
		// flight.
		require.NotEmpty(t, w.pauses)
		for _, pause := range w.pauses {
			require.Zero(t, pause)
		}
		assert.Zero(t, w.unasked)
		assert.Equal(t, 128, w.mem.Host("peer").Peak(), "one connection for each client")
		assert.Empty(t, w.mem.Host("peer").Conns(), "and none is left over")
	})
}

// ORA-43: others need the peer too.
func TestSharedPeerIsLoadedToItsShareOnly(t *testing.T) {
	for share, want := range map[float64]int{0.5: 100, 0.25: 50, 0.1: 20} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorkshop(t, 1000, 50*time.Millisecond)
			ro := brisk(time.Second)
			ro.share = share
			ro.load = func(_ context.Context, clients int) (float64, error) {
				assert.Len(t, w.mem.Host("peer").Conns(), clients, "asked while they are at work")
				return float64(clients) / 2, nil
			}
			e, err := experimenting(t, w.target(t), ro, 1)
			require.NoError(t, err)
			assert.Equal(t, endedByShare, e.Ended)
			assert.Equal(t, want, e.Within)
			assert.LessOrEqual(t, w.most, want, "the share of the others is never touched")
			assert.Contains(t, e.Advice[0].Command, fmt.Sprintf("-share %v -load-command x", share))
		})
	}
}

// A load that grows faster than the number of clients cannot be predicted: the ramp
// overshoots the share once, and then narrows the number down.
func TestShareIsFoundWhereLoadLeaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 1000, 50*time.Millisecond)
		ro := brisk(time.Second)
		ro.share = 0.5
		ro.load = func(_ context.Context, clients int) (float64, error) {
			if clients > 37 {
				return 90, nil
			}
			return 1, nil
		}
		e, err := experimenting(t, w.target(t), ro, 1)
		require.NoError(t, err)
		assert.Equal(t, endedByShare, e.Ended)
		assert.Equal(t, 37, e.Within)
	})
}

func TestLoadThatCannotBeReadEndsTheRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, time.Millisecond)
		ro := brisk(time.Second)
		why := errors.New("no such thing")
		ro.share, ro.load = 0.5, func(context.Context, int) (float64, error) { return 0, why }
		_, err := experimenting(t, w.target(t), ro, 1)
		require.ErrorIs(t, err, why)
		synctest.Wait()
		assert.Empty(t, w.mem.Host("peer").Conns())
	})
}

// A peer with a limit on connections of its own, as databases have.
func TestRampEndsWhereThePeerRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 50, 10*time.Millisecond)
		host := w.mem.Host("peer")
		tgt := w.target(t)
		tgt.open = func(ctx context.Context, _ connpool.Addr) (net.Conn, error) {
			if len(host.Conns()) >= 20 {
				return nil, errors.New("too many connections")
			}
			return w.mem.Dial(ctx, "peer")
		}
		e, err := experimenting(t, tgt, brisk(2*time.Second), 1)
		require.NoError(t, err)
		assert.Equal(t, endedByErrors, e.Ended)
		assert.Equal(t, 20, e.Within)
		assert.Contains(t, e.text(), "with more, exchanges fail: too many connections")
		assert.False(t, e.Knee.Reached, "it has workers left")
	})
}

// If clients are starved and nothing fails, no error is reported.
func TestStarvedClientsAreNoFailedExchanges(t *testing.T) {
	e := &experiment{Ended: endedByErrors}
	assert.Contains(t, e.why(), "no answer within a step")
	e.lastErr = errors.New("too many connections")
	assert.Equal(t, "with more, exchanges fail: too many connections", e.why())
}

func TestPeerThatNeverAnswersIsAnErrorAndNoSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 1, time.Hour)
		_, err := experimenting(t, w.target(t), brisk(time.Second), 1)
		require.ErrorContains(t, err, "not even one client")
	})
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 1, time.Millisecond)
		w.mem.Host("peer").Down()
		_, err := experimenting(t, w.target(t), brisk(time.Second), 1)
		require.ErrorContains(t, err, "refused")
	})
}

func TestRampThatEndsBeforeTheLimitExtrapolatesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, 10*time.Millisecond)
		ro := brisk(2 * time.Second)
		ro.max = 64
		e, err := experimenting(t, w.target(t), ro, 1)
		require.NoError(t, err)
		assert.Equal(t, endedByMax, e.Ended)
		assert.Equal(t, 64, e.Within)
		assert.InEpsilon(t, 2000, e.Beyond, 0.05)
		assert.Contains(t, e.text(), "nobody has tried")
	})
}

func TestInterruptedRampReportsWhatItMeasuredAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	plot := filepath.Join(dir, "plot.svg")
	require.NoError(t, os.WriteFile(plot, []byte("the old plot"), 0o600))
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, 100*time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
		defer cancel()
		tgt := w.target(t)
		e, err := experimentOn(ctx, sizeOptions{target: tgt, ramp: brisk(2 * time.Second), processes: 1, svg: plot}, newNotices(io.Discard, true))
		require.NoError(t, err)
		assert.Equal(t, endedByCtx, e.Ended)
		assert.NotEmpty(t, e.Levels)
		assert.Contains(t, e.text(), "interrupted there")
		synctest.Wait()
		assert.Empty(t, w.mem.Host("peer").Conns())
	})
	old, err := os.ReadFile(plot)
	require.NoError(t, err)
	assert.Equal(t, "the old plot", string(old))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, files, 1, "nothing half written lies about")
}

func TestDisturbancesDoNotMoveTheKnee(t *testing.T) {
	curve := func(points ...float64) (out []level) {
		for i := 0; i < len(points); i += 2 {
			out = append(out, level{Clients: int(points[i]), PerSecond: points[i+1], Seconds: 2, Answers: 1000})
		}
		return out
	}
	for name, c := range map[string]struct {
		levels  []level
		clients int
		reached bool
	}{
		"a clean one":   {curve(1, 100, 2, 200, 4, 400, 8, 800, 10, 1000, 16, 1000, 32, 1000), 10, true},
		"noise":         {curve(1, 100, 2, 200, 4, 400, 8, 800, 10, 985, 16, 1010, 32, 990, 64, 1020, 128, 985), 10, true},
		"a lucky dip":   {curve(1, 100, 4, 400, 10, 1000, 16, 930, 32, 1010, 64, 1000), 10, true},
		"a lucky level": {curve(1, 100, 8, 800, 10, 985, 16, 985, 32, 1050, 64, 985), 10, true},
		// As measured with a real peer on a busy machine.
		"disturbances": {curve(1, 24_242, 2, 49_476, 4, 56_895, 8, 65_387, 16, 57_440, 32, 95_609, 64, 106_294, 128, 101_504, 160, 65_926,
			176, 80_497, 184, 61_324, 190, 55_322, 192, 109_662, 208, 106_390, 216, 95_142, 256, 105_077), 64, true},
		"decline":         {curve(1, 100, 8, 800, 10, 1000, 16, 1000, 32, 700, 64, 400), 10, true},
		"still growing":   {curve(1, 100, 2, 200, 4, 400), 4, false},
		"one at a time":   {curve(1, 100, 2, 100, 4, 101), 1, true},
		"a single level":  {curve(1, 100), 1, false},
		"nothing at all":  {nil, 0, false},
		"errors are none": {append(curve(1, 100, 2, 200, 4, 210), level{Clients: 8, PerSecond: 900, Seconds: 2, Answers: 100, Errors: 50, Starved: 1}), 2, true},
	} {
		t.Run(name, func(t *testing.T) {
			k := kneeOf(c.levels)
			assert.Equal(t, c.clients, k.Clients)
			assert.Equal(t, c.reached, k.Reached)
			assert.Equal(t, name == "disturbances", disturbed(c.levels))
		})
	}
}

// For the length of one level, something else keeps the peer busy.
func TestDisturbedLevelIsMeasuredAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorkshop(t, 10, 100*time.Millisecond)
		r := &ramp{rampOptions: brisk(2 * time.Second), crew: newCrew(t.Context(), w.target(t)), live: newNotices(io.Discard, true)}
		defer r.crew.resize(0)
		before, err := r.measure(t.Context(), 10)
		require.NoError(t, err)
		for range 8 {
			w.workers <- struct{}{}
		}
		time.AfterFunc(2500*time.Millisecond, func() {
			for range 8 {
				<-w.workers
			}
		})
		l, err := r.measure(t.Context(), 20)
		require.NoError(t, err)
		assert.InEpsilon(t, before.PerSecond, l.PerSecond, 0.05)
		assert.Len(t, r.levels, 2)
	})
}

// ORA-43: the command that tells the load, with a shell.
func TestLoadCommandPrintsAPercentage(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/bin/sh"); err != nil {
		t.Skip("there is no /bin/sh here to run a load command")
	}
	for command, want := range map[string]float64{
		"echo $((CONNPOOL_CLIENTS / 2))": 50,
		"echo 47.5 %":                    47.5,
		"printf 12%%":                    12,
	} {
		got, err := commandLoad(command)(t.Context(), 100)
		require.NoError(t, err, command)
		assert.Equal(t, want, got)
	}
	for command, says := range map[string]string{
		"echo much":             "one number",
		"echo -3":               "one number",
		"true":                  "one number",
		"echo gone >&2; exit 3": "gone",
	} {
		_, err := commandLoad(command)(t.Context(), 100)
		assert.ErrorContains(t, err, says, command)
		assert.ErrorContains(t, err, "-load-command", command)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := commandLoad("sleep 60")(ctx, 1)
	require.Error(t, err)
	assert.Less(t, time.Since(began), 30*time.Second)
}

// ORA-39, ORA-61: the command itself, over real sockets.
func TestSizeMeasuresARealPeerAndPlotsIt(t *testing.T) {
	t.Parallel()
	echo := startEcho(t)
	plot := filepath.Join(t.TempDir(), "size.svg")
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"size", "-to", "tcp://" + echo, "-probe", "line:hello", "-max-clients", "4", "-step", short.Of("300ms", "100ms"),
		"-limit", "1s", "-svg", plot, "-json", "-processes", "2"}, &out, &errs)
	require.Equal(t, exitOK, status, errs.String())
	assert.Contains(t, errs.String(), "4 clients:")
	assert.NotContains(t, errs.String(), "\x1b")
	var e experiment
	require.NoError(t, json.Unmarshal(out.Bytes(), &e))
	assert.Equal(t, "tcp://"+echo, e.Address)
	assert.Equal(t, endedByMax, e.Ended)
	assert.GreaterOrEqual(t, e.Within, 1, "how far a busy machine comes within the limit is its own affair")
	assert.LessOrEqual(t, e.Within, 4)
	for _, l := range e.Levels {
		assert.Positive(t, l.PerSecond)
		assert.Zero(t, l.Errors)
		assert.LessOrEqual(t, l.P50, l.P99)
	}
	svg, err := os.ReadFile(plot)
	require.NoError(t, err)
	assert.True(t, strings.HasPrefix(string(svg), "<svg ") && strings.HasSuffix(string(svg), "</svg>\n"))
	assert.Contains(t, string(svg), fmt.Sprint("limit ", e.Within))
	for dec := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := dec.Token(); err != nil {
			assert.ErrorIs(t, err, io.EOF, "well-formed")
			break
		}
	}
}
