package connpool

import (
	"context"
	"sync/atomic"
	"time"
)

// CloseReason says why a connection left the pool. The set is closed: every close has
// exactly one of these, in [Stats] and in [Trace.Closed].
type CloseReason uint8

const (
	// The zero value; no close has it.
	ClosedUnknown     CloseReason = iota
	ClosedEvicted                 // evicted by the pool: least recently used, to make room
	ClosedIdleTimeout             // by age: idle longer than IdleTimeout
	ClosedLifetime                // by age: older than MaxLifetime
	ClosedMaxUses                 // lent MaxUses times
	ClosedSurplus                 // more idle connections than MaxIdle or MaxIdlePerAddr keeps, or more open ones than a limit allows
	ClosedStale                   // the peer closed it, or the socket failed, while it was idle
	ClosedDirty                   // unrequested bytes were waiting, or the last borrower left bytes unread
	ClosedFnError                 // fn returned an error without Keep
	ClosedPanic                   // fn panicked
	ClosedGoexit                  // fn ended its goroutine (runtime.Goexit)
	ClosedCanceled                // the borrower's ctx was done before the loan ended
	ClosedInFlight                // an operation was still running when fn returned
	ClosedBroken                  // an operation of the loan failed, but fn returned nil
	ClosedTimeout                 // an operation of the loan timed out, but fn returned nil
	ClosedHalfClosed              // CloseWrite was called
	ClosedByBorrower              // Conn.Close was called
	ClosedSetupFailed             // Config.Setup failed
	ClosedResetFailed             // Config.Reset failed, or took too long
	ClosedCheckFailed             // Config.Check failed, or took too long
	ClosedPushFailed              // Config.Push failed, took too long, or read nothing
	ClosedRetired                 // opened before Pool.Retire or RetireFunc of its address, or its client certificate was replaced
	ClosedOnRequest               // Pool.CloseIdle was called
	ClosedWithPool                // Pool.Close or Pool.Shutdown was called
	ClosedLowHandles              // closed by the pool: the process is running out of file handles
	ClosedMarkedDead              // Pool.MarkDead was called: the caller holds the same socket
	ClosedLeaked                  // a lease or session became unreachable without being returned
	ClosedQuarantined             // not closed: another owner has its descriptor now, so the pool never touches it again
	ClosedExpired                 // by age: the time of its state's Expires, or of one of its certificates, has come
	ClosedMoved                   // the name of its address does not lead to its peer any more (Config.FollowDNS)
	numCloseReasons
)

var closeReasonNames = [numCloseReasons]string{"unknown", "evicted", "idle-timeout", "lifetime", "max-uses",
	"surplus", "stale", "dirty", "fn-error", "panic", "goexit", "canceled", "in-flight", "broken", "timeout",
	"half-closed", "by-borrower", "setup-failed", "reset-failed", "check-failed", "push-failed", "retired", "on-request", "with-pool", "low-handles", "marked-dead", "leaked", "quarantined", "expired", "moved"}

func (r CloseReason) String() string { return nameOf(closeReasonNames[:], r) }

// MarshalText returns the same text as String, so that a map keyed by reason is a JSON
// object.
func (r CloseReason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// clean reports whether a connection that is closed for this reason is in step with its
// peer, so that TLS may send close_notify.
func (r CloseReason) clean() bool {
	switch r {
	case ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus,
		ClosedByBorrower, ClosedRetired, ClosedOnRequest, ClosedWithPool, ClosedExpired, ClosedMoved:
		return true
	}
	return false
}

// inStep reports whether a connection that is closed for this reason was idle, or given back in
// good order, so that its state may say goodbye to the peer.
func (r CloseReason) inStep() bool {
	return r.clean() && r != ClosedByBorrower || r == ClosedLowHandles
}

// innocent reports whether a close for this reason was caused by the pool or its user,
// and says nothing about the peer. The list names all such reasons, so a reason that is
// missing from it counts against the peer.
func (r CloseReason) innocent() bool {
	switch r {
	case ClosedUnknown, ClosedEvicted, ClosedOnRequest, ClosedLowHandles, ClosedRetired, ClosedWithPool,
		ClosedSurplus, ClosedIdleTimeout, ClosedMaxUses, ClosedMarkedDead, ClosedQuarantined, ClosedCanceled,
		ClosedPanic, ClosedGoexit, ClosedLeaked, ClosedExpired, ClosedMoved,
		ClosedSetupFailed: // recorded as the dial's failure
		return true
	}
	return false
}

// Trace observes a pool ([Config.Trace]) or one use of it ([WithTrace]). Any field may be
// nil. The functions are called with no lock held, concurrently for concurrent uses; they
// may use the pool. They should be quick.
//
// GetConn, GotConn and PutConn are called on the borrower's goroutine, and With waits for
// them; a panic or runtime.Goexit in them is the borrower's. The others are called in the
// middle of the pool's own work, on goroutines of their own. The pool waits a quarter of
// a second for them, and not at all while an earlier one has not returned. A panic or
// runtime.Goexit in them is logged and goes no further.
//
// What is said here of With and its fn holds for a [Lease] too, from [Pool.Lease] to its
// return. Within a [Pool.Session] each With is reported separately, but a With nested in
// another is part of the outer one and is not reported; a connection that the session
// keeps between two uses counts as kept.
//
// If both a pool's and a use's Trace are set, both are called, the pool's first. A use's
// Trace sees the close that ends the use; only the pool's Trace sees closes of idle
// connections. A dial is reported to the Trace of the borrower it was started for, even
// if the dial outlives that borrower.
type Trace struct {
	GetConn  func(Addr)     // With begins
	Wait     func(WaitInfo) // no connection was idle: the borrower queues
	GotConn  func(GotInfo)  // fn is about to run
	DialDone func(DialInfo) // a connection was opened, or could not be
	PutConn  func(PutInfo)  // fn is over and the connection was kept
	Detached func(PutInfo)  // the borrower took the connection out of the pool
	HeldLong func(HeldInfo) // a loan has lasted for Config.HoldWarn; called once for each loan
	Leaked   func(HeldInfo) // a lease or session became unreachable, and its connection is closed
	Closed   func(CloseInfo)
}

// WaitInfo is what [Trace.Wait] gets.
type WaitInfo struct {
	Addr    Addr
	Waiting int // borrowers in the queue of the address, this one included
}

// GotInfo is what [Trace.GotConn] gets.
type GotInfo struct {
	Addr    Addr
	ID      uint64        // of the connection in its pool, from 1
	Reused  bool          // it was lent before
	Uses    int           // loans, this one included
	IdleFor time.Duration // how long it had been unused, also before its first loan; 0 if it came from another borrower or a dial
	Waited  time.Duration // since With was called
}

// DialInfo is what [Trace.DialDone] gets.
type DialInfo struct {
	Addr Addr
	ID   uint64 // 0 if the dial failed
	Took time.Duration
	Err  error
}

// PutInfo is what [Trace.PutConn] and [Trace.Detached] get.
type PutInfo struct {
	Addr Addr
	ID   uint64        // of the connection in its pool, from 1
	Held time.Duration // since the loan began
}

// CloseInfo is what [Trace.Closed] gets.
type CloseInfo struct {
	Addr   Addr
	ID     uint64 // of the connection in its pool, from 1; 0 if it was closed before it was ready, as after a failed Setup
	Reason CloseReason
	Uses   int           // loans
	Age    time.Duration // since it was opened
	Err    error         // the error that made the pool close it, if there was one
}

// HeldInfo is what [Trace.HeldLong] and [Trace.Leaked] get.
type HeldInfo struct {
	Addr  Addr
	ID    uint64        // of the connection in its pool
	Held  time.Duration // so far
	Place string        // where it was borrowed: a function, its file and line
	Stack string        // the stack of the borrow, as in the text of a panic: its innermost 64 calls, or 4 for a lease in a pool without HoldWarn, Profile and Debug
}

// traceKey is the key of a Trace in a ctx.
type traceKey struct{}

// noneRemovableKey is the key of a NoneRemovable function in a ctx.
type noneRemovableKey struct{}

// WithNoneRemovable returns a ctx whose dials call decide instead of
// Config.NoneRemovable. It also replaces a decide already in ctx: of several hooks that
// decide, the one closest to the use counts, while hooks that observe all run, see
// [WithTrace]. With a nil decide nothing is called. A dial uses the ctx of the borrower
// for whom it was started.
func WithNoneRemovable(ctx context.Context, decide func(*Error) bool) context.Context {
	return context.WithValue(ctx, noneRemovableKey{}, decide)
}

// noneRemovable returns the function that a dial under ctx calls when no connection is
// removable; nil: none.
func (cfg *Config) noneRemovable(ctx context.Context) func(*Error) bool {
	if decide, ok := ctx.Value(noneRemovableKey{}).(func(*Error) bool); ok {
		return decide
	}
	return cfg.NoneRemovable
}

// WithTrace returns a ctx whose uses of a pool are observed by t, in addition
// to the pool's own Trace and to one already in ctx. A nil t returns ctx. Set the
// fields of t before: the pool may go on calling the functions that it found first.
func WithTrace(ctx context.Context, t *Trace) context.Context {
	if t == nil {
		return ctx
	}
	tracesInCtx.Store(true)
	outer, _ := ctx.Value(traceKey{}).(*Trace)
	return context.WithValue(ctx, traceKey{}, chain(outer, t))
}

// chain returns a Trace that calls first, then second; either may be nil.
func chain(first, second *Trace) *Trace {
	if first == nil {
		return second
	}
	if second == nil {
		return first
	}
	return &Trace{
		GetConn:  both(first.GetConn, second.GetConn),
		Wait:     both(first.Wait, second.Wait),
		GotConn:  both(first.GotConn, second.GotConn),
		DialDone: both(first.DialDone, second.DialDone),
		PutConn:  both(first.PutConn, second.PutConn),
		Detached: both(first.Detached, second.Detached),
		HeldLong: both(first.HeldLong, second.HeldLong),
		Leaked:   both(first.Leaked, second.Leaked),
		Closed:   both(first.Closed, second.Closed),
	}
}

// both returns a function that calls f, then g; either may be nil.
func both[T any](f, g func(T)) func(T) {
	if f == nil {
		return g
	}
	if g == nil {
		return f
	}
	return func(v T) { f(v); g(v) }
}

// observers finds what observes a use: the pool's Trace and the one in the use's ctx.
type observers struct {
	last atomic.Pointer[pairOfTraces] // a chain allocates, and most uses in a row have the same two
}

// pairOfTraces is a Trace of a ctx, and its chain behind the pool's.
type pairOfTraces struct{ inCtx, both *Trace }

// tracesInCtx is set by the first WithTrace of the process. Until then no ctx has a Trace, and
// a search for one, which takes longer the more values a ctx has, is left out.
var tracesInCtx atomic.Bool

// of returns what observes a use under ctx of a pool whose Trace is pools; nil if nothing does.
func (o *observers) of(ctx context.Context, pools *Trace) *Trace {
	if !tracesInCtx.Load() {
		return pools
	}
	inCtx, _ := ctx.Value(traceKey{}).(*Trace)
	if inCtx == nil || pools == nil {
		return chain(pools, inCtx)
	}
	pair := o.last.Load()
	if pair == nil || pair.inCtx != inCtx {
		pair = &pairOfTraces{inCtx, chain(pools, inCtx)}
		o.last.Store(pair)
	}
	return pair.both
}
