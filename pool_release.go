package connpool

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// This file is where the use of a connection ends. The owner of the connection calls these
// functions, without holding a lock. The lock is held only while the books change:
//
//	release       a loan ended in good order: to Push if bytes are left to read, else
//	              as releaseFrom
//	releaseFrom   to the oldest waiter, onto the idle stack, or closed
//	discard       closed; the slot is free when the socket is closed (noteRemoved)
//	noteDetached  the borrower took the connection out of the pool
//
// The decisions of the books (releaseLocked, whyUnwantedLocked) are in books.go. What the
// books write to an agenda is done here (run): dials and timers start, dials that the pool
// breaks off are canceled, connections are closed.
//
// An example: a loan ends in good order and nobody waits. The idle stack is full (MaxIdle).
// releaseLocked moves the connection to closing and adds a close to the agenda. run, after
// the unlock, calls discard. discard closes the socket, and noteRemoved frees the slot and
// calls admitLocked, which may start a dial for a waiter of another address.

// release gives back a connection whose loan ended in good order. If the loan left bytes to
// read and there is a Push, Push gets the connection first.
func (c *conn) release() bool {
	p := c.site.env.pool
	if p.cfg.Push == nil {
		return c.releaseFrom(fromLoan)
	}
	switch unread, err := c.unread(); {
	case err != nil:
		c.discard(ClosedDirty, err)
		return false
	case !unread:
		return c.releaseFrom(fromLoan)
	}
	c.dropRecord()
	now := p.clock.Now()
	p.mu.Lock()
	p.countLoanLocked(c)
	c.since, c.idleFor = now, 0
	c.dropLoanState()
	p.recency.touch(c)
	p.mu.Unlock()
	c.push()
	return true
}

// releaseFrom gives up a connection that its owner does not need any more: it goes to the
// oldest waiter, onto the idle stack, or, if it may not be lent again, it is closed.
// releaseFrom reports whether the connection was kept.
func (c *conn) releaseFrom(u origin) bool {
	p := c.site.env.pool
	c.dropRecord()
	now := p.clock.Now()
	var todo agenda
	p.mu.Lock()
	kept := p.releaseLocked(c, u, now, &todo)
	at := idleRef{c, c.generation()}
	p.mu.Unlock()
	todo.run(p)
	at.recheckHangUp()
	if p.debug {
		p.audit(1)
	}
	return kept
}

// discard closes a connection that its owner gives up, and frees the slot. The returned
// channel is closed when the socket is closed; it is nil if that has happened already.
func (c *conn) discard(reason CloseReason, err error) <-chan struct{} {
	p := c.site.env.pool
	c.noteLoss(reason, err)
	c.dropRecord()
	first, own := c.seal()
	if !own {
		c.noteRemoved(ClosedQuarantined, errStolen)
		c.wake()
		return nil
	}
	if c.closesAtOnce(reason) {
		if first {
			c.closeAbruptly()
		} else {
			c.awaitCloseUnderHook()
		}
		c.noteRemoved(reason, err)
		return nil
	}
	p.mu.Lock()
	p.countLoanLocked(c)
	if c.phase != phaseClosing {
		p.moveLocked(c, phaseClosing)
	}
	p.mu.Unlock()
	done := make(chan struct{})
	var once sync.Once
	free := func() {
		once.Do(func() {
			c.noteRemoved(reason, err)
			close(done)
		})
	}
	var at atomic.Value // the foreign code that runs
	at.Store("Close")
	var ended atomic.Bool
	late := time.AfterFunc(closeTimeout, func() {
		if ended.Load() {
			return // the close has ended at the last moment
		}
		p.report.noteAbandoned(at.Load().(string), c.site.addr)
		go c.closeBelow()
		if bye := c.farewell(); bye != nil { // the state has not returned from its goodbye
			go bye.closeSocket(c)
		}
		free()
	})
	slow := time.AfterFunc(closePatience, func() {
		if c.closesSlowly() && (reason == ClosedEvicted || c.farewell() != nil) && late.Stop() {
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

// closesSlowly records that the slot of c, which is being closed, will not be free soon. If an
// idle connection can make room, waiters need not wait for the slot of c. closesSlowly reports
// whether a waiter wanted a slot.
func (c *conn) closesSlowly() (wanted bool) {
	p := c.site.env.pool
	var todo agenda
	e := c.ensureCold()
	p.mu.Lock()
	if c.phase == phaseClosing {
		e.slow = true
		p.slow++
		wanted = p.want > 0
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
	return wanted
}

// noteRemoved frees the slot of a connection that the dial had opened: the socket is
// closed, or it is no longer the pool's (ClosedQuarantined, or ClosedUnknown for a
// detached connection). No other function frees such a slot.
func (c *conn) noteRemoved(reason CloseReason, err error) {
	p := c.site.env.pool
	var todo agenda
	var lost error
	if c.uses == 0 && !reason.innocent() {
		lost = lostBeforeUse(reason, err)
	}
	age := p.clock.Now().Sub(c.born)
	p.mu.Lock()
	s := c.site
	p.countLoanLocked(c)
	p.moveLocked(c, phaseNone)
	if c.sock.raw != nil && p.byFD[c.sock.fd()] == c {
		delete(p.byFD, c.sock.fd())
		p.unwatchLocked(c, &todo)
	}
	if e := c.cold.Load(); e != nil && e.slow {
		e.slow = false
		p.slow--
	}
	p.noteFreedLocked()
	if p.recency.remove(c) {
		p.countKindLocked(c, -1)
	}
	if reason != ClosedUnknown {
		p.closedBy[reason]++
	}
	if s.prefill != nil {
		p.noteReserveLostLocked(c, reason, lost, age)
	}
	p.giveUpLocked(s)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.dropIfEmptyLocked(s)
	p.noteLeftLocked()
	p.mu.Unlock()
	c.endLife(reason)
	todo.run(p)
	if reason == ClosedUnknown {
		return
	}
	if t := c.trace(); t != nil && t.Closed != nil {
		p.report.observe("Trace.Closed", func() {
			t.Closed(CloseInfo{Addr: s.addr, ID: c.id, Reason: reason, Uses: c.uses, Age: age, Err: err})
		})
	}
	c.logClosed(reason, err)
}

// countKindLocked adds n to the counts of the kinds of connections to which c belongs.
func (p *Pool) countKindLocked(c *conn, n int) {
	if c.unprobed() {
		p.counts.Unprobed += n
	}
	if c.isResident() {
		p.counts.Residents += n
	}
}

// noteDetached records that a borrower took c out of the pool.
func (c *conn) noteDetached() {
	p := c.site.env.pool
	c.dropRecord()
	p.mu.Lock()
	p.counts.Detached++
	watcher := p.watching.watcher
	p.mu.Unlock()
	watcher.Remove(c.sock.raw)
	t, info := c.trace(), PutInfo{Addr: c.site.addr, ID: c.id, Held: p.clock.Exactly().Sub(c.since)}
	c.noteRemoved(ClosedUnknown, nil)
	if t != nil && t.Detached != nil {
		p.report.observe("Trace.Detached", func() { t.Detached(info) })
	}
}

// run does what the agenda says. It is small enough to be inlined: most agendas are empty.
func (a *agenda) run(p *Pool) {
	if a.dials != nil || a.closes != nil || a.cancels != nil || a.timers != nil {
		a.runAll(p)
	}
}

// runAll starts the dials, the timers and the cancellations first: a close may take long, and
// its Trace function may not return.
func (a *agenda) runAll(p *Pool) {
	if p.debug {
		defer p.audit(1) // a panic of the audit loses nothing that was on the agenda
	}
	for _, d := range a.dials {
		go d.dial()
	}
	for _, t := range a.timers {
		t.start(p)
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
		o.c.discard(o.reason, o.err)
	}
}

func (c *conn) logClosed(reason CloseReason, err error) {
	if c.site.env.report.logger == nil {
		return // before the arguments of the line are made
	}
	level := slog.LevelDebug
	switch reason {
	case ClosedDirty, ClosedInFlight, ClosedResetFailed, ClosedCheckFailed, ClosedPushFailed:
		level = slog.LevelWarn
	case ClosedQuarantined, ClosedLeaked:
		level = slog.LevelError
	case ClosedStale:
		level = slog.LevelInfo
	}
	c.site.env.report.log(level, "connection closed", "addr", c.site.addr, "id", c.id, "reason", reason.String(), "uses", c.uses, "err", err)
}

// leakedLease takes back the connection of a lease that became unreachable.
func leakedLease(c *conn) {
	go func() { // the caller is the runtime, whose other clean-ups wait
		if c.abort() {
			c.noteLeaked()
		}
	}()
}

// noteLeaked counts and reports the connection of a leaked lease or session, and closes
// it. The caller owns c.
func (c *conn) noteLeaked() {
	p := c.site.env.pool
	t, h := c.trace(), c.loanState().record
	if h == nil { // the loan was not recorded; only leases always are
		h = &loanRecord{addr: c.site.addr, id: c.id, since: c.since}
	}
	info := h.info(p.clock.Exactly())
	p.mu.Lock()
	p.counts.Leaked++
	p.mu.Unlock()
	c.discard(ClosedLeaked, nil)
	if t != nil && t.Leaked != nil {
		p.report.observe("Trace.Leaked", func() { t.Leaked(info) })
	}
	p.report.log(slog.LevelError, "a lease or session was forgotten; its connection is closed", "addr", info.Addr, "id", info.ID,
		"held", info.Held, "borrowed by", info.Stack)
}
