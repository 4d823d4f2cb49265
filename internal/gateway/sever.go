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

// What a session carries may be as long as its direction, and then its end says
// that it is whole. So a session that breaks must not look like one that ended.

// broke reports whether a session that ended with err was broken off by a reset, or
// by the gateway (a side that takes nothing any more, the cut).
func (g *Gateway) broke(err error) bool {
	return g.ctx.Err() != nil || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, os.ErrDeadlineExceeded)
}

// resets makes the close of a client's socket a reset. Under TLS there is no need:
// an end that is none has no close_notify.
func resets(raw net.Conn) {
	if tc, ok := raw.(*net.TCPConn); ok {
		tc.SetLinger(0)
	}
}

// sever closes the connection to the server of a session that did not end of
// itself: by a reset if reset is set, and under TLS without a goodbye.
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

// errCutOff is the end of a connection without the goodbye of TLS. Whoever can cut
// the line can bring that about, where the client meant to say more.
var errCutOff = fmt.Errorf("the connection ended without the goodbye of TLS (%w)", io.ErrUnexpectedEOF)

// whole is what TLS runs on to clients. Between two records crypto/tls takes an
// end of the socket for the end of the stream; then the first part of a last line
// would be taken for all of it.
type whole struct{ net.Conn }

func (w whole) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err == io.EOF {
		err = errCutOff
	}
	return n, err
}
