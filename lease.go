package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
)

// Lease is a connection that is held across calls, until [Lease.Return]. It is a
// net.Conn whose Close gives it back, so that a layer which owns its connection
// (a textproto.Conn, an rpc.Client) can be built on it and closed as usual.
// Nothing of a lease works after its end: the answer is an error that is both
// ErrReturned and net.ErrClosed. All methods may be called by several
// goroutines at once.
//
// Prefer [Pool.With], which cannot be forgotten. A lease that was is found by the
// garbage collector: once nobody can reach the *Lease any more, its connection
// is closed (ClosedLeaked), its slot is free, and [Trace.Leaked], Stats.Leaked
// and the log tell of it with the stack of the borrow. Whoever goes on with a
// part of the lease only, say a codec from [State], must keep the lease too.
type Lease struct {
	c       *conn
	ctx     context.Context // the values of Lease's ctx
	trace   *Trace
	cleanup runtime.Cleanup // finds that the lease was forgotten; nothing of the pool refers to the lease itself

	mu      sync.Mutex // guards what follows; nothing that can block or is foreign, and no other lock, under it
	state   leaseState
	gen     uint64 // of the standing loan; in Do, of fn's, 0 before that begins
	wanted  bool   // Return or Discard was called during Do
	dropped bool   // it was Discard; who begins a loan next closes it, if Discard itself met none
}

// leaseState is where a lease is in its life. Whoever moves it out of leaseHeld
// or leaseDoing is the owner of the connection.
//
//	held <-> doing
//	 |  \      |  \
//	 |   +-----|---+--> lost (by Do's verdict, or fn closed it)
//	 +-> over <+---------+
type leaseState uint8

const (
	leaseHeld  leaseState = iota // a loan stands, and its generation is gen
	leaseDoing                   // Do has the connection
	leaseLost                    // the connection is gone, Return has not been called
	leaseOver
)

// leaseError is the error of a lease that is over. Those who take the lease for
// a plain net.Conn know it as net.ErrClosed.
type leaseError struct{}

func (leaseError) Error() string   { return "connpool: the lease is over: its connection was given back" }
func (leaseError) Unwrap() []error { return []error{ErrReturned, net.ErrClosed} }

var (
	errLeaseBusy    = errors.New("connpool: the lease is in use by its Do: use the Conn that Do's fn got")
	errLeaseRunning = errors.New("connpool: another operation of the lease is running: Do needs the connection alone")
	errLeaseLost    = fmt.Errorf("connpool: the lease has lost its connection: %w", net.ErrClosed)
)

// Lease borrows a connection to addr until it is returned. ctx governs the wait
// for it, and nothing after; its values are those of the whole lease. The error
// is as that of [Pool.With]. A lease is no part of a [Pool.Session] that ctx may
// have: its connection is its own.
func (p *Pool) Lease(ctx context.Context, addr Addr) (*Lease, error) {
	switch {
	case p.stop == nil:
		return nil, usage(addr, ErrClosed)
	case ctx == nil:
		return nil, usage(addr, errors.New("ctx is nil: pass context.Background()"))
	}
	k := checkout{p: p, trace: p.cfg.trace(ctx)}
	k.get(&addr)
	if err := k.borrow(ctx, &addr); err != nil {
		return nil, err
	}
	defer k.rescue()
	k.record(1)
	l := &Lease{c: k.c, ctx: context.WithoutCancel(ctx), trace: k.trace}
	l.gen = k.start(l.ctx).gen
	k.got()
	l.cleanup = runtime.AddCleanup(l, leakedLease, k.c)
	k.owned = false // the lease is the owner
	return l, nil
}

// checkout is that of the owner of the lease's connection.
func (l *Lease) checkout() checkout {
	return checkout{p: l.c.site.pool, c: l.c, trace: l.trace, owned: true}
}

// Return ends the lease. The connection goes back to the pool by the same
// verdict as at the end of a [Pool.With] whose fn said nil: it is closed instead
// if an operation is still running, failed or timed out, or if bytes are left
// unread. Return reports no error for that. Called again it does nothing and returns
// an error that is ErrReturned and net.ErrClosed. If a Do closed the connection,
// Return returns nil. During Do it takes effect when Do returns.
func (l *Lease) Return() error {
	defer runtime.KeepAlive(l)
	l.mu.Lock()
	was := l.state
	switch {
	case was == leaseOver, l.wanted:
		l.mu.Unlock()
		return leaseError{}
	case was == leaseDoing:
		l.wanted = true
	default:
		l.state = leaseOver
	}
	l.mu.Unlock()
	if was == leaseHeld {
		l.release()
	}
	return nil
}

// release is for the owner of a connection on which a loan stands.
func (l *Lease) release() {
	l.cleanup.Stop()
	k := l.checkout()
	defer k.rescue()
	k.finish(l.ctx, nil)
}

// Close is Return, for those who take the lease for a net.Conn: operations that
// are blocked are interrupted, at the cost of the connection.
func (l *Lease) Close() error { return l.Return() }

// Discard ends the lease and closes the connection, now and also during Do. It
// interrupts operations that are blocked. On a lease that is over it does
// nothing and says so.
func (l *Lease) Discard() error {
	defer runtime.KeepAlive(l)
	l.mu.Lock()
	was, h := l.state, Conn{l.c, l.gen}
	switch {
	case was == leaseOver, l.wanted:
		l.mu.Unlock()
		return leaseError{}
	case was == leaseDoing:
		l.wanted, l.dropped = true, true
	default:
		l.state = leaseOver
	}
	l.mu.Unlock()
	if was == leaseLost {
		return nil
	}
	if was == leaseHeld {
		l.cleanup.Stop()
	}
	if h.gen != 0 {
		h.Close() // fails if fn has closed or detached it: it is gone then, too
	}
	return nil
}

// loan is what stands between two Dos.
func (l *Lease) loan() (Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.unusableLocked(); err != nil {
		return Conn{}, err
	}
	return Conn{l.c, l.gen}, nil
}

func (l *Lease) unusableLocked() error {
	switch {
	case l.state == leaseHeld:
		return nil
	case l.state == leaseLost:
		return errLeaseLost
	case l.state == leaseDoing && !l.wanted:
		return errLeaseBusy
	}
	return leaseError{}
}
