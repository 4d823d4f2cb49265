package connpool

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// What happens in a loan: it begins and ends, its operations enter and leave, its ctx
// interrupts them, and what they meet is noted in the state word and in the loanState
// (both in conn.go).

// loanState returns the state of the loan of c, and makes one if there is none yet.
func (c *conn) loanState() *loanState {
	for {
		if l := c.loan.Load(); l != nil {
			return l
		}
		l, _ := loanStates.Get().(*loanState)
		if l == nil {
			l = new(loanState)
			l.interrupt = func() { l.c.interrupt(l) }
		}
		l.c = c
		if c.loan.CompareAndSwap(nil, l) {
			return l
		}
	}
}

// observedBy makes t the Trace of the loan. t includes the pool's Trace.
func (c *conn) observedBy(t *Trace) {
	if c.loan.Load() != nil || t != c.site.env.cfg.Trace {
		c.loanState().trace = t
	}
}

// trace returns the Trace of the loan if the loan has one, else the pool's; nil if
// there is neither.
func (c *conn) trace() *Trace {
	if l := c.loan.Load(); l != nil && l.trace != nil {
		return l.trace
	}
	return c.site.env.cfg.Trace
}

// begin starts a loan under ctx and returns its handle. flags are set in the state
// word. Only the owner calls it.
func (c *conn) begin(ctx context.Context, flags uint64) Conn {
	l := c.loan.Load()
	if l != nil { // left over from the loan that this one, a hook's, is part of
		l.ctx, l.limit, l.firstErr, l.foreignErr, l.over = nil, time.Time{}, nil, false, nil
	}
	watch := ctx.Done() != nil
	if watch {
		l = c.loanState()
		l.ctx = ctx
		if c.sock.foreign {
			l.over, l.left = make(chan struct{}), false
		}
		if t, ok := ctx.Deadline(); ok {
			l.limit = t
			c.startDeadline(l, t)
		}
	}
	var gen uint64
	for {
		// Other goroutines may set flagHungUp, flagStolen or flagBroken at any moment:
		// the new loan keeps these.
		w := c.word.Load()
		if gen = (w>>genShift + 1) & lastGen; gen == 0 {
			gen = 1 // 0 is the generation of the guard
		}
		if c.word.CompareAndSwap(w, gen<<genShift|w&(flagHungUp|flagStolen|flagBroken|flagWrote|flagRead)|flagLent|flags) {
			break
		}
	}
	if watch {
		l.unwatch = context.AfterFunc(ctx, l.interrupt)
	}
	if c.site.env.cfg.Debug {
		c.recordBorrower(gen)
	}
	return Conn{c, gen}
}

// interrupt makes blocked operations of the loan return. It runs when the loan's ctx is
// done. If the loan has ended in the meantime, stopping the watch has failed, and the
// owner discards the connection.
func (c *conn) interrupt(l *loanState) {
	defer func() {
		if v := recover(); v != nil { // from a ctx of the caller's making
			c.site.env.report.log(slog.LevelError, "interrupting a loan panicked", "addr", c.site.addr, "panic", v)
		}
	}()
	if !c.cutShort() {
		return
	}
	if c.sock.foreign {
		c.interruptForeign(l)
		return
	}
	c.dmu.Lock()
	c.deadlineSet = true
	err := c.nc.SetDeadline(aLongTimeAgo)
	c.dmu.Unlock()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		c.revoke()
	}
}

// cutShort sets flagCut: the loan's ctx was done. It reports false if the connection
// was detached (also by a use nested in this one, see underCtx): the pool must not
// interrupt a detached connection.
func (c *conn) cutShort() bool {
	for {
		w := c.word.Load()
		if w&flagDetached != 0 {
			return false
		}
		if c.word.CompareAndSwap(w, w|flagCut) {
			return true
		}
	}
}

// end ends the loan and returns the state word as it was before. Unless that has
// flagGone, the caller is the owner again. A second call does nothing.
func (c *conn) end() uint64 {
	word := c.word.And(^uint64(flagLent))
	if word&flagGone == 0 || word&flagHooked != 0 {
		if !c.unwatchCtx() {
			word |= flagCut
		}
		if word&(inFlight|flagCut|flagGone) == 0 && c.deadlineSet { // with one of these flags another goroutine may be setting a deadline
			if c.clearDeadline() != nil {
				word |= flagBroken // a deadline that cannot be cleared would end an operation of the next borrower
			}
		}
	}
	return word
}

// abort ends a loan whose connection the caller will discard, without calling foreign
// code. It reports whether the caller is the owner.
func (c *conn) abort() bool {
	if c.word.And(^uint64(flagLent))&flagGone != 0 {
		return false
	}
	c.unwatchCtx()
	return true
}

// unwatchCtx stops the watch on the loan's ctx. It reports false if the interrupt has
// begun already. Only the owner calls it.
func (c *conn) unwatchCtx() bool {
	l := c.loan.Load()
	if l == nil || l.unwatch == nil {
		return true
	}
	if !l.unwatch() {
		return false
	}
	c.dmu.Lock() // the guard of a detached connection may be setting deadlines already
	l.unwatch, l.ctx, l.limit = nil, nil, time.Time{}
	c.dmu.Unlock()
	return true
}

// enter begins an operation of the loan with generation gen; 0 is the guard. After a
// nil error the caller must call leave, leaveRead or leaveWrite.
func (c *conn) enter(gen uint64) error {
	if c == nil {
		return ErrReturned
	}
	for {
		w := c.word.Load()
		switch {
		case gen == 0 && w&flagDetached != 0:
		case w&flagLent == 0, gen != 0 && w>>genShift != gen, w&flagDetached != 0:
			c.reportUseAfterReturn(gen)
			return ErrReturned
		case w&(flagGone|flagCut) == flagGone|flagCut: // the pool has closed the connection, because a deadline had no effect
			return c.note(os.ErrDeadlineExceeded)
		case w&flagGone != 0:
			return net.ErrClosed
		case w&inFlight == inFlight:
			return errors.New("connpool: too many operations at once on one connection")
		case w&flagStolen != 0:
			return errStolen
		}
		if c.word.CompareAndSwap(w, w+oneOp) {
			return nil
		}
	}
}

// leave ends an operation that moved n bytes and returned err. It returns the error to
// report.
func (c *conn) leave(n int64, err error) error {
	if n > 0 && c.word.Load()&flagMoved == 0 {
		c.word.Or(flagMoved)
	}
	if err != nil {
		err = c.note(err)
	}
	c.word.Add(^uint64(oneOp - 1))
	return err
}

// leaveRead is leave for an operation that read.
func (c *conn) leaveRead(n int64, err error) error {
	if sock := c.sock.belowTLS(); sock != nil {
		sock.record.Delivered(n)
	} else if err != nil && c.sock.tls != nil {
		// The crypto/tls of a dialer's own *tls.Conn may have read more than it
		// returned. flagMoved makes leftovers ask it. note runs first, because the kind
		// of its error depends on flagMoved.
		err = c.note(err)
		c.word.Or(flagMoved)
		c.word.Add(^uint64(oneOp - 1))
		return err
	}
	if n > 0 {
		c.noteTraffic(flagRead)
	}
	return c.leave(n, err)
}

// leaveWrite is leave for an operation that wrote. A write that timed out is as bad as
// a write that failed: a part of the bytes may have been sent, and crypto/tls refuses
// every later write.
func (c *conn) leaveWrite(n int64, err error) error {
	if err != nil {
		c.word.Or(flagBroken)
	}
	if n > 0 {
		c.noteTraffic(flagWrote)
	}
	return c.leave(n, err)
}

// note records that an operation failed, and returns the error to report. If time ran
// out, that error says whether it was the time of the loan's ctx.
func (c *conn) note(err error) error {
	if _, known := err.(*net.OpError); !known && err != io.EOF {
		err = sanitizeError(err) // the error of a foreign connection, or of the other end of a copy
	}
	if errors.Is(err, net.ErrClosed) && c.word.Load()&(flagGone|flagCut) == flagGone {
		return err
	}
	// ETIMEDOUT of the system also has Timeout() true, but no deadline has passed: the
	// peer has answered neither data nor keep-alive probes, and the connection is dead.
	// A time-out of a nested borrow (*Error) is not a deadline of this connection
	// either.
	ne, ok := err.(net.Error)
	if _, borrow := err.(*Error); borrow {
		ok = false
	}
	late := ok && ne.Timeout() && !errors.Is(err, sock.ErrTimedOut)
	_, left := err.(*lateError) // the operation still runs, and may read bytes that belong to others
	if late && !left {
		c.word.Or(flagTimedOut)
	} else {
		c.word.Or(flagBroken)
	}
	word := c.word.Load()
	if word&flagDetached != 0 {
		if late {
			err = ioErrorOf(word, err)
		}
		return err
	}
	l := c.loanState()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if late || word&flagCut != 0 {
		ioe := ioErrorOf(word, err)
		switch {
		case l.ctx == nil:
		case l.ctx.Err() != nil:
			ioe.cause = causeOf(l.ctx)
			if l.ctx.Err() == context.Canceled { // whatever type the cause has
				ioe.kind = KindCanceled
			}
		case !l.limit.IsZero() && !c.site.env.clock.Read().Before(l.limit):
			// The deadline of the socket fired a moment before the ctx was done.
			ioe.cause = context.DeadlineExceeded
			c.word.Or(flagCut)
		}
		err = ioe
	}
	if l.firstErr == nil {
		l.firstErr = err
	}
	return err
}

// ioErrorOf returns err as a time-out. Its kind says whether the loan has moved bytes.
func ioErrorOf(word uint64, err error) *ioError {
	ioe := &ioError{kind: KindTimeout, err: spent(err)}
	if word&flagMoved != 0 {
		ioe.kind = KindTimeoutInTransfer
	}
	return ioe
}

// failure returns the first error of the loan, nil if there was none.
func (c *conn) failure() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil {
		return l.firstErr
	}
	return nil
}

// interruption returns why the loan was interrupted: the cause of its ctx. If the ctx
// of a nested use was done, that ctx is no longer known, and the error is
// context.Canceled.
func (c *conn) interruption() error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil && l.ctx != nil && l.ctx.Err() != nil {
		return causeOf(l.ctx)
	}
	return context.Canceled
}

// setDeadline sets a deadline for fn, at most the deadline of the loan's ctx.
func (c *conn) setDeadline(t time.Time, set func(net.Conn, time.Time) error) error {
	if c.sock.foreign {
		return c.setForeignDeadline(t, set)
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.word.Load()&flagCut != 0 {
		return nil // interrupted: the deadline in the past stays
	}
	c.deadlineSet = true
	return set(c.nc, c.limited(t))
}

// limited returns t, or the deadline of the loan's ctx if that is earlier. The caller
// holds dmu.
func (c *conn) limited(t time.Time) time.Time {
	if l := c.loan.Load(); l != nil && !l.limit.IsZero() && (t.IsZero() || t.After(l.limit)) {
		return l.limit
	}
	return t
}

// recordLoan records that c is lent. The stack in the record begins skip frames above
// recordLoan's caller. Only the owner of c calls it.
func (c *conn) recordLoan(skip int) {
	env := c.site.env
	var pcs [64]uintptr
	n := runtime.Callers(skip+2, pcs[:])
	h := &loanRecord{addr: c.site.addr, id: c.id, since: env.clock.Exactly(), stack: append([]uintptr(nil), pcs[:n]...), trace: c.trace()}
	c.loanState().record = h
	env.loanLog.add(h, skip+2)
}

// dropRecord removes the record of c, if c has one. Only the owner of c calls it, when
// it is about to give c up.
func (c *conn) dropRecord() {
	if l := c.loan.Load(); l != nil && l.record != nil {
		h := l.record
		l.record = nil
		c.site.env.loanLog.remove(h)
	}
}

// noteTraffic records that a loan has moved bytes in one direction: way is flagWrote or
// flagRead.
func (c *conn) noteTraffic(way uint64) {
	if w := c.word.Load(); w&way != 0 || w&(flagHooked|flagDetached) != 0 {
		return // traffic of Setup and the other hooks proves nothing: it is part of preparing a connection
	}
	if (c.word.Or(way)|way)&flagsLived == flagsLived {
		c.noteLived(true)
	}
}

// noteForeignError records that an operation with two ends (ReadFrom, WriteTo) failed.
// The error may be of either end, so it counts against no peer.
func (c *conn) noteForeignError(err error) {
	if err == nil {
		return
	}
	l := c.loanState()
	c.dmu.Lock()
	l.foreignErr = true
	c.dmu.Unlock()
}

// hasForeignError reports whether noteForeignError has recorded an error in this loan.
func (c *conn) hasForeignError() bool {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	l := c.loan.Load()
	return l != nil && l.foreignErr
}

// noteContent is called when fn has returned nil. If an operation of the loan failed,
// as at the end of the stream, fn expected the failure, and it does not count against
// the peer.
func (c *conn) noteContent() {
	if w := c.word.Load(); w&flagBroken != 0 && w&flagsLived != flagsLived {
		c.word.Or(flagHalfClosed)
	}
}

// reportUseAfterReturn reports, in debug mode, the use of a handle whose loan has ended.
func (c *conn) reportUseAfterReturn(gen uint64) {
	env := c.site.env
	if !env.cfg.Debug {
		return
	}
	loan := "not known any more"
	c.dmu.Lock()
	if c.recentLoans != nil {
		for _, l := range *c.recentLoans {
			if l.gen == gen {
				loan = string(l.stack)
			}
		}
	}
	c.dmu.Unlock()
	env.report.log(slog.LevelError, "a Conn was used after it was given back", "addr", c.site.addr,
		"borrowed by", loan, "used by", string(debug.Stack()))
}

// recordBorrower records, in debug mode, who borrowed the connection, for the last eight
// loans.
func (c *conn) recordBorrower(gen uint64) {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.recentLoans == nil {
		c.recentLoans = new([]pastLoan)
	}
	if len(*c.recentLoans) == 8 {
		*c.recentLoans = append((*c.recentLoans)[:0], (*c.recentLoans)[1:]...)
	}
	*c.recentLoans = append(*c.recentLoans, pastLoan{gen, debug.Stack()})
}
