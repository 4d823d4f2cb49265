package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// noticeEvery is how often one cause is logged: for the operator, the same event at a
// thousand clients in a second is one event.
const noticeEvery = time.Minute

// notices remembers what was logged without -verbose, and when.
type notices struct {
	mu    sync.Mutex // guards the fields below; nothing is logged under it
	seen  map[string]*noticed
	since time.Time // when the server was found to be down; zero: it was not
	down  bool      // the last log line about the server's state said that it cannot be reached
}

type noticed struct {
	last  time.Time
	times int // how often the cause was met since last
}

// due reports whether cause is to be logged now, and how often it was met since it was
// last logged. Causes are few and fixed.
func (n *notices) due(cause string) (times int, due bool) {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.seen == nil {
		n.seen = make(map[string]*noticed)
	}
	s := n.seen[cause]
	if s == nil {
		s = &noticed{}
		n.seen[cause] = s
	}
	s.times++
	if !s.last.IsZero() && now.Sub(s.last) < noticeEvery {
		return 0, false
	}
	times, s.last, s.times = s.times, now, 0
	return times, true
}

// notice logs cause, once a minute at most, and reports whether it did.
func (g *Gateway) notice(level slog.Level, cause, msg string, args ...any) bool {
	times, due := g.notices.due(cause)
	if due {
		if times > 1 {
			args = append(args, "times", times)
		}
		g.Logger.Log(context.Background(), level, msg, args...)
	}
	return due
}

// unanswered logs why requests get no reply, with advice on what to change.
func (g *Gateway) unanswered(why failure, err error) {
	warn := func(cause, msg string) { g.notice(slog.LevelWarn, cause, msg, "error", err) }
	switch {
	case why == ending, why == left, errors.Is(err, errBehind):
	case why == unreachable, refusal(err) != "":
		g.serverDown(err)
	case errors.Is(err, errPins):
		g.notice(slog.LevelWarn, "pins", "clients wait too long for a connection of their own: all of -max-pinned are taken", "max-pinned", g.MaxPinned)
	case why == busy:
		g.notice(slog.LevelWarn, "busy", "requests wait too long for a connection: all of -max-open are in use", "max-open", g.MaxOpen, "error", err)
	case why == lost:
		warn("lost", "the server ends connections with requests under way")
	case why == late:
		g.notice(slog.LevelWarn, "late", "the server does not answer within -request-timeout", "request-timeout", g.RequestTimeout)
	case why == tooLong:
		g.notice(slog.LevelWarn, "too-long", "replies are longer than -max-frame", "max-frame", g.MaxFrame)
	case why == noMemory:
		g.notice(slog.LevelWarn, "no-memory", "replies find no room in -max-memory", "max-memory", g.MaxMemory)
	default:
		warn(why.String(), "requests fail: "+why.String())
	}
}

// refused logs that the server refuses our certificate.
func (g *Gateway) refused(err error) {
	g.refusedAt.Store(int64(time.Since(g.started)))
	if len(g.Upstream.Cert) == 0 {
		g.notice(slog.LevelError, "refused", "the server refuses connections without a certificate: give -upstream-cert and -upstream-key", "server", g.to, "error", err)
		return
	}
	g.notice(slog.LevelError, "refused", "the server refuses our certificate: -upstream-cert is not to its liking", "server", g.to, "error", err)
}

// refusedLately reports whether the server has refused our certificate, with an alert,
// within the last minute.
func (g *Gateway) refusedLately() bool {
	at := g.refusedAt.Load()
	return at != 0 && time.Since(g.started)-time.Duration(at) < time.Minute
}

// refusal returns the alert with which a TLS server ended a connection because of our
// certificate, or because we sent none; "" for any other error.
func refusal(err error) string {
	var said *net.OpError
	if errors.As(err, &said) && said.Op == "remote error" {
		text := said.Err.Error()
		for _, word := range []string{"certificate", "access denied", "unknown certificate authority"} {
			if strings.Contains(text, word) {
				return text
			}
		}
	}
	return ""
}

// serverDown logs that the server cannot be reached.
func (g *Gateway) serverDown(err error) {
	var said *serverSaid
	switch {
	case refusal(err) != "":
		g.refused(err)
		return
	case g.refusedLately() && (connpool.KindOf(err) == connpool.KindEOF || connpool.KindOf(err) == connpool.KindBroken):
		return // the server ended the connection before we could read its alert
	case errors.As(err, &said): // the server is up, and refuses this client
		g.notice(slog.LevelWarn, "login", "the server refuses what clients say of themselves", "server", g.to, "error", said)
		return
	}
	g.notices.mu.Lock()
	if g.notices.since.IsZero() {
		g.notices.since = time.Now()
	}
	g.notices.mu.Unlock()
	advice := ""
	var unknown *tls.CertificateVerificationError
	var alert *net.OpError
	switch {
	case errors.As(err, &unknown):
		advice = ", or not believed: see -ca and -server-name"
	case errors.As(err, &alert) && alert.Op == "remote error":
		advice = ", since it ends the TLS handshake: it may want a certificate (-upstream-cert) or the name of a protocol (-alpn)"
	}
	if g.notice(slog.LevelError, "down", "the server cannot be reached"+advice, "server", g.to, "error", err) {
		g.notices.mu.Lock()
		g.notices.down = true
		g.notices.mu.Unlock()
	}
	g.down.Store(true) // set last; otherwise a client that is answered meanwhile would log nothing
}

// answered is called after each success; only the first success after a failure costs
// anything. It logs that the server answers again if the last log line about the server
// said that it cannot be reached (which is logged once a minute at most).
func (g *Gateway) answered() {
	if !g.down.Load() || !g.down.CompareAndSwap(true, false) {
		return
	}
	g.notices.mu.Lock()
	since, told := g.notices.since, g.notices.down
	g.notices.since, g.notices.down = time.Time{}, false
	g.notices.mu.Unlock()
	if told && !since.IsZero() {
		g.Logger.Info("the server answers again", "server", g.to, "after", time.Since(since).Round(time.Millisecond))
	}
}

// ofPool is the handler of the pool's own log. The gateway itself reports failed dials.
// Every other line is logged once a minute at most, unless -verbose is set.
type ofPool struct {
	slog.Handler
	g *Gateway
}

func (h ofPool) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn && !h.Enabled(ctx, slog.LevelDebug) {
		if strings.HasSuffix(r.Message, "dial failed") {
			h.g.serverDown(errorOf(r))
			return nil
		}
		if _, due := h.g.notices.due(r.Message); !due {
			return nil
		}
	}
	return h.Handler.Handle(ctx, r)
}

func (h ofPool) WithAttrs(attrs []slog.Attr) slog.Handler {
	return ofPool{h.Handler.WithAttrs(attrs), h.g}
}
func (h ofPool) WithGroup(name string) slog.Handler { return ofPool{h.Handler.WithGroup(name), h.g} }

// errorOf returns the error in a log line of the pool.
func errorOf(r slog.Record) (err error) {
	r.Attrs(func(a slog.Attr) bool {
		var ok bool
		err, ok = a.Value.Any().(error)
		return !ok
	})
	if err == nil {
		err = fmt.Errorf("%s", r.Message)
	}
	return err
}
