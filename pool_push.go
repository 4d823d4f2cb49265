package connpool

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Push: what a peer sends unasked on an idle connection goes to Config.Push.
//
// Where the pool looks at a connection and finds bytes, it would call it dirty
// and close it; with a Push it becomes its owner instead and lends it to Push,
// on a goroutine that lives for that long:
//
//	idle -> bytes? -> Push -> nil, nothing left -> idle
//	           ^        |
//	           |        +---> nil, more is there --+
//	           +-----------------------------------+
//	                    +---> error, or nil although it read nothing -> closed
//
// The looks are those before a loan and in a sweep, and on Linux that of the
// watcher, which then listens for data too (see hearsData).
//
// Under TLS the look takes out what it finds: a look at bytes that are session
// tickets takes nothing, but plaintext is in the pool's hands then. It is put
// back in front of what the next loan reads, Push's.

// pushback is what a look took out of crypto/tls, for the loan that follows. It is
// there as long as the pool has not seen it empty.
type pushback struct {
	mu    sync.Mutex // guards what follows; no I/O happens under it
	bytes []byte
	moved bool // something was read, from here or from the connection
}

// read reads what was put back, and then from the connection.
func (b *pushback) read(nc net.Conn, p []byte) (n int, err error) {
	if n, ok := b.take(p); ok {
		return n, nil
	}
	n, err = nc.Read(p)
	if n > 0 {
		b.mu.Lock()
		b.moved = true
		b.mu.Unlock()
	}
	return n, err
}

func (b *pushback) take(p []byte) (n int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.bytes) == 0 {
		return 0, false
	}
	n = copy(p, b.bytes)
	b.bytes = b.bytes[n:]
	b.moved = b.moved || n > 0
	return n, true
}

// restart forgets that something was read, and reports whether something was.
func (b *pushback) restart() (moved bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	moved, b.moved = b.moved, false
	return moved
}

func (b *pushback) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.bytes)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// plaintext is the error of a look that took plaintext out of crypto/tls, for
// Push.
type plaintext struct{ bytes []byte }

func (*plaintext) Error() string { return ErrUnread.Error() }
func (*plaintext) Unwrap() error { return ErrUnread }

// wholeRecord is for a look that read first through crypto/tls, which has the
// rest of the record in hand.
func (p *socket) wholeRecord(first byte) *plaintext {
	rest := make([]byte, 16<<10) // no record is longer
	if sock := p.belowTLS(); sock != nil {
		sock.enter(tlsSealed)
	} else if p.tls.SetDeadline(aLongTimeAgo) != nil {
		return &plaintext{[]byte{first}} // the rest is still in order behind it
	}
	n, _ := p.tls.Read(rest)
	return &plaintext{append([]byte{first}, rest[:n]...)}
}

// keepPushback puts back what a look has taken out, if err says so. The caller owns c.
func (c *conn) keepPushback(err error) {
	text, ok := err.(*plaintext)
	if !ok {
		return
	}
	e := c.ensureCold()
	if e.pushback == nil {
		e.pushback = new(pushback)
	}
	e.pushback.mu.Lock()
	e.pushback.bytes = append(e.pushback.bytes, text.bytes...)
	e.pushback.mu.Unlock()
}

// holds reports whether bytes wait above the socket, in the state or put back.
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

// isForPush reports whether a connection that would be closed for this reason is
// one for Push.
func (cfg *Config) isForPush(reason CloseReason) bool {
	return reason == ClosedDirty && cfg.Push != nil
}

// push gives c, on which something waits to be read, to Config.Push until
// nothing is left. The caller was its owner, and is not any more.
func (c *conn) push() {
	p := c.site.pool
	p.mu.Lock()
	if p.limits.MinIdlePerAddr > 0 {
		p.setCheckingLocked(c, true) // a reserve is complete with what Push has
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

// pushAll calls Push as long as there is something for it, and says why c has to
// be closed then, ClosedUnknown if it has not.
func (c *conn) pushAll() (CloseReason, error) {
	p := c.site.pool
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
		err = c.runHook(context.Background(), "Config.Push", p.cfg.Push)
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

// awaitMessage looks everywhere for bytes that wait: ClosedDirty if there are any.
// Of a TLS record that has arrived in part it waits for the rest, since only then
// is it known whether it is a message or a ticket.
func (c *conn) awaitMessage() (CloseReason, error) {
	p := c.site.pool
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
		case !errors.Is(err, errPartial): // then nothing was taken out
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

// listen is called when c was parked: what arrived before is to be heard of now,
// and what arrives later when it does.
func (c *conn) rearmWatch() {
	p := c.site.pool
	p.mu.Lock()
	watcher := p.watching.watcher
	p.mu.Unlock()
	watcher.Rearm(c.sock.raw, c.hearsData())
}

// readable is told that something waits on the connection with this descriptor.
// If it is in use, that is its borrower's business.
func (p *Pool) readable(fd uintptr) {
	p.mu.Lock()
	c := p.byFD[fd]
	if c == nil {
		p.mu.Unlock()
		return
	}
	if c.phase == phaseIdle {
		idleRef{c, c.generation()}.examineAsideLocked()
	}
	p.mu.Unlock()
}
