package connpool

import (
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"syscall"
	"time"
)

// The face of a lease as a net.Conn. Each method is that of the [Conn] of the
// standing loan. The lease must stay reachable to its end: a goroutine that is
// blocked in a method, or about to call one, has not forgotten it.

var (
	_ net.Conn      = (*Lease)(nil)
	_ syscall.Conn  = (*Lease)(nil)
	_ io.ReaderFrom = (*Lease)(nil)
	_ io.WriterTo   = (*Lease)(nil)
)

// through calls a method of the standing loan.
func through[T any](l *Lease, method func(Conn) (T, error)) (v T, err error) {
	defer runtime.KeepAlive(l)
	h, err := l.loan()
	if err != nil {
		return v, err
	}
	v, err = method(h)
	return v, l.own(err)
}

// own is err as the lease says it: if the lease ended, or Do began, after the
// look at it, the loan says only that it is over.
func (l *Lease) own(err error) error {
	if err != ErrReturned {
		return err
	}
	if _, e := l.loan(); e != nil {
		return e
	}
	return err
}

// Read reads as net.Conn does. io.EOF comes unwrapped.
func (l *Lease) Read(b []byte) (int, error) {
	defer runtime.KeepAlive(l)
	h, err := l.loan()
	if err != nil {
		return 0, err
	}
	n, err := h.Read(b)
	return n, l.own(err)
}

// Write writes as net.Conn does.
func (l *Lease) Write(b []byte) (int, error) {
	defer runtime.KeepAlive(l)
	h, err := l.loan()
	if err != nil {
		return 0, err
	}
	n, err := h.Write(b)
	return n, l.own(err)
}

// ReadFrom is [Conn.ReadFrom].
func (l *Lease) ReadFrom(r io.Reader) (int64, error) {
	return through(l, func(h Conn) (int64, error) { return h.ReadFrom(r) })
}

// WriteTo is [Conn.WriteTo].
func (l *Lease) WriteTo(w io.Writer) (int64, error) {
	return through(l, func(h Conn) (int64, error) { return h.WriteTo(w) })
}

// CloseWrite is [Conn.CloseWrite]: the connection is closed, not kept, when the
// lease ends.
func (l *Lease) CloseWrite() error {
	_, err := through(l, func(h Conn) (struct{}, error) { return struct{}{}, h.CloseWrite() })
	return err
}

// SetDeadline sets a deadline as net.Conn does.
func (l *Lease) SetDeadline(t time.Time) error { return l.deadline(t, Conn.SetDeadline) }

// SetReadDeadline sets the deadline of reads, as net.Conn does.
func (l *Lease) SetReadDeadline(t time.Time) error { return l.deadline(t, Conn.SetReadDeadline) }

// SetWriteDeadline sets the deadline of writes, as net.Conn does.
func (l *Lease) SetWriteDeadline(t time.Time) error { return l.deadline(t, Conn.SetWriteDeadline) }

func (l *Lease) deadline(t time.Time, set func(Conn, time.Time) error) error {
	_, err := through(l, func(h Conn) (struct{}, error) { return struct{}{}, set(h, t) })
	return err
}

// Detach takes the connection out of the pool for good, as [Conn.Detach] does,
// and ends the lease.
func (l *Lease) Detach() (net.Conn, error) {
	nc, err := through(l, Conn.Detach)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.state = leaseOver
	l.mu.Unlock()
	l.cleanup.Stop()
	return nc, nil
}

// SyscallConn gives access to the socket, as [Conn.SyscallConn] does. What it
// returns ends with the lease, or with the next Do.
func (l *Lease) SyscallConn() (syscall.RawConn, error) {
	raw, err := through(l, Conn.SyscallConn)
	if err != nil {
		return nil, err
	}
	return rawLease{raw, l}, nil
}

// rawLease is a RawConn that keeps its lease from being forgotten.
type rawLease struct {
	syscall.RawConn
	l *Lease
}

func (r rawLease) Control(f func(uintptr)) error {
	defer runtime.KeepAlive(r.l)
	return r.RawConn.Control(f)
}

func (r rawLease) Read(f func(uintptr) bool) error {
	defer runtime.KeepAlive(r.l)
	return r.RawConn.Read(f)
}

func (r rawLease) Write(f func(uintptr) bool) error {
	defer runtime.KeepAlive(r.l)
	return r.RawConn.Write(f)
}

// Addr is the address that was borrowed, in its canonical form, also after the end.
func (l *Lease) Addr() Addr { return l.c.site.addr }

// LocalAddr is the local end, nil after the end and during Do.
func (l *Lease) LocalAddr() net.Addr { return ofLease(l, Conn.LocalAddr) }

// RemoteAddr is the peer's end, nil after the end and during Do.
func (l *Lease) RemoteAddr() net.Addr { return ofLease(l, Conn.RemoteAddr) }

// ConnectionState is that of TLS, as with [Conn.ConnectionState].
func (l *Lease) ConnectionState() tls.ConnectionState { return ofLease(l, Conn.ConnectionState) }

func ofLease[T any](l *Lease, get func(Conn) T) (v T) {
	defer runtime.KeepAlive(l)
	if h, err := l.loan(); err == nil {
		v = get(h)
	}
	return v
}
