package faultnet

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// window is how many bytes one direction holds before Write blocks. It counts bytes that
// were written and not read yet, arrived or not.
const window = 64 << 10

const network = "mem"

// memAddr is the address of an end: the host's name, or for a dialer that name with the
// connection's number.
type memAddr string

func (memAddr) Network() string  { return network }
func (a memAddr) String() string { return string(a) }

func clientAddr(host string, serial int) memAddr {
	return memAddr(fmt.Sprintf("%s#%d", host, serial))
}

// Conn is one end of a connection of [Mem]. It is a net.Conn and returns errors as
// package net does: io.EOF bare, every other error in an *net.OpError.
type Conn struct {
	// Written without a lock, on purpose; see Touch.
	reads, writes, readDeadlines, writeDeadlines int

	host          *Host
	pair          *pair
	peer          *Conn
	entry         *Conn // the server's end, as Host.conns lists it
	serial        int
	owned         bool // Read and the other methods call Touch, for the race detector
	local, remote memAddr

	// Guarded by pair.mu.
	in          stream // from the peer
	closed      bool   // by this end, with Close or Reset
	closedWrite bool
	writing     bool // one Write is under way; others wait, so that bytes do not mix
	rd, wd      deadline
}

// pair is what the two ends of a connection share.
type pair struct {
	// mu guards the changing fields of both ends. It is held only briefly: a goroutine
	// blocked on a mutex stops the clock of a synctest bubble, while one that waits on
	// moved, a sync.Cond, does not.
	mu    sync.Mutex
	moved sync.Cond // something changed that a blocked call may wait for
	reset bool      // by either end
}

func (p *pair) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.moved.Broadcast()
}

// Touch adds to two fields, as if this end were read and written, without any lock. If a
// second goroutine calls Touch and nothing orders the two calls, the race detector
// reports them: the connection has two owners.
//
// On a dialed end, Read and Probe touch one field and Write the other, since one
// goroutine may read while another writes. Deadlines have fields of their own, also one
// per direction, since another goroutine may set one to interrupt a blocked Read. Close
// touches nothing: it is allowed at any time. The server's end belongs to the test, and
// only an explicit Touch touches it.
func (c *Conn) Touch() {
	c.reads++
	c.writes++
}

// Serial is the connection's number on its host, from 1; both ends have it.
func (c *Conn) Serial() int { return c.serial }

func (c *Conn) LocalAddr() net.Addr  { return c.local }
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

func (c *Conn) Read(p []byte) (int, error) {
	if c.owned {
		c.reads++
	}
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.opError("read", net.ErrClosed)
		case len(p) == 0:
			return 0, nil
		case c.rd.expired:
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		case c.pair.reset:
			return 0, c.opError("read", os.NewSyscallError("read", syscall.ECONNRESET))
		}
		now := time.Now()
		if n := c.in.take(p, now); n > 0 {
			c.pair.moved.Broadcast()
			return n, nil
		}
		switch at, coming := c.in.next(); {
		case !coming:
			c.pair.moved.Wait()
		case at.After(now):
			arrival := time.AfterFunc(at.Sub(now), c.pair.wake)
			c.pair.moved.Wait()
			arrival.Stop()
		default: // if it were not the end, take would have returned the bytes
			return 0, io.EOF
		}
	}
}

func (c *Conn) Write(p []byte) (int, error) {
	if c.owned {
		c.writes++
	}
	how := c.host.paceNow()
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	for c.writing {
		c.pair.moved.Wait()
	}
	c.writing = true
	defer func() {
		c.writing = false
		c.pair.moved.Broadcast()
	}()
	written := 0
	for {
		switch {
		case c.closed:
			return written, c.opError("write", net.ErrClosed)
		case c.wd.expired:
			return written, c.opError("write", os.ErrDeadlineExceeded)
		case c.pair.reset:
			return written, c.opError("write", os.NewSyscallError("write", syscall.ECONNRESET))
		case c.closedWrite, c.peer.closed:
			return written, c.opError("write", os.NewSyscallError("write", syscall.EPIPE))
		}
		n := min(len(p)-written, window-c.peer.in.size)
		c.peer.in.push(p[written:written+n], time.Now(), how)
		if written += n; written == len(p) {
			return written, nil
		}
		c.pair.moved.Broadcast()
		c.pair.moved.Wait()
	}
}

// Close ends both directions: the peer reads the bytes on their way and then io.EOF, and
// the peer's writes fail with EPIPE at once.
func (c *Conn) Close() error {
	how := c.host.paceNow()
	c.pair.mu.Lock()
	if c.closed {
		c.pair.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.peer.in.end(time.Now(), how)
	c.closeLocked()
	c.pair.mu.Unlock()
	c.host.forget(c.entry)
	return nil
}

// CloseWrite ends this end's direction: the peer reads the bytes on their way and then
// io.EOF, and may still write.
func (c *Conn) CloseWrite() error {
	how := c.host.paceNow()
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	switch {
	case c.closed:
		return c.opError("close", net.ErrClosed)
	case c.pair.reset:
		return c.opError("close", os.NewSyscallError("shutdown", syscall.ENOTCONN))
	}
	c.closedWrite = true
	c.peer.in.end(time.Now(), how)
	c.pair.moved.Broadcast()
	return nil
}

// Reset closes this end and breaks the connection: the peer's calls fail with ECONNRESET
// at once, and bytes on their way to the peer are lost.
func (c *Conn) Reset() {
	c.pair.mu.Lock()
	c.pair.reset = true
	c.closeLocked()
	c.pair.mu.Unlock()
	c.host.forget(c.entry)
}

func (c *Conn) closeLocked() {
	c.closed = true
	c.in = stream{}
	c.rd.set(c.pair, time.Time{})
	c.wd.set(c.pair, time.Time{})
	c.pair.moved.Broadcast()
}

// Closed reports whether this end was closed, by Close or Reset on it. A close by the
// peer does not count: the owner of this end still has to close it.
func (c *Conn) Closed() bool {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	return c.closed
}

// Probe returns what a Read would return, without blocking, without taking a byte and
// whatever the deadline: nil if the peer is there and nothing has arrived, ErrUnread if
// bytes have arrived, io.EOF if the stream has ended before any, and ECONNRESET or
// net.ErrClosed in an *net.OpError.
func (c *Conn) Probe() error {
	if c.owned {
		c.reads++
	}
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	at, coming := c.in.next()
	switch {
	case c.closed:
		return c.opError("probe", net.ErrClosed)
	case c.pair.reset:
		return c.opError("probe", os.NewSyscallError("recv", syscall.ECONNRESET))
	case !coming, at.After(time.Now()):
		return nil
	case c.in.size > 0:
		return ErrUnread
	}
	return io.EOF
}

func (c *Conn) SetDeadline(t time.Time) error {
	if c.owned {
		c.readDeadlines++
		c.writeDeadlines++
	}
	return c.setDeadlines(t, &c.rd, &c.wd)
}

func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.owned {
		c.readDeadlines++
	}
	return c.setDeadlines(t, &c.rd)
}

func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.owned {
		c.writeDeadlines++
	}
	return c.setDeadlines(t, &c.wd)
}

func (c *Conn) setDeadlines(t time.Time, ds ...*deadline) error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	for _, d := range ds {
		d.set(c.pair, t)
	}
	c.pair.moved.Broadcast()
	return nil
}

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: network, Source: c.local, Addr: c.remote, Err: err}
}

// deadline is a flag that a timer raises.
type deadline struct {
	expired bool
	timer   *time.Timer // the timer that may raise the flag; nil: none
}

// set needs p.mu. Its caller wakes blocked calls.
func (d *deadline) set(p *pair, t time.Time) {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.expired = false
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		d.expired = true
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(left, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if d.timer == timer { // Stop does not stop a timer function that has started
			d.expired = true
			p.moved.Broadcast()
		}
	})
	d.timer = timer
}

// stream is one direction of a connection: the bytes written and not read yet.
type stream struct {
	segments []segment // in the order of writing; a segment that arrives early waits for those before it
	size     int       // bytes in segments
	last     time.Time // arrival of the newest segment ever
	ended    bool
	endAt    time.Time // checked when all segments are gone
}

type segment struct {
	b     []byte
	at    time.Time
	alone bool // is not read together with other segments
}

func (s *stream) push(p []byte, now time.Time, how pace) {
	piece := len(p)
	if how.n > 0 {
		piece = how.n
	}
	for len(p) > 0 {
		at := now.Add(how.delay)
		if dripped := s.last.Add(how.every); how.n > 0 && !s.last.IsZero() && dripped.After(at) {
			at = dripped
		}
		n := min(piece, len(p))
		s.segments = append(s.segments, segment{append([]byte(nil), p[:n]...), at, how.n > 0})
		s.size += n
		s.last = at
		p = p[n:]
	}
}

func (s *stream) end(now time.Time, how pace) {
	if !s.ended {
		s.ended, s.endAt = true, now.Add(how.delay)
	}
}

// take copies the bytes that have arrived to p.
func (s *stream) take(p []byte, now time.Time) int {
	n := 0
	for len(s.segments) > 0 && n < len(p) {
		first := &s.segments[0]
		alone := first.alone
		if first.at.After(now) || alone && n > 0 {
			break
		}
		k := copy(p[n:], first.b)
		first.b = first.b[k:]
		n += k
		if len(first.b) == 0 {
			*first = segment{}
			s.segments = s.segments[1:]
		}
		if alone {
			break
		}
	}
	s.size -= n
	return n
}

// next returns when the next bytes, or the end, will arrive. coming is false if nothing
// is on its way.
func (s *stream) next() (at time.Time, coming bool) {
	if len(s.segments) > 0 {
		return s.segments[0].at, true
	}
	return s.endAt, s.ended
}
