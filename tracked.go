package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
)

// DialContext opens a connection that the pool counts but does not pool: it is
// the caller's until the caller closes it. It is for libraries that want a
// dialer and keep connections themselves, as an http.Transport does, so that
// theirs and the pool's share one budget of file handles.
//
// The connection takes a slot of MaxOpen. To make room the least recently used
// idle connection is closed; if there is none, DialContext waits for a slot, in
// one line with the pool's borrowers, until ctx is done. The dial counts in
// MaxDialing, is bounded by ctx and by DialTimeout, and when file handles run out
// it is tried again as the pool's own dials are. MaxPerAddr and MaxDialingPerAddr
// do not apply: that is the library's business. So is TLS, and Setup does not run.
//
// network is "tcp", "tcp4", "tcp6" or "unix". A dialer that Config.Dialers has
// for TCP or Unix is used; it knows no family, so with one "tcp4" and "tcp6" need
// a literal address of theirs.
//
// The result has the methods of what was dialled, a *net.TCPConn or a
// *net.UnixConn, with the kernel's fast paths; that of a dialer of your own is
// a net.Conn and a [syscall.Conn] if it was. Its Close frees the slot; a second
// one is net.ErrClosed. A connection that is dropped without Close is closed
// when the garbage collector finds it. Until then it is one of Stats.InUse and
// Stats.Tracked: Close of the pool leaves it alone, Shutdown waits for it and
// names it. An error is a *[net.OpError], as that of package net's dialer, and wraps
// an *[Error].
func (p *Pool) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := p.dialTracked(ctx, network, address)
	if pe, ok := err.(*Error); ok {
		return nil, pe.opError(network, address)
	}
	return nc, err
}

func (p *Pool) dialTracked(ctx context.Context, network, address string) (net.Conn, error) {
	switch {
	case p.stop == nil:
		return nil, usage(Addr{}, ErrClosed)
	case ctx == nil:
		return nil, usage(Addr{}, errors.New("ctx is nil: pass context.Background()"))
	}
	addr, err := p.trackedAddr(ctx, network, address)
	if err != nil {
		return nil, err
	}
	start := p.clock.exactly()
	if ctx.Err() != nil {
		return nil, p.tooLate(ctx, addr)
	}
	// Its books are its own: nothing that is opened here may serve another.
	s := &site{pool: p, addr: addr, queue: &noQueue, heapIndex: -1, family: familyOf(network)}
	var todo agenda
	p.mu.Lock()
	if p.closed {
		defer p.mu.Unlock()
		return nil, p.failedLocked(addr, StageWait, ErrClosed, start)
	}
	if p.tracked == nil {
		p.tracked = make(map[*site]struct{})
	}
	p.tracked[s] = struct{}{}
	w, err := p.enqueueLocked(ctx, s, 0, &start, p.trace(ctx), &todo) // unlocks
	if err != nil {
		return nil, err
	}
	c, err := p.await(ctx, s, w)
	if err != nil {
		stage := StageWait
		if de, ok := err.(*dialError); ok {
			stage, err = de.stage, de.err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return nil, p.failedAtLocked(s, stage, err, start)
	}
	p.mu.Lock()
	p.counts.Tracked++
	p.mu.Unlock()
	return track(c), nil
}

// trackedAddr is the Addr for what package net calls network and address.
func (p *Pool) trackedAddr(ctx context.Context, network, address string) (Addr, error) {
	wrong := func(err error) (Addr, error) {
		return Addr{}, usage(Addr{}, fmt.Errorf("dial %s %s: %w", network, address, err))
	}
	addr := Addr{Transport: TCP}
	switch network {
	case "unix":
		addr.Transport, addr.Host = Unix, address
	case "tcp", "tcp4", "tcp6":
		host, service, err := net.SplitHostPort(address)
		if err != nil {
			return wrong(err)
		}
		port, err := strconv.Atoi(service)
		if err != nil {
			if port, err = net.DefaultResolver.LookupPort(ctx, network, service); err != nil {
				return wrong(err)
			}
		}
		if port < 1 || port > 65535 {
			return wrong(errors.New("the port must be from 1 to 65535"))
		}
		if host == "" {
			host = "localhost" // as package net has it
		}
		addr.Host, addr.Port = host, uint16(port)
		if ip := net.ParseIP(host); network != "tcp" && p.cfg.Dialers[TCP] != nil && (ip == nil || (ip.To4() != nil) != (network == "tcp4")) {
			return wrong(fmt.Errorf("Config.Dialers[%q] cannot be told to dial %s: use network tcp", TCP, network))
		}
	default:
		return wrong(errors.New(`the network must be "tcp", "tcp4", "tcp6" or "unix"`))
	}
	addr, err := addr.canonical()
	if err != nil {
		return wrong(err)
	}
	return addr, nil
}

// dial is sys.dial, for one family of addresses.
func (f family) dial(ctx context.Context, addr Addr) (net.Conn, error) {
	network := map[family]string{family4: "tcp4", family6: "tcp6"}[f]
	var d net.Dialer
	return d.DialContext(ctx, network, net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port))))
}

// tracked is the part of a connection on its way to whoever dialled it that all
// its forms share.
type tracked struct {
	c       *conn
	closed  atomic.Bool
	cleanup runtime.Cleanup
}

// release closes the connection and frees its slot.
func (t *tracked) release() error {
	if t.closed.Swap(true) {
		return &net.OpError{Op: "close", Net: t.c.nc.LocalAddr().Network(), Source: t.c.nc.LocalAddr(), Addr: t.c.nc.RemoteAddr(), Err: net.ErrClosed}
	}
	t.cleanup.Stop()
	if done := t.c.site.pool.untrack(t.c, nil); done != nil {
		<-done
	}
	return nil
}

func (p *Pool) untrack(c *conn, err error) <-chan struct{} {
	p.mu.Lock()
	p.counts.Tracked--
	p.mu.Unlock()
	return p.discard(c, ClosedByBorrower, err)
}

// family is what DialContext was asked for.
type family uint8

const (
	pooled    family = iota // it was not DialContext
	anyFamily               // "tcp" or "unix"
	family4                 // "tcp4"
	family6                 // "tcp6"
)

func familyOf(network string) family {
	switch network {
	case "tcp4":
		return family4
	case "tcp6":
		return family6
	}
	return anyFamily
}

// tracked reports whether s is the books of a connection of DialContext's.
func (s *site) tracked() bool { return s.family != pooled }

// track gives c the methods of what it is.
func track(c *conn) net.Conn {
	switch nc := c.nc.(type) {
	case *net.TCPConn:
		own := &trackedTCP{TCPConn: nc}
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own, lost, c)
		return own
	case *net.UnixConn:
		own := &trackedUnix{UnixConn: nc}
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own, lost, c)
		return own
	default:
		own := &trackedConn{Conn: nc}
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own, lost, c)
		return own
	}
}

var errLost = errors.New("a connection of DialContext was dropped without being closed")

// lost is called when nobody can reach a connection any more that was not closed.
func lost(c *conn) { go c.site.pool.untrack(c, errLost) }

type trackedTCP struct {
	*net.TCPConn
	t tracked
}

func (c *trackedTCP) Close() error { return c.t.release() }

// The garbage collector must not find the connection while it is being used.

func (c *trackedTCP) Read(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.TCPConn.Read(b)
}

func (c *trackedTCP) Write(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.TCPConn.Write(b)
}

func (c *trackedTCP) ReadFrom(r io.Reader) (int64, error) {
	defer runtime.KeepAlive(c)
	return c.TCPConn.ReadFrom(r)
}

func (c *trackedTCP) WriteTo(w io.Writer) (int64, error) {
	defer runtime.KeepAlive(c)
	return c.TCPConn.WriteTo(w)
}

type trackedUnix struct {
	*net.UnixConn
	t tracked
}

func (c *trackedUnix) Close() error { return c.t.release() }

func (c *trackedUnix) Read(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.UnixConn.Read(b)
}

func (c *trackedUnix) Write(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.UnixConn.Write(b)
}

// trackedConn is what a dialer of the user's made.
type trackedConn struct {
	net.Conn
	t tracked
}

func (c *trackedConn) Close() error { return c.t.release() }

func (c *trackedConn) Read(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.Conn.Read(b)
}

func (c *trackedConn) Write(b []byte) (int, error) {
	defer runtime.KeepAlive(c)
	return c.Conn.Write(b)
}

// NetConn is what the dialer returned.
func (c *trackedConn) NetConn() net.Conn { return c.Conn }

// SyscallConn gives access to the socket, if there is one.
func (c *trackedConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// CloseWrite shuts down the sending side, if the connection can do that.
func (c *trackedConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}
