//go:build unix

package sock

import "golang.org/x/sys/unix"

// Lingers reports whether closing the socket waits until the data written to it has
// arrived (SO_LINGER with a time above zero). A linger time of zero does not wait: it
// makes the close a reset.
func Lingers(fd uintptr) bool {
	l, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER)
	return err == nil && l.Onoff != 0 && l.Linger != 0
}

// ResetOnClose makes the close of a socket a reset: data that was written and has not
// arrived is lost, and the peer learns that the stream is incomplete.
func ResetOnClose(fd uintptr) {
	unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// Shutdown ends both directions of a socket. The descriptor stays open.
func Shutdown(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) }
