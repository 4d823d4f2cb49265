//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package sock

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

var socketsCan = capabilities{dscp: true, noDelay: true, keepAlive: runtime.GOOS != "openbsd", buffers: true}

func setTrafficClass(fd uintptr, ipv6 bool, tos int) error {
	if ipv6 {
		return unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos)
	}
	return unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, tos)
}

func setUserTimeout(uintptr, int) error { return errors.ErrUnsupported }

func setSendBuffer(fd uintptr, n int) error { return setBuffer(fd, n, unix.SO_SNDBUF) }

func setRecvBuffer(fd uintptr, n int) error { return setBuffer(fd, n, unix.SO_RCVBUF) }

func setBuffer(fd uintptr, n, option int) error {
	const advice = "raise the system's limit for socket buffers (kern.ipc.maxsockbuf or its like)"
	err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, n)
	if errors.Is(err, unix.ENOBUFS) { // most of these systems refuse a size beyond their limit
		return fmt.Errorf("%d bytes asked for: %w: %s, or ask for less", n, err, advice)
	}
	if err != nil {
		return err
	}
	got, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option)
	if err == nil && got < n {
		err = tooSmall(n, got, advice)
	}
	return err
}
