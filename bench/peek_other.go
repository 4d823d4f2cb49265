//go:build unix && !linux

package bench

import (
	"errors"
	"syscall"
)

var errNotQuiet = errors.New("bytes, an error or the end wait on the socket")

// quiet reports nil if nothing waits on the socket.
func quiet(fd uintptr) error {
	var b [1]byte
	_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	if err == syscall.EAGAIN {
		return nil
	}
	return errNotQuiet
}

// cookie exists on Linux only.
func cookie(uintptr) uint64 { return 0 }
