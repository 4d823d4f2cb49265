package connpool

import (
	"context"
	"errors"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Push: what a peer sends unasked on an idle connection goes to Config.Push.
//
// When the pool probes an idle connection and finds bytes, it would close the connection as
// dirty. With a Push, the pool becomes the owner of the connection instead and lends it to
// Push, on a goroutine that lives as long as this loan:
//
//	idle -> bytes? -> Push -> nil, nothing left -> idle
//	           ^        |
//	           |        +---> nil, more is there --+
//	           +-----------------------------------+
//	                    +---> error, or nil although it read nothing -> closed
//
// The pool probes before a loan and in a sweep. On Linux the watcher also makes it probe,
// and then the watcher listens for data too (see hearsData).
//
// Under TLS the probe reads through crypto/tls. If the bytes are session tickets, crypto/tls
// consumes them and the probe gets nothing. If they are plaintext, the probe has taken them
// out. The pool puts them back in front of what the next loan, which is Push's, reads.

// hasBuffered reports whether unread bytes are above the socket: in the state, or put back.
// The caller owns c.
func (c *conn) hasBuffered() (bool, error) {
	if e := c.cold.Load(); e != nil && e.pushback != nil && e.pushback.len() > 0 {
		return true, nil
	}
	in, err := c.heldSoon()
	return in.unread > 0, err
}

// unread reports whether the last loan may have left something for Push.
func (c *conn) unread() (bool, error) {
	if e := c.cold.Load(); e != nil && e.unread {
		return true, nil
	}
	return c.hasBuffered()
}

// push gives c, on which unread bytes wait, to Config.Push until none are left. The caller
// owned c and gives up c.
func (c *conn) push() {
	p := c.site.env.pool
	p.mu.Lock()
	if p.limitsAt(c.site).MinIdle > 0 {
		p.setCheckingLocked(c, true) // a connection in Push counts for the reserve
		p.refreshLocked(c.site)
	}
	p.mu.Unlock()
	go func() {
		reason, err := c.pushAll()
		if reason != ClosedUnknown {
			c.discard(reason, err)
			return
		}
		c.releaseFrom(fromCheck)
	}()
}

// pushAll calls Push as long as there is something for it. It returns why c has to be closed
// after that; ClosedUnknown if c may stay.
func (c *conn) pushAll() (CloseReason, error) {
	p := c.site.env.pool
	for {
		e := c.ensureCold()
		if reason, err := c.awaitMessage(); !p.cfg.isForPush(reason) {
			e.unread, e.pushback = false, nil
			return reason, err
		}
		if e.pushback == nil {
			e.pushback = new(pushback)
		}
		e.pushback.restart()
		before, err := c.heldSoon()
		if err != nil {
			return ClosedPushFailed, err
		}
		p.mu.Lock()
		p.counts.Pushes++
		p.mu.Unlock()
		err = c.runHook(context.Background(), false, "Config.Push", p.cfg.Push)
		after := holdings{}
		if err == nil {
			after, err = c.heldSoon()
		}
		switch {
		case err != nil && p.ctx.Err() != nil:
			return ClosedWithPool, err
		case err != nil:
			return ClosedPushFailed, err
		case !e.pushback.restart() && after.unread == before.unread:
			return ClosedPushFailed, errUnpushed
		}
	}
}

var errUnpushed = &brokenContract{"Config.Push returned nil and read nothing"}

// awaitMessage looks for unread bytes everywhere; ClosedDirty means that there are some. If
// a TLS record has arrived in part, awaitMessage waits for the rest, because only the whole
// record shows whether it is a message or a ticket.
func (c *conn) awaitMessage() (CloseReason, error) {
	p := c.site.env.pool
	end := p.clock.Exactly() + clock.Instant(defaultHookTimeout)
	for {
		if reason, err := c.condemned(); reason != ClosedUnknown {
			return reason, err
		}
		if held, err := c.hasBuffered(); err != nil {
			return ClosedPushFailed, err
		} else if held {
			return ClosedDirty, ErrUnread
		}
		reason, err := c.probe()
		if reason == ClosedUnknown && c.sock.tls != nil {
			reason, err = c.sock.readThrough(tlsNoWait, probePatience)
			c.keepPushback(err)
			p.report.outlived(err, c.site.addr)
		}
		switch {
		case !errors.Is(err, errPartial): // nothing was taken out of a partial record
			return reason, err
		case p.clock.Exactly() > end:
			return ClosedPushFailed, err
		}
		pause := time.NewTimer(time.Millisecond)
		select {
		case <-pause.C:
		case <-p.ctx.Done():
			pause.Stop()
			return ClosedWithPool, ErrClosed
		}
	}
}

// rearmWatch makes the watcher listen to c again, after c was released. The watcher reports
// at once what arrived before, and later data when it arrives.
func (c *conn) rearmWatch() {
	p := c.site.env.pool
	p.mu.Lock()
	watcher := p.watching.watcher
	p.mu.Unlock()
	watcher.Rearm(c.sock.raw, c.hearsData())
}

// readable handles a report of the watcher: bytes wait on the connection with this
// descriptor. If the connection is in use, its borrower takes care of them.
func (p *Pool) readable(fd uintptr) {
	p.mu.Lock()
	c := p.byFD[fd]
	if c == nil {
		p.mu.Unlock()
		return
	}
	c.examineIdleLocked()
	p.mu.Unlock()
}
