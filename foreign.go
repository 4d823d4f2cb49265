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

// What the pool calls and has not written: a dialer's connections, observers, a
// log. Such code may panic, end its goroutine, or never come back; a connection
// may refuse deadlines, or take them and do nothing. None of it may cost more
// than itself.
//
// A call that must not block (SetDeadline, Probe, a Trace function, a log line)
// runs briefly: on a goroutine of its own, for foreignPatience. What blocks by its
// nature, reading and writing, runs aside while a ctx may end it: the loan goes on
// without it if neither a deadline nor a close brings it back.
//
// Package net and crypto/tls over it need none of that, and get none of it.

// mannersOf is how much is known of a connection whose socket, if it is crypto/tls,
// is below: that its close does not block, or that its deadlines work at least; else
// it is foreign.
func mannersOf(nc, below net.Conn, ownTLS bool) (plain, foreign bool) {
	switch below.(type) {
	case *net.TCPConn, *net.UnixConn:
		return nc == below || ownTLS, false
	case *net.UDPConn, *net.IPConn:
		return false, false
	}
	return false, true
}

// foreignPatience is what foreign code gets that must not block. It counts from
// when the code has begun to run, so that a busy machine costs nobody anything.
const foreignPatience = 250 * time.Millisecond

// lateError is foreign code that the pool goes on without.
type lateError struct{ what string }

func (e *lateError) Error() string { return e.what + " did not return" }
func (e *lateError) Timeout() bool { return true }
func (*lateError) Temporary() bool { return false }

func isLate(err error) bool {
	var late *lateError
	return errors.As(err, &late)
}

// tame is err as foreign code has returned it, less the marks of Keep that are in it.
// The pool asks errors for more than their text, later, with its books locked and
// on goroutines of its own, where a method that panics would end the process. So
// each is asked here first, and one that cannot be asked is replaced.
//
// A method that does not return holds up its caller, who has a bound for that.
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

// briefly runs f, which is foreign code that must not block, for patience at most.
// The error is f's, a *hookPanic if f panicked, a *PanicError if it ended its
// goroutine, or a *lateError if f is still running: then what f refers to is f's for good.
func briefly(what string, patience time.Duration, f func() error) error {
	k := newCall(what)
	k.f = f
	return k.await(patience)
}

// call is one call of briefly. It is used again unless it was left behind.
type call struct {
	what   string
	step   string // where f is, if it tells; only f's goroutine has it
	f      func() error
	prober Prober // in the place of f: its method as a value would allocate
	start  func() // k.run, made once

	mu    sync.Mutex // guards what follows
	moved sync.Cond  // it changed
	begun bool
	ended bool
	late  bool // await waits no longer
	timed bool // there was a timer, which may still come
	err   error
}

var calls sync.Pool // of *call

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

func (k *call) run() {
	whole := false
	var err error
	defer func() {
		if !whole {
			v := recover()
			pan := panicOf(cmp.Or(k.step, k.what), v)
			if err = pan; v != nil { // else a runtime.Goexit
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

func (k *call) await(patience time.Duration) error {
	go k.start()
	ended := false
	for range 4 { // most are over before a timer would be made
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

// awaitLong reports whether f ended in time.
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

// outlived books err if it says that foreign code was left behind or went wrong,
// and reports whether it does.
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

// whose is what a log line says of an address, nothing if it is none's.
func whose(addr Addr) []any {
	if addr == (Addr{}) {
		return nil
	}
	return []any{"addr", addr}
}

// outcome is how an operation ended that ran aside.
type outcome struct {
	n        int64
	err      error
	panicked any
	exited   bool // runtime.Goexit
}

// aside runs op, which may block, on a goroutine of its own, and returns when it
// does or when over is closed, or other, if there are two loans. A panic or Goexit of
// op is the caller's.
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

// end ends the operation for its caller as it ended by itself.
func (o outcome) end() (int64, error) {
	switch {
	case o.panicked != nil:
		panic(o.panicked)
	case o.exited:
		runtime.Goexit()
	}
	return o.n, o.err
}

// leavable is a foreign connection as the operations of a loan see it. The bytes
// go through a buffer of the operation's own: one that was left behind must not
// touch the borrower's.
type leavable struct {
	c    *conn
	r    io.Reader
	w    io.Writer
	over <-chan struct{}
}

// asideBuffer bounds the copy that a Read makes; it may read less than it is asked
// for. A Write must write all, and keeps what it writes together.
const asideBuffer = 64 << 10

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

// isOverdue reports whether the ctx of the loan is done. On a socket the past
// deadline says so; a foreign connection may not have listened to it.
func (c *conn) isOverdue() bool { return c.word.Load()&(flagCut|flagDetached) == flagCut }

// over is closed when the operations of the loan are left behind. nil: a loan
// whose ctx can never be done waits for them.
func (c *conn) over() <-chan struct{} {
	l := c.loan.Load()
	if l == nil || !c.sock.foreign {
		return nil
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	return l.over
}

// source is where the bytes of a loan come from.
func (c *conn) source() io.Reader {
	e := c.cold.Load()
	if e == nil || e.pushback == nil {
		return c.nc
	}
	return readerFunc(func(p []byte) (int, error) { return e.pushback.read(c.nc, p) })
}

// reader is what a loan reads from, writer what it writes to.
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

// copyIn and copyOut are ReadFrom and WriteTo of a loan. Where what is at the other
// end is the kernel's, or another loan, the copy as a whole runs aside if either end
// may be left, so that the kernel sees both; else a Write or Read at a time does.
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

// overdueAt reports whether the ctx of the loan behind x, if there is one, is done: a
// copy that begins after that meets no interrupt of that loan any more.
func overdueAt(x any) bool {
	h, ok := onLoan(x)
	return ok && h.c.isOverdue()
}

// overOf is over of the loan behind x, if there is one.
func overOf(x any) <-chan struct{} {
	h, ok := onLoan(x)
	if !ok || h.c == nil {
		return nil
	}
	return h.c.over()
}

// kernels reports whether x is a connection on loan, or a file or socket.
func kernels(x any) bool {
	switch x := x.(type) {
	case Conn, *Lease, *net.TCPConn, *net.UnixConn, *os.File:
		return true
	case *io.LimitedReader:
		return kernels(x.R)
	}
	return false
}

// query runs a question to a foreign connection that has no bytes in it, such as
// its address.
//
// A question that begins when the ctx of the loan is done already meets no interrupt
// any more, so it has a bound of its own.
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
		c.site.pool.report.outlived(err, c.site.addr)
	}
	return err
}

// startDeadline sets the deadline with which a loan begins. A connection that
// refuses it is lent all the same, and closed when the ctx is done.
func (c *conn) startDeadline(l *loanState, t time.Time) {
	if !c.sock.foreign {
		c.deadlineSet = true
		c.nc.SetDeadline(t)
		return
	}
	c.tellDeadline(l, true, func() error { return c.nc.SetDeadline(t) })
}

// clearHalves sees to it that a SetDeadline that failed has set nothing: a half of
// it that worked can be cleared, one that does not work was not set.
func (c *conn) clearHalves() error {
	return errors.Join(c.nc.SetReadDeadline(time.Time{}), c.nc.SetWriteDeadline(time.Time{}))
}

var errMute = errors.New("SetDeadline of the connection has not returned, or panicked, before")

// tellDeadline sets a deadline of a foreign connection by set, one at a time. After
// the interrupt there is only the past one. A connection whose SetDeadline panicked,
// or has not returned, is not asked again, and closed after the loan.
//
// dmu is not held while set runs: who wants it would wait as long.
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
	c.site.pool.report.outlived(err, c.site.addr)
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

// clearDeadline is for the owner, after a loan in which one was set.
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

// interruptForeign is the part of interrupt that deadlines may not bring about.
// First the connection is asked to let go of what is blocked in it; then, at once if
// it refuses, it is closed; then its operations are left behind. None begins any
// more, see isOverdue. Nobody waits for that, so each step is a timer's.
func (c *conn) interruptForeign(l *loanState) {
	p := c.site.pool
	err := c.tellDeadline(l, false, func() error { return c.nc.SetDeadline(aLongTimeAgo) })
	leave := func() {
		if !c.blocked() {
			return
		}
		if err != nil {
			p.report.noteAbandoned("an operation of a connection that was closed", c.site.addr)
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
				p.report.noteAbandoned("an operation that takes no notice of its deadline", c.site.addr)
				refuse()
			}
		})
	}
}

// blocked reports whether operations of the loan, or of one that has just ended,
// are under way.
func (c *conn) blocked() bool { return c.word.Load()&inFlight != 0 }

// revoke closes the connection under a loan whose ctx is done: the caller becomes
// the owner in the place of the borrower, as with Conn.Close. If the loan has
// ended, its owner closes the connection, because it is cut.
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

// trusted is raw, made safe to call if it is somebody else's.
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

// carefulRaw is a RawConn that is not package net's.
type carefulRaw struct{ syscall.RawConn }

func (r *carefulRaw) Control(f func(uintptr)) error {
	var (
		mu   sync.Mutex // guards over, and f against being called when Control has returned
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

// reporter is how the pool tells others what happens: the functions of a Trace, and
// the lines of Config.Logger. Both are foreign code. It also counts the foreign code
// that the pool goes on without.
type reporter struct {
	logger                  *slog.Logger  // nil: none
	stuckTraces, stuckLines atomic.Int32  // calls of Trace and Logger that have not returned, see notify
	abandoned               atomic.Uint64 // Stats.AbandonedCalls
}

// observe runs a Trace function in the middle of the pool's own work, which goes
// on whatever the function does. While one is stuck none is waited for.
func (r *reporter) observe(what string, f func()) {
	notify(what, &r.stuckTraces, func(err error) {
		r.outlived(err, Addr{})
	}, f)
}

// notify runs f, waits for it as long as briefly does, and reports what went wrong.
func notify(what string, stuck *atomic.Int32, report func(error), f func()) {
	patience := foreignPatience
	if stuck.Load() > 0 {
		patience = 0
	}
	var left atomic.Int32 // 1: over, 2: not waited for any longer
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
			stuck.Add(-1) // it has come back meanwhile
		}
		if patience == 0 {
			return // it was not given time
		}
	}
	report(err)
}

// named lets a panic or Goexit of a Trace function that runs in its borrower's own
// time pass, and says in the log whose it was.
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

// log writes a line to Config.Logger, which must not cost a slot if it is broken.
// Lines are dropped while an earlier one is stuck.
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

// noteAbandoned counts and reports foreign code that the pool goes on without.
func (r *reporter) noteAbandoned(what string, addr Addr) {
	r.abandoned.Add(1)
	r.log(slog.LevelError, what+" did not end in time; the pool goes on without it", whose(addr)...)
}
