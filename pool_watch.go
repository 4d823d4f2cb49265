package connpool

import (
	"log/slog"
	"syscall"
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

// watching is a pool's watcher, and how it stands with it.
type watching struct {
	create func() (*sock.Watcher, error)                    // but for tests that of the system
	add    func(*sock.Watcher, syscall.RawConn, bool) error // Watcher.Add, but for tests

	// Pool.mu guards these.
	watcher  *sock.Watcher      // nil where there is none, and before the first connection
	off      bool               // there shall be none
	starting bool               // somebody is making it
	failedAt clock.Instant      // when it could not be made; 0: it could, or was not tried
	pause    time.Duration      // from then to the next try
	retry    *time.Timer        // running while that shall be tried again
	missed   map[*conn]struct{} // those that the watcher could not take; nil as a rule
	running  int                // goroutines in watch
}

// mayStartLocked reports whether a watcher may be made now, as far as that is for the
// watching to say.
func (ws *watching) mayStartLocked(now clock.Instant) bool {
	pausing := ws.failedAt != 0 && now.Sub(ws.failedAt) < ws.pause
	return sock.CanWatch && !ws.off && ws.watcher == nil && !ws.starting && !pausing
}

// noteFailedLocked books that no watcher could be made: the next try is after a pause.
func (ws *watching) noteFailedLocked(now clock.Instant) {
	ws.failedAt, ws.pause = now, min(max(rewatchSoon, 2*ws.pause), rewatchAfter)
}

// noteStartedLocked books that w is the watcher, of which watch will run.
func (ws *watching) noteStartedLocked(w *sock.Watcher) {
	ws.watcher = w
	ws.failedAt, ws.pause = 0, 0
	ws.missed = nil
	ws.running++
}

// missLocked books that the watcher could not take c.
func (ws *watching) missLocked(c *conn) {
	if ws.missed == nil {
		ws.missed = make(map[*conn]struct{})
	}
	ws.missed[c] = struct{}{}
}

// watch sees to it that c, which has just been filed in byFD, is watched.
func (c *conn) watch() {
	p := c.site.pool
	p.mu.Lock()
	w := p.watching.watcher
	p.mu.Unlock()
	if w == nil {
		p.startWatcher()
		return
	}
	c.watchWith(w)
}

// watchWith has w watch c. If w cannot, the sweep tries it again.
func (c *conn) watchWith(w *sock.Watcher) {
	p := c.site.pool
	err := p.watching.add(w, c.sock.raw, c.hearsData())
	if err == nil {
		return
	}
	p.mu.Lock()
	first := p.watching.missed == nil
	if p.byFD[c.sock.fd()] == c {
		p.watching.missLocked(c)
	}
	p.mu.Unlock()
	if first {
		p.report.log(slog.LevelWarn, "the deaths of some idle connections are found by the sweep only", "err", err)
	}
}

// startWatcher makes the pool's watcher, if there is none and may be one, and has it
// watch what there is.
func (p *Pool) startWatcher() {
	now, ws := p.clock.Exactly(), &p.watching
	p.mu.Lock()
	failedBefore := ws.failedAt != 0
	if !ws.mayStartLocked(now) || p.cfg.NoProbe || p.closed || len(p.byFD) == 0 {
		p.mu.Unlock()
		return
	}
	ws.starting = true
	p.mu.Unlock()

	w, err := ws.create()

	var all []*conn
	p.mu.Lock()
	ws.starting = false
	switch {
	case err != nil:
		ws.noteFailedLocked(now)
		p.rewatchLocked()
	case p.closed:
	default:
		ws.noteStartedLocked(w)
		for _, c := range p.byFD {
			all = append(all, c)
		}
	}
	began := ws.watcher == w && w != nil
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
	w, idle := p.watching.watcher, len(p.byFD) == 0
	if idle {
		p.watching.watcher = nil
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
	if p.watching.watcher == w {
		p.watching.watcher = nil
	}
	p.noteLeftLocked()
	p.mu.Unlock()
}

// unwatchLocked forgets c, which leaves the books.
func (p *Pool) unwatchLocked(c *conn, todo *agenda) {
	delete(p.watching.missed, c)
	if len(p.byFD) == 0 && p.watching.watcher != nil {
		p.armSweepLocked(todo) // which ends it
	}
}
