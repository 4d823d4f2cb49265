package connpool

import (
	"errors"
	"fmt"
)

// The end of Setup. A connection on which something waits to be read when Setup is
// done is not in step: the next thing that is read would be taken for the reply to
// the first request. It is no matter for the first borrower, who cannot know, nor
// for luck: the dial fails, whoever it was for. With a Push, what waits may be a
// message, and Push gets it before the connection is lent to anybody.
//
// A server that speaks first needs a Setup, which reads what it says. Without one
// nobody has claimed to know the protocol, and the greeting is left to whoever
// dialled.

// handState makes the state the connection's. From then on it is closed with it.
// The caller has settled the dial, or holds a.mu.
func (a *attempt) handState() {
	if a.state != nil {
		a.c.state, a.state = a.state, nil
	}
}

// setUp judges what Setup, which said that all was well, has left behind.
func (a *attempt) setUp() error {
	p := a.c.site.pool
	c := a.c
	a.mu.Lock()
	late := a.claimed
	if !late {
		a.handState()
	}
	a.mu.Unlock()
	if late { // and closed by whoever finds that out, see dial
		return nil
	}
	in, err := c.heldSoon()
	if err != nil {
		return err
	}
	if in.unflushed > 0 || in.unread > 0 && p.cfg.Push == nil {
		return in.clean("Config.Setup")
	}
	if p.cfg.Push == nil {
		a.where = "the look at the connection"
		return c.speaksUnasked()
	}
	a.where = "Config.Push"
	reason, err := c.pushAll()
	switch kind := KindOf(err); {
	case reason == ClosedUnknown:
		return nil
	case reason == ClosedStale && (kind == KindEOF || kind == KindBroken):
		c.ended(err) // with a Push as without
		return nil
	case reason == ClosedStale:
		return fmt.Errorf("after Config.Setup: %w", err)
	}
	return err
}

// speaksUnasked says what waits to be read on a connection that was just set up. A
// peer that has hung up is found when the connection is about to be lent, and a
// part of a TLS record is nothing yet, since most are tickets.
func (c *conn) speaksUnasked() error {
	pr := &c.sock
	keep := pr.keep
	pr.keep = true // so that a look tells how much there is
	defer func() { pr.keep = keep }()
	_, err := pr.leftovers(true)
	if c.site.pool.report.outlived(err, c.site.addr) {
		return err
	}
	if text, ok := err.(*plaintext); ok {
		return &leftUnread{&brokenContract{fmt.Sprintf("Config.Setup left %d bytes unread in crypto/tls", len(text.bytes))}}
	}
	// Not c.ask, which would forget that the peer was seen to hang up.
	reason, err := pr.probe(&c.site.pool.cfg, c.nc)
	if c.site.pool.report.outlived(err, c.site.addr) {
		return err // what still looks at it has it
	}
	if reason == ClosedStale {
		c.ended(err)
	}
	if reason != ClosedDirty || errors.Is(err, errPartial) {
		return nil
	}
	n := 0
	if text, ok := err.(*plaintext); ok {
		n = len(text.bytes)
	} else if pr.tls == nil && pr.raw != nil && pr.prober(c.nc) == nil {
		n = pr.drain()
	}
	if n == 0 {
		return &leftUnread{&brokenContract{"Config.Setup left bytes unread in the connection"}}
	}
	return &leftUnread{&brokenContract{fmt.Sprintf("Config.Setup left %d bytes unread in the connection", n)}}
}

// ended leaves it to whoever is about to lend c to find that its peer has ended the
// connection. The look that found the end may have read it: an alert of TLS is read
// once, and the socket may be open for a while after it.
func (c *conn) ended(err error) {
	c.ensureCold().end = err
	c.word.Or(flagHungUp)
}

// drain counts what waits in a socket that is about to be closed for it, by reading
// it: up to 4 KiB.
func (p *socket) drain() (n int) {
	b := make([]byte, 4<<10)
	p.raw.Control(func(fd uintptr) { n, _ = p.sys.readNow(fd, b) })
	return max(n, 0)
}
