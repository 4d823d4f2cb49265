package connpool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// DialContext opens a connection that the pool counts but does not pool: the caller
// owns it until the caller closes it. It is for libraries that want a dialer and keep
// connections themselves, as an http.Transport does, so that their connections and
// the pool's share one budget of file handles.
//
// The connection takes a slot of MaxOpen. To make room, the pool closes the least
// recently used idle connection; if there is none, DialContext waits for a slot, in one
// queue with the pool's borrowers, until ctx is done. Config.WaitTimeout bounds the wait for
// the slot and the dial together. The dial counts in MaxDialing, is
// bounded by ctx and by DialTimeout, and is repeated when file handles run out, as the
// pool's own dials are. MaxPerAddr and MaxDialingPerAddr do not apply, because the
// library decides how many connections it needs. TLS is the library's business too, and
// Setup does not run. FullOverflow does not apply either: a library keeps its connections
// for long, so the pool would exceed MaxOpen for long. A library that needs one more
// connection before it can close one gets its dial function from [Pool.DialOverflow].
//
// network is "tcp", "tcp4", "tcp6" or "unix". A final dot of the host is kept for the
// dial, where it says that the name is complete; an Addr has no final dot. DialContext
// uses a dialer that Config.Dialers has for TCP or Unix. Such a dialer knows no family, so
// with it "tcp4" and "tcp6" need a literal address of that family.
//
// The result has the methods of what was dialed, a *net.TCPConn or a *net.UnixConn,
// with the kernel's fast paths. With a dialer of your own the result is a net.Conn, and
// a [syscall.Conn] if the dialed connection was. Close of the result frees the slot; a
// second Close returns net.ErrClosed. A connection that is dropped without Close is closed
// when the garbage collector finds it. The collector does not find it while any part of
// it is used: a RawConn, a call that has not returned, or its File for as long as File is
// running. A caller that takes NetConn of a dialer's connection has to close the result
// of DialContext, because the collector does not find it any more. Until it is closed, the
// connection counts in Stats.InUse and Stats.Tracked: Close of the pool does not close it,
// and Shutdown waits for it and names it. An error is a *[net.OpError], as that of
// package net's dialer, and wraps an *[Error].
func (p *Pool) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return (&trackedDialer{p: p}).dial(ctx, network, address)
}

// trackedDialer is what the functions DialContext, and those that DialOverflow and DialThrough
// return, have in common.
type trackedDialer struct {
	p        *Pool
	overflow int
	through  dialFunc // nil: the pool's own dialer, or that of the transport
}

// dialFunc has the signature of DialContext.
type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

func (d *trackedDialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := d.open(ctx, network, address)
	if pe, ok := err.(*Error); ok {
		return nil, pe.opError(network, address)
	}
	return nc, err
}

func (d *trackedDialer) open(ctx context.Context, network, address string) (net.Conn, error) {
	p := d.p
	switch {
	case p.stop == nil:
		return nil, usage(Addr{}, ErrClosed)
	case ctx == nil:
		return nil, usage(Addr{}, errors.New("ctx is nil: pass context.Background()"))
	}
	dialer := p.cfg.Dialers[TCP]
	if d.through != nil {
		dialer = nil // through is told the network
	}
	addr, err := trackedAddr(ctx, network, address, dialer)
	if err != nil {
		return nil, err
	}
	start := p.clock.Exactly()
	if ctx.Err() != nil {
		return nil, p.tooLate(ctx, addr)
	}
	// The site is for this call only: no other borrower may use what is opened here.
	s := p.newSite(addr)
	s.family, s.absolute = familyOf(network), absolute(network, address)
	s.overflow = uint8(max(0, min(d.overflow, math.MaxUint8)))
	if d.through != nil {
		ctx = context.WithValue(ctx, throughKey{s}, DialFunc(func(ctx context.Context, _ Addr) (net.Conn, error) {
			return d.through(ctx, network, address)
		}))
	}
	t := p.trace(ctx) // trace calls a method of ctx, which is foreign code: not under the lock
	var todo agenda
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, p.failed(addr, StageWait, ErrClosed, start)
	}
	if p.unpooled == nil {
		p.unpooled = make(map[*site]struct{})
	}
	p.unpooled[s] = struct{}{}
	if s.overflow > 0 {
		p.overflows++
		defer d.noteOverflowEnded()
	}
	got := p.enqueueLocked(ctx, s, &request{start: start}, &todo)
	p.mu.Unlock()
	if got.refused != nil {
		todo.run(p)
		return nil, got.refused.classify()
	}
	got.w.announce(t, &todo)
	if s.overflow > 0 {
		defer time.AfterFunc(ownPatience, func() { got.w.noteStalled() }).Stop()
	}
	c, err := got.w.await(ctx, start)
	if err != nil {
		stage, err := stageAndCause(err)
		p.mu.Lock()
		failed := p.failedAtLocked(s, stage, err, start)
		p.mu.Unlock()
		return nil, failed.classify()
	}
	p.mu.Lock()
	p.counts.Tracked++
	p.mu.Unlock()
	return track(c), nil
}

// trackedAddr is the Addr for the network and address that package net would dial. dialer is that
// of Config.Dialers for TCP if it is to dial, else nil.
func trackedAddr(ctx context.Context, network, address string, dialer DialFunc) (Addr, error) {
	addr, err := parseNet(ctx, network, address, "localhost") // as in package net
	if err == nil && dialer != nil && oneFamily(network, addr.Host) != nil {
		err = fmt.Errorf("Config.Dialers[%q] cannot be told to dial %s: use network tcp", TCP, network)
	}
	if err != nil {
		return Addr{}, usage(Addr{}, fmt.Errorf("dial %s %s: %w", network, address, err))
	}
	return addr, nil
}

// absolute reports whether address names a host with a final dot. For such a name a resolver
// adds nothing of its search list. The canonical Addr has no dot (the peer is the same), so
// the dial needs this information.
func absolute(network, address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && network != "unix" && strings.HasSuffix(host, ".")
}

// dial is sys.dial for one family of addresses.
func (f family) dial(ctx context.Context, base *net.Dialer, addr Addr) (net.Conn, error) {
	network := map[family]string{family4: "tcp4", family6: "tcp6"}[f]
	return sock.Options{}.DialFrom(ctx, base, network, addr.HostPort())
}

// trackedLoan is the part that all forms of a connection of DialContext share.
type trackedLoan struct {
	c       *conn
	closed  atomic.Bool
	cleanup runtime.Cleanup
}

// release closes the connection and frees its slot.
func (t *trackedLoan) release() error {
	if t.closed.Swap(true) {
		again := &net.OpError{Op: "close", Source: t.c.nc.LocalAddr(), Addr: t.c.nc.RemoteAddr(), Err: net.ErrClosed}
		if again.Source != nil { // a connection of the user's dialer may have no local address
			again.Net = again.Source.Network()
		}
		return again
	}
	t.cleanup.Stop()
	if done := t.c.untrack(nil); done != nil {
		<-done
	}
	return nil
}

// untrack closes a connection of DialContext; err is the cause if there is one.
func (c *conn) untrack(err error) <-chan struct{} {
	p := c.site.env.pool
	p.mu.Lock()
	p.counts.Tracked--
	p.mu.Unlock()
	return c.discard(ClosedByBorrower, err)
}

// ownPatience is how long a dial of DialOverflow waits for a slot before it may use the
// overflow.
const ownPatience = 250 * time.Millisecond

// DialOverflow returns a DialContext that does not get stuck when the caller's own
// connections fill the pool. A library may need one more connection before it can close
// one: a PostgreSQL client cancels a query over a second connection, and keeps the first
// until the cancel request has come through. If such connections take all slots of MaxOpen,
// the library would wait for itself.
//
// A dial of the returned function waits for a slot as others do. After 250 milliseconds
// (under FullFail: at once) it opens its connection beyond MaxOpen, as long as no more than
// n connections are open beyond MaxOpen, whoever opened them. Connections beyond MaxOpen
// count in Stats as all others do. Until as many connections are closed, the pool opens no
// other connection. So MaxOpen and n together are what the process, or the server, must
// allow.
//
// n is how many such connections may be needed at the same time: for a PostgreSQL client,
// the number of queries that are canceled at once. Further dials wait for these. More than
// 255 count as 255. With n of 0 or less the function is DialContext.
func (p *Pool) DialOverflow(n int) func(ctx context.Context, network, address string) (net.Conn, error) {
	return (&trackedDialer{p: p, overflow: n}).dial
}

// DialThrough returns a DialContext whose connections are opened by dial, and not by the pool's
// own dialer: a [net.Dialer] with a LocalAddr for this library alone, or the dialer of a proxy.
// dial gets network and address as the returned function got them, and a ctx with the bounds of
// DialContext. If dial returns a *net.TCPConn or *net.UnixConn, the result has the methods of
// that type; otherwise the result is as with a dialer of Config.Dialers. Config.Dialers and
// Config.Dialer are not used. dial may be called again for one call of the function, if file
// handles run out, and by several goroutines at once. If dial itself uses [Pool.DialContext],
// its connection takes a second slot.
//
// n is that of [Pool.DialOverflow]: how many connections may be open beyond MaxOpen; 0 or less
// for none.
// dial must not be nil.
func (p *Pool) DialThrough(dial func(ctx context.Context, network, address string) (net.Conn, error), n int) func(ctx context.Context, network, address string) (net.Conn, error) {
	if dial == nil {
		return func(_ context.Context, network, address string) (net.Conn, error) {
			return nil, usage(Addr{}, errors.New("the dial function of DialThrough is nil")).opError(network, address)
		}
	}
	return (&trackedDialer{p, n, dial}).dial
}

// throughKey is the key, in the ctx of a dial, of the dial function of DialThrough. The dials that
// this function makes itself, under its ctx, are of other sites.
type throughKey struct{ s *site }

// noteStalled records that w, of a DialOverflow, has waited for ownPatience.
func (w *waiter) noteStalled() {
	p := w.site.env.pool
	var todo agenda
	p.mu.Lock()
	w.stalled = true
	if w.queued {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
}

// noteOverflowEnded records that a call of DialOverflow's function has ended.
func (d *trackedDialer) noteOverflowEnded() {
	d.p.mu.Lock()
	d.p.overflows--
	d.p.mu.Unlock()
}

// track wraps c for the caller, with the methods of its kind of connection.
//
// The pool closes a connection that nobody can reach any more. So everything in use must lead
// to the object that the garbage collector watches. The books of the pool refer to the dialed
// connection, which is therefore never garbage. So the caller gets a copy of it, two words
// that share the socket, and the copy is watched. Every method of package net's connection has
// the copy until it returns, also the unexported ones (net.Buffers calls one), so a caller that
// has the copy keeps the connection open. A RawConn has only the socket, see heldRaw.
func track(c *conn) net.Conn {
	switch nc := c.nc.(type) {
	case *net.TCPConn:
		own := &trackedTCP{TCPConn: new(net.TCPConn)}
		*own.TCPConn = *nc
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own.TCPConn, lost, c)
		return own
	case *net.UnixConn:
		own := &trackedUnix{UnixConn: new(net.UnixConn)}
		*own.UnixConn = *nc
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own.UnixConn, lost, c)
		return own
	default:
		own := &trackedConn{Conn: nc}
		own.t.c = c
		own.t.cleanup = runtime.AddCleanup(own, lost, c)
		return own
	}
}

var errLost = errors.New("a connection of DialContext was dropped without being closed")

// lost runs when nobody can reach a connection any more that was not closed.
func lost(c *conn) { go c.untrack(errLost) }

type trackedTCP struct {
	*net.TCPConn
	t trackedLoan
}

func (c *trackedTCP) Close() error { return c.t.release() }

// SyscallConn gives access to the socket.
func (c *trackedTCP) SyscallConn() (syscall.RawConn, error) { return holdRaw(c.TCPConn, c.TCPConn) }

type trackedUnix struct {
	*net.UnixConn
	t trackedLoan
}

func (c *trackedUnix) Close() error { return c.t.release() }

// SyscallConn gives access to the socket.
func (c *trackedUnix) SyscallConn() (syscall.RawConn, error) { return holdRaw(c.UnixConn, c.UnixConn) }

// heldRaw is a RawConn that holds the object that the garbage collector watches.
type heldRaw struct {
	raw  syscall.RawConn
	held any
}

func holdRaw(sc syscall.Conn, held any) (syscall.RawConn, error) {
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &heldRaw{raw, held}, nil
}

func (r *heldRaw) Control(f func(uintptr)) error {
	defer runtime.KeepAlive(r.held)
	return r.raw.Control(f)
}

func (r *heldRaw) Read(f func(uintptr) bool) error {
	defer runtime.KeepAlive(r.held)
	return r.raw.Read(f)
}

func (r *heldRaw) Write(f func(uintptr) bool) error {
	defer runtime.KeepAlive(r.held)
	return r.raw.Write(f)
}

// trackedConn is a connection that a dialer of the user made. It cannot be copied, so the
// wrapper is watched, and each method has to hold the wrapper.
type trackedConn struct {
	net.Conn
	t trackedLoan
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

func (c *trackedConn) SetDeadline(t time.Time) error {
	defer runtime.KeepAlive(c)
	return c.Conn.SetDeadline(t)
}

func (c *trackedConn) SetReadDeadline(t time.Time) error {
	defer runtime.KeepAlive(c)
	return c.Conn.SetReadDeadline(t)
}

func (c *trackedConn) SetWriteDeadline(t time.Time) error {
	defer runtime.KeepAlive(c)
	return c.Conn.SetWriteDeadline(t)
}

// NetConn is the connection that the dialer returned. A caller that has it does not need the
// wrapper, so from now on the connection is closed only when Close is called.
func (c *trackedConn) NetConn() net.Conn {
	defer runtime.KeepAlive(c)
	c.t.cleanup.Stop()
	return c.Conn
}

// SyscallConn gives access to the socket, if there is one.
func (c *trackedConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return holdRaw(sc, c)
	}
	return nil, errors.ErrUnsupported
}

// CloseWrite shuts down the sending side, if the connection can do that.
func (c *trackedConn) CloseWrite() error {
	defer runtime.KeepAlive(c)
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}
