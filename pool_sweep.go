package connpool

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// The sweep visits every idle connection each SweepInterval: what expired or
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
//
// Pings take as long as the peer likes, so the sweep does not wait for them: each
// address has them on a goroutine of its own, and the next sweep leaves out those
// that are still at it. Ages and deaths have their period whatever Checks do.

// checkers bounds the pings that run at the same time, but for those that take
// longer than foreignPatience: a peer that hangs holds up no other address.
const maxCheckers = 16

// atOnce is how many connections a sweep lists, or addresses it visits, before it lets
// borrowers pass.
const atOnce = 64

// eachSiteLocked calls visit for each address, with the lock held, which it gives up
// and takes again so that nobody waits for a million of them. Addresses that are
// forgotten meanwhile do not come any more, and new ones may come or not.
func (p *Pool) eachSiteLocked(visit func(*site)) {
	n := 0
	for s := range p.sites.all() {
		visit(s)
		if n++; n%atOnce == 0 {
			p.mu.Unlock()
			p.mu.Lock()
		}
	}
}

// sighting is an idle connection as a sweep found it.
type idleRef struct {
	c   *conn
	gen uint64
}

func (p *Pool) sweep() {
	now := p.clock.Exactly()
	p.doubtPressure(now)
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.sweeping = true
	p.eachSiteLocked(func(s *site) {
		if p.closed {
			return
		}
		if t := s.backoff; t != nil && t.failures > 0 && s.queue.len == 0 && now.Sub(t.failedAt) >= failureMemory {
			p.stopRetryLocked(s)
			s.backoff = nil
			if s.prefill != nil {
				s.prefill.unstable = true
				p.refreshLocked(s) // it may end a Warm, the last that keeps the books
			}
			p.dropIfEmptyLocked(s)
		}
		if s.prefill.reserved() {
			p.sweepReserveLocked(s, now)
		}
	})
	var todo agenda
	if p.deficit.Len() > 0 {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)

	pings := make(map[*site][]idleRef)
	for mark := new(conn); p.cfg.SweepInterval > 0; {
		p.mu.Lock()
		met := p.recency.walk(mark, atOnce)
		here := p.listIdleLocked(met, now)
		p.mu.Unlock()
		if len(met) == 0 {
			break
		}
		here.todo.run(p)
		for _, at := range here.seen {
			switch at.peek() {
			case peekUnfit:
				at.examine(false)
				if p.cfg.Check == nil {
					continue
				}
				fallthrough // for one that was not that bad
			case peekNeedsOwner:
				pings[at.c.site] = append(pings[at.c.site], at)
				continue // which tells whether it is well
			}
			at.c.noteStood(now)
		}
	}
	p.examineAll(pings)
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

// examineAll starts the examination of connections that need an owner for it, for
// each address on a goroutine of its own, unless one is at it since the last sweep.
func (p *Pool) examineAll(pings map[*site][]idleRef) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s, here := range pings {
		if p.checkingSites[s] {
			continue
		}
		if p.checkingSites == nil {
			p.checkingSites = make(map[*site]bool)
		}
		p.checkingSites[s] = true
		p.examiners++
		go s.examineIdle(here)
	}
}

// examineIdle examines idle connections of s, one after another.
func (s *site) examineIdle(here []idleRef) {
	p := s.pool
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

// examineInTurn takes one of the places that checkers leaves. It reports false if
// the peer gave no answer in time: then neither will its other connections, and
// those keep until the next sweep or loan.
func (at idleRef) examineInTurn() bool {
	p := at.c.site.pool
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

// impression is what a look from outside says of a connection.
type peekVerdict uint8

const (
	peekClean      peekVerdict = iota
	peekUnfit                  // dead, dirty or stolen
	peekNeedsOwner             // it takes an owner to find out
)

// peek looks at the connection without being its owner.
func (at idleRef) peek() peekVerdict {
	p := at.c.site.pool
	pr := &at.c.sock
	if pr.raw != nil {
		l := newFDVisit(pr, !p.cfg.NoProbe)
		err := pr.raw.Control(l.visit)
		taken := l.stolen
		seen := l.seen
		l.done()
		if err != nil || taken || seen != (sock.Seen{}) {
			if pr.foreign {
				return peekNeedsOwner // whose examination may wait for it
			}
			return peekUnfit
		}
	}
	if p.cfg.Check != nil || !p.cfg.NoProbe && pr.prober(at.c.nc) != nil {
		return peekNeedsOwner
	}
	return peekClean
}

// examine takes a connection, unless it was lent since it was sighted, and asks
// it all that can be asked. The error is why it was closed, if an error was.
func (at idleRef) examine(ping bool) error {
	p := at.c.site.pool
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

// examineAsideLocked is examine for the watcher, which must not wait for what an
// examination, or the close that it leads to, runs.
func (at idleRef) examineAsideLocked() {
	p := at.c.site.pool
	p.examiners++
	go func() {
		at.examine(false)
		p.mu.Lock()
		p.examiners--
		p.noteLeftLocked()
		p.mu.Unlock()
	}()
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
	c.word.Or(flagHungUp)
	if c.phase == phaseIdle {
		idleRef{c, c.generation()}.examineAsideLocked()
	}
	p.mu.Unlock()
}

// recheckHangUp is for a connection that was given back, or opened, while its peer
// hung up: the news found it in use, and comes only once.
func (at idleRef) recheckHangUp() {
	if at.c.word.Load()&flagHungUp != 0 {
		at.examine(false)
	}
	if at.c.site.pool.cfg.Push != nil {
		at.c.rearmWatch()
	}
}
