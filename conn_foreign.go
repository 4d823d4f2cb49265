package connpool

import (
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// A loan over a foreign connection (foreign.go): its deadlines may not work, and its calls
// may not return, so that a loan must be able to leave them behind.

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
	if l == nil || !c.sock.foreign || c.isResident() {
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
	if c.isResident() {
		return c.nc
	}
	if over := c.over(); over != nil {
		return leavable{c: c, r: c.source(), over: over}
	}
	return c.source()
}

func (c *conn) writer() io.Writer {
	if c.isResident() {
		return c.nc
	}
	if over := c.over(); over != nil {
		return leavable{c: c, w: c.nc, over: over}
	}
	return c.nc
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

// clearHalves clears the read and the write deadline after a SetDeadline that failed,
// which may have set one of the two. An error says that one could not be cleared.
func (c *conn) clearHalves() error {
	return errors.Join(c.nc.SetReadDeadline(time.Time{}), c.nc.SetWriteDeadline(time.Time{}))
}

// errMute is the error of a SetDeadline that was not called, see loanState.mute.
var errMute = errors.New("SetDeadline of the connection has not returned, or panicked, before")

// errOfClient is the error of a SetDeadline that was not called, because Setup has returned meanwhile
// and the deadlines are those of a client.
var errOfClient = errors.New("the deadlines are those of the client")

// tellDeadline calls set, which sets a deadline of a foreign connection. Calls run one
// at a time. After the interrupt only the deadline in the past is set, and when Setup has returned
// a client only that client sets deadlines, so with unlessCut the call is left out. If SetDeadline has panicked or has not returned, it
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
	case unlessCut && c.isResident():
		c.dmu.Unlock()
		return errOfClient
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
	err := c.tellDeadline(l, true, func() error { return set(c.nc, limited) })
	if err == errOfClient {
		err = set(c.nc, t)
	}
	return err
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
func (c *conn) blocked() bool { return operating(c.word.Load()) }

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
			c.closeUnderHook()
			return
		}
		if c.word.CompareAndSwap(w, w|flagGone) {
			c.discard(ClosedCanceled, c.interruption())
			return
		}
	}
}
