package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"time"
)

// Lease is a connection that is held across calls, until [Lease.Return]. It is a
// net.Conn whose Close gives the connection back, so a layer that owns its connection
// (a textproto.Conn, an rpc.Client) can be built on a lease and closed as usual. After
// the end of the lease its methods fail with an error that is both ErrReturned and
// net.ErrClosed. Several goroutines may call the methods at once.
//
// Prefer [Pool.With], which always gives the connection back. A lease that is never
// returned is found by the garbage collector: once the *Lease is unreachable, the pool
// closes the connection (ClosedLeaked), which frees its slot, and reports the leak with
// the stack of the borrow to [Trace.Leaked], Stats.Leaked and the log. A program that
// goes on using a part of the lease, such as a codec from [State], must keep the *Lease
// reachable, too.
type Lease struct {
	c       *conn
	values  valuesOf // of the ctx given to Pool.Lease
	trace   *Trace
	cleanup runtime.Cleanup // detects a leak; nothing in the pool refers to the Lease itself

	mu      sync.Mutex // guards what follows; nothing that can block or is foreign, and no other lock, under it
	state   leaseState
	gen     uint64 // generation of the current loan; in Do that of fn's loan, and 0 before that loan begins
	wanted  bool   // Return or Discard was called during Do
	dropped bool   // it was Discard; the next loan of the lease is closed as soon as it begins, if Discard itself found none
}

// valuesOf is a ctx with the values of another one, which is never done. It is a part of the
// Lease, where context.WithoutCancel would allocate one.
type valuesOf struct{ ctx context.Context }

func (*valuesOf) Deadline() (t time.Time, ok bool) { return t, false }
func (*valuesOf) Done() <-chan struct{}            { return nil }
func (*valuesOf) Err() error                       { return nil }
func (v *valuesOf) Value(key any) any              { return v.ctx.Value(key) }

// leaseState is the state of a lease. Whoever moves it out of leaseHeld or leaseDoing
// is the owner of the connection.
//
//	held <-> doing
//	 |  \      |  \
//	 |   +-----|---+--> lost (by Do's verdict, or fn closed it)
//	 +-> over <+---------+
type leaseState uint8

const (
	leaseHeld  leaseState = iota // a loan is under way; its generation is gen
	leaseDoing                   // Do has the connection
	leaseLost                    // the connection has left the pool, but Return has not been called
	leaseOver                    // Return, Close, Discard or Detach was called
)

// leaseError is the error of a lease that is over. It is also net.ErrClosed, for code
// that uses the lease as a plain net.Conn.
type leaseError struct{}

func (leaseError) Error() string   { return "connpool: the lease is over: its connection was given back" }
func (leaseError) Unwrap() []error { return []error{ErrReturned, net.ErrClosed} }

var (
	errLeaseBusy    = errors.New("connpool: the lease is in use by its Do: use the Conn that Do's fn got")
	errLeaseRunning = errors.New("connpool: another operation of the lease is running: Do needs the connection alone")
	errLeaseLost    = fmt.Errorf("connpool: the lease has lost its connection: %w", net.ErrClosed)
)

// Lease borrows a connection to addr, until the lease is returned. ctx bounds only the
// wait for the connection; the values of ctx serve for the whole lease. The error is as
// for [Pool.With]. A lease ignores a [Pool.Session] in ctx: it always has a connection
// of its own.
func (p *Pool) Lease(ctx context.Context, addr Addr) (*Lease, error) { return p.lease(ctx, addr, 1) }

// lease is Lease for a caller that is skip frames below the one to report if the lease leaks.
func (p *Pool) lease(ctx context.Context, addr Addr, skip int) (*Lease, error) {
	switch {
	case p.stop == nil:
		return nil, usage(addr, ErrClosed)
	case ctx == nil:
		return nil, usage(addr, errors.New("ctx is nil: pass context.Background()"))
	}
	k := checkout{p: p, trace: p.trace(ctx)}
	k.get(&addr)
	if err := k.borrow(ctx, &addr); err != nil {
		return nil, err
	}
	defer k.rescue()
	k.record(skip + 1)
	l := &Lease{c: k.c, values: valuesOf{ctx}, trace: k.trace}
	l.gen = k.start(context.Background()).gen // the ctx of a lease can never be done
	k.got()
	l.cleanup = runtime.AddCleanup(l, leakedLease, k.c)
	k.owned = false // the lease is the owner
	return l, nil
}

// checkout returns a checkout for the owner of the lease's connection.
func (l *Lease) checkout() checkout {
	return checkout{p: l.c.site.env.pool, c: l.c, trace: l.trace, owned: true}
}

// Return ends the lease. The connection goes back to the pool under the same rules as
// after a [Pool.With] whose fn returned nil: the pool closes it instead if an operation
// is still running, failed or timed out, or if bytes are left unread. Return reports no
// error for that. A second call does nothing and returns an error that is ErrReturned
// and net.ErrClosed. If a Do closed the connection, Return returns nil. During Do,
// Return takes effect when Do returns.
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

// release gives the connection back. The caller is the owner, and a loan is under way.
func (l *Lease) release() {
	l.cleanup.Stop()
	k := l.checkout()
	defer k.rescue()
	k.finish(&l.values, nil)
}

// Close is Return, for code that uses the lease as a net.Conn. If operations are
// blocked, they return, and the pool closes the connection.
func (l *Lease) Close() error { return l.Return() }

// Discard ends the lease and closes the connection, at once and also during Do.
// Operations that are blocked return. On a lease that is over it does nothing and
// returns an error that is ErrReturned and net.ErrClosed.
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
		h.Close() // fails if fn has closed or detached the connection; then it has left the pool already
	}
	return nil
}

// loan returns the current loan of a lease that is not in Do.
func (l *Lease) loan() (Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.unusableLocked(); err != nil {
		return Conn{}, err
	}
	return Conn{l.c, l.gen}, nil
}

// unusableLocked returns why the lease cannot be used now, nil if it can. The caller
// holds mu.
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
