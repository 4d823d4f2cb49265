package connpool

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"
)

// The sweep visits every idle connection each CheckInterval: what expired or
// died is closed, so that Idle in Stats is true and descriptors of dead
// connections do not linger. It runs on a timer's goroutine, and the timer
// exists only while there are books to sweep.
//
// It must never make the pool look empty. So it peeks at a connection where it
// stands, without becoming its owner: a peek takes nothing out of the socket,
// waits for nothing, and RawConn keeps the descriptor valid meanwhile. Only
// when the look finds something, and the connection has not been lent since,
// does it take the connection. Just a protocol's ping, and the few connections
// that no peek can judge, need an owner during the look; of those it takes one
// per address at a time.

// checkers bounds the pings of one sweep that run at the same time.
const checkers = 16

// atOnce is how many connections a sweep lists before it lets borrowers pass.
const atOnce = 64

func (p *Pool) armSweepLocked() {
	if p.sweeper == nil && !p.closed {
		p.sweeper = time.AfterFunc(p.sweepPeriod(), p.sweep)
	}
}

// sweepPeriod is CheckInterval. With the sweep switched off, old failures must
// be forgotten all the same.
func (p *Pool) sweepPeriod() time.Duration {
	if p.cfg.CheckInterval > 0 {
		return p.cfg.CheckInterval
	}
	return failureMemory
}

// sighting is an idle connection as a sweep found it.
type sighting struct {
	c   *conn
	gen uint64
}

func (p *Pool) sweep() {
	now := p.clock.exactly()
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.sweeping = true
	for s := range p.sites.all() {
		if t := s.trouble; t != nil && t.failures > 0 && s.queue.len == 0 && now.sub(t.failedAt) >= failureMemory {
			p.stopRetryLocked(s)
			s.trouble = nil
			if s.special != nil {
				s.special.shaky = true
				p.refreshLocked(s) // it may end a Warm, the last that keeps the books
			}
			p.forgetLocked(s)
		}
		if s.special.reserved() {
			p.sweepReserveLocked(s, now)
		}
	}
	var todo agenda
	if p.short.Len() > 0 {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)

	suspects := make(map[*site][]sighting)
	for mark := new(conn); p.cfg.CheckInterval > 0; {
		p.mu.Lock()
		met := p.recency.walk(mark, atOnce)
		here := p.sightLocked(met, now)
		p.mu.Unlock()
		if len(met) == 0 {
			break
		}
		here.todo.run(p)
		for _, at := range here.seen {
			if !p.looksFine(at) {
				suspects[at.c.site] = append(suspects[at.c.site], at)
				continue
			}
			p.stood(at.c, now)
		}
	}

	var group errgroup.Group
	group.SetLimit(checkers)
	for _, here := range suspects {
		group.Go(func() error {
			for _, at := range here {
				p.examine(at, true)
			}
			return nil
		})
	}
	group.Wait()

	p.mu.Lock()
	p.sweeping = false
	switch {
	case p.closed:
		p.leftLocked()
	case p.sites.len() == 0:
		p.sites.renew()
		p.sweeper = nil
	default:
		p.sweeper.Reset(p.sweepPeriod())
	}
	p.mu.Unlock()
}

// sightings is what a sweep found in one go.
type sightings struct {
	seen []sighting
	todo agenda // the expired ones
}

func (p *Pool) sightLocked(met []*conn, now instant) (found sightings) {
	for _, c := range met {
		if c.phase != idle {
			continue
		}
		idleFor := now.sub(c.since)
		if p.reservedLocked(c.site, c.site.n[idle], now) {
			idleFor = 0
		}
		if reason := p.aged(c, idleFor, now); reason != ClosedUnknown {
			p.takeLocked(c)
			p.moveLocked(c, closing)
			found.todo.close(c, reason, nil)
		} else {
			found.seen = append(found.seen, sighting{c, c.generation()})
		}
	}
	return found
}

// looksFine looks at a connection that it does not own.
func (p *Pool) looksFine(at sighting) bool {
	pr := &at.c.probe
	var seen peeked
	if pr.raw != nil {
		l := newLook(pr, !p.cfg.NoProbe)
		err := pr.raw.Control(l.visit)
		taken := l.stolen
		seen = l.seen
		l.done()
		if err != nil || taken {
			return false
		}
	}
	switch {
	case p.cfg.Check != nil:
		return false
	case p.cfg.NoProbe:
		return true
	case pr.prober:
		return false
	}
	return seen == peeked{}
}

// examine takes a connection, unless it was lent since it was sighted, and asks
// it all that can be asked.
func (p *Pool) examine(at sighting, ping bool) {
	c := at.c
	p.mu.Lock()
	if c.phase != idle || c.generation() != at.gen {
		p.mu.Unlock()
		return
	}
	p.takeLocked(c)
	c.lookedAtLocked(true)
	p.mu.Unlock()
	reason, err := c.ask()
	if reason == ClosedUnknown && ping && p.cfg.Check != nil {
		reason, err = p.ping(context.Background(), c)
	}
	if p.pushes(reason) {
		p.push(c)
		return
	}
	if reason != ClosedUnknown {
		p.discard(c, reason, err)
		return
	}
	if ping {
		p.stood(c, p.clock.exactly())
	}
	p.park(c, untouched)
}

// hangUp is told that the peer of the connection with this descriptor has
// closed its end. An idle one leaves the pool now; one in use is looked at when
// it is given back.
func (p *Pool) hangUp(fd uintptr) {
	p.mu.Lock()
	c := p.byFD[fd]
	if c == nil {
		p.mu.Unlock()
		return
	}
	c.word.Or(hungUp)
	at := sighting{c, c.generation()}
	p.mu.Unlock()
	p.examine(at, false)
}

// hearAgain is for a connection that was given back, or opened, while its peer
// hung up: the news found it in use, and comes only once.
func (p *Pool) hearAgain(at sighting) {
	if at.c.word.Load()&hungUp != 0 {
		p.examine(at, false)
	}
	if p.cfg.Push != nil {
		p.listen(at.c)
	}
}
