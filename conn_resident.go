package connpool

import (
	"errors"
	"io"
	"net"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// A connection whose client does the I/O (resident.go): what its operations may do, what their
// failure means, and how the pool finds out whether it may be lent.

// settle makes r the client of c. The caller owns c.
func (c *conn) settle(r *resident) {
	c.ensureCold().resident = r
	c.word.Or(flagResident)
}

// isCarried reports whether the client of c dialled for itself.
func (c *conn) isCarried() bool {
	_, yes := c.nc.(*carrier)
	return yes
}

// clientClosedSocket reports whether the client of c dialled for itself, showed its socket, and has
// closed that socket. It makes no system call.
func (c *conn) clientClosedSocket() bool {
	return c.isCarried() && c.sock.raw != nil && c.sock.raw.Control(func(uintptr) {}) != nil
}

// endIsSeen reports whether a peek at the socket of c, which has a client, tells something: that
// the peer has closed it, where no watcher has heard so. The reads of a resident client meet the
// end themselves; a carried client need not read while it is idle. Bytes that wait are the
// client's, and say nothing.
func (c *conn) endIsSeen() bool { return c.isCarried() && !c.site.env.cfg.NoProbe }

// enterIO is enter for an operation that transfers bytes or sets a deadline.
func (c *conn) enterIO(gen uint64) error {
	if c != nil && c.isResident() && (gen != 0 || c.isCarried()) {
		if err := c.enter(gen); err != nil {
			return err
		}
		c.leave(0, nil)
		return errResident
	}
	return c.enter(gen)
}

// noteResident records that an operation of the client failed, and returns the error to report.
// A read that timed out is between the client and its protocol.
func (c *conn) noteResident(err error) error {
	word := c.word.Load()
	if word&flagDetached != 0 {
		return err
	}
	if ne, ok := err.(net.Error); ok && ne.Timeout() && word&flagBroken == 0 && !errors.Is(err, sock.ErrTimedOut) {
		return err
	}
	if word&flagCut != 0 { // the end of a ctx has closed the connection
		ioe := ioErrorOf(word, err)
		ioe.cause = c.interruption()
		err = ioe
	}
	c.loseResident(err)
	return err
}

// endBeside is the end of a loan whose connection has a client, beside the operations of the client.
// word is the state word of the loan.
func (c *conn) endBeside(word uint64) uint64 {
	if c.ctx == nil {
		return word
	}
	c.awaitDeadlines(word)
	set, limit := c.deadlineSet, time.Time{} // set in Setup only
	if l := c.loan.Load(); l != nil {
		limit = l.limit
	}
	c.dmu.Unlock()
	if !c.leaveCtx(word) {
		word |= flagCut
	}
	if set && word&flagGone == 0 {
		if c.clearDeadline() != nil {
			word |= flagBroken
		}
		if !limit.IsZero() && !c.site.env.clock.Read().Before(limit) {
			word |= flagCut // the deadline of Setup may have ended a read of the client
		}
	}
	return word | c.word.Load()&flagBroken
}

// awaitDeadlines waits until the watch on the ctx of the loan, which left the state word word
// behind, is set, with the deadline of that ctx, and until no SetDeadline is under way. It returns
// with dmu held.
func (c *conn) awaitDeadlines(word uint64) {
	c.dmu.Lock()
	l := c.loan.Load()
	if l == nil {
		return
	}
	wait := func(end <-chan struct{}) {
		c.dmu.Unlock()
		<-end
		c.dmu.Lock()
	}
	if word&flagUnwatched == 0 && l.watching != nil {
		wait(l.watching)
	}
	for l.setting != nil {
		wait(l.setting)
	}
}

// loseResident records why the I/O of the client ended.
func (c *conn) loseResident(err error) {
	c.resident().end.CompareAndSwap(nil, &err)
	if c.word.Or(flagHungUp|flagBroken)&flagHungUp == 0 {
		c.noteClientEnded()
	}
}

// probeResident finds out whether c, which has the client r, may be lent. The caller owns c.
func (c *conn) probeResident(r *resident) (CloseReason, error) {
	env := c.site.env
	if reason, err := c.condemned(); reason != ClosedUnknown {
		return reason, err
	}
	if c.word.Load()&flagHungUp != 0 {
		return ClosedStale, io.EOF
	}
	if c.sock.raw != nil {
		l := newFDVisit(&c.sock, c.endIsSeen())
		err := c.sock.raw.Control(l.visit)
		stolen, end := l.stolen, l.seen.Err
		l.done()
		switch {
		case end != nil:
			return ClosedStale, end
		case stolen:
			return ClosedQuarantined, errStolen
		case err != nil: // a carried client has closed its socket
			return ClosedStale, err
		}
	}
	if r.alive == nil {
		return ClosedUnknown, nil
	}
	err := briefly("alive of the client", foreignPatience, r.alive)
	env.report.outlived(err, c.site.addr)
	if err != nil {
		return ClosedStale, err
	}
	return ClosedUnknown, nil
}

var errClientClosed = errors.New("the client closed its connection")
