package sock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Options has the fields of connpool.QoS, in the same order and of the same types. A QoS
// is converted to Options, so a field that only one of the two has does not compile. The
// doc of QoS says what each field means. A zero field is left as package net and the
// system have it. Errors name the field as a field of QoS.
type Options struct {
	DSCP        uint8
	Delay       bool
	KeepAlive   time.Duration
	UserTimeout time.Duration
	SendBuffer  int
	RecvBuffer  int
}

// capabilities lists the options that the sockets of a system support. The options file
// of each system defines the variable socketsCan for that system.
type capabilities struct {
	dscp        bool
	noDelay     bool // and switching keep-alive on or off
	keepAlive   bool // the keep-alive period
	userTimeout bool
	buffers     bool
	abstract    bool // Unix sockets whose name is in no file system
}

// HasAbstractUnix reports whether the system has Unix sockets whose name is in no file
// system.
func HasAbstractUnix() bool { return socketsCan.abstract }

// Dial opens a socket with package net and sets every field of o. ctx governs the dial.
func (o Options) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return o.DialFrom(ctx, new(net.Dialer), network, address)
}

// DialFrom is Dial with the settings of base. The control function of base runs before o sets
// its options, and LocalAddr of base holds for dials of its own network only.
func (o Options) DialFrom(ctx context.Context, base *net.Dialer, network, address string) (net.Conn, error) {
	// Not every port of package net calls Dialer.Control.
	if err := o.Supported(); err != nil {
		return nil, err
	}
	d := *base
	if d.LocalAddr != nil && strings.HasPrefix(network, "unix") != strings.HasPrefix(d.LocalAddr.Network(), "unix") {
		d.LocalAddr = nil
	}
	if early := o.Early(); early != (Options{}) {
		d.Control = nil // package net prefers ControlContext
		d.ControlContext = func(ctx context.Context, network, address string, c syscall.RawConn) error {
			var err error
			switch {
			case base.ControlContext != nil:
				err = base.ControlContext(ctx, network, address, c)
			case base.Control != nil:
				err = base.Control(network, address, c)
			}
			if err != nil {
				return err
			}
			return early.BeforeConnect(network, c)
		}
	}
	if o.KeepAlive != 0 {
		d.KeepAlive, d.KeepAliveConfig = -1, net.KeepAliveConfig{} // AfterConnect sets it and checks the error
	}
	nc, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if err := o.AfterConnect(nc); err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nil
}

// Supported returns nil if this system can set every non-zero field of o. Otherwise it
// returns an [errors.ErrUnsupported] that names the first field it cannot set. Supported
// touches no socket.
func (o Options) Supported() error { return socketsCan.set(o) }

// set returns nil if every non-zero field of o can be set, or an error that names the
// first that cannot.
func (can capabilities) set(o Options) error {
	for _, f := range [...]struct {
		name        string
		wanted, can bool
	}{
		{"DSCP", o.DSCP != 0, can.dscp},
		{"Delay", o.Delay, can.noDelay},
		{"KeepAlive", o.KeepAlive > 0, can.keepAlive},
		{"KeepAlive", o.KeepAlive < 0, can.noDelay},
		{"UserTimeout", o.UserTimeout != 0, can.userTimeout},
		{"SendBuffer", o.SendBuffer != 0, can.buffers},
		{"RecvBuffer", o.RecvBuffer != 0, can.buffers},
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

// Early returns o without the fields that package net overwrites when it connects. What
// is left is set by BeforeConnect; AfterConnect sets the others.
func (o Options) Early() Options {
	o.Delay, o.KeepAlive = false, 0
	return o
}

// BeforeConnect sets the early fields of o on a socket that is not connected yet. network
// must name the address family: "tcp4", "tcp6", "unix" and the like. If there is nothing
// to set, BeforeConnect does not touch c.
func (o Options) BeforeConnect(network string, c syscall.RawConn) error {
	if o = o.Early(); o == (Options{}) {
		return nil
	}
	if err := o.Supported(); err != nil {
		return err
	}
	var err error
	if cerr := c.Control(func(fd uintptr) { err = o.setEarly(fd, network) }); cerr != nil {
		return cerr
	}
	return err
}

func (o Options) setEarly(fd uintptr, network string) error {
	if o.DSCP != 0 {
		ipv6 := strings.HasSuffix(network, "6")
		if !ipv6 && !strings.HasSuffix(network, "4") {
			return unsupported("DSCP", "network "+strconv.Quote(network)+" is neither IPv4 nor IPv6")
		}
		// The lower two bits of the byte are ECN, and the kernel's.
		if err := setTrafficClass(fd, ipv6, int(o.DSCP)<<2); err != nil {
			return fmt.Errorf("QoS.DSCP: %w", err)
		}
	}
	if o.UserTimeout != 0 {
		if !strings.HasPrefix(network, "tcp") {
			return unsupported("UserTimeout", "network "+strconv.Quote(network)+" is not TCP")
		}
		if err := setUserTimeout(fd, int(o.UserTimeout.Milliseconds())); err != nil {
			return fmt.Errorf("QoS.UserTimeout: %w", err)
		}
	}
	if o.SendBuffer != 0 {
		if err := setSendBuffer(fd, o.SendBuffer); err != nil {
			return fmt.Errorf("QoS.SendBuffer: %w", err)
		}
	}
	if o.RecvBuffer != 0 {
		if err := setRecvBuffer(fd, o.RecvBuffer); err != nil {
			return fmt.Errorf("QoS.RecvBuffer: %w", err)
		}
	}
	return nil
}

// tooSmall is the error for a buffer that the system silently made smaller than
// requested.
func tooSmall(asked, got int, advice string) error {
	return fmt.Errorf("%d bytes asked for, %d granted: %s, or ask for less", asked, got, advice)
}

// AfterConnect sets the fields that package net would overwrite if they were set earlier.
// Package net sets its own defaults for both and ignores whether that worked;
// AfterConnect reports errors.
func (o Options) AfterConnect(nc net.Conn) error {
	if !o.Delay && o.KeepAlive == 0 {
		return nil
	}
	tcp, ok := nc.(interface {
		SetNoDelay(bool) error
		SetKeepAliveConfig(net.KeepAliveConfig) error
	})
	if o.Delay {
		if !ok {
			return unsupported("Delay", fmt.Sprintf("a %T is not TCP", nc))
		}
		if err := tcp.SetNoDelay(false); err != nil {
			return fmt.Errorf("QoS.Delay: %w", err)
		}
	}
	if o.KeepAlive != 0 {
		if !ok {
			return unsupported("KeepAlive", fmt.Sprintf("a %T is not TCP", nc))
		}
		// A negative value leaves the system's setting as it is, and makes no system call
		// for an option that the system lacks.
		ka := net.KeepAliveConfig{Enable: false, Idle: -1, Interval: -1, Count: -1}
		if o.KeepAlive > 0 {
			ka = net.KeepAliveConfig{Enable: true, Idle: o.KeepAlive, Interval: o.KeepAlive}
		}
		if err := tcp.SetKeepAliveConfig(ka); err != nil {
			return fmt.Errorf("QoS.KeepAlive: %w", err)
		}
	}
	return nil
}
