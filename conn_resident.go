package connpool

import (
	"errors"
	"io"
	"net"
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
	if ne, ok := err.(net.Error); word&flagDetached != 0 || ok && ne.Timeout() && word&flagBroken == 0 {
		return err
	}
	c.loseResident(err)
	return err
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
	if c.sock.isStolen() {
		return ClosedQuarantined, errStolen
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
