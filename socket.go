package connpool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// capabilities says what the sockets of a system can do. Each sockopt file has
// the variable socketsCan, which holds those of one.
type capabilities struct {
	dscp        bool
	noDelay     bool // and keep-alive on or off
	keepAlive   bool // its period
	userTimeout bool
	buffers     bool
	abstract    bool // Unix names that are in no file system
}

// dialSocket opens the socket of a canonical TCP, TLS or Unix address, with
// every field of its QoS set. Under TLS the handshake is still to come.
func dialSocket(ctx context.Context, addr Addr) (net.Conn, error) {
	network, address, err := socketsCan.target(addr)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Control: addr.QoS.Control}
	if addr.QoS.KeepAlive != 0 {
		d.KeepAlive = -1 // it is for applyConnected, which looks at the error
	}
	nc, err := d.DialContext(ctx, network, address)
	if network == "unix" && errors.Is(err, syscall.EAGAIN) {
		nc, err = awaitBacklog(ctx, err, func() (net.Conn, error) { return d.DialContext(ctx, network, address) })
	}
	if err != nil {
		return nil, err
	}
	if err := addr.QoS.applyConnected(nc); err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nil
}

// awaitBacklog dials again until ctx is done. On Linux a Unix socket whose server
// has not accepted for a moment refuses at once, with EAGAIN, what a TCP socket
// would keep waiting; and a pool's own burst is enough for that.
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
		case again != nil && errors.Is(again, syscall.EAGAIN):
			err = again
		case again != nil && (ctx.Err() != nil || errors.Is(again, context.DeadlineExceeded)):
			return nil, &backlogFull{err} // what it waited for is worth more than that the time is up
		default:
			return nc, again
		}
	}
}

// backlogFull is the end of a wait for a server that does not accept.
type backlogFull struct{ err error }

func (e *backlogFull) Error() string {
	return "the server's backlog is full, it does not accept fast enough: " + e.err.Error()
}
func (e *backlogFull) Unwrap() error { return e.err }

// target translates addr for package net, or says why this system cannot dial
// it. It comes before the dial because not every port of package net calls
// Dialer.Control.
func (can capabilities) target(addr Addr) (network, address string, err error) {
	if err := can.set(addr.QoS); err != nil {
		return "", "", err
	}
	switch addr.Transport {
	case TCP, TLS:
		return "tcp", net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port))), nil
	case Unix:
		if strings.HasPrefix(addr.Host, "@") && !can.abstract {
			return "", "", fmt.Errorf("%s has no abstract Unix sockets: give a path in Host (%w)", runtime.GOOS, errors.ErrUnsupported)
		}
		return "unix", addr.Host, nil
	}
	return "", "", fmt.Errorf("nobody dials transport %q: add it to Config.Dialers (%w)", addr.Transport, fs.ErrInvalid)
}

// set reports whether every field of q can be set.
func (can capabilities) set(q QoS) error {
	for _, f := range [...]struct {
		name        string
		wanted, can bool
	}{
		{"DSCP", q.DSCP != 0, can.dscp},
		{"Delay", q.Delay, can.noDelay},
		{"KeepAlive", q.KeepAlive > 0, can.keepAlive},
		{"KeepAlive", q.KeepAlive < 0, can.noDelay},
		{"UserTimeout", q.UserTimeout != 0, can.userTimeout},
		{"SendBuffer", q.SendBuffer != 0, can.buffers},
		{"RecvBuffer", q.RecvBuffer != 0, can.buffers},
	} {
		if f.wanted && !f.can {
			return unsupported(f.name, runtime.GOOS+" cannot set it")
		}
	}
	return nil
}

func unsupported(field, why string) error {
	return fmt.Errorf("QoS.%s: %s, leave it at zero (%w)", field, why, errors.ErrUnsupported)
}

// Control sets, on a socket that is not connected yet, what must be there from
// the first packet on: DSCP, SendBuffer, RecvBuffer and UserTimeout. It is made
// for the Control field of [net.Dialer], for which a dialer in Config.Dialers
// may use it:
//
//	d := net.Dialer{Control: addr.QoS.Control}
//
// Delay and KeepAlive come after connecting, as package net overwrites them
// then; a dialer of your own sets them with [net.TCPConn.SetNoDelay] and
// [net.TCPConn.SetKeepAliveConfig]. network is one that tells the family:
// "tcp4", "tcp6", "unix" and their like. A field that cannot be set is an
// error that names it, [errors.ErrUnsupported] if the system or the network
// has no such thing.
func (q QoS) Control(network, address string, c syscall.RawConn) error {
	early := QoS{DSCP: q.DSCP, UserTimeout: q.UserTimeout, SendBuffer: q.SendBuffer, RecvBuffer: q.RecvBuffer}
	if early == (QoS{}) {
		return nil
	}
	if err := early.validate(); err != nil {
		return err
	}
	if err := socketsCan.set(early); err != nil {
		return err
	}
	var err error
	if cerr := c.Control(func(fd uintptr) { err = early.setEarly(fd, network) }); cerr != nil {
		return cerr
	}
	return err
}

func (q QoS) setEarly(fd uintptr, network string) error {
	if q.DSCP != 0 {
		ipv6 := strings.HasSuffix(network, "6")
		if !ipv6 && !strings.HasSuffix(network, "4") {
			return unsupported("DSCP", "network "+strconv.Quote(network)+" is neither IPv4 nor IPv6")
		}
		// The lower two bits of the byte are ECN, and the kernel's.
		if err := setTrafficClass(fd, ipv6, int(q.DSCP)<<2); err != nil {
			return fmt.Errorf("QoS.DSCP: %w", err)
		}
	}
	if q.UserTimeout != 0 {
		if !strings.HasPrefix(network, "tcp") {
			return unsupported("UserTimeout", "network "+strconv.Quote(network)+" is not TCP")
		}
		if err := setUserTimeout(fd, int(q.UserTimeout.Milliseconds())); err != nil {
			return fmt.Errorf("QoS.UserTimeout: %w", err)
		}
	}
	if q.SendBuffer != 0 {
		if err := setSendBuffer(fd, q.SendBuffer); err != nil {
			return fmt.Errorf("QoS.SendBuffer: %w", err)
		}
	}
	if q.RecvBuffer != 0 {
		if err := setRecvBuffer(fd, q.RecvBuffer); err != nil {
			return fmt.Errorf("QoS.RecvBuffer: %w", err)
		}
	}
	return nil
}

// tooSmall is the error for a buffer that the system did not make as large as
// it was told to, which systems do without a word.
func tooSmall(asked, got int, advice string) error {
	return fmt.Errorf("%d bytes asked for, %d granted: %s, or ask for less", asked, got, advice)
}

// applyConnected sets what package net would overwrite if it were set earlier.
// net does the default of both on its own, and ignores whether it worked.
func (q QoS) applyConnected(nc net.Conn) error {
	if !q.Delay && q.KeepAlive == 0 {
		return nil
	}
	tcp, ok := nc.(interface {
		SetNoDelay(bool) error
		SetKeepAliveConfig(net.KeepAliveConfig) error
	})
	if q.Delay {
		if !ok {
			return unsupported("Delay", fmt.Sprintf("a %T is not TCP", nc))
		}
		if err := tcp.SetNoDelay(false); err != nil {
			return fmt.Errorf("QoS.Delay: %w", err)
		}
	}
	if q.KeepAlive != 0 {
		if !ok {
			return unsupported("KeepAlive", fmt.Sprintf("a %T is not TCP", nc))
		}
		// A negative number leaves the value of the system as it is, and asks
		// nothing of one that has no such option.
		ka := net.KeepAliveConfig{Enable: false, Idle: -1, Interval: -1, Count: -1}
		if q.KeepAlive > 0 {
			ka = net.KeepAliveConfig{Enable: true, Idle: q.KeepAlive, Interval: q.KeepAlive}
		}
		if err := tcp.SetKeepAliveConfig(ka); err != nil {
			return fmt.Errorf("QoS.KeepAlive: %w", err)
		}
	}
	return nil
}
