package connpool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
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

// mannersOf says how far the pool can rely on the connection nc. below is nc, or the
// socket below it if nc is crypto/tls; ownTLS says that the pool made that crypto/tls.
// plain: Close does not block. foreign: the code is unknown and may do anything.
// Neither: the deadlines work at least.
func mannersOf(nc, below net.Conn, ownTLS bool) (plain, foreign bool) {
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

// lateError is the error for foreign code that has not returned in time. The pool goes
// on without it.
type lateError struct{ what string }

func (e *lateError) Error() string { return e.what + " did not return" }
func (e *lateError) Timeout() bool { return true }
func (*lateError) Temporary() bool { return false }

// isLate reports whether err is a lateError, or wraps one.
func isLate(err error) bool {
	var late *lateError
	return errors.As(err, &late)
}

// tame makes the error of foreign code safe to use, and removes the marks of Keep from
// it. Later the pool calls methods of the error with its books locked and on goroutines
// of its own, where a panic of a method would end the process. So tame calls these
// methods first, and replaces an error whose methods panic.
//
// If a method does not return, neither does tame; each caller has a bound for that.
func tame(err error) (tamed error) {
	if err == nil {
		return nil
	}
	defer func() {
		if v := recover(); v != nil {
			tamed = &brokenContract{fmt.Sprintf("an error of type %T, a method of which panicked: %s", err, panicText(v))}
		}
	}()
	KindOf(err)
	_ = err.Error()
	return spent(err)
}

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
	err = tame(returned(err))
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

// leavable is the reader and writer through which a loan uses a foreign connection, so
// that it can leave a blocked call behind. The bytes go through a buffer of the
// operation's own, because a call that was left behind must not touch the borrower's
// buffer.
type leavable struct {
	c    *conn
	r    io.Reader
	w    io.Writer
	over <-chan struct{}
}

// asideBuffer bounds the buffer of a Read, which may return fewer bytes than it was
// asked for. A Write has to write everything, so it copies everything.
const asideBuffer = 64 << 10

// Read reads at most asideBuffer bytes, into a buffer of its own.
func (l leavable) Read(b []byte) (int, error) {
	if l.c.isOverdue() {
		return 0, os.ErrDeadlineExceeded
	}
	own := make([]byte, min(len(b), asideBuffer))
	n, err := aside("Read of the connection", l.over, nil, func() (int64, error) {
		n, err := l.r.Read(own)
		return int64(n), err
	})
	return copy(b, own[:max(0, min(n, int64(len(own))))]), err
}

// Write writes a copy of b.
func (l leavable) Write(b []byte) (int, error) {
	if l.c.isOverdue() {
		return 0, os.ErrDeadlineExceeded
	}
	own := append([]byte(nil), b...)
	n, err := aside("Write of the connection", l.over, nil, func() (int64, error) {
		n, err := l.w.Write(own)
		return int64(n), err
	})
	return int(n), err
}

// isOverdue reports whether the ctx of the loan is done. On a socket of package net the
// deadline in the past has the same effect; a foreign connection may have ignored that
// deadline.
func (c *conn) isOverdue() bool { return c.word.Load()&(flagCut|flagDetached) == flagCut }

// over returns the channel that is closed when the operations of the loan are left
// behind. nil: operations are never left behind, because the connection is not foreign
// or the loan's ctx can never be done.
func (c *conn) over() <-chan struct{} {
	l := c.loan.Load()
	if l == nil || !c.sock.foreign {
		return nil
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	return l.over
}

// source returns the reader of a loan: pushback first, if there is any, then the
// connection.
func (c *conn) source() io.Reader {
	e := c.cold.Load()
	if e == nil || e.pushback == nil {
		return c.nc
	}
	return readerFunc(func(p []byte) (int, error) { return e.pushback.read(c.nc, p) })
}

// reader returns what an operation of a loan reads from: source, through a leavable if
// the loan may leave its operations behind. writer does the same for writes.
func (c *conn) reader() io.Reader {
	if over := c.over(); over != nil {
		return leavable{c: c, r: c.source(), over: over}
	}
	return c.source()
}

func (c *conn) writer() io.Writer {
	if over := c.over(); over != nil {
		return leavable{c: c, w: c.nc, over: over}
	}
	return c.nc
}

// copyIn is ReadFrom of a loan, copyOut is WriteTo. If neither end may be left behind,
// they copy directly. If the other end is a file, a socket or another loan, the whole
// copy runs through aside, so that the kernel sees both ends. Else each Read or Write
// runs through aside.
func (c *conn) copyIn(r io.Reader) (int64, error) {
	over, other := c.over(), overOf(r)
	switch {
	case over == nil && other == nil:
		return readFrom(c.nc, r)
	case !kernels(r):
		return readFrom(c.writer(), r)
	case c.isOverdue(), overdueAt(r):
		return 0, os.ErrDeadlineExceeded
	}
	return aside("ReadFrom of the connection", over, other, func() (int64, error) { return readFrom(c.nc, r) })
}

func (c *conn) copyOut(w io.Writer) (int64, error) {
	over, other := c.over(), overOf(w)
	switch {
	case over == nil && other == nil:
		return writeTo(c.source(), w)
	case !kernels(w):
		return writeTo(c.reader(), w)
	case c.isOverdue(), overdueAt(w):
		return 0, os.ErrDeadlineExceeded
	}
	return aside("WriteTo of the connection", over, other, func() (int64, error) { return writeTo(c.source(), w) })
}

// overdueAt reports whether x is a loan whose ctx is done. A copy that begins after
// that must not start: the interrupt of that loan has already happened.
func overdueAt(x any) bool {
	h, ok := onLoan(x)
	return ok && h.c.isOverdue()
}

// overOf returns over of the loan behind x, nil if x is no loan.
func overOf(x any) <-chan struct{} {
	h, ok := onLoan(x)
	if !ok || h.c == nil {
		return nil
	}
	return h.c.over()
}

// kernels reports whether the kernel may copy from or to x: whether x is a connection
// on loan, a socket or a file.
func kernels(x any) bool {
	switch x := x.(type) {
	case Conn, *Lease, *net.TCPConn, *net.UnixConn, *os.File:
		return true
	case *io.LimitedReader:
		return kernels(x.R)
	}
	return false
}

// query calls a method of a foreign connection that transfers no bytes, such as
// LocalAddr.
//
// If the ctx of the loan is done before the call begins, the interrupt has already
// happened, so query sets a bound of its own.
func (c *conn) query(what string, ask func() error) error {
	over := c.over()
	if over == nil {
		return ask()
	}
	overdue := c.isOverdue()
	if overdue {
		late := make(chan struct{})
		defer time.AfterFunc(foreignPatience, func() { close(late) }).Stop()
		over = late
	}
	_, err := aside(what, over, nil, func() (int64, error) { return 0, ask() })
	if overdue {
		c.site.env.report.outlived(err, c.site.addr)
	}
	return err
}

// startDeadline sets the deadline with which a loan begins. A connection that refuses
// the deadline is lent all the same, and the pool closes it when the ctx is done.
func (c *conn) startDeadline(l *loanState, t time.Time) {
	if !c.sock.foreign {
		c.deadlineSet = true
		c.nc.SetDeadline(t)
		return
	}
	c.tellDeadline(l, true, func() error { return c.nc.SetDeadline(t) })
}

// clearHalves clears the read and the write deadline after a SetDeadline that failed,
// which may have set one of the two. An error says that one could not be cleared.
func (c *conn) clearHalves() error {
	return errors.Join(c.nc.SetReadDeadline(time.Time{}), c.nc.SetWriteDeadline(time.Time{}))
}

// errMute is the error of a SetDeadline that was not called, see loanState.mute.
var errMute = errors.New("SetDeadline of the connection has not returned, or panicked, before")

// tellDeadline calls set, which sets a deadline of a foreign connection. Calls run one
// at a time. After the interrupt only the deadline in the past is set, so with
// unlessCut the call is left out. If SetDeadline has panicked or has not returned, it
// is not called again, and the pool closes the connection after the loan.
//
// dmu is not held while set runs: other users of dmu would wait as long as set runs.
func (c *conn) tellDeadline(l *loanState, unlessCut bool, set func() error) error {
	c.dmu.Lock()
	for l.setting != nil {
		setting := l.setting
		c.dmu.Unlock()
		<-setting
		c.dmu.Lock()
	}
	switch {
	case unlessCut && c.word.Load()&flagCut != 0:
		c.dmu.Unlock()
		return nil
	case l.mute:
		c.dmu.Unlock()
		return errMute
	}
	mine, before := make(chan struct{}), c.deadlineSet
	l.setting = mine
	c.dmu.Unlock()
	err := briefly("SetDeadline of the connection", foreignPatience, func() error {
		err := set()
		if err != nil && !before {
			c.clearHalves()
		}
		return err
	})
	c.dmu.Lock()
	l.setting = nil
	close(mine)
	switch err.(type) {
	case nil:
		c.deadlineSet = true
	case *lateError, *PanicError, *hookPanic:
		l.mute = true
		if l.firstErr == nil {
			l.firstErr = err
		}
		c.word.Or(flagBroken)
	}
	c.dmu.Unlock()
	c.site.env.report.outlived(err, c.site.addr)
	return err
}

// setForeignDeadline is setDeadline for a foreign connection.
func (c *conn) setForeignDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if c.word.Load()&flagDetached != 0 {
		return set(c.nc, t)
	}
	l := c.loanState()
	c.dmu.Lock()
	limited := c.limited(t)
	c.dmu.Unlock()
	return c.tellDeadline(l, true, func() error { return set(c.nc, limited) })
}

// clearDeadline clears the deadline after a loan that has set one. If that fails, the
// connection is marked broken. Only the owner calls it.
func (c *conn) clearDeadline() error {
	var err error
	if !c.sock.foreign {
		err = c.nc.SetDeadline(time.Time{})
	} else {
		err = c.tellDeadline(c.loanState(), false, func() error {
			err := c.nc.SetDeadline(time.Time{})
			if err != nil && c.clearHalves() == nil {
				return nil
			}
			return err
		})
	}
	c.deadlineSet = false
	if err == nil {
		return nil
	}
	l := c.loanState()
	c.dmu.Lock()
	if l.firstErr == nil {
		l.firstErr = err
	}
	c.dmu.Unlock()
	c.word.Or(flagBroken)
	return err
}

// interruptForeign is interrupt for a foreign connection, whose deadlines may not work.
// It has three steps, each foreignPatience after the one before, as long as operations
// are blocked: it sets a deadline in the past; it closes the connection (at once if the
// deadline is refused); it leaves the operations behind. No operation begins any more,
// see isOverdue. The steps run from timers, so that nobody waits for them.
func (c *conn) interruptForeign(l *loanState) {
	env := c.site.env
	err := c.tellDeadline(l, false, func() error { return c.nc.SetDeadline(aLongTimeAgo) })
	leave := func() {
		if !c.blocked() {
			return
		}
		if err != nil {
			env.report.noteAbandoned("an operation of a connection that was closed", c.site.addr)
		}
		c.dmu.Lock()
		defer c.dmu.Unlock()
		if l.over != nil && !l.left {
			l.left = true
			close(l.over)
		}
	}
	refuse := func() {
		c.revoke()
		time.AfterFunc(foreignPatience, leave)
	}
	switch {
	case !c.blocked():
	case err != nil && (!errors.Is(err, net.ErrClosed) || c.word.Load()&(flagGone|flagShut) == 0):
		refuse()
	default:
		err = nil
		time.AfterFunc(foreignPatience, func() {
			if c.blocked() {
				env.report.noteAbandoned("an operation that takes no notice of its deadline", c.site.addr)
				refuse()
			}
		})
	}
}

// blocked reports whether operations of the loan, or of a loan that has just ended, are
// still running.
func (c *conn) blocked() bool { return c.word.Load()&inFlight != 0 }

// revoke closes the connection during a loan whose ctx is done: the caller becomes the
// owner in the place of the borrower, as with Conn.Close. If the loan has ended, revoke
// does nothing: flagCut makes the owner close the connection.
func (c *conn) revoke() {
	for {
		w := c.word.Load()
		switch {
		case w&flagLent == 0, w&(flagGone|flagDetached) != 0:
			return
		case w&flagHooked != 0: // the hook's caller remains the owner
			c.strike()
			return
		}
		if c.word.CompareAndSwap(w, w|flagGone) {
			c.discard(ClosedCanceled, c.interruption())
			return
		}
	}
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
