package connpool

import (
	"log/slog"
	"maps"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// When a pool has a watcher: from its first connection with a descriptor to the sweep that
// finds no such connection any more, so that a pool that was used and then forgotten leaves
// nothing behind; and again from the next connection on. The system may refuse the watcher
// a handle, or a place for a connection. Until it has both, only the sweep finds dead
// connections, and the pool tries again what was refused.

// A watcher that could not be made is tried again after a pause, which doubles from
// rewatchSoon to rewatchAfter: usually handles are short only briefly, and where watchers
// are forbidden one try a second costs nothing.
const (
	rewatchSoon  = 50 * time.Millisecond
	rewatchAfter = time.Second
)

// watching is a pool's watcher and its state.
type watching struct {
	create func() (*sock.Watcher, error)                    // sock.NewWatcher, but for tests
	add    func(*sock.Watcher, syscall.RawConn, bool) error // Watcher.Add, but for tests

	// Pool.mu guards these.
	watcher  *sock.Watcher      // nil where there is none, and before the first connection
	off      bool               // there shall be no watcher
	starting bool               // a goroutine is making the watcher
	failedAt clock.Instant      // when a watcher could not be made; 0: it was made, or was not tried
	pause    time.Duration      // from failedAt to the next try
	retry    *time.Timer        // fires at the next try; nil before the first
	missed   map[*conn]struct{} // connections that the watcher could not take; nil if there are none
	running  int                // goroutines that run Pool.watch
}

// mayStartLocked reports whether, by the state of watching alone, a watcher may be made now.
func (ws *watching) mayStartLocked(now clock.Instant) bool {
	pausing := ws.failedAt != 0 && now.Sub(ws.failedAt) < ws.pause
	return sock.CanWatch && !ws.off && ws.watcher == nil && !ws.starting && !pausing
}

// noteFailedLocked records that no watcher could be made, and sets the pause before the next try.
func (ws *watching) noteFailedLocked(now clock.Instant) {
	ws.failedAt, ws.pause = now, min(max(rewatchSoon, 2*ws.pause), rewatchAfter)
}

// noteStartedLocked records that w is the watcher, and that a goroutine will run watch.
func (ws *watching) noteStartedLocked(w *sock.Watcher) {
	ws.watcher = w
	ws.failedAt, ws.pause = 0, 0
	ws.missed = nil
	ws.running++
}

// missLocked records that the watcher could not take c.
func (ws *watching) missLocked(c *conn) {
	if ws.missed == nil {
		ws.missed = make(map[*conn]struct{})
	}
	ws.missed[c] = struct{}{}
}

// watch makes the watcher watch c, which has just been stored in byFD.
func (c *conn) watch() {
	p := c.site.env.pool
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
	p := c.site.env.pool
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

// startWatcher makes the pool's watcher, if there is none and one may be made, and has it watch
// the connections with a descriptor.
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
	began := false
	p.mu.Lock()
	ws.starting = false
	switch {
	case err != nil:
		ws.noteFailedLocked(now)
		p.rewatchLocked()
	case p.closed:
	default:
		ws.noteStartedLocked(w)
		began = true
		eachLocked(p, maps.Values(p.byFD), new(agenda), func(c *conn) { all = append(all, c) })
	}
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

// rewatchLocked starts the timer for the next try to make the watcher, so that it also happens
// if nobody dials.
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

// rewatch is a part of the sweep. It tries again to watch what could not be watched, and ends the
// watcher when there is nothing to watch any more.
func (p *Pool) rewatch() {
	p.mu.Lock()
	w, idle := p.watching.watcher, len(p.byFD) == 0
	if idle {
		p.watching.watcher = nil
	}
	missed := p.watching.missed
	p.watching.missed = nil
	p.mu.Unlock()
	switch {
	case w == nil:
		p.startWatcher()
	case idle:
		w.Close()
	default:
		for c := range missed {
			c.watchWith(w)
		}
	}
}

// hearsData reports whether the watcher listens for data on c, beside hang-ups. With a Push it
// does, and once: data that arrives during a loan need not wake it. It is armed again
// every time c is released.
func (c *conn) hearsData() bool { return c.site.env.cfg.Push != nil && !c.site.unpooled() }

// watch passes the reports of the watcher on, until the watcher is closed.
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

// unwatched records that the goroutine of a watcher ends.
func (p *Pool) unwatched(w *sock.Watcher) {
	p.mu.Lock()
	p.watching.running--
	if p.watching.watcher == w {
		p.watching.watcher = nil
	}
	p.noteLeftLocked()
	p.mu.Unlock()
}

// unwatchLocked forgets c, which leaves the pool.
func (p *Pool) unwatchLocked(c *conn, todo *agenda) {
	delete(p.watching.missed, c)
	if len(p.byFD) == 0 && p.watching.watcher != nil {
		p.armSweepLocked(todo) // which ends it
	}
}
