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
	if l := c.loan.Load(); l != nil { // left over from the loan that this one, a hook's, is part of
		l.limit, l.limited, l.firstErr, l.foreignErr, l.over, l.watching, l.unwatch = time.Time{}, false, nil, false, nil, nil, nil
	}
	var none context.Context
	c.setCtx(none)
	if ctx != context.Background() {
		flags |= c.beginUnder(ctx)
	}
	var gen uint64
	for {
		w := c.word.Load()
		if gen = (w>>genShift + 1) & lastGen; gen == 0 {
			gen = 1 // 0 is the generation of the guard
		}
		if c.word.CompareAndSwap(w, gen<<genShift|carriedOver(w)|flagLent|flags) {
			if flags&flagListed > w&flagListed {
				c.site.env.young.Add(c)
			}
			break
		}
	}
	if c.site.env.cfg.Debug {
		c.recordBorrower(gen)
	}
	return Conn{c, gen}
}

// end ends the loan and returns the state word as it was before. Unless that has
// flagGone, the caller is the owner again. A second call does nothing.
func (c *conn) end() uint64 {
	word := c.word.And(^uint64(flagLent))
	if word&flagGone == 0 || word&flagHooked != 0 {
		if word&flagResident != 0 {
			return c.endBeside(word)
		}
		if c.ctx != nil {
			if !c.leaveCtx(word) {
				word |= flagCut
			}
			word |= c.word.Load() & flagBroken // a deadline that could not be set while the watch began
		}
		if word&(inFlight|flagCut|flagGone) == 0 && c.deadlineSet { // with one of these flags another goroutine may be setting a deadline
			if c.clearDeadline() != nil {
				word |= flagBroken // a deadline that cannot be cleared would end an operation of the next borrower
			}
		}
	}
	return word
}

// abort ends a loan whose connection the caller will discard. It calls no foreign code, but
// waits for a watch on the ctx that is being set. It reports whether the caller is the owner.
func (c *conn) abort() bool {
	word := c.word.And(^uint64(flagLent))
	if word&flagGone != 0 {
		return false
	}
	if c.ctx != nil {
		c.leaveCtx(word)
	}
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
		case w&inFlight == inFlight:
			return errors.New("connpool: too many operations at once on one connection")
		case gen == 0 && w&flagDetached != 0, gen == 0 && w&(flagResident|flagStolen) == flagResident:
		case w&flagLent == 0, gen != 0 && w>>genShift != gen, w&flagDetached != 0:
			c.reportUseAfterReturn(gen)
			return ErrReturned
		case w&(flagGone|flagCut) == flagGone|flagCut: // the pool has closed the connection, because a deadline had no effect
			return c.note(os.ErrDeadlineExceeded)
		case w&flagGone != 0:
			return net.ErrClosed
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
	if n > 0 {
		if w := c.word.Load(); w&flagMoved == 0 {
			if err == nil && c.word.CompareAndSwap(w, (w|flagMoved)-oneOp) { // the usual case, with one atomic operation
				return nil
			}
			c.word.Or(flagMoved)
		}
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
	if c.isResident() {
		return c.noteResident(err)
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
	ctx, limit := c.underway()
	if late || word&flagCut != 0 {
		ioe := ioErrorOf(word, err)
		switch {
		case ctx == nil:
		case ctx.Err() != nil:
			ioe.cause = causeOf(ctx)
			if ctx.Err() == context.Canceled { // whatever type the cause has
				ioe.kind = KindCanceled
			}
		case !limit.IsZero() && !c.site.env.clock.Read().Before(limit):
			// The deadline of the socket fired a moment before the ctx was done.
			ioe.cause = context.DeadlineExceeded
			c.word.Or(flagCut)
		}
		err = ioe
	}
	l := c.loanState()
	c.dmu.Lock()
	defer c.dmu.Unlock()
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

// failure returns the first error of the loan, or of the client that does the I/O; nil if there
// was none.
func (c *conn) failure() error {
	if r := c.resident(); r != nil {
		return r.ended()
	}
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if l := c.loan.Load(); l != nil {
		return l.firstErr
	}
	return nil
}

// recordLoan records that c is lent. The stack in the record begins skip frames above
// recordLoan's caller. Only the owner of c calls it.
func (c *conn) recordLoan(skip int) {
	env := c.site.env
	h := loanRecords.Get().(*loanRecord)
	h.addr, h.id, h.trace = c.site.addr, c.id, c.trace()
	h.calls, h.since = env.loanLog.extent()
	h.calls = runtime.Callers(skip+2, h.pcs[:h.calls])
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
	if err == nil || c.isResident() {
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
	if e := c.cold.Load(); e != nil {
		for _, l := range e.recentLoans {
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
	e := c.ensureCold()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if len(e.recentLoans) == 8 {
		e.recentLoans = append(e.recentLoans[:0], e.recentLoans[1:]...)
	}
	e.recentLoans = append(e.recentLoans, pastLoan{gen, debug.Stack()})
}
