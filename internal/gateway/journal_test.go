package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// stuck is a log whose reader does not read until it is released.
type stuck struct {
	let  chan struct{}
	text logged
}

func (s *stuck) Write(b []byte) (int, error) {
	<-s.let
	return s.text.Write(b)
}

// TRY-09: the gateway serves, and ends, without its log.
func TestNobodyWaitsForALogThatStandsStill(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	log := &stuck{let: make(chan struct{})}
	g := begin(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n", MaxFrame: 100, Drain: time.Second, RequestTimeout: 5 * time.Second,
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	for range journalLength + 200 { // each of them is worth a line
		c := g.call()
		c.say("%s\n", strings.Repeat("x", 200))
		require.Equal(t, "ERR", c.hear())
		c.hearEnd()
		c.Close()
	}
	soon(t, "none of those who left is held", func() bool { return g.Status().Clients == 0 })
	g.call().token("x")
	srv.Stop()
	c := g.call()
	c.say("y\n")
	require.Equal(t, "ERR", c.hear(), "a server that is gone is told of, and logged")
	require.Positive(t, g.Status().LogDropped)
	g.end()
	require.NoError(t, g.wait(), "it does not wait for the log, which stands still as long as nobody lets it go on")
	close(log.let)
	require.True(t, g.journal.flush(forever))
	require.Contains(t, log.text.String(), "log lines were dropped")
}

// TRY-09
func TestLinesThatTheLogDoesNotTakeAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		let := make(chan struct{})
		log := &stuck{let: let}
		j := newJournal(slog.NewTextHandler(log, nil))
		l := slog.New(j).With("who", "we")
		l.Info("first")
		synctest.Wait() // the write has begun and takes long
		for i := range journalLength + 7 {
			l.Info("more", "i", i)
		}
		require.EqualValues(t, 7, j.droppedSoFar())
		require.False(t, j.flush(time.Second))
		close(let)
		synctest.Wait()
		require.True(t, j.flush(0))
		text := log.text.String()
		require.Equal(t, 1+journalLength+1, strings.Count(text, "\n"))
		require.Contains(t, text, "lines=7")
		require.Contains(t, text, "who=we i=1023")
	})
	var broken atomic.Bool
	broken.Store(true)
	j := newJournal(handlerFunc(func(slog.Record) error {
		if broken.Load() {
			return errors.New("broken pipe")
		}
		return nil
	}))
	for range 5 {
		slog.New(j).Error("lost")
	}
	require.True(t, j.flush(forever))
	require.EqualValues(t, 5, j.droppedSoFar())
	broken.Store(false)
	slog.New(j).Error("kept")
	require.True(t, j.flush(forever))
	require.EqualValues(t, 5, j.droppedSoFar())
	j = newJournal(handlerFunc(func(slog.Record) error { panic("a bad handler") }))
	slog.New(j).Error("lost")
	require.True(t, j.flush(forever))
	require.EqualValues(t, 1, j.droppedSoFar())
}

type handlerFunc func(slog.Record) error

func (h handlerFunc) Enabled(context.Context, slog.Level) bool      { return true }
func (h handlerFunc) Handle(_ context.Context, r slog.Record) error { return h(r) }
func (h handlerFunc) WithAttrs([]slog.Attr) slog.Handler            { return h }
func (h handlerFunc) WithGroup(string) slog.Handler                 { return h }

// TRY-38
func TestACauseIsToldOnceAMinuteWithTheNumberOfTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n notices
		times, due := n.due("a")
		require.True(t, due)
		require.Equal(t, 1, times)
		for range 10 {
			time.Sleep(5 * time.Second)
			_, due = n.due("a")
			require.False(t, due)
		}
		_, due = n.due("b")
		require.True(t, due, "another cause is another line")
		time.Sleep(11 * time.Second)
		times, due = n.due("a")
		require.True(t, due)
		require.Equal(t, 11, times)
	})
}

// atDefault starts a gateway whose log has the level of the command without
// flags.
func atDefault(t *testing.T, cfg Config) (*running, *logged) {
	log := new(logged)
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	return begin(t, cfg), log
}

// told waits for a line with all of the words, and returns how many lines have the first
// word.
func told(t *testing.T, log *logged, words ...string) int {
	t.Helper()
	soon(t, fmt.Sprintf("the log tells %q", words), func() bool {
		for line := range strings.Lines(log.String()) {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				return true
			}
		}
		return false
	})
	return strings.Count(log.String(), words[0])
}

// TRY-38
func TestTheLogTellsThatTheServerIsDownAndCameBack(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n", MaxOpen: 2})
	g.call().token("a")
	srv.Stop()
	c := g.call()
	for range 6 {
		c.say("b\n")
		require.Equal(t, "ERR", c.hear())
	}
	require.Equal(t, 1, told(t, log, "the server cannot be reached", "level=ERROR", "refused"))
	require.NotContains(t, log.String(), "dial failed", "one line for one thing")
	require.NoError(t, srv.Restart())
	soon(t, "it serves again", func() bool {
		c.say("c\n")
		return c.hear() != "ERR"
	})
	require.Equal(t, 1, told(t, log, "the server answers again", "after="))
}

// TRY-38
func TestTheLogTellsWhichLimitIsInTheWay(t *testing.T) {
	t.Parallel()
	_, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "resp", To: to, MaxClients: 1})
	g.call()
	soon(t, "it is in", func() bool { return g.Status().Clients == 1 })
	for range 20 {
		c := g.call()
		c.hear()
		c.hearEnd()
	}
	require.Equal(t, 1, told(t, log, "turned away", "-max-clients", "clients=1"))

	slow, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(io.Discard, p) }})
	g, log = atDefault(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n", MaxOpen: 1, RequestTimeout: 100 * time.Millisecond})
	first, second := g.call(), g.call()
	first.say("a\n")
	soon(t, "it is at work", func() bool { return slow.Accepts() > 0 })
	for range 5 {
		second.say("b\n")
		require.Equal(t, "ERR", second.hear())
		first.say("a\n")
	}
	told(t, log, "within -request-timeout")
	g, log = atDefault(t, Config{Framing: "line", To: to, MaxFrame: 16})
	c := g.call()
	c.say("%s\n", strings.Repeat("x", 100))
	c.hearEnd()
	told(t, log, "break the protocol", "-max-frame")
}

// TRY-38
func TestTheLogTellsThatPinsAreFullByTheirFlag(t *testing.T) {
	t.Parallel()
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned, c.RequestTimeout = 3, 1, time.Second })
	a, b := g.call(), g.call()
	a.say("MULTI\r\n")
	require.Equal(t, "+OK", strings.TrimSpace(a.hear()))
	for range 3 {
		b.say("MULTI\r\n")
		require.Contains(t, b.hear(), "gateway")
	}
	require.Equal(t, 1, told(t, g.log, "all of -max-pinned", "level=WARN", "max-pinned=1"))
}

// TRY-38: under TLS 1.3 a server refuses a certificate after the handshake, so that the
// first request fails.
func TestTheLogTellsThatTheServerRefusesOurCertificate(t *testing.T) {
	t.Parallel()
	ca, k, to := demanding(t)
	g, log := atDefault(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n", Upstream: UpstreamFiles{CA: k.ca}})
	_ = ca
	c := g.call()
	for range 5 {
		c.say("a\n")
		require.Equal(t, "ERR", c.hear())
	}
	require.Equal(t, 1, told(t, log, "without a certificate", "-upstream-cert", "level=ERROR", "certificate required"))
	require.NotContains(t, log.String(), "cannot be reached")
}

// TRY-38
func TestAnOldCertificateThatStaysIsNotToldOfAtEveryLook(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1"))
	_, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}, ReloadEvery: -1})
	spoil(t, k.cert)
	for range 10 {
		require.Error(t, g.Reload())
	}
	require.Equal(t, 1, told(t, log, "not reloaded"))
	require.EqualValues(t, 10, g.Status().ReloadsFailed)
	require.False(t, bytes.Contains([]byte(log.String()), []byte("PRIVATE")))
}

// TRY-38: the last line about the server never says that it cannot be reached after it
// has come back, however soon that was.
func TestTheLogsLastWordOnAServerThatCameBackIsThatItAnswers(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	g, log := atDefault(t, Config{Framing: "line", To: to})
	for i := range 2 {
		g.serverDown(io.EOF)
		g.answered()
		g.journal.flush(forever)
		require.Equal(t, 1+i, told(t, log, "the server cannot be reached"))
		require.Equal(t, 1+i, strings.Count(log.String(), "the server answers again"))
		g.notices.mu.Lock()
		g.notices.seen["down"].last = time.Now().Add(-noticeEvery) // as if a minute had passed
		g.notices.mu.Unlock()
	}
	g.serverDown(io.EOF)
	for range 5 { // a server that comes and goes is reported once a minute
		g.answered()
		g.serverDown(io.EOF)
	}
	g.answered()
	g.journal.flush(forever)
	require.Equal(t, 3, told(t, log, "the server answers again"))
}
