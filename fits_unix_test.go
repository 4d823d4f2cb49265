//go:build unix

package connpool

import "golang.org/x/sys/unix"

// fits writes to a socket, and reports whether there was room.
func fits(fd uintptr) bool {
	_, err := unix.Write(int(fd), make([]byte, 64<<10))
	return err == nil
}
