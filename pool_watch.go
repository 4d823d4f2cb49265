package connpool

import (
	"log/slog"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// When a pool has a watcher: from its first connection with a descriptor to the
// sweep that finds none any more, so that a pool which was used and forgotten leaves
// nothing behind; and again from the next connection on. The system may refuse it a
// handle, or a place for a connection. Until it has both, the sweep has to do, and
// what was refused is tried again.

// A watcher that could not be made is tried again after a pause, which doubles from
// rewatchSoon to rewatchAfter: a want of handles is short as a rule, and where watchers
// are forbidden one try a second costs nothing.
const (
	rewatchSoon  = 50 * time.Millisecond
	rewatchAfter = time.Second
)

// watching is what a pool knows of its watcher. Pool.mu guards it.
type watching struct {
	off      bool               // there shall be none
	starting bool               // somebody is making it
	failedAt clock.Instant      // when it could not be made; 0: it could, or was not tried
	pause    time.Duration      // from then to the next try
	retry    *time.Timer        // running while that shall be tried again
	missed   map[*conn]struct{} // those that the watcher could not take; nil as a rule
	running  int                // goroutines in watch
}

// watch sees to it that c, which has just been filed in byFD, is watched.
func (c *conn) watch() {
	p := c.site.pool
	p.mu.Lock()
	w := p.watcher
	p.mu.Unlock()
	if w == nil {
		p.startWatcher()
		return
	}
	c.watchWith(w)
}

func (c *conn) watchWith(w *sock.Watcher) {
	p := c.site.pool
	err := p.addWatch(w, c.sock.raw, c.hearsData())
	if err == nil {
		return
	}
	p.mu.Lock()
	first := p.watching.missed == nil
	if p.byFD[c.sock.fd()] == c {
		if first {
			p.watching.missed = make(map[*conn]struct{})
		}
		p.watching.missed[c] = struct{}{}
	}
	p.mu.Unlock()
	if first {
		p.report.log(slog.LevelWarn, "the deaths of some idle connections are found by the sweep only", "err", err)
	}
}

// startWatcher makes the pool's watcher, if there is none and may be one, and has it
// watch what there is.
func (p *Pool) startWatcher() {
	now := p.clock.Exactly()
	p.mu.Lock()
	ws := &p.watching
	failedBefore := ws.failedAt != 0
	if !sock.CanWatch || ws.off || p.cfg.NoProbe || p.closed || p.watcher != nil || ws.starting ||
		len(p.byFD) == 0 || failedBefore && now.Sub(ws.failedAt) < ws.pause {
		p.mu.Unlock()
		return
	}
	ws.starting = true
	p.mu.Unlock()

	w, err := p.newWatcher()

	var all []*conn
	p.mu.Lock()
	ws.starting = false
	switch {
	case err != nil:
		ws.failedAt, ws.pause = now, min(max(rewatchSoon, 2*ws.pause), rewatchAfter)
		p.rewatchLocked()
	case p.closed:
	default:
		ws.failedAt, ws.pause = 0, 0
		ws.missed = nil
		ws.running++
		p.watcher = w
		for _, c := range p.byFD {
			all = append(all, c)
		}
	}
	began := p.watcher == w && w != nil
	p.mu.Unlock()
	switch {
	case err != nil:
		if !failedBefore {
			p.report.log(slog.LevelWarn, "deaths of idle connections are found by the sweep only", "err", err)
		}
	case !began:
		w.Close()
	default:
		go p.watch(w)
		for _, c := range all {
			c.watchWith(w)
		}
	}
}

// rewatchLocked sees to it that the watcher is tried again, also if nobody dials.
func (p *Pool) rewatchLocked() {
	ws := &p.watching
	if p.closed || len(p.byFD) == 0 {
		return
	}
	if ws.retry == nil {
		ws.retry = time.AfterFunc(ws.pause, p.startWatcher)
	} else {
		ws.retry.Reset(ws.pause)
	}
}

// rewatch is the sweep's part: what could not be watched is tried again, and where
// there is nothing to watch any more, the watcher ends.
func (p *Pool) rewatch() {
	var missed []*conn
	p.mu.Lock()
	w, idle := p.watcher, len(p.byFD) == 0
	if w != nil && idle {
		p.watcher = nil
	}
	for c := range p.watching.missed {
		missed = append(missed, c)
	}
	p.watching.missed = nil
	p.mu.Unlock()
	switch {
	case w == nil:
		p.startWatcher()
	case idle:
		w.Close()
	default:
		for _, c := range missed {
			c.watchWith(w)
		}
	}
}

// hearsData reports whether the watcher is to hear of data on c as well. With a Push
// it listens for data, and once: what arrives during a loan would wake it for nothing.
// Every time c is parked it is armed anew.
func (c *conn) hearsData() bool { return c.site.pool.cfg.Push != nil && !c.site.unpooled() }

// watch passes on what the watcher hears, until it is closed.
func (p *Pool) watch(w *sock.Watcher) {
	w.Run(func(fd uintptr, hungUp bool) {
		if hungUp {
			p.hangUp(fd)
		} else {
			p.readable(fd)
		}
	})
	p.unwatched(w)
}

// unwatched is told that the goroutine of a watcher ends.
func (p *Pool) unwatched(w *sock.Watcher) {
	p.mu.Lock()
	p.watching.running--
	if p.watcher == w {
		p.watcher = nil
	}
	p.noteLeftLocked()
	p.mu.Unlock()
}

// unwatchLocked forgets c, which leaves the books.
func (p *Pool) unwatchLocked(c *conn, todo *agenda) {
	delete(p.watching.missed, c)
	if len(p.byFD) == 0 && p.watcher != nil {
		p.armSweepLocked(todo) // which ends it
	}
}
