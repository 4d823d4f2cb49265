package connpool

import (
	"errors"
	"fmt"
)

// The checks at the end of Setup. If bytes are waiting on a connection when Setup is
// done, the connection is not in step: a borrower would take these bytes for the reply
// to its first request. The first borrower cannot know about them, so the pool checks
// before any loan: such a dial fails, for whichever borrower it was started. With
// Config.Push the bytes may be a message, and Push gets them before the connection is
// lent.
//
// A server that speaks first needs a Setup that reads its greeting. Without a Setup no
// code of the user has claimed to know the protocol, and the greeting is left to the
// borrower.

// handState makes the state that Setup returned the connection's. From then on the
// state is closed with the connection. The caller has taken the outcome of the dial, or holds a.mu.
func (a *attempt) handState() {
	if a.state != nil {
		a.c.state, a.state = a.state, nil
	}
}

// setUp checks what Setup has left behind, after Setup has returned without an error. A
// non-nil error fails the dial.
func (a *attempt) setUp() error {
	p := a.c.site.env.pool
	c := a.c
	a.mu.Lock()
	late := a.taken
	if !late {
		a.handState()
	}
	a.mu.Unlock()
	if late { // the dial was given up; whoever finds that out closes the connection, see dial
		return nil
	}
	a.where = "Expires of the state"
	if err := c.askExpiry(); err != nil {
		return err
	}
	if c.isResident() { // what the peer sends is the client's
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
		c.ended(err) // as without a Push
		return nil
	case reason == ClosedStale:
		return fmt.Errorf("after Config.Setup: %w", err)
	}
	return err
}

// speaksUnasked returns an error if bytes wait to be read on a connection that was just
// set up. A peer that has hung up is no error here: the probe before the first loan
// finds that. A part of a TLS record is no error either, since it usually belongs to a
// session ticket.
func (c *conn) speaksUnasked() error {
	pr := &c.sock
	keep := pr.keep
	pr.keep = true // so that readThrough returns the bytes, which can be counted
	defer func() { pr.keep = keep }()
	_, err := pr.leftovers(true)
	if c.site.env.report.outlived(err, c.site.addr) {
		return err
	}
	if text, ok := err.(*plaintext); ok {
		return &leftUnread{&brokenContract{fmt.Sprintf("Config.Setup left %d bytes unread in crypto/tls", len(text.bytes))}}
	}
	// Not c.probe, which clears flagHungUp.
	reason, err := pr.probe(&c.site.env.cfg, c.nc)
	if c.site.env.report.outlived(err, c.site.addr) {
		return err // the call that was given up still uses the connection
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

// ended records that the peer has ended the connection, so that the probe before the
// first loan finds it. The probe that found the end may have consumed it: a TLS alert
// is read only once, and the socket may stay open for a while after it.
func (c *conn) ended(err error) {
	c.ensureCold().end = err
	c.word.Or(flagHungUp)
}

// drain returns how many bytes wait in a socket that is about to be closed because of
// them, 4 KiB at most. It reads them.
func (p *socket) drain() (n int) {
	b := make([]byte, 4<<10)
	p.raw.Control(func(fd uintptr) { n, _ = p.sys.readNow(fd, b) })
	return max(n, 0)
}
