package connpool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// dialSocket opens the socket of a canonical TCP, TLS or Unix address and sets every field of
// its QoS. Under TLS, the handshake follows.
func dialSocket(ctx context.Context, addr Addr) (net.Conn, error) {
	return dialFrom(ctx, new(net.Dialer), addr)
}

// dialFrom is dialSocket with the settings of base.
func dialFrom(ctx context.Context, base *net.Dialer, addr Addr) (net.Conn, error) {
	network, address, err := target(addr, sock.HasAbstractUnix())
	if err != nil {
		return nil, err
	}
	options := sock.Options(addr.QoS)
	nc, err := options.DialFrom(ctx, base, network, address)
	if network == "unix" && sock.FullBacklog(err) {
		nc, err = awaitBacklog(ctx, err, func() (net.Conn, error) { return options.DialFrom(ctx, base, network, address) })
	}
	return nc, err
}

// awaitBacklog dials again until ctx is done. On Linux a Unix socket whose server has not
// accepted for a moment refuses a dial at once, with EAGAIN, where a TCP socket would wait. A
// burst of one pool is enough to cause this.
func awaitBacklog(ctx context.Context, err error, dial func() (net.Conn, error)) (net.Conn, error) {
	const longest = 50 * time.Millisecond
	timer := time.NewTimer(time.Millisecond)
	defer timer.Stop()
	for pause := time.Millisecond; ; pause = min(2*pause, longest) {
		timer.Reset(pause/2 + rand.N(pause))
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, &backlogFull{err}
		}
		nc, again := dial()
		switch {
		case again != nil && sock.FullBacklog(again):
			err = again
		case again != nil && (ctx.Err() != nil || errors.Is(again, context.DeadlineExceeded)):
			return nil, &backlogFull{err} // the full backlog says more than the end of ctx
		default:
			return nc, again
		}
	}
}

// target translates addr for package net. It returns an error if a system cannot dial addr;
// abstract says whether the system has abstract Unix sockets.
func target(addr Addr, abstract bool) (network, address string, err error) {
	switch addr.Transport {
	case TCP, TLS:
		return "tcp", addr.HostPort(), nil
	case Unix:
		if strings.HasPrefix(addr.Host, "@") && !abstract {
			return "", "", fmt.Errorf("%s has no abstract Unix sockets: give a path in Host (%w)", runtime.GOOS, errors.ErrUnsupported)
		}
		return "unix", addr.Host, nil
	}
	return "", "", fmt.Errorf("nobody dials transport %q: add it to Config.Dialers (%w)", addr.Transport, fs.ErrInvalid)
}

// Control sets, on a socket that is not connected yet, the fields that must be set from
// the first packet on: DSCP, SendBuffer, RecvBuffer and UserTimeout. It fits the
// Control field of [net.Dialer], so a dialer in Config.Dialers may use it:
//
//	d := net.Dialer{Control: addr.QoS.Control}
//
// Delay and KeepAlive have to be set after connecting, because package net overwrites
// them then. A dialer of your own sets them with [net.TCPConn.SetNoDelay] and
// [net.TCPConn.SetKeepAliveConfig]. network must tell the family: "tcp4", "tcp6", "unix"
// and similar. If a field cannot be set, the error names it; the error is
// [errors.ErrUnsupported] if the system or the network has no such option.
func (q QoS) Control(network, address string, c syscall.RawConn) error {
	early := sock.Options(q).Early()
	if early == (sock.Options{}) {
		return nil
	}
	if err := QoS(early).validate(); err != nil {
		return err
	}
	return early.BeforeConnect(network, c)
}
