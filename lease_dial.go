package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
)

// Leases in the shape of a dialer, for libraries that dial through a function of the caller and
// close the connection between their exchanges.
//
// Such a library knows nothing of the pool. It cannot say that an exchange has failed: it only
// closes. So, beyond the rules of a Lease, a connection whose last transfer was a write does not
// go to another borrower: the reply to what was written may still come.

// LeaseContext borrows a connection in the shape of [net.Dialer.DialContext], for a library that
// takes such a function, and closes its connection after an exchange or a few: Close of the
// result gives the connection back, and the next call of LeaseContext gets a warm one. network
// and address are read by [NetAddr], so Scope, QoS and ServerName are unset. ctx bounds the wait
// for the connection; its values serve until Close. An error is a *[net.OpError], as that of
// package net's dialer, and wraps an *[Error].
//
// The result has the methods of a [Lease]. Close judges the connection as [Lease.Return] does,
// which closes it for good after an operation that failed, timed out or is still running, and if
// bytes are left unread. Close also does so if the last transfer was a write, since the reply may
// still come; use [Pool.Lease] for a protocol without replies. Close cannot see a reply that is
// still on the way after a read: the rest of one that the library has read in part, or one to a
// request that the library wrote before it read the reply to another. A library that closes then
// must not be used with LeaseContext.
//
// The library must leave each connection as it found it. One that logs in, selects a database
// or starts TLS on the connection gives the next caller a connection in that state: let Setup do
// the login, let [Pool.LeaseDialer] do TLS, or use [Pool.DialContext], which counts the
// library's connections and lends none again.
func (p *Pool) LeaseContext(ctx context.Context, network, address string) (net.Conn, error) {
	return (&leaseDialer{p: p}).dial(ctx, network, address)
}

// LeaseDialer is [Pool.LeaseContext] for connections with the Transport, Scope, QoS and
// ServerName of addr: TLS by the pool, say, below a library that speaks plain text. If Host of
// addr is "", the function that LeaseDialer returns takes Host and Port from the network and
// address that it is called with; addr may have no Port then. Otherwise the function lends
// connections to addr alone, and refuses a call for another host or port. An addr with Host must
// be valid ([Addr.Validate]); if it is not, each call fails.
func (p *Pool) LeaseDialer(addr Addr) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return (&leaseDialer{p, &addr}).dial(ctx, network, address)
	}
}

// leaseDialer is a dialer that lends.
type leaseDialer struct {
	p    *Pool
	like *Addr // of LeaseDialer; nil for LeaseContext
}

func (d *leaseDialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	l, err := d.lease(ctx, network, address)
	if pe, ok := err.(*Error); ok {
		return nil, pe.opError(network, address)
	}
	if err != nil {
		return nil, err
	}
	return &dialedLease{Lease: l}, nil
}

func (d *leaseDialer) lease(ctx context.Context, network, address string) (*Lease, error) {
	if ctx == nil {
		return nil, usage(Addr{}, errors.New("ctx is nil: pass context.Background()"))
	}
	addr, err := parseNet(ctx, network, address, "localhost") // as in package net
	if err == nil {
		err = oneFamily(network, addr.Host)
	}
	if err == nil && d.like != nil {
		addr, err = d.like.dialedAs(addr)
	}
	if err != nil {
		return nil, usage(Addr{}, fmt.Errorf("dial %s %s: %w", network, address, err))
	}
	return d.p.lease(ctx, addr, 3)
}

// dialedAs is the Addr that LeaseDialer(a) lends for a dial of to. to is canonical.
func (a Addr) dialedAs(to Addr) (Addr, error) {
	if (a.Transport == Unix) != (to.Transport == Unix) {
		return Addr{}, fmt.Errorf("LeaseDialer was made for transport %s", a.Transport)
	}
	if a.Host == "" {
		if a.Port != 0 {
			return Addr{}, errors.New("the Addr of LeaseDialer has a Port and no Host: set both or none")
		}
		a.Host, a.Port = to.Host, to.Port
		return a.canonical()
	}
	a, err := a.canonical()
	if err == nil && (a.Host != to.Host || a.Port != to.Port) {
		err = fmt.Errorf("LeaseDialer was made for %s", a.HostPort())
	}
	return a, err
}

// dialedLease is the lease of a library that took it for a connection of its own.
type dialedLease struct {
	*Lease
	owed atomic.Bool // the last transfer was a write: a reply may still come
}

// Close gives the connection back, or closes it if a reply may still come.
func (d *dialedLease) Close() error { return d.Return() }

// Return is Close.
func (d *dialedLease) Return() error {
	if d.owed.Load() {
		return d.Discard()
	}
	return d.Lease.Return()
}

func (d *dialedLease) Write(b []byte) (int, error) {
	d.owed.Store(true)
	return d.Lease.Write(b)
}

func (d *dialedLease) ReadFrom(r io.Reader) (int64, error) {
	d.owed.Store(true)
	return d.Lease.ReadFrom(r)
}

func (d *dialedLease) Read(b []byte) (int, error) {
	n, err := d.Lease.Read(b)
	d.heard(int64(n))
	return n, err
}

func (d *dialedLease) WriteTo(w io.Writer) (int64, error) {
	n, err := d.Lease.WriteTo(w)
	d.heard(n)
	return n, err
}

func (d *dialedLease) heard(n int64) {
	if n > 0 {
		d.owed.Store(false)
	}
}

// SyscallConn is like that of the lease. What passes through the RawConn's own Read and Write is
// not seen as a transfer, so after a Write there the connection is not lent again.
func (d *dialedLease) SyscallConn() (syscall.RawConn, error) {
	raw, err := d.Lease.SyscallConn()
	if err != nil {
		return nil, err
	}
	return rawDialed{raw, d}, nil
}

type rawDialed struct {
	syscall.RawConn
	d *dialedLease
}

func (r rawDialed) Write(f func(uintptr) bool) error {
	r.d.owed.Store(true)
	return r.RawConn.Write(f)
}
