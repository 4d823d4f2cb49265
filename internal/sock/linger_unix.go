//go:build unix

package sock

import "golang.org/x/sys/unix"

// Lingers reports whether the close of a socket waits until what was written has
// arrived. One that lingers for no time at all does not wait, but resets.
func Lingers(fd uintptr) bool {
	l, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER)
	return err == nil && l.Onoff != 0 && l.Linger != 0
}
