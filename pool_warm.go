package connpool

import (
	"context"
	"errors"
	"fmt"
)

// Connections that are opened before a borrower wants them: because Warm was called, or
// because an address in use has fewer idle connections than its reserve needs
// (MinIdlePerAddr). They are dials like all others, in the same books. No borrower waits for
// them, but a borrower that comes uses such a dial as if it had been started for it.
//
// An address that wants such dials is on the list books.deficit. They start only when nobody
// else wants the slot: no waiter is without a dial, a slot is free, and nothing has to be
// evicted for it.

// Warm opens connections to addr, several at a time, until n are open, and returns
// when they are. Connections that are idle, lent, or being opened for a borrower count
// too; so if there was no borrow before, n are idle then.
//
// Warm keeps to all limits and has less right to room than a borrower: while others need
// the slots, Warm waits, until ctx is done, and it evicts nothing. The connections that
// it opens expire as any other idle connection does.
//
// If a dial fails, or three of the connections are lost before anybody has used them,
// Warm starts no more dials, waits for the dials under way and returns an *[Error] with
// the first failure or the last loss, in which errors.Is finds the cause. Connections
// that were opened stay, also when ctx ends the wait; the error says how many are open.
// If no limit ever allows n connections, the error names the limit. It is also an
// error if a connection could not be kept because others fill MaxIdle, or because file
// handles run low. Under [FullFail] a full pool is ErrExhausted. n may be 0.
func (p *Pool) Warm(ctx context.Context, addr Addr, n int) error {
	switch {
	case p.stop == nil:
		return usage(addr, ErrClosed)
	case ctx == nil:
		return usage(addr, errors.New("ctx is nil: pass context.Background()"))
	case n < 0:
		return usage(addr, errNegative)
	}
	addr, err := p.cfg.canonical(addr)
	if err != nil {
		return usage(addr, err)
	}
	start := p.clock.Exactly()
	if ctx.Err() != nil {
		return p.tooLate(ctx, addr)
	}
	w := &warming{ctx: ctx, n: n, since: start, ready: make(chan struct{})}
	r := request{addr: &addr, hash: p.sites.hash(&addr), known: true}
	var (
		todo agenda
		own  *ownLimits // what LimitsFor has answered
	)
	p.mu.Lock()
	for p.mustAskLocked(p.sites.find(addr), &r, own) {
		p.mu.Unlock()
		if own, err = p.askLimits(&r); err != nil {
			return p.failed(addr, StageLimits, err, start)
		}
		p.mu.Lock()
	}
	if p.closed {
		p.mu.Unlock()
		return p.failed(addr, StageWait, ErrClosed, start)
	}
	s := p.siteLocked(p.sites.find(addr), &r, own, &todo)
	if err := p.warmableLocked(s, n); err != nil {
		p.dropIfEmptyLocked(s)
		p.mu.Unlock()
		todo.run(p)
		return usage(addr, err)
	}
	s.prefillLocked().warm = append(s.prefill.warm, w)
	p.refreshLocked(s)
	p.admitLocked(&todo)
	p.refreshLocked(s) // the pool may be full under FullFail
	p.dropIfEmptyLocked(s)
	p.mu.Unlock()
	todo.run(p)

	select {
	case <-w.ready:
	case <-ctx.Done():
		why := causeOf(ctx)
		p.mu.Lock()
		if !w.ended {
			vain := p.whyLocked(s, nil)
			vain.ctx = why
			w.err = p.warmFailedLocked(s, vain)
			p.endWarmingLocked(s, w)
			p.refreshLocked(s)
			p.dropIfEmptyLocked(s)
		}
		p.mu.Unlock()
	}
	if w.err == nil {
		return nil
	}
	w.err.Waited = p.clock.Exactly().Sub(start)
	w.err.classify()
	w.err.Err = fmt.Errorf("%d of %d are open: %w", w.open, w.n, w.err.Err)
	return w.err
}
