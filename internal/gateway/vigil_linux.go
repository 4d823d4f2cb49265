package gateway

import "golang.org/x/sys/unix"

const canWatch = true

// hasLeft reports whether the peer of a socket has reset the connection or, if fin is
// set, has ended its direction. Unread data in the socket does not hide that.
func hasLeft(fd uintptr, fin bool) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if _, err := unix.Poll(p, 0); err != nil {
		return false
	}
	return p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 || fin && p[0].Revents&unix.POLLRDHUP != 0
}
