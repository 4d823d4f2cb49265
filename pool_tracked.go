package connpool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
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
// FullOverflow does not apply either: what a library keeps is no passing excess. A
// library that needs one connection more before it can give one up gets its dial
// function from [Pool.DialOverflow].
//
// network is "tcp", "tcp4", "tcp6" or "unix". A final dot of the host is kept for the
// dial, where it says that the name is complete; in an Addr there is none. A dialer that Config.Dialers has
// for TCP or Unix is used; it knows no family, so with one "tcp4" and "tcp6" need
// a literal address of theirs.
//
// The result has the methods of what was dialled, a *net.TCPConn or a
// *net.UnixConn, with the kernel's fast paths; that of a dialer of your own is
// a net.Conn and a [syscall.Conn] if it was. Its Close frees the slot; a second
// one is net.ErrClosed. A connection that is dropped without Close is closed
// when the garbage collector finds it, which it does not as long as anything of
// it is used: a RawConn, a call that has not returned, its File for as long as that is
// being made. Who takes NetConn of a dialer's connection has to close the
// result of DialContext; it is not found any more. Until then it is one of Stats.InUse and
// Stats.Tracked: Close of the pool leaves it alone, Shutdown waits for it and
// names it. An error is a *[net.OpError], as that of package net's dialer, and wraps
// an *[Error].
func (p *Pool) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return p.dialCounted(ctx, network, address, 0)
}

// dialCounted is DialContext, and what DialOverflow returns.
func (p *Pool) dialCounted(ctx context.Context, network, address string, overflow int) (net.Conn, error) {
	nc, err := p.dialTracked(ctx, network, address, overflow)
	if pe, ok := err.(*Error); ok {
		return nil, pe.opError(network, address)
	}
	return nc, err
}

func (p *Pool) dialTracked(ctx context.Context, network, address string, overflow int) (net.Conn, error) {
	switch {
	case p.stop == nil:
		return nil, usage(Addr{}, ErrClosed)
	case ctx == nil:
		return nil, usage(Addr{}, errors.New("ctx is nil: pass context.Background()"))
	}
	addr, err := p.cfg.trackedAddr(ctx, network, address)
	if err != nil {
		return nil, err
	}
	start := p.clock.Exactly()
	if ctx.Err() != nil {
		return nil, p.tooLate(ctx, addr)
	}
	// Its books are its own: nothing that is opened here may serve another.
	s := p.newSite(addr)
	s.family, s.absolute = familyOf(network), absolute(network, address)
	s.overflow = uint8(max(0, min(overflow, math.MaxUint8)))
	t := p.cfg.trace(ctx) // a method of ctx, which is foreign: not under the lock
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
		defer p.noteOverflowDialEnded()
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
	c, err := got.w.await(ctx)
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

// trackedAddr is the Addr for what package net calls network and address.
func (cfg *Config) trackedAddr(ctx context.Context, network, address string) (Addr, error) {
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
		if ip := net.ParseIP(host); network != "tcp" && cfg.Dialers[TCP] != nil && (ip == nil || (ip.To4() != nil) != (network == "tcp4")) {
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

// absolute reports whether address names a host with a final dot: a resolver then
// adds nothing of its search list. The canonical Addr has no dot (it is the same
// peer), so the dial has to be told.
func absolute(network, address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && network != "unix" && strings.HasSuffix(host, ".")
}

// dial is sys.dial, for one family of addresses.
func (f family) dial(ctx context.Context, addr Addr) (net.Conn, error) {
	network := map[family]string{family4: "tcp4", family6: "tcp6"}[f]
	var d net.Dialer
	return d.DialContext(ctx, network, net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port))))
}

// tracked is the part of a connection on its way to whoever dialled it that all
// its forms share.
type trackedLoan struct {
	c       *conn
	closed  atomic.Bool
	cleanup runtime.Cleanup
}

// release closes the connection and frees its slot.
func (t *trackedLoan) release() error {
	if t.closed.Swap(true) {
		again := &net.OpError{Op: "close", Source: t.c.nc.LocalAddr(), Addr: t.c.nc.RemoteAddr(), Err: net.ErrClosed}
		if again.Source != nil { // a connection of the user's need not know where it is
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

func (c *conn) untrack(err error) <-chan struct{} {
	p := c.site.pool
	p.mu.Lock()
	p.counts.Tracked--
	p.mu.Unlock()
	return c.discard(ClosedByBorrower, err)
}

// ownPatience is how long a dial waits for a slot before it may take of the overflow.
const ownPatience = 250 * time.Millisecond

// DialOverflow returns a DialContext that is not stalled by a pool full of the
// caller's own connections. A library may need one more connection before it can
// give one up: a PostgreSQL client cancels a query over a second connection, and
// holds the first until that has come through. If all slots of MaxOpen are such
// connections, it would wait for itself.
//
// A dial of the function that DialOverflow returns waits for a slot as others do.
// After 250 milliseconds (under FullFail: at once) it opens its connection beyond
// MaxOpen, as long as no more than n are open beyond it, whoever opened them. What is
// open beyond MaxOpen counts in Stats as everything else does, and is gone when as
// many connections are closed: until then nothing else is opened. So MaxOpen and n
// together are what the process, or the server, must allow.
//
// n is as many as may be needed at the same time, for a PostgreSQL client the queries
// that are cancelled at once; the others wait for these. More than 255 count as 255.
// With n of 0 or less the function is DialContext.
func (p *Pool) DialOverflow(n int) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return p.dialCounted(ctx, network, address, n)
	}
}

// noteStalled is told that w, of a DialOverflow, has waited for ownPatience.
func (w *waiter) noteStalled() {
	p := w.site.pool
	var todo agenda
	p.mu.Lock()
	w.stalled = true
	if w.queued {
		p.admitLocked(&todo)
	}
	p.mu.Unlock()
	todo.run(p)
}

// noteOverflowDialEnded is told that a call of DialOverflow's function has ended.
func (p *Pool) noteOverflowDialEnded() {
	p.mu.Lock()
	p.overflows--
	p.mu.Unlock()
}

// family is what DialContext was asked for.
type family uint8

const (
	familyPooled family = iota // it was not DialContext
	familyAny                  // "tcp" or "unix"
	family4                    // "tcp4"
	family6                    // "tcp6"
)

func familyOf(network string) family {
	switch network {
	case "tcp4":
		return family4
	case "tcp6":
		return family6
	}
	return familyAny
}

// tracked reports whether s is the books of a connection of DialContext's.
func (s *site) unpooled() bool { return s.family != familyPooled }

// track gives c the methods of what it is.
//
// What nobody can reach any more is closed, so what is reached must lead to the
// object that the garbage collector watches, whichever way it is used. The books of
// the pool refer to the connection that was dialled, which therefore is never
// garbage. So the caller gets a copy of it, two words that share the socket, and the
// copy is watched: every method of package net's has it in hand until it returns,
// those that are not exported too (net.Buffers ends in one), and whoever gets at the
// copy has the connection. A RawConn has the socket only, see heldRaw.
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

// lost is called when nobody can reach a connection any more that was not closed.
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

// heldRaw is a RawConn that holds what the garbage collector watches.
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

// trackedConn is what a dialer of the user's made. It cannot be copied, so it is
// the wrapper that is watched, and each method has to hold it.
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

// NetConn is what the dialer returned. Who has that can do without the wrapper, so
// from now on it is not closed before Close is called.
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
