package connpool

import (
	"sync"
	"sync/atomic"
	"time"
)

// Where a connection ends or goes idle. Everything in this file is done by the owner
// of a connection, with no lock held but for the time in which the books are
// changed:
//
//	giveBack  a loan ended in good order: to Push if something is left to read, else park
//	park      to the oldest waiter, onto the idle stack, or out
//	discard   closed; the slot is free when the socket is closed (removed)
//	detached  the borrower took the connection away
//
// What the books decide (parkLocked, unwantedLocked) is in books.go. What they write
// to the agenda is done here (run): dials and timers start, dials that are broken
// off hear of it, connections are closed.

// giveBack is park for a loan that ended in good order: what it left to read goes
// to Push.
func (p *Pool) giveBack(c *conn) bool {
	if p.cfg.Push == nil {
		return p.park(c, used)
	}
	switch unread, err := c.unread(); {
	case err != nil:
		p.discard(c, ClosedDirty, err)
		return false
	case !unread:
		return p.park(c, used)
	}
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	now := p.clock.Now()
	p.mu.Lock()
	p.countLoanLocked(c)
	c.since, c.idleFor = now, 0
	c.forget()
	p.recency.touch(c)
	p.mu.Unlock()
	p.push(c)
	return true
}

// park is what an owner does who has no more use for a connection: it goes to
// the oldest waiter, onto the idle stack, or, if it may not be lent again, out.
// It reports whether the connection was kept.
func (p *Pool) park(c *conn, u use) bool {
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	now := p.clock.Now()
	var todo agenda
	p.mu.Lock()
	kept := p.parkLocked(c, u, now, &todo)
	at := sighting{c, c.generation()}
	p.mu.Unlock()
	todo.run(p)
	p.hearAgain(at)
	return kept
}

// discard closes a connection that its owner gives up, and frees the slot. The
// channel is closed when the socket is; it is nil if that has happened already.
func (p *Pool) discard(c *conn, reason CloseReason, err error) <-chan struct{} {
	p.judge(c, reason, err)
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	first, own := c.seal()
	if !own {
		p.removed(c, Quarantined, errStolen)
		c.wake()
		return nil
	}
	if c.closesAtOnce(reason) {
		if first {
			c.closeAbruptly()
		} else {
			c.awaitStrike()
		}
		p.removed(c, reason, err)
		return nil
	}
	p.mu.Lock()
	p.countLoanLocked(c)
	if c.phase != closing {
		p.moveLocked(c, closing)
	}
	p.mu.Unlock()
	done := make(chan struct{})
	var once sync.Once
	free := func() {
		once.Do(func() {
			p.removed(c, reason, err)
			close(done)
		})
	}
	var at atomic.Value // what runs
	at.Store("Close")
	var ended atomic.Bool
	late := time.AfterFunc(closeTimeout, func() {
		if ended.Load() {
			return // closesSlowly wound it up at the last moment
		}
		p.abandoned(at.Load().(string), c.site.addr)
		go c.closeBelow()
		free()
	})
	slow := time.AfterFunc(closePatience, func() {
		if p.closesSlowly(c) && reason == ClosedEvicted && late.Stop() {
			late.Reset(evictionPatience)
		}
	})
	go func() {
		defer func() { // also after a runtime.Goexit
			ended.Store(true)
			late.Stop()
			slow.Stop()
			free()
		}()
		c.closeFully(reason, first, &at)
	}()
	return done
}

// closesSlowly books that the slot of c, which is being closed, cannot be counted on:
// if something idle can make room, waiters need not wait for it. It reports whether
// somebody waits for a slot.
func (p *Pool) closesSlowly(c *conn) (wanted bool) {
	var todo agenda
	e := c.extra()
	p.mu.Lock()
	if c.phase == closing {
		e.slow = true
		p.slow++
		wanted = p.want > 0
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
	return wanted
}

// removed is the one place where a slot becomes free: the socket of c is closed,
// or is no longer the pool's (Quarantined; ClosedUnknown for one that was
// detached).
func (p *Pool) removed(c *conn, reason CloseReason, err error) {
	var todo agenda
	var lost error
	if c.uses == 0 && !reason.innocent() {
		lost = unborn(reason, err)
	}
	age := p.clock.Now().Sub(c.born)
	p.mu.Lock()
	s := c.site
	p.countLoanLocked(c)
	p.moveLocked(c, none)
	if c.probe.raw != nil && p.byFD[c.probe.fd()] == c {
		delete(p.byFD, c.probe.fd())
		p.unwatchLocked(c, &todo)
	}
	if e := c.more.Load(); e != nil && e.slow {
		e.slow = false
		p.slow--
	}
	p.freedLocked()
	if p.recency.remove(c) && c.unprobed() {
		p.counts.Unprobed--
	}
	if reason != ClosedUnknown {
		p.closedBy[reason]++
	}
	if s.special != nil {
		p.reserveLostLocked(c, reason, lost, age)
	}
	p.giveUpLocked(s)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.forgetLocked(s)
	p.leftLocked()
	p.mu.Unlock()
	c.endLife(reason)
	todo.run(p)
	if reason == ClosedUnknown {
		return
	}
	if t := c.trace(); t != nil && t.Closed != nil {
		p.observe("Trace.Closed", func() {
			t.Closed(CloseInfo{Addr: s.addr, ID: c.id, Reason: reason, Uses: c.uses, Age: age, Err: err})
		})
	}
	p.logClosed(c, reason, err)
}

// detached books that a borrower took c away.
func (p *Pool) detached(c *conn) {
	if l := c.loan.Load(); l != nil && l.hold != nil {
		p.unhold(l)
	}
	p.mu.Lock()
	p.counts.Detached++
	watcher := p.watcher
	p.mu.Unlock()
	watcher.Remove(c.probe.raw)
	t, info := c.trace(), PutInfo{Addr: c.site.addr, ID: c.id, Held: p.clock.Exactly().Sub(c.since)}
	p.removed(c, ClosedUnknown, nil)
	if t != nil && t.Detached != nil {
		p.observe("Trace.Detached", func() { t.Detached(info) })
	}
}

// run is inlined: on the agenda of most loans there is nothing.
func (a *agenda) run(p *Pool) {
	if a.dials != nil || a.closes != nil || a.cancels != nil || a.timers != nil {
		a.runAll(p)
	}
}

func (a *agenda) runAll(p *Pool) {
	for _, d := range a.dials {
		go p.dial(d)
	}
	for _, t := range a.timers {
		p.startTimer(t)
	}
	for _, cancel := range a.cancels {
		cancel()
	}
	defer func() {
		if len(a.closes) > 0 { // a Trace function called runtime.Goexit
			rest := agenda{closes: a.closes}
			go rest.run(p)
		}
	}()
	for len(a.closes) > 0 {
		o := a.closes[0]
		a.closes = a.closes[1:]
		p.discard(o.c, o.reason, o.err)
	}
}
