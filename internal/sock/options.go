package sock

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Options are the fields of a QoS, in the same order and of the same types, so that
// a QoS converts to Options and a field that only one of the two has does not compile.
// What each means is said there. A zero field is left as package net and the system
// have it. The errors name the field as one of a QoS.
type Options struct {
	DSCP        uint8
	Delay       bool
	KeepAlive   time.Duration
	UserTimeout time.Duration
	SendBuffer  int
	RecvBuffer  int
}

// capabilities says what the sockets of a system can do. Each options file of a
// system has the variable socketsCan, which holds those of one.
type capabilities struct {
	dscp        bool
	noDelay     bool // and keep-alive on or off
	keepAlive   bool // its period
	userTimeout bool
	buffers     bool
	abstract    bool // Unix names that are in no file system
}

// HasAbstractUnix reports whether there are Unix sockets whose name is in no file system.
func HasAbstractUnix() bool { return socketsCan.abstract }

// Supported is nil if this system can set every field of o that is not zero, else an
// [errors.ErrUnsupported] that names the first that it cannot set. It asks no socket.
func (o Options) Supported() error { return socketsCan.set(o) }

// set reports whether every field of o can be set.
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

// Early is o without what package net overwrites when it connects: the part that
// BeforeConnect sets. The rest is set by AfterConnect.
func (o Options) Early() Options {
	o.Delay, o.KeepAlive = false, 0
	return o
}

// BeforeConnect sets the early fields of o on a socket that is not connected yet.
// network is one that tells the family: "tcp4", "tcp6", "unix" and their like. If there
// is nothing to set, c is not touched.
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

// tooSmall is the error for a buffer that the system did not make as large as
// it was told to, which systems do without a word.
func tooSmall(asked, got int, advice string) error {
	return fmt.Errorf("%d bytes asked for, %d granted: %s, or ask for less", asked, got, advice)
}

// AfterConnect sets what package net would overwrite if it were set earlier.
// net does the default of both on its own, and ignores whether it worked.
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
		// A negative number leaves the value of the system as it is, and asks
		// nothing of one that has no such option.
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
