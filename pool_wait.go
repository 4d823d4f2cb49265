package connpool

import "context"

// The part of a borrower's wait that blocks. The queue itself is in books_queue.go.

// await blocks until w is served or ctx is done. On return w is in no queue; exactly one of the
// connection and the error is set, and with a connection the caller owns the connection.
func (w *waiter) await(ctx context.Context) (*conn, error) {
	served, over := false, false
	defer func() {
		switch {
		case over:
		case !served: // a ctx of the borrower's making panicked
			w.leave()
		case w.err == nil:
			w.noteDeclined()
		}
	}()
	select {
	case <-w.ready:
		served = true
		canceled := ctx.Err() != nil
		over = true
		if canceled && w.err == nil {
			w.noteDeclined()
			return nil, causeOf(ctx)
		}
		return w.c, w.err
	case <-ctx.Done():
		over = true
		if err := w.leave(); err != nil {
			return nil, err
		}
		return nil, w.gaveUp(causeOf(ctx))
	}
}

// stageAndCause splits the error of a wait: a failed dial has its own stage.
func stageAndCause(err error) (Stage, error) {
	if de, ok := err.(*dialError); ok {
		return de.stage, de.err
	}
	return StageWait, err
}

// leave takes w out of the queue. If w was served meanwhile, leave gives a connection back and
// returns an error.
func (w *waiter) leave() error {
	s, p := w.site, w.site.env.pool
	var todo agenda
	p.mu.Lock()
	if w.queued {
		w.why = p.whyLocked(s, w)
		s.queue.remove(w)
		p.noteWaitedLocked(w, true)
		p.refreshLocked(s)
		p.admitLocked(&todo)
		p.dropIfEmptyLocked(s)
		p.mu.Unlock()
		todo.run(p)
		return nil
	}
	p.mu.Unlock()
	<-w.ready // w was served before leave got the lock
	if w.err == nil {
		w.noteDeclined()
	}
	return w.err
}

// noteDeclined gives back the connection with which a waiter was served that had given up.
func (w *waiter) noteDeclined() {
	p := w.c.site.env.pool
	p.mu.Lock()
	p.counts.WaitsFailed++
	p.mu.Unlock()
	w.c.releaseFrom(fromCheck)
}
