package connpool

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Foreign code is code that the pool calls and did not write: a dialer's connections,
// observers, a log. Such code may panic, end its goroutine, or never return. A
// connection may refuse deadlines, or accept them and ignore them. The damage must not
// go beyond the call itself: the pool keeps its slots and its goroutines going.
//
// A call that must not block (SetDeadline, Probe, a Trace function, a log line) runs
// through briefly: on a goroutine of its own, for foreignPatience at most. A call that
// blocks by its nature (Read, Write) runs through aside, if the ctx of its loan may
// end. If neither a deadline nor a close makes the call return, the loan goes on
// without it.
//
// A socket of package net, and crypto/tls over one, need none of this, and the pool
// calls them directly.

// classifyNetConn says how far the pool can rely on the connection nc. below is nc, or the
// socket below it if nc is crypto/tls; ownTLS says that the pool made that crypto/tls.
// plain: Close does not block. foreign: the code is unknown and may do anything.
// Neither of the two: the deadlines work, and Close may block.
func classifyNetConn(nc, below net.Conn, ownTLS bool) (plain, foreign bool) {
	switch below.(type) {
	case *net.TCPConn, *net.UnixConn:
		return nc == below || ownTLS, false
	case *net.UDPConn, *net.IPConn:
		return false, false
	}
	return false, true
}

// foreignPatience bounds foreign code that must not block. The time counts from the
// moment when the code has begun to run, so that a busy machine does not look like a
// slow callee.
const foreignPatience = 250 * time.Millisecond

// briefly runs f, foreign code that must not block, for patience at most. It returns
// f's error, a *hookPanic if f panicked, a *PanicError if f ended its goroutine, or a
// *lateError if f is still running. After a *lateError the caller must not use again
// what f refers to.
func briefly(what string, patience time.Duration, f func() error) error {
	k := newCall(what)
	k.f = f
	return k.await(patience)
}

// call is one call of briefly. Calls are used again, except those that needed a timer
// or were given up.
type call struct {
	what   string
	step   string // what f is doing, for the text of a panic; only f's goroutine uses it
	f      func() error
	prober Prober // called instead of f if it is not nil: a method value would allocate
	start  func() // k.run, made once: a method value allocates

	mu    sync.Mutex // guards what follows
	moved sync.Cond  // signals that a field below has changed
	begun bool       // f has begun to run
	ended bool       // f has ended
	late  bool       // await has given up
	timed bool       // a timer was made, and may still fire
	err   error
}

var calls sync.Pool // of *call

// newCall returns a call to be filled in; what names it in errors.
func newCall(what string) *call {
	k, _ := calls.Get().(*call)
	if k == nil {
		k = new(call)
		k.moved.L = &k.mu
		k.start = k.run
	}
	k.what = what
	return k
}

// run runs f, or Probe of prober, on the call's own goroutine.
func (k *call) run() {
	whole := false
	var err error
	defer func() {
		if !whole {
			v := recover()
			pan := panicOf(cmp.Or(k.step, k.what), v)
			if err = pan; v != nil { // v is nil after a runtime.Goexit
				err = &hookPanic{pan}
			}
		}
		k.mu.Lock()
		k.ended, k.err = true, err
		k.mu.Unlock()
		k.moved.Broadcast()
	}()
	k.mu.Lock()
	k.begun = true
	k.mu.Unlock()
	if k.prober != nil {
		err = k.prober.Probe()
	} else {
		err = k.f()
	}
	err = sanitizeError(returned(err))
	whole = true
}

// await starts the call and waits for its end, for patience at most.
func (k *call) await(patience time.Duration) error {
	go k.start()
	ended := false
	for range 4 { // most calls end before a timer would be made
		k.mu.Lock()
		ended = k.ended
		k.mu.Unlock()
		if ended {
			break
		}
		runtime.Gosched()
	}
	if !ended && !k.awaitLong(patience) {
		return &lateError{k.what}
	}
	err := k.err
	if !k.timed {
		k.f, k.prober, k.err, k.step = nil, nil, nil, ""
		k.begun, k.ended = false, false
		calls.Put(k)
	}
	return err
}

// awaitLong waits for the end of f, with a timer. It reports whether f ended in time.
func (k *call) awaitLong(patience time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.timed = true
	var timer *time.Timer
	timer = time.AfterFunc(patience, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if !k.begun && patience > 0 {
			timer.Reset(patience) // the machine is busy
			return
		}
		k.late = true
		k.moved.Broadcast()
	})
	defer timer.Stop()
	for !k.ended && !k.late {
		k.moved.Wait()
	}
	return k.ended
}

// outlived counts and reports err if it says that foreign code has not returned, has
// panicked or has ended its goroutine. It reports whether err is of this kind.
func (r *reporter) outlived(err error, addr Addr) bool {
	switch err := err.(type) {
	case *lateError:
		r.noteAbandoned(err.what, addr)
	case *hookPanic:
		return r.outlived(err.pan, addr)
	case *PanicError:
		r.log(slog.LevelError, err.Error(), append(whose(addr), "stack", string(err.Stack))...)
	default:
		return false
	}
	return true
}

// whose returns the attributes of a log line about addr; none for the zero Addr.
func whose(addr Addr) []any {
	if addr == (Addr{}) {
		return nil
	}
	return []any{"addr", addr}
}

// outcome is the result of an operation that ran through aside.
type outcome struct {
	n        int64
	err      error
	panicked any  // value of a panic, nil if there was none
	exited   bool // runtime.Goexit was called
}

// aside runs op, which may block, on a goroutine of its own. It returns when op does,
// or with a *lateError when over or other is closed: each is of one loan, and a copy
// between two connections has two. A panic or Goexit of op happens to the caller.
func aside(what string, over, other <-chan struct{}, op func() (int64, error)) (int64, error) {
	done := make(chan outcome, 1)
	go func() {
		o := outcome{exited: true}
		defer func() {
			if o.exited {
				o.panicked = recover()
			}
			done <- o
		}()
		o.n, o.err = op()
		o.exited = false
	}()
	var o outcome
	select {
	case o = <-done:
		return o.end()
	case <-over:
	case <-other:
	}
	select {
	case o = <-done:
		return o.end()
	default:
		return 0, &lateError{what}
	}
}

// end lets the caller return, panic or exit as the operation did.
func (o outcome) end() (int64, error) {
	switch {
	case o.panicked != nil:
		panic(o.panicked)
	case o.exited:
		runtime.Goexit()
	}
	return o.n, o.err
}

// trusted returns raw, wrapped in a carefulRaw unless it is of package net or os.
func trusted(raw syscall.RawConn) syscall.RawConn {
	if raw == nil {
		return nil
	}
	switch t := reflect.TypeOf(raw); {
	case t.Kind() == reflect.Pointer && (t.Elem().PkgPath() == "net" || t.Elem().PkgPath() == "os"):
		return raw
	}
	return &carefulRaw{RawConn: raw}
}

// carefulRaw is a RawConn of foreign code. Its Control returns in time, and calls f
// only before it has returned.
type carefulRaw struct{ syscall.RawConn }

func (r *carefulRaw) Control(f func(uintptr)) error {
	var (
		mu   sync.Mutex // guards over; held while f runs, so that f does not run after Control has returned
		over bool
	)
	err := briefly("Control of the connection's RawConn", foreignPatience, func() error {
		return r.RawConn.Control(func(fd uintptr) {
			mu.Lock()
			defer mu.Unlock()
			if !over {
				f(fd)
			}
		})
	})
	mu.Lock()
	over = true
	mu.Unlock()
	return err
}

// reporter tells others what the pool does: it calls the functions of a Trace and
// writes to Config.Logger. Both are foreign code. It also counts the foreign code that
// the pool gave up.
type reporter struct {
	logger                  *slog.Logger  // nil: none
	stuckTraces, stuckLines atomic.Int32  // calls of Trace and Logger that have not returned, see notify
	abandoned               atomic.Uint64 // Stats.AbandonedCalls
}

// observe calls a Trace function in the middle of the pool's own work, which goes on
// whatever the function does. While a Trace function has not returned, observe waits
// for none.
func (r *reporter) observe(what string, f func()) {
	notify(what, &r.stuckTraces, func(err error) {
		r.outlived(err, Addr{})
	}, f)
}

// notify runs f, waits for it like briefly, and reports what went wrong. stuck counts
// the calls that were given up and have not returned: while there are any, notify does
// not wait.
func notify(what string, stuck *atomic.Int32, report func(error), f func()) {
	patience := foreignPatience
	if stuck.Load() > 0 {
		patience = 0
	}
	var left atomic.Int32 // 1: f has ended; 2: notify has given f up
	err := briefly(what, patience, func() error {
		defer func() {
			if !left.CompareAndSwap(0, 1) {
				stuck.Add(-1)
			}
		}()
		f()
		return nil
	})
	if err == nil {
		return
	}
	if isLate(err) {
		stuck.Add(1)
		if !left.CompareAndSwap(0, 2) {
			stuck.Add(-1) // f has returned in the meantime
		}
		if patience == 0 {
			return // f was given no time
		}
	}
	report(err)
}

// named runs f, a Trace function, on its borrower's goroutine. A panic or Goexit goes
// on to the borrower; the log says which function it was.
func (r *reporter) named(what string, f func()) {
	returned := false
	defer func() {
		if !returned {
			r.log(slog.LevelError, what+" panicked or ended its goroutine; the borrower gets it")
		}
	}()
	f()
	returned = true
}

// log writes a line to Config.Logger. A Logger that blocks or panics must not keep a
// slot, so log waits as long as notify does, and drops lines while an earlier one has
// not returned.
func (r *reporter) log(level slog.Level, msg string, args ...any) {
	if r.logger == nil || r.stuckLines.Load() > 0 {
		return
	}
	notify("Config.Logger", &r.stuckLines, func(err error) {
		if isLate(err) {
			r.abandoned.Add(1)
		}
	}, func() { r.logger.Log(context.Background(), level, "connpool: "+msg, args...) })
}

// noteAbandoned counts and reports foreign code that did not end in time.
func (r *reporter) noteAbandoned(what string, addr Addr) {
	r.abandoned.Add(1)
	r.log(slog.LevelError, what+" did not end in time; the pool goes on without it", whose(addr)...)
}
