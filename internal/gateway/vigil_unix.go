//go:build unix && !linux

package gateway

import "golang.org/x/sys/unix"

const canWatch = true

// hasLeft reports whether the peer of a socket has reset the connection or, if fin is
// set, has ended its direction. These systems have no call that finds both out as Linux
// does; unread data in the socket hides the end.
func hasLeft(fd uintptr, fin bool) bool {
	var b [1]byte
	for {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return false
		case err != nil:
			return true
		default:
			return fin && n == 0
		}
	}
}
