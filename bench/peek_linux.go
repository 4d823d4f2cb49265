package bench

import (
	"errors"
	"syscall"
	"unsafe"
)

var errNotQuiet = errors.New("bytes, an error or the end wait on the socket")

// quiet reports nil if nothing waits on the socket. The raw system call spares
// the scheduler's part of an ordinary one; it cannot block.
func quiet(fd uintptr) error {
	var b [1]byte
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b)), 1,
		syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
	if errno == syscall.EAGAIN {
		return nil
	}
	return errNotQuiet
}

// cookie asks who the socket is.
func cookie(fd uintptr) (c uint64) {
	const soCookie = 57
	size := uint32(8)
	syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, soCookie,
		uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&size)), 0)
	return c
}
