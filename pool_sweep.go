package connpool

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// A sweep visits every idle connection each SweepInterval. It closes the expired and the
// dead ones, so that Idle in Stats is right and descriptors of dead connections do not stay
// open. The sweep runs on the goroutine of a timer, and the timer exists only while there is
// something to sweep.
//
// A sweep must never make the pool look empty. So it peeks at an idle connection without
// becoming its owner: a peek takes nothing out of the socket, waits for nothing, and RawConn
// keeps the descriptor valid meanwhile. Only when the peek finds something, and the connection
// has not been lent since, does the sweep become its owner. Two kinds of examinations need
// an owner: a ping (Config.Check or a Prober), and that of the few connections that no peek
// can judge. The sweep takes one of these at a time per address.
//
// A ping lasts as long as the peer likes, so the sweep does not wait for pings: each address
// has a goroutine for its pings, and the next sweep leaves out the addresses whose goroutine
// still runs. So the sweep finds expired and dead connections on time, however long pings
// take.

// maxCheckers is how many pings may run at the same time, not counting those that take longer
// than foreignPatience: a peer that hangs holds up no other address.
const maxCheckers = 16

// sweep is one sweep, from the forgetting of old failures to the start of the next timer.
func (p *Pool) sweep() {
	now := p.clock.Exactly()
	p.doubtPressure(now)
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.sweeping = true
	var todo agenda
	eachLocked(p, p.sites.all(), &todo, func(s *site) {
		if p.closed {
			return
		}
		if t := s.backoff; t != nil && t.failures > 0 && s.queue.len == 0 && now.Sub(t.failedAt) >= failureMemory {
			p.stopRetryLocked(s)
			s.backoff = nil
			if s.prefill != nil {
				s.prefill.unstable = true
				p.refreshLocked(s) // this may end the last Warm of the site
			}
			p.dropIfEmptyLocked(s)
		}
		if s.prefill.reserved() {
			p.sweepReserveLocked(s, now)
		}
	})
	if p.deficit.Len() > 0 {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)

	pings := make(map[*site][]idleRef)
	var names followedNames
	var certs certUses
	rotates := p.cfg.rotates()
	for mark := new(conn); p.cfg.SweepInterval > 0; {
		p.mu.Lock()
		met := p.recency.walk(mark, atOnce)
		here := p.listIdleLocked(met, now)
		p.mu.Unlock()
		if len(met) == 0 {
			break
		}
		here.todo.run(p)
		if p.cfg.FollowDNS {
			names.add(met)
		}
		if rotates {
			certs.add(met)
		}
		for _, at := range here.seen {
			switch at.peek() {
			case peekUnfit:
				at.examine(false)
				if p.cfg.Check == nil {
					continue
				}
				fallthrough // for a connection that was not unfit
			case peekNeedsOwner:
				pings[at.c.site] = append(pings[at.c.site], at)
				continue // the examination shows whether the connection is well
			}
			at.c.noteStood(now)
		}
	}
	p.examineAll(pings)
	if p.cfg.FollowDNS {
		p.follow.lookUpAll(names)
	}
	p.certs.check(certs)
	p.rewatch()

	p.mu.Lock()
	p.sweeping = false
	switch {
	case p.closed:
		p.noteLeftLocked()
	case p.sites.len() == 0:
		p.sites.renew()
		p.swept, p.sweeper = false, nil
	default:
		p.sweeper.Reset(p.sweepPeriod())
	}
	p.mu.Unlock()
}

// examineAll starts the examination of connections that need an owner for it, on one
// goroutine for each address, unless a goroutine of the last sweep still runs for it.
func (p *Pool) examineAll(pings map[*site][]idleRef) {
	p.mu.Lock()
	defer p.mu.Unlock()
	eachLocked(p, maps.Keys(pings), new(agenda), func(s *site) {
		if p.checkingSites[s] {
			return
		}
		if p.checkingSites == nil {
			p.checkingSites = make(map[*site]bool)
		}
		p.checkingSites[s] = true
		p.examiners++
		go s.examineIdle(pings[s])
	})
}

// examineIdle examines idle connections of s, one after another.
func (s *site) examineIdle(here []idleRef) {
	p := s.env.pool
	defer func() {
		p.mu.Lock()
		delete(p.checkingSites, s)
		p.examiners--
		p.noteLeftLocked()
		p.mu.Unlock()
	}()
	for _, at := range here {
		if p.ctx.Err() != nil || !at.examineInTurn() {
			return
		}
	}
}

// examineInTurn examines a connection when there is a place in Pool.checkers. It reports false
// if the pool is closed, or if the peer gave no answer in time. In that case the other
// connections of the address would get no answer either, so they wait for the next sweep or
// loan.
func (at idleRef) examineInTurn() bool {
	p := at.c.site.env.pool
	select {
	case p.checkers <- struct{}{}:
	case <-p.ctx.Done():
		return false
	}
	var once sync.Once
	leave := func() { once.Do(func() { <-p.checkers }) }
	defer leave()
	slow := time.AfterFunc(foreignPatience, leave)
	defer slow.Stop()
	err := at.examine(true)
	return !isLate(err) && !errors.Is(err, context.DeadlineExceeded)
}

// peekVerdict is what a peek, which takes nothing out, says of a connection.
type peekVerdict uint8

const (
	peekClean      peekVerdict = iota
	peekUnfit                  // dead, dirty or stolen
	peekNeedsOwner             // only an owner can find out
)

// peek examines the connection without owning it.
func (at idleRef) peek() peekVerdict {
	p := at.c.site.env.pool
	pr, r := &at.c.sock, at.c.resident()
	if pr.raw != nil {
		l := newFDVisit(pr, !p.cfg.NoProbe && (r == nil || at.c.endIsSeen()))
		err := pr.raw.Control(l.visit)
		taken := l.stolen
		seen := l.seen
		l.done()
		if err != nil || taken || seen != (sock.Seen{}) {
			if pr.foreign {
				return peekNeedsOwner // the examination by an owner may wait for the connection
			}
			return peekUnfit
		}
	}
	if p.cfg.Check != nil || r != nil && r.alive != nil || !p.cfg.NoProbe && pr.prober(at.c.nc) != nil {
		return peekNeedsOwner
	}
	return peekClean
}

// examine takes a connection, unless it was lent since at was made, and examines it fully. The
// error is the cause if the connection was closed for an error.
func (at idleRef) examine(ping bool) error {
	p := at.c.site.env.pool
	c := at.c
	p.mu.Lock()
	if c.phase != phaseIdle || c.generation() != at.gen {
		p.mu.Unlock()
		return nil
	}
	p.moveLocked(c, phaseBorrowed) // it keeps its place on the stack, see linked
	c.lendAtLocked(p.clock.Now())
	p.setCheckingLocked(c, true)
	p.mu.Unlock()
	reason, err := c.probe()
	if reason == ClosedUnknown && ping && p.cfg.Check != nil {
		reason, err = c.ping(context.Background())
	}
	switch {
	case p.cfg.isForPush(reason):
		c.push()
		return nil
	case reason != ClosedUnknown:
		c.discard(reason, err)
		return err
	}
	if ping {
		c.noteStood(p.clock.Exactly())
	}
	c.releaseFrom(fromCheck)
	return nil
}

// examineAsideLocked is examine on a goroutine of its own, for the watcher, which must not
// wait for the foreign code that an examination, or the close after it, runs.
func (at idleRef) examineAsideLocked() {
	p := at.c.site.env.pool
	p.examiners++
	go func() {
		at.examine(false)
		p.mu.Lock()
		p.examiners--
		p.noteLeftLocked()
		p.mu.Unlock()
	}()
}

// hangUp handles a report of the watcher: the peer of the connection with this descriptor has
// closed its end. An idle connection leaves the pool now; one in use is examined when it is
// given back.
func (p *Pool) hangUp(fd uintptr) {
	p.mu.Lock()
	c := p.byFD[fd]
	if c == nil {
		p.mu.Unlock()
		return
	}
	c.word.Or(flagHungUp)
	c.examineIdleLocked()
	p.mu.Unlock()
}

// noteClientEnded is called when the client of c has met the end of its I/O. If c is idle, c leaves
// the pool now; if c is in use, the end of the loan finds flagBroken.
func (c *conn) noteClientEnded() {
	p := c.site.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	c.examineIdleLocked()
}

// examineIdleLocked has c examined, if c is idle, because something has happened to it.
func (c *conn) examineIdleLocked() {
	if c.phase == phaseIdle {
		idleRef{c, c.generation()}.examineAsideLocked()
	}
}

// recheckHangUp examines a connection whose peer hung up while it was in use or being opened:
// the watcher reports a hang-up only once, and found the connection in use. With a Push it
// also makes the watcher listen to the connection again.
func (at idleRef) recheckHangUp() {
	if at.c.word.Load()&flagHungUp != 0 {
		at.examine(false)
	}
	if at.c.site.env.cfg.Push != nil && !at.c.isResident() {
		at.c.rearmWatch()
	}
}
