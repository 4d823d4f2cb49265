package sock

import "golang.org/x/sys/unix"

var socketsCan = capabilities{dscp: true, noDelay: true, keepAlive: true, userTimeout: true, buffers: true, abstract: true}

func setTrafficClass(fd uintptr, ipv6 bool, tos int) error {
	if ipv6 {
		return unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos)
	}
	return unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, tos)
}

func setUserTimeout(fd uintptr, ms int) error {
	return unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, ms)
}

func setSendBuffer(fd uintptr, n int) error {
	return setBuffer(fd, n, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE, "net.core.wmem_max")
}

func setRecvBuffer(fd uintptr, n int) error {
	return setBuffer(fd, n, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, "net.core.rmem_max")
}

// setBuffer first sets the option that any process may set; the kernel silently cuts the
// size down to its limit. If the size was cut, setBuffer tries the option that needs
// CAP_NET_ADMIN. The kernel doubles the size it is given, for its own bookkeeping, and
// reports the doubled size.
func setBuffer(fd uintptr, n, option, force int, limit string) error {
	if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, n); err != nil {
		return err
	}
	got, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option)
	if err == nil && got < 2*n && unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, n) == nil {
		got, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option)
	}
	if err == nil && got < 2*n {
		err = tooSmall(n, got/2, "raise sysctl "+limit)
	}
	return err
}
