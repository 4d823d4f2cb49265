package connpool

import (
	"io"
	"net"
	"os"
	"runtime"
)

// Copies from a loan and to it: the other end may be a loan too, or something that the kernel
// copies from by itself.

// copyIn is ReadFrom of a loan, copyOut is WriteTo. If neither end may be left behind,
// they copy directly. If the other end is a file, a socket or another loan, the whole
// copy runs through aside, so that the kernel sees both ends. Else each Read or Write
// runs through aside.
func (c *conn) copyIn(r io.Reader) (int64, error) {
	over, other := c.over(), overOf(r)
	switch {
	case over == nil && other == nil:
		return readFrom(c.nc, r)
	case !kernels(r):
		return readFrom(c.writer(), r)
	case c.isOverdue(), overdueAt(r):
		return 0, os.ErrDeadlineExceeded
	}
	return aside("ReadFrom of the connection", over, other, func() (int64, error) { return readFrom(c.nc, r) })
}

func (c *conn) copyOut(w io.Writer) (int64, error) {
	over, other := c.over(), overOf(w)
	switch {
	case over == nil && other == nil:
		return writeTo(c.source(), w)
	case !kernels(w):
		return writeTo(c.reader(), w)
	case c.isOverdue(), overdueAt(w):
		return 0, os.ErrDeadlineExceeded
	}
	return aside("WriteTo of the connection", over, other, func() (int64, error) { return writeTo(c.source(), w) })
}

// overdueAt reports whether x is a loan whose ctx is done. A copy that begins after
// that must not start: the interrupt of that loan has already happened.
func overdueAt(x any) bool {
	h, ok := onLoan(x)
	return ok && h.c.isOverdue()
}

// overOf returns over of the loan behind x, nil if x is no loan.
func overOf(x any) <-chan struct{} {
	h, ok := onLoan(x)
	if !ok || h.c == nil {
		return nil
	}
	return h.c.over()
}

// kernels reports whether the kernel may copy from or to x: whether x is a connection
// on loan, a socket or a file.
func kernels(x any) bool {
	switch x := x.(type) {
	case Conn, *Lease, *net.TCPConn, *net.UnixConn, *os.File:
		return true
	case *io.LimitedReader:
		return kernels(x.R)
	}
	return false
}

// readFrom copies from r to nc. If r is a Conn or a Lease, the copy is an operation of
// that loan, too.
func readFrom(nc io.Writer, r io.Reader) (int64, error) {
	if src, ok := onLoan(r); ok { // nc needs the socket behind r: the kernel copies only between sockets
		defer runtime.KeepAlive(r)
		if err := src.c.enterIO(src.gen); err != nil {
			return 0, err
		}
		n, err := readFrom(nc, src.c.source())
		src.c.noteForeignError(err)
		return n, src.c.leaveRead(n, err)
	}
	if rf, ok := nc.(io.ReaderFrom); ok {
		return rf.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{nc}, r)
}

// onLoan returns the loan behind x, if x is a Conn or a Lease that can be used now.
func onLoan(x any) (Conn, bool) {
	switch x := x.(type) {
	case Conn:
		return x, true
	case *Lease:
		h, err := x.loan()
		return h, err == nil
	}
	return Conn{}, false
}

// writeTo copies from nc to w. If w is a Conn or a Lease, the copy is an operation of
// that loan, too.
func writeTo(nc io.Reader, w io.Writer) (int64, error) {
	if dst, ok := onLoan(w); ok {
		defer runtime.KeepAlive(w)
		if err := dst.c.enterIO(dst.gen); err != nil {
			return 0, err
		}
		n, err := writeTo(nc, dst.c.nc)
		dst.c.noteForeignError(err)
		return n, dst.c.leaveWrite(n, err)
	}
	if wt, ok := nc.(io.WriterTo); ok {
		return wt.WriteTo(w)
	}
	return io.Copy(w, struct{ io.Reader }{nc})
}
