package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
)

// brief are the flags of a short run.
var brief = []string{"demo", "-for", "300ms", "-compare", "50ms", "-workers", "8", "-addrs", "6", "-max-open", "4"}

func runDemo(t *testing.T, more ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), append(append([]string{}, brief...), more...), &out, &errs)
	return status, out.String(), errs.String()
}

// BETA-07, BETA-08, PLT-12
func TestDemoKeepsItsPromisesUnderFaults(t *testing.T) {
	status, out, errs := runDemo(t)
	assert.Equal(t, exitOK, status, "%s%s", out, errs)
	assert.Contains(t, out, "\nreplies that belonged to someone else: 0\n")
	assert.NotContains(t, out, "BROKEN")
	for _, part := range []string{"the borrower gave up", "the connection died while in use", "avoidable",
		"getting a connection", "p99", "used before", "by reason", "a dial for each exchange", "times as much", "goroutines"} {
		assert.Contains(t, out, part)
	}
	assert.Contains(t, errs, "loans/s", "the live line goes to stderr")
	assert.NotContains(t, errs, "\x1b", "nothing is redrawn where there is no terminal")
}

func TestJSONReportIsOneObjectAndNothingElse(t *testing.T) {
	status, out, errs := runDemo(t, "-json", "-quiet", "-seed", "7")
	require.Equal(t, exitOK, status, "%s%s", out, errs)
	assert.Empty(t, errs)

	var fields map[string]any
	dec := json.NewDecoder(strings.NewReader(out))
	require.NoError(t, dec.Decode(&fields))
	_, err := dec.Token()
	require.ErrorIs(t, err, io.EOF)
	for _, name := range []string{"seed", "exchanges", "answered", "errors", "foreign_replies", "avoidable_errors",
		"unexplained_errors", "reuse_ratio", "borrow_p50_us", "borrow_p99_us", "exchange_p50_us", "exchange_p99_us",
		"closed", "peak_open", "peak_open_seen_by_servers", "max_open", "comparison", "left", "interrupted", "broken", "faults"} {
		assert.Contains(t, fields, name)
	}

	var r report
	require.NoError(t, json.Unmarshal([]byte(out), &struct {
		*report
		Errors any            `json:"errors"` // kinds and reasons cannot be parsed from their text
		Closed map[string]int `json:"closed"`
	}{report: &r}))
	assert.EqualValues(t, 7, r.Seed)
	assert.Positive(t, r.Answered)
	assert.Zero(t, r.ForeignReplies)
	assert.LessOrEqual(t, r.PeakOpen, 4)
	assert.Equal(t, []string{}, r.Broken)
	assert.Positive(t, r.Comparison.Pooled.PerSecond)
	assert.Positive(t, r.Comparison.Dialed.PerSecond)
	assert.False(t, r.Interrupted)
}

// writeFunc is a Writer that calls a function.
type writeFunc func(p []byte) (int, error)

func (f writeFunc) Write(p []byte) (int, error) { return f(p) }

func TestInterruptedDemoStillReportsAndJudges(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out bytes.Buffer
	began := time.Now()
	status := run(ctx, []string{"demo", "-for", "1m", "-workers", "4", "-addrs", "3", "-max-open", "2"}, &out,
		writeFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })) // at the first live line
	assert.Equal(t, exitOK, status, out.String())
	assert.Less(t, time.Since(began), 30*time.Second)
	assert.Contains(t, out.String(), ", interrupted,")
	assert.Contains(t, out.String(), "replies that belonged to someone else: 0")
	assert.NotContains(t, out.String(), "a dial for each exchange")
}

func TestEachBrokenPromiseEndsInStatusOne(t *testing.T) {
	sound := func() *report {
		return &report{MaxOpen: 4, PeakOpen: 4, PeakServed: 6, Exchanges: 10, Answered: 9, Avoidable: 1,
			Left: leftovers{Descriptors: unknown}}
	}
	r := sound()
	r.judge()
	require.Equal(t, exitOK, r.exitStatus(), r.Broken)

	for name, c := range map[string]struct {
		spoil func(*report)
		says  string
	}{
		"foreign reply":           {func(r *report) { r.count(outcome{class: foreign}, 1) }, "1 replies belonged to someone else"},
		"overlap":                 {func(r *report) { r.Overlaps = 2 }, "2 times"},
		"limit exceeded":          {func(r *report) { r.PeakOpen = 5 }, "5 connections were open, with a limit of 4"},
		"limit exceeded for long": {func(r *report) { r.LastingServed = 5 }, "for 1s, with a limit of 4"},
		"leak in the books":       {func(r *report) { r.Left.PoolOpen = 1 }, "in the books of a closed pool"},
		"leak at the servers":     {func(r *report) { r.Left.ServerOpen = 1 }, "open at the servers"},
		"leak of goroutines":      {func(r *report) { r.Left.Goroutines = 3 }, "3 goroutines"},
		"leak of descriptors":     {func(r *report) { r.Left.Descriptors = 1 }, "1 descriptors"},
		"nothing was answered":    {func(r *report) { r.Answered = 0 }, "nothing was shown"},
		"interrupted and broken":  {func(r *report) { r.Interrupted = true; r.PeakOpen = 5 }, "limit"},
	} {
		t.Run(name, func(t *testing.T) {
			r := sound()
			c.spoil(r)
			r.judge()
			assert.Equal(t, exitBroken, r.exitStatus())
			require.Len(t, r.Broken, 1)
			assert.Contains(t, r.Broken[0], c.says)
			assert.Contains(t, r.table(), "BROKEN: "+r.Broken[0])
		})
	}
}

func TestBadFlagsAreRefusedWithAdvice(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"-nonsense"}, "-nonsense"},
		{[]string{"-for", "soon"}, "-for"},
		{[]string{"-for", "-1s"}, "-for"},
		{[]string{"-compare", "-1s"}, "-compare"},
		{[]string{"-workers", "0"}, "-workers"},
		{[]string{"-addrs", "100000"}, "-addrs"},
		{[]string{"-max-open", "-3"}, "-max-open"},
		{[]string{"now"}, `"now"`},
	} {
		var out, errs bytes.Buffer
		status := run(t.Context(), append([]string{"demo"}, c.args...), &out, &errs)
		assert.Equal(t, exitUsage, status, c.args)
		assert.Contains(t, errs.String(), c.says)
		assert.Contains(t, errs.String(), "connpool demo -h")
		assert.Empty(t, out.String())
	}
}

func TestHelpTeachesOnStdout(t *testing.T) {
	for _, args := range [][]string{{"demo", "-h"}, {"demo", "--help"}, {"help", "demo"}} {
		var out, errs bytes.Buffer
		assert.Equal(t, exitOK, run(t.Context(), args, &out, &errs), args)
		assert.Empty(t, errs.String())
		for _, part := range []string{"-max-open", "-seed", "-json", "examples:", "token", "status 1"} {
			assert.Contains(t, out.String(), part)
		}
	}
	for _, args := range [][]string{nil, {"help"}, {"-h"}} {
		var out, errs bytes.Buffer
		assert.Equal(t, exitOK, run(t.Context(), args, &out, &errs), args)
		assert.Empty(t, errs.String())
		assert.Contains(t, out.String(), "demo")
	}
}

func TestUnknownCommandIsNamedAndTheKnownOnesListed(t *testing.T) {
	var out, errs bytes.Buffer
	assert.Equal(t, exitUsage, run(t.Context(), []string{"dmeo"}, &out, &errs))
	assert.Contains(t, errs.String(), `"dmeo"`)
	assert.Contains(t, errs.String(), "there is: demo")
	assert.Empty(t, out.String())
}

// exchangeWith makes one exchange with a peer that answers by reply.
func exchangeWith(t *testing.T, n *note, reply string) (*exchange, error) {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		defer far.Close()
		if _, err := far.Read(make([]byte, 100)); err == nil {
			io.WriteString(far, reply)
		}
	}()
	x := &exchange{token: "w1-1"}
	x.lent(n, n.serial != 0)
	return x, x.talk(near, n)
}

func TestReplyToAnotherRequestIsForeign(t *testing.T) {
	for reply, want := range map[string]error{
		"5 3 w1-1\n":         nil,
		"5 3 w2-1\n":         errForeign, // another's token
		"5 3 w1-11\n":        errForeign,
		"-1\n":               errForeign, // the end of a longer reply
		"6 3 w1-1\n":         errForeign, // for another connection
		"5 4 w1-1\n":         errForeign, // another request came in between
		"5 2 w1-1\n":         errForeign,
		"\n":                 errForeign,
		"#unasked\n":         errNoise,
		"5 3 w1-1\n#unasked": errNoise,
		"5 3":                io.EOF,
		"":                   io.EOF,
	} {
		n := &note{serial: 5, seq: 2}
		_, err := exchangeWith(t, n, reply)
		assert.ErrorIs(t, err, want, "%q", reply)
	}
	_, err := exchangeWith(t, &note{}, "9 1 w1-1\n")
	assert.NoError(t, err, "a new connection's serial is not known")
	_, err = exchangeWith(t, &note{}, "9 2 w1-1\n")
	assert.ErrorIs(t, err, errForeign, "a new connection's first reply is number 1")
}

func TestReplyThatArrivedInPartIsNoAvoidableError(t *testing.T) {
	x, err := exchangeWith(t, &note{serial: 5, seq: 2}, "5 3")
	assert.ErrorIs(t, err, io.EOF)
	assert.True(t, x.heard)
	x, err = exchangeWith(t, &note{serial: 5, seq: 2}, "#una")
	assert.ErrorIs(t, err, io.EOF)
	assert.False(t, x.heard)
}

func TestErrorIsAvoidableOnlyIfItsCauseHadEndedBeforeTheLook(t *testing.T) {
	asked := time.Now()
	before, after := asked.Add(-time.Millisecond), asked.Add(time.Millisecond)
	logOf := func(f fault, ended time.Time) *faultLog {
		l := new(faultLog)
		l.ended[f] = ended
		return l
	}
	going := func(f fault) *faultLog {
		l := logOf(f, before)
		l.begin(f)
		return l
	}
	reused := func(x exchange) exchange { x.ran, x.reused, x.asked, x.checked = true, true, asked, asked; return x }
	refused := func(stage connpool.Stage, kind connpool.Kind) error {
		return &connpool.Error{Stage: stage, Kind: kind, Err: errors.New("no")}
	}
	unread := func(stage connpool.Stage) error {
		return &connpool.Error{Stage: stage, Kind: connpool.KindInternal, Err: connpool.ErrUnread}
	}
	late := &connpool.Error{Stage: connpool.StageWait, Kind: connpool.KindTimeout, Err: context.DeadlineExceeded}

	for name, c := range map[string]struct {
		x    exchange
		err  error
		log  *faultLog
		want class
	}{
		"answered":                 {reused(exchange{}), nil, new(faultLog), answered},
		"answered by nobody":       {exchange{}, nil, new(faultLog), unexplained},
		"cut before the look":      {reused(exchange{}), io.EOF, logOf(cutIdle, before), avoidable},
		"stopped before the look":  {reused(exchange{}), syscall.ECONNRESET, logOf(stopping, before), avoidable},
		"polluted before the look": {reused(exchange{}), errNoise, logOf(unasked, before), avoidable},
		"cut after the look":       {reused(exchange{}), io.EOF, logOf(cutIdle, after), diedInUse},
		"being cut":                {reused(exchange{}), io.EOF, going(cutIdle), diedInUse},
		"busy one cut":             {reused(exchange{}), syscall.ECONNRESET, logOf(cutBusy, after), diedInUse},
		"cut in the reply":         {reused(exchange{heard: true}), io.EOF, logOf(cutIdle, before), unexplained},
		"never cut":                {reused(exchange{}), io.EOF, new(faultLog), unexplained},
		"down is no cut":           {reused(exchange{}), io.EOF, logOf(down, after), unexplained},
		"foreign":                  {reused(exchange{}), fmt.Errorf("%w: x", errForeign), logOf(cutIdle, after), foreign},
		"gave up in fn":            {reused(exchange{impatient: true}), context.Canceled, new(faultLog), gaveUp},
		"patient, yet timed out":   {reused(exchange{}), context.DeadlineExceeded, new(faultLog), unexplained},
		"gave up in the queue":     {exchange{asked: asked, impatient: true}, late, new(faultLog), gaveUp},
		"patient, yet not served":  {exchange{asked: asked}, late, new(faultLog), unexplained},
		"refused while down":       {exchange{asked: asked}, refused(connpool.StageDial, connpool.KindRefused), going(down), serverDown},
		"refused while up":         {exchange{asked: asked}, refused(connpool.StageDial, connpool.KindRefused), logOf(down, before), unexplained},
		"back-off after down":      {exchange{asked: asked}, refused(connpool.StageBackoff, connpool.KindRefused), logOf(down, before), serverDown},
		"back-off for nothing":     {exchange{asked: asked}, refused(connpool.StageBackoff, connpool.KindRefused), new(faultLog), unexplained},
		"polluted in Setup":        {exchange{asked: asked}, unread(connpool.StageSetup), logOf(unasked, after), diedInUse},
		"unread for nothing":       {exchange{asked: asked}, unread(connpool.StageSetup), logOf(unasked, before), unexplained},
		"back-off after pollution": {exchange{asked: asked}, unread(connpool.StageBackoff), logOf(unasked, before), diedInUse},
		"fn ran, With denies it":   {reused(exchange{}), refused(connpool.StageDial, connpool.KindRefused), going(down), unexplained},
		"fn never ran, not said":   {exchange{asked: asked}, io.EOF, going(cutIdle), unexplained},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, c.want, c.x.outcome(c.err, c.log).class)
		})
	}
}

func TestLookIsNoEarlierThanTheLastReturn(t *testing.T) {
	asked := time.Now()
	later, earlier := asked.Add(time.Second), asked.Add(-time.Second)
	x := exchange{asked: asked}
	x.lent(&note{born: earlier, returned: later}, true) // waited for, and handed over
	assert.Equal(t, later, x.checked)
	x.lent(&note{born: earlier, returned: earlier}, true)
	assert.Equal(t, asked, x.checked)
	x.lent(&note{born: earlier}, false)
	assert.True(t, x.checked.Before(earlier), "a fault may have hit a new connection since its dial began")
}

func TestFaultsFollowFromTheSeed(t *testing.T) {
	for salt := range uint64(1000) {
		d := replyDelay(salt)
		assert.Equal(t, d, replyDelay(salt))
		assert.GreaterOrEqual(t, d, time.Duration(0))
		assert.Less(t, d, 50*time.Millisecond)
	}
}

func TestQuantileIsAtMostASixteenthAboveTheTruth(t *testing.T) {
	var l latencies
	assert.Zero(t, l.quantile(0.5))
	for _, d := range []time.Duration{0, 1, 31, 32, 33, 1000, time.Millisecond, time.Minute, 1<<63 - 1} {
		up := upperBound(bucketOf(d))
		assert.GreaterOrEqual(t, up, d)
		assert.LessOrEqual(t, float64(up-d), float64(d)/subBuckets)
		if up < 1<<63-1 {
			assert.Equal(t, bucketOf(d)+1, bucketOf(up+1), "%v: buckets leave no gap", d)
		}
	}
	var other latencies
	for i := range 1000 {
		to := &l
		if i%2 == 0 {
			to = &other
		}
		to.add(time.Duration(i+1) * time.Millisecond)
	}
	l.merge(&other)
	assert.InEpsilon(t, 500*time.Millisecond, l.quantile(0.50), 1.0/subBuckets)
	assert.InEpsilon(t, 990*time.Millisecond, l.quantile(0.99), 1.0/subBuckets)
	assert.Equal(t, time.Second, l.quantile(1))
}

func TestBarAlwaysFillsItsWidth(t *testing.T) {
	l := new(liveLine)
	for _, st := range []connpool.Stats{
		{},
		{Limit: 24},
		{Limit: 24, Open: 24, InUse: 24},
		{Limit: 24, Open: 20, InUse: 7, Idle: 9},
		{Limit: 1, Open: 1, Idle: 1},
		{Limit: 3, Open: 5, InUse: 5}, // must not happen, must not crash
		{Limit: 1000, Open: 1, InUse: 1},
	} {
		assert.Len(t, l.bar(st), barCells+2, "%+v", st)
	}
	assert.Equal(t, "[#####======~~...]", l.bar(connpool.Stats{Limit: 16, Open: 13, InUse: 5, Idle: 6}))
}

func TestPlainLinesComeOnceASecond(t *testing.T) {
	var b bytes.Buffer
	l := newLiveLine(&b, demoOptions{})
	for at := time.Duration(0); at < 3*time.Second; at += liveEvery {
		l.show(at, connpool.Stats{Loans: uint64(at / time.Millisecond)})
	}
	l.end()
	assert.Equal(t, 3, strings.Count(b.String(), "\n"))
	assert.Contains(t, b.String(), "1000 loans/s")

	b.Reset()
	l = newLiveLine(&b, demoOptions{quiet: true})
	l.show(time.Second, connpool.Stats{})
	l.end()
	assert.Empty(t, b.String())
}

func TestErrorsOfOneKindAreOneRow(t *testing.T) {
	r := new(report)
	o := outcome{diedInUse, stageUse, connpool.KindEOF}
	r.count(o, 2)
	r.count(o, 3)
	r.count(outcome{diedInUse, stageUse, connpool.KindBroken}, 1)
	r.count(outcome{serverDown, "dial", connpool.KindRefused}, 4)
	assert.Len(t, r.Errors, 3)
	assert.Equal(t, "6: 5 eof, 1 broken", r.errorsOf(diedInUse))
	assert.Equal(t, "4: 4 refused (dial)", r.errorsOf(serverDown))
	assert.Equal(t, "0", r.errorsOf(avoidable))
	assert.Equal(t, "1,234,567 123 1,000", grouped(1234567)+" "+grouped(123)+" "+grouped(1000))
}
