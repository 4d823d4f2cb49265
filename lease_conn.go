package connpool

import (
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"syscall"
	"time"
)

// The methods of a lease as a net.Conn. Each calls the same method of the [Conn] of the
// current loan. The lease must stay reachable until its end: runtime.KeepAlive keeps a
// lease from being reported as leaked while a goroutine is in one of its methods.

var (
	_ net.Conn      = (*Lease)(nil)
	_ syscall.Conn  = (*Lease)(nil)
	_ io.ReaderFrom = (*Lease)(nil)
	_ io.WriterTo   = (*Lease)(nil)
)

// through calls a method of the current loan.
func through[T any](l *Lease, method func(Conn) (T, error)) (v T, err error) {
	defer runtime.KeepAlive(l)
	h, err := l.loan()
	if err != nil {
		return v, err
	}
	v, err = method(h)
	return v, l.own(err)
}

// own returns err as an error of the lease: if the lease ended, or Do began, after
// l.loan was called, the loan's ErrReturned is replaced by the lease's error.
func (l *Lease) own(err error) error {
	if err != ErrReturned {
		return err
	}
	if _, e := l.loan(); e != nil {
		return e
	}
	return err
}

// Read reads as net.Conn does. io.EOF is returned unwrapped.
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

// CloseWrite is [Conn.CloseWrite]: when the lease ends, the pool closes the connection.
func (l *Lease) CloseWrite() error {
	_, err := through(l, func(h Conn) (struct{}, error) { return struct{}{}, h.CloseWrite() })
	return err
}

// SetDeadline sets both deadlines, as net.Conn does.
func (l *Lease) SetDeadline(t time.Time) error { return l.deadline(t, Conn.SetDeadline) }

// SetReadDeadline sets the read deadline, as net.Conn does.
func (l *Lease) SetReadDeadline(t time.Time) error { return l.deadline(t, Conn.SetReadDeadline) }

// SetWriteDeadline sets the write deadline, as net.Conn does.
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

// SyscallConn gives access to the socket, as [Conn.SyscallConn] does. The result is
// valid until the lease ends, or the next Do begins.
func (l *Lease) SyscallConn() (syscall.RawConn, error) {
	raw, err := through(l, Conn.SyscallConn)
	if err != nil {
		return nil, err
	}
	return rawLease{raw, l}, nil
}

// rawLease is a RawConn that keeps its lease reachable.
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

// Addr returns the address that was borrowed, in its canonical form, also after the
// end.
func (l *Lease) Addr() Addr { return l.c.site.addr }

// LocalAddr returns the address of the local end, nil after the end and during Do.
func (l *Lease) LocalAddr() net.Addr { return ofLease(l, Conn.LocalAddr) }

// RemoteAddr returns the address of the peer's end, nil after the end and during Do.
func (l *Lease) RemoteAddr() net.Addr { return ofLease(l, Conn.RemoteAddr) }

// ConnectionState returns the state of TLS, as [Conn.ConnectionState] does.
func (l *Lease) ConnectionState() tls.ConnectionState { return ofLease(l, Conn.ConnectionState) }

// ofLease returns what get finds in the current loan; the zero T if the lease cannot be
// used now.
func ofLease[T any](l *Lease, get func(Conn) T) (v T) {
	defer runtime.KeepAlive(l)
	if h, err := l.loan(); err == nil {
		v = get(h)
	}
	return v
}
