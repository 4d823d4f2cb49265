package connpool

import (
	"context"
	"errors"
	"runtime"
)

// Do takes the standing loan of a lease away and puts another one in its place,
// for as long as fn runs.

// Do runs fn with the connection as a [Conn], for what takes one: [State], and
// I/O under a ctx. ctx governs the I/O inside fn as in [Pool.With], and the
// Conn is dead when Do returns. fn's error comes back as it is, without the
// marks of [Keep].
//
// The connection is closed, and the lease lost, by the same verdict as With's,
// with two exceptions, which count at Return: bytes left unread or unflushed, and
// CloseWrite.
// On a lost lease everything fails but Return, Close and Discard.
//
// fn has the connection alone: the other methods of the lease fail meanwhile,
// and Do fails, as an *[Error], while one of them is running. A deadline set
// with them does not outlive Do.
func (l *Lease) Do(ctx context.Context, fn func(Conn) error) error {
	defer runtime.KeepAlive(l)
	c, p := l.c, l.c.site.pool
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
	var again Conn // the loan that stands after Do; zero: the connection is lost
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
	// The loan that stands from now on is judged by what was before, too.
	again, k.owned = c.begin(l.ctx, before&(flagTimedOut|flagHalfClosed)|word&(flagMoved|flagHalfClosed)), false
	return unkeep(err)
}

// pause ends the standing loan for Do, if that has the connection alone.
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
	case word&inFlight != 0:
		return errLeaseRunning
	}
	return errLeaseLost // closed or detached through what Setup built
}

// hush ends the loan gen unless an operation is running or the connection is
// gone, and returns the word as it was.
func (c *conn) endIfQuiet(gen uint64) (word uint64, ok bool) {
	for {
		w := c.word.Load()
		if w&(inFlight|flagGone) != 0 || w&flagLent == 0 || w>>genShift != gen {
			return w, false
		}
		if c.word.CompareAndSwap(w, w&^flagLent) {
			return w, true
		}
	}
}

// began reports whether fn may run: the lease was not discarded before the loan
// of Do began. If it was, the connection is closed.
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

// resume is the end of Do: again stands from now on, or, if it is the zero Conn,
// the connection is lost. What was wished for meanwhile, and which loan a wish
// from now on concerns, is one critical section: between the loan of fn and
// again there is none that Discard could have closed.
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
