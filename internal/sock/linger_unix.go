//go:build unix

package sock

import "golang.org/x/sys/unix"

// Lingers reports whether the close of a socket waits until what was written has
// arrived. One that lingers for no time at all does not wait, but resets.
func Lingers(fd uintptr) bool {
	l, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER)
	return err == nil && l.Onoff != 0 && l.Linger != 0
}

// ResetOnClose makes the close of a socket a reset: what was written and has not
// arrived is lost, and the peer learns that the stream is not whole.
func ResetOnClose(fd uintptr) {
	unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// Shutdown ends both directions of a socket, which stays open.
func Shutdown(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) }
