package connpool

import "time"

// The timers that the books ask for: an agenda starts them (timerOrder.start), and each of
// them ends here. hush is told by a timer of the dial itself.

func (t timerOrder) start(p *Pool) {
	switch {
	case t.pause != nil:
		t.site.startPause(t.pause, t.after)
	case t.doubt != nil:
		time.AfterFunc(t.after, func() { t.site.doubtDials(t.doubt) })
	default:
		p.startSweeper(t.after)
	}
}

// startPause starts the timer of a pause that an agenda has brought, unless the
// pause has been ended meanwhile.
func (s *site) startPause(running *pause, after time.Duration) {
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.backoff != nil && s.backoff.pause == running {
		running.timer = time.AfterFunc(after, func() { s.retry(running) })
	}
}

// retry is the end of a pause: the probe of an address that is backing off goes ahead.
func (s *site) retry(over *pause) {
	p := s.pool
	var todo agenda
	p.mu.Lock()
	p.pauseOverLocked(s, over, &todo)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.mu.Unlock()
	todo.run(p)
}

// startSweeper starts the timer of the next sweep, which an agenda has brought, unless
// the pool was closed meanwhile.
func (p *Pool) startSweeper(after time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sweeper == nil && !p.closed {
		p.sweeper = time.AfterFunc(after, p.sweep)
	}
}

// doubtDials is the end of surplusPatience.
func (s *site) doubtDials(q *queue) {
	p := s.pool
	var todo agenda
	p.mu.Lock()
	p.dropDialsLocked(s, q, &todo)
	p.mu.Unlock()
	todo.run(p)
}

// hush is told that a dial has gone without an answer for so long. answers is how
// many its address had given when it began.
func (a *attempt) hush(answers int) {
	p := a.c.site.pool
	var todo agenda
	p.mu.Lock()
	if s := a.c.site; a.giveUp != nil && !a.surplus {
		if a.quiet = true; s.queue.answers == answers {
			s.queue.silent = true
			p.refreshLocked(s)
		}
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
}
