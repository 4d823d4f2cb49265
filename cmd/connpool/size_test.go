package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
)

func runSize(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), append([]string{"size"}, args...), &out, &errs)
	return status, out.String(), errs.String()
}

// ORA-08
func TestSizePrintsTheOfferedLoadAndTheTableOfWaits(t *testing.T) {
	status, out, errs := runSize(t, "-users", "10000", "-think", "10s", "-service", "100ms", "-connections", "100,110,120,130")
	require.Equal(t, exitOK, status, errs)
	assert.Empty(t, errs)
	assert.Contains(t, out, "offered  99.0 connections in use on average")
	for conns, want := range map[int][]string{100: {"83.2 %", "144 ms"}, 110: {"19.5 %"}, 120: {"2.5 %"}, 130: {"0.17 %"}} {
		line := lineOf(out, fmt.Sprintf("  %11d ", conns))
		for _, w := range want {
			assert.Contains(t, line, w)
		}
	}
	assert.Contains(t, out, "knee     100 connections")
	assert.Contains(t, out, "limit    124 connections")
}

func lineOf(text, prefix string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, prefix) {
			return line
		}
	}
	return ""
}

// ORA-08, ORA-61: the table with -simulate, and that it is the same each time.
func TestSizeSimulatesOnRequestAndAlwaysSaysTheSame(t *testing.T) {
	args := []string{"-users", "500", "-think", "1s", "-service", "50ms", "-simulate", "-requests", "50000", "-seed", "3", "-json"}
	status, out, errs := runSize(t, args...)
	require.Equal(t, exitOK, status, errs)
	_, again, _ := runSize(t, args...)
	assert.Equal(t, out, again)
	var r arithmetic
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	require.NotEmpty(t, r.Rows)
	for _, row := range r.Rows {
		require.NotNil(t, row.Simulated)
		assert.InEpsilon(t, row.MeanResponse, row.Simulated.MeanResponse, 0.1)
	}
	_, text, _ := runSize(t, args[:len(args)-1]...)
	assert.Contains(t, text, "simulated:")
}

// APR-11: one request in five needs the peer, so the mean is one connection for five
// threads; the report says how many more are needed, and a simulation of that number
// keeps the promise.
func TestOneInFiveNeedsMoreThanOneConnectionForFiveThreads(t *testing.T) {
	status, out, errs := runSize(t, "-concurrency", "100", "-fraction", "0.2")
	require.Equal(t, exitOK, status, errs)
	assert.Contains(t, out, "offered  20.0 connections")
	assert.Contains(t, out, "knee     20 connections")
	assert.Contains(t, out, "limit    31 connections: from here on at most 1.0 % of the requests wait")

	_, out, _ = runSize(t, "-concurrency", "100", "-fraction", "0.2", "-connections", "20,30,31", "-json", "-simulate", "-requests", "400000")
	var r arithmetic
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	require.Equal(t, 20, r.Mean)
	require.Equal(t, 31, r.Enough)
	for _, row := range r.Rows {
		switch row.Connections {
		case 20:
			assert.Greater(t, row.Simulated.WaitShare, 0.6, "the mean alone")
		case 31:
			assert.LessOrEqual(t, row.Simulated.WaitShare, r.MayWait, "no waiting above the target")
		}
	}

	// The same for users: 1,000 users whose every fifth request needs the peer.
	_, out, _ = runSize(t, "-users", "1000", "-think", "1s", "-service", "100ms", "-fraction", "0.2", "-json")
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	assert.InDelta(t, 1000*0.1/5.1, r.Offered, 1e-9)
}

func TestThreadsThatAlwaysNeedTheirConnectionNeedOneEach(t *testing.T) {
	status, out, errs := runSize(t, "-concurrency", "8", "-fraction", "1", "-json")
	require.Equal(t, exitOK, status, errs)
	var r arithmetic
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	assert.Equal(t, 8, r.Mean)
	assert.Equal(t, 8, r.Enough)
}

// ORA-42
func TestSharesNeverExceedTheTotal(t *testing.T) {
	for _, c := range []struct{ total, processes, each, sum int }{
		{200, 5, 40, 200}, {200, 3, 66, 198}, {7, 7, 1, 7}, {7, 1, 7, 7}, {99, 100, 0, 0},
	} {
		assert.Equal(t, division{c.total, c.processes, c.each, c.sum}, divide(c.total, c.processes))
	}
	for total := range 100 {
		for p := 1; p < 20; p++ {
			d := divide(total, p)
			assert.LessOrEqual(t, d.Sum, total)
			assert.Less(t, total-d.Sum, p, "and none is wasted")
		}
	}
	_, out, _ := runSize(t, "-total", "200", "-processes", "3")
	assert.Contains(t, out, "200 over 3 processes: 66 each (198 of 200)")
	assert.Contains(t, divide(2, 3).String(), "less than one each")

	// A divided pool needs more connections in all than an undivided one.
	_, out, _ = runSize(t, "-users", "10000", "-think", "10s", "-service", "100ms", "-processes", "5", "-json")
	var r arithmetic
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	require.NotNil(t, r.Division)
	assert.Equal(t, 124/5, r.Division.Each)
	assert.LessOrEqual(t, r.Division.Sum, 124)
	assert.Greater(t, r.Division.EnoughSum, 124)
	assert.LessOrEqual(t, closedModel{2000, 10, 0.1}.with(r.Division.EnoughEach).WaitShare, 0.01)
}

// record writes a history as the help says.
func record(t *testing.T, name string, inUse func(second int) int, seconds int, more func(second int, st *connpool.Stats)) {
	t.Helper()
	f, err := os.Create(name)
	require.NoError(t, err)
	defer f.Close()
	enc := json.NewEncoder(f)
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s := range seconds {
		st := connpool.Stats{InUse: inUse(s), Closed: map[connpool.CloseReason]uint64{connpool.ClosedEvicted: 1}}
		if more != nil {
			more(s, &st)
		}
		require.NoError(t, enc.Encode(struct {
			Time time.Time
			connpool.Stats
		}{start.Add(time.Duration(s) * time.Second), st}))
	}
}

func historyOf(t *testing.T, args ...string) histories {
	t.Helper()
	status, out, errs := runSize(t, append(args, "-json")...)
	require.Equal(t, exitOK, status, errs)
	var h histories
	require.NoError(t, json.Unmarshal([]byte(out), &h))
	return h
}

// ORA-46: the minimum below the average, the maximum between average and peak.
func TestHistoryAdvisesMinimumAndMaximum(t *testing.T) {
	name := filepath.Join(t.TempDir(), "stats.jsonl")
	// 10 in use, but 30 for 5 % of the time, and 50 for a moment.
	record(t, name, func(s int) int {
		switch {
		case s == 500:
			return 50
		case s%20 == 0:
			return 30
		}
		return 10
	}, 1001, func(s int, st *connpool.Stats) { st.Loans, st.Dials = uint64(100*s), 50 })
	h := historyOf(t, "-history", name, "-processes", "4").Of[0]
	assert.InDelta(t, 11.02, h.Average, 0.01)
	assert.Equal(t, 50, h.Peak)
	assert.Equal(t, 11, h.Min)
	assert.Less(t, float64(h.Min), h.Average)
	assert.Equal(t, 30, h.Max)
	assert.GreaterOrEqual(t, float64(h.Max), h.Average)
	assert.LessOrEqual(t, h.Max, h.Peak)
	assert.Equal(t, 7, h.Share.Each)
	assert.False(t, h.Cut)
	assert.EqualValues(t, 100_000, h.Loans)

	_, out, _ := runSize(t, "-history", name)
	assert.Contains(t, out, "MinIdlePerAddr: 11, below the average in use (11.0)")
	assert.Contains(t, out, "MaxPerAddr: 30, between the average and the peak (50)")
}

// ORA-46: for any history.
func TestAdviceIsAlwaysBelowAverageAndBetweenAverageAndPeak(t *testing.T) {
	for name, inUse := range map[string]func(int) int{
		"constant": func(int) int { return 7 },
		"nothing":  func(int) int { return 0 },
		"one":      func(int) int { return 1 },
		"rarely":   func(s int) int { return s / 99 },
		"ramp":     func(s int) int { return s },
		"half":     func(s int) int { return s % 2 * 100 },
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "h")
			record(t, file, inUse, 101, nil)
			h := historyOf(t, "-history", file).Of[0]
			if h.Average > 0 {
				assert.Less(t, float64(h.Min), h.Average)
			}
			assert.GreaterOrEqual(t, h.Min, 0)
			assert.GreaterOrEqual(t, float64(h.Max), h.Average)
			assert.LessOrEqual(t, h.Max, max(1, h.Peak))
		})
	}
}

func TestHistoryIsWeightedByTimeAndKnowsItsAddresses(t *testing.T) {
	name := filepath.Join(t.TempDir(), "h")
	at := func(s int) string { return time.Unix(int64(1e9+s), 0).UTC().Format(time.RFC3339) }
	line := func(s int, addr string, inUse int) string {
		return fmt.Sprintf(`{"Time":%q,"Addr":%q,"InUse":%d,"Open":%d,"LastErr":null}`+"\n", at(s), addr, inUse, inUse)
	}
	// Out of order; the last sample has no weight; the last line is cut off.
	text := line(90, "tcp://a:1", 9) + line(0, "tcp://a:1", 1) + line(100, "tcp://a:1", 99) +
		line(0, "tcp://b:1", 4) + line(10, "tcp://b:1", 4) + "\n" + `{"Time":"20`
	require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	h := historyOf(t, "-history", name)
	require.Len(t, h.Of, 2)
	assert.Equal(t, "tcp://a:1", h.Of[0].Addr)
	assert.InDelta(t, 1.8, h.Of[0].Average, 1e-9)
	assert.Equal(t, 99, h.Of[0].Peak)
	assert.Equal(t, 9, h.Of[0].Max)
	assert.InDelta(t, 4, h.Of[1].Average, 1e-9)
	assert.Equal(t, 3, h.Of[1].Min)
	assert.Equal(t, 4, h.Of[1].Max)
	assert.Contains(t, h.Of[1].Advice[1].Command, "-to tcp://b:1")
}

func TestHistoryThatTheLimitCutSaysSo(t *testing.T) {
	name := filepath.Join(t.TempDir(), "h")
	record(t, name, func(int) int { return 5 }, 50, func(s int, st *connpool.Stats) {
		st.Open, st.Limit, st.Addrs, st.Waiting = 5, 5, 3, s%2*4
		st.Loans, st.Dials = uint64(s), uint64(s)
		st.Waits, st.WaitDuration = uint64(2*s), time.Duration(s)*time.Millisecond
	})
	h := historyOf(t, "-history", name).Of[0]
	assert.True(t, h.Cut)
	assert.EqualValues(t, 98, h.Waits)
	assert.InDelta(t, 0.0005, h.MeanWait, 1e-9)
	_, out, _ := runSize(t, "-history", name)
	assert.Contains(t, out, "waited at the limit of 5")
	assert.Contains(t, out, "MaxOpen: 5", "several addresses share it")
	assert.Contains(t, out, "dials for")
}

func TestHistoryThatIsNoneIsRefusedByLine(t *testing.T) {
	for text, says := range map[string]string{
		"":                                      "no line in it",
		"{\"InUse\":1}\n":                       "line 1 has no Time",
		"{\"Time\":\"2026-01-02T03:04:05Z\"}\n": "line 1 has no InUse",
		"\n\nhello\n":                           "line 3",
		"{\"Time\":\"2026-01-02T03:04:05Z\",\"InUse\":-1}\n": "InUse is -1",
		"{\"Time\":\"2026-01-02T03:04:05Z\",\"InUse\":1}\n":  "one point in time",
	} {
		name := filepath.Join(t.TempDir(), "h")
		require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
		status, out, errs := runSize(t, "-history", name)
		assert.Equal(t, exitBroken, status)
		assert.Contains(t, errs, says)
		assert.Empty(t, out)
	}
	status, _, errs := runSize(t, "-history", "/nonexistent")
	assert.Equal(t, exitBroken, status)
	assert.Contains(t, errs, "-history")
}

// ORA-61: each piece of advice names the command that measures it, and each such command
// exists and accepts its flags.
func TestEveryAdviceNamesACommandThatWorks(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "h")
	record(t, name, func(s int) int { return s % 5 }, 50, func(s int, st *connpool.Stats) {
		st.Open, st.Limit, st.Waiting, st.Loans, st.Dials, st.Addrs = 5, 5, 3, uint64(s), uint64(s), 2
	})
	var all []advice
	for _, args := range [][]string{
		{"size", "-users", "100", "-think", "1s"},
		{"size", "-users", "100", "-think", "1s", "-processes", "3"},
		{"size", "-concurrency", "100", "-fraction", "0.2"},
		{"size", "-total", "200", "-processes", "3"},
		{"size", "-history", name},
		{"size", "-history", name, "-processes", "2"},
		{"size", "-to", "tcp://" + startEcho(t), "-max-clients", "2", "-step", "10ms", "-limit", "1s"},
		{"size", "-to", "tcp://" + startEcho(t), "-max-clients", "4", "-step", "10ms", "-limit", "1s", "-share", "0.5", "-load-command", "echo 60"},
		{"size", "-own", "2x1ms", "-max-clients", "2", "-step", "10ms", "-limit", "1s"},
		{"load", "-n", "10"},
		{"load", "-n", "10", "-to", "tcp://" + startEcho(t), "-probe", "line:a b"},
	} {
		var out, errs bytes.Buffer
		require.Equal(t, exitOK, run(t.Context(), append(args, "-json", "-quiet"), &out, &errs), "%v: %s", args, errs.String())
		var r struct {
			Advice []advice
			Of     []struct{ Advice []advice }
		}
		if args[1] == "-total" { // its report is the division itself
			r.Advice = divide(200, 3).advice()
		} else {
			require.NoError(t, json.Unmarshal(out.Bytes(), &r), out.String())
		}
		for _, h := range r.Of {
			r.Advice = append(r.Advice, h.Advice...)
		}
		require.NotEmpty(t, r.Advice, "%v", args)
		all = append(all, r.Advice...)
	}
	for _, a := range all {
		require.NotEmpty(t, a.Text)
		command := strings.NewReplacer("ADDR", "tcp://h:1", "PROBE", "line", "FILE", name, "'line:a b'", "line:a", "'echo 60'", "x").Replace(a.Command)
		words := strings.Fields(command)
		require.Greater(t, len(words), 2, "%q", a.Command)
		require.Equal(t, "connpool", words[0])
		var err error
		switch words[1] {
		case "size":
			_, err = parseSize(words[2:], io.Discard)
		case "load":
			_, err = parseLoad(words[2:], io.Discard)
		default:
			t.Errorf("no command: %q", a.Command)
		}
		require.NoError(t, err, a.Command)
	}
}

// ORA-61: a program that reads the output finds the same fields in the same order.
func TestReportsAreTheSameEachTime(t *testing.T) {
	for _, args := range [][]string{
		{"-users", "1000", "-think", "1s"},
		{"-users", "1000", "-think", "1s", "-json", "-processes", "2"},
		{"-concurrency", "40", "-fraction", "0.5"},
		{"-total", "9", "-processes", "2", "-json"},
	} {
		_, one, errs := runSize(t, args...)
		require.NotEmpty(t, one, errs)
		_, two, _ := runSize(t, args...)
		assert.Equal(t, one, two)
	}
}

func TestBadFlagsOfSizeAreRefusedWithAdvice(t *testing.T) {
	for _, c := range []struct {
		args string
		says string
	}{
		{"", "nothing to size"},
		{"-users 5 -to tcp://h:1", "choose one"},
		{"-users 5", "-think"},
		{"-users 0 -think 1s", "-users is 0"},
		{"-users 5 -think 1s -limit 1s", "-limit has no meaning with -users"},
		{"-concurrency 5 -think 1s", "-think has no meaning"},
		{"-concurrency 5 -fraction 2", "-fraction"},
		{"-concurrency 5 -fraction 0", "-fraction"},
		{"-concurrency 5 -fraction NaN", "-fraction"},
		{"-concurrency 5 -service 0s", "-service"},
		{"-concurrency 5 -may-wait 1", "-may-wait"},
		{"-concurrency 5 -connections 6", "-connections"},
		{"-concurrency 5 -connections x", "-connections"},
		{"-concurrency 5 -processes 6", "without any"},
		{"-concurrency 5 -requests 1", "-requests"},
		{"-to h:1", "-to"},
		{"-to tcp://h:1 -limit 0s", "-limit"},
		{"-to tcp://h:1 -limit 1m", "-timeout"},
		{"-to tcp://h:1 -judge max", "-judge"},
		{"-to tcp://h:1 -step 1ms", "-step"},
		{"-to tcp://h:1 -max-clients 0", "-max-clients"},
		{"-to tcp://h:1 -share 0.5", "-load-command"},
		{"-to tcp://h:1 -share 2", "-share"},
		{"-to tcp://h:1 -svg /nonexistent/x.svg", "-svg"},
		{"-to tcp://h:1 -svg /", "-svg"},
		{"-own 10", "-own"},
		{"-own 0x1s", "-own"},
		{"-own 1x0s", "-own"},
		{"-own 10x20ms -probe redis", "-probe has no meaning with -own"},
		{"-total 2 -processes 3", "at least one each"},
		{"-total 2 -processes 0", "-processes"},
		{"-history=", "-history"},
		{"-users 5 -think 1s now", `"now"`},
	} {
		status, out, errs := runSize(t, strings.Fields(c.args)...)
		assert.Equal(t, exitUsage, status, c.args)
		assert.Contains(t, errs, c.says, c.args)
		assert.Contains(t, errs, "connpool size -h", c.args)
		assert.Empty(t, out, c.args)
	}
}

func TestHelpOfSizeAndLoadTeaches(t *testing.T) {
	for command, parts := range map[string][]string{
		"size": {"knee", "limit", "-users", "-load-command", "examples:", "json.NewEncoder", "SCRAM", "status"},
		"load": {"pool", "dial", "one per worker", "-think", "examples:", "until=BYTES", "status"},
	} {
		for _, args := range [][]string{{command, "-h"}, {"help", command}} {
			var out, errs bytes.Buffer
			assert.Equal(t, exitOK, run(t.Context(), args, &out, &errs))
			assert.Empty(t, errs.String())
			for _, part := range parts {
				assert.Contains(t, out.String(), part)
			}
		}
	}
}

func TestFileAppearsWholeOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "plot.svg")
	require.NoError(t, canWrite(name))
	require.NoError(t, writeFileAtOnce(name, []byte("one")))
	require.NoError(t, writeFileAtOnce(name, []byte("two")))
	got, err := os.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, "two", string(got))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1)

	// A directory with the file's name: the new file cannot replace it, and is removed.
	taken := filepath.Join(dir, "taken")
	require.NoError(t, os.MkdirAll(filepath.Join(taken, "x"), 0o755))
	require.Error(t, writeFileAtOnce(taken, []byte("three")))
	require.Error(t, canWrite(taken))
	files, err = os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 2)
}
