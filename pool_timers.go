package connpool

import "time"

// The timers that the books ask for. An agenda starts them (timerOrder.start), and their
// functions are here. The timer of hush is different: the dial starts it itself.

// start starts the timer of t.
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

// startPause starts the timer of a pause, unless the pause has ended meanwhile.
func (s *site) startPause(running *pause, after time.Duration) {
	p := s.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.backoff != nil && s.backoff.pause == running {
		running.timer = time.AfterFunc(after, func() { s.retry(running) })
	}
}

// retry ends a pause of back-off: the next dial of the address may start.
func (s *site) retry(over *pause) {
	p := s.env.pool
	var todo agenda
	p.mu.Lock()
	p.pauseOverLocked(s, over, &todo)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.mu.Unlock()
	todo.run(p)
}

// startSweeper starts the timer of the next sweep, unless the pool was closed meanwhile.
func (p *Pool) startSweeper(after time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sweeper == nil && !p.closed {
		p.sweeper = time.AfterFunc(after, p.sweep)
	}
}

// doubtDials ends surplusPatience: it breaks off the dials that are still in surplus.
func (s *site) doubtDials(q *queue) {
	p := s.env.pool
	var todo agenda
	p.mu.Lock()
	p.dropDialsLocked(s, q, &todo)
	p.mu.Unlock()
	todo.run(p)
}

// hush records that a dial has been without an answer for the duration `silence`. answers is how
// many dials of its address had succeeded when this dial began.
func (a *attempt) hush(answers int) {
	p := a.c.site.env.pool
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
