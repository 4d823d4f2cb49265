package connpool

import (
	"context"
	"errors"
	"runtime"
)

// Do ends the current loan of the lease, starts a loan of its own for fn, and starts
// another loan for the lease when fn has returned.

// Do runs fn with the lease's connection as a [Conn], for functions that need one
// ([State]), and for I/O under a ctx. ctx governs the I/O inside fn as in [Pool.With],
// and the Conn is invalid when Do returns. Do returns fn's error unchanged, without the
// marks of [Keep].
//
// The pool closes the connection, and the lease is lost, under the same rules as at the
// end of a With, with two exceptions, which are judged at Return: bytes left unread or
// unflushed, and CloseWrite. On a lost lease all methods but Return, Close and Discard
// fail.
//
// While fn runs, nothing else can use the connection: the other methods of the lease
// fail, and Do fails, as an *[Error], if one of them is running. A deadline set with
// them ends when Do begins.
func (l *Lease) Do(ctx context.Context, fn func(Conn) error) error {
	defer runtime.KeepAlive(l)
	c, p := l.c, l.c.site.env.pool
	switch {
	case ctx == nil:
		return usage(c.site.addr, errors.New("ctx is nil: pass context.Background()"))
	case fn == nil:
		return usage(c.site.addr, errors.New("fn is nil"))
	case ctx.Err() != nil:
		return p.tooLate(ctx, c.site.addr)
	}
	if err := l.pause(); err != nil {
		return usage(c.site.addr, err)
	}
	var again Conn // the lease's loan after Do; zero: the connection is lost
	k := l.checkout()
	defer func() { l.resume(again) }()
	defer k.rescue()
	before := c.end()
	h := c.begin(ctx, before&flagMoved)
	if !l.began(h) {
		k.owned = false
		return usage(c.site.addr, leaseError{})
	}
	err := fn(h)
	if err == nil {
		c.noteContent()
	}
	word, mine := k.end()
	if !mine {
		return unkeep(err)
	}
	if reason, why := c.verdict(ctx, word&^flagHalfClosed, err); reason != ClosedUnknown {
		k.close(reason, why)
		return unkeep(err)
	}
	// The flags of the lease's loan before Do count for its loan after Do, too.
	again, k.owned = c.begin(context.Background(), before&(flagTimedOut|flagHalfClosed)|word&(flagMoved|flagHalfClosed)), false
	return unkeep(err)
}

// pause ends the current loan for Do, if no operation of it is running.
func (l *Lease) pause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.unusableLocked(); err != nil {
		return err
	}
	switch word, ok := l.c.endIfQuiet(l.gen); {
	case ok:
		l.state, l.gen = leaseDoing, 0
		return nil
	case operating(word):
		return errLeaseRunning
	}
	return errLeaseLost // closed or detached through the guard, the net.Conn that Setup got
}

// endIfQuiet ends the loan with generation gen, unless an operation is running or the
// connection was closed or detached. It returns the state word as it was before.
func (c *conn) endIfQuiet(gen uint64) (word uint64, ok bool) {
	for {
		w := c.word.Load()
		if operating(w) || w&flagGone != 0 || w&flagLent == 0 || w>>genShift != gen {
			return w, false
		}
		if c.word.CompareAndSwap(w, w&^flagLent) {
			return w, true
		}
	}
}

// began records h as the loan of fn and reports whether fn may run. If Discard was
// called before this loan began, began closes the connection, and fn must not run.
func (l *Lease) began(h Conn) bool {
	l.mu.Lock()
	dropped := l.dropped
	l.gen = h.gen
	l.mu.Unlock()
	if dropped {
		h.Close()
	}
	return !dropped
}

// resume ends Do. again is the lease's loan from now on; the zero Conn means that the
// connection is lost. One critical section reads what Return and Discard asked for
// during Do and sets the loan that a later Discard closes. So Discard cannot miss the
// loan that is under way between fn's loan and again.
func (l *Lease) resume(again Conn) {
	kept := again.c != nil
	l.mu.Lock()
	wanted, dropped := l.wanted, l.dropped
	l.gen = again.gen
	switch {
	case wanted:
		l.state = leaseOver
	case kept:
		l.state = leaseHeld
	default:
		l.state = leaseLost
	}
	l.mu.Unlock()
	switch {
	case !kept:
		l.cleanup.Stop()
	case dropped:
		l.cleanup.Stop()
		again.Close()
	case wanted:
		l.release()
	}
}
