package bench

import (
	"errors"
	"syscall"
	"unsafe"
)

var errNotQuiet = errors.New("bytes, an error or the end wait on the socket")

// quiet returns nil if nothing waits on the socket. The raw system call cannot block, and
// saves the work that an ordinary one gives to Go's scheduler.
func quiet(fd uintptr) error {
	var b [1]byte
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b)), 1,
		syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
	if errno == syscall.EAGAIN {
		return nil
	}
	return errNotQuiet
}

// cookie returns the socket's cookie.
func cookie(fd uintptr) (c uint64) {
	const soCookie = 57
	size := uint32(8)
	syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, soCookie,
		uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&size)), 0)
	return c
}
