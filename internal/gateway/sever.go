package gateway

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// A protocol may end its data with the end of the direction, which then means that the
// data is complete. So a session that breaks must not look like one that has ended.

// broke reports whether a session that ended with err was broken off by a reset, or by
// the gateway (a side that no longer takes bytes, or the cut at the end of the drain).
func (g *Gateway) broke(err error) bool {
	return g.ctx.Err() != nil || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, os.ErrDeadlineExceeded)
}

// resets makes the close of a client's socket a reset. TLS does not need a reset: an end
// without close_notify shows that the data is incomplete.
func resets(raw net.Conn) {
	if tc, ok := raw.(*net.TCPConn); ok {
		tc.SetLinger(0)
	}
}

// sever closes the server connection of a session that did not end properly: with a reset
// if reset is set, and under TLS without close_notify.
func sever(c connpool.Conn, isTLS, reset bool) {
	if rc, err := c.SyscallConn(); err == nil && (isTLS || reset) {
		rc.Control(func(fd uintptr) {
			if isTLS {
				sock.Shutdown(fd)
			} else {
				sock.ResetOnClose(fd)
			}
		})
	}
	c.Close()
}

// errCutOff is the end of a TLS connection without close_notify. Anyone who can cut the
// line can cause it while the client still has bytes to send.
var errCutOff = fmt.Errorf("the connection ended without the goodbye of TLS (%w)", io.ErrUnexpectedEOF)

// whole is the connection under TLS to clients. Between two records crypto/tls treats the
// end of the socket as the end of the stream; then the first part of a cut-off last line
// would be taken for a whole line.
type whole struct{ net.Conn }

func (w whole) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err == io.EOF {
		err = errCutOff
	}
	return n, err
}
