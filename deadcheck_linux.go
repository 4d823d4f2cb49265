package connpool

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const canPeek = true

// peek looks into a socket without taking anything out of it or waiting. The
// raw system call is right, since MSG_DONTWAIT never blocks, and it spares the
// scheduler's part of an ordinary one.
func peek(fd uintptr) peeked {
	var b [1]byte
	n, errno := recv(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errno == unix.EAGAIN:
		return peeked{}
	case errno != 0:
		return peeked{err: os.NewSyscallError("recvfrom", errno)}
	case n == 0:
		return peeked{err: io.EOF}
	}
	return peeked{bytes: true}
}

// readNow reads what is there. It fails with os.ErrDeadlineExceeded if nothing is.
func readNow(fd uintptr, b []byte) (int, error) {
	n, errno := recv(fd, b, unix.MSG_DONTWAIT)
	switch {
	case errno == unix.EAGAIN:
		return 0, os.ErrDeadlineExceeded
	case errno != 0:
		return 0, os.NewSyscallError("recvfrom", errno)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func recv(fd uintptr, b []byte, flags uintptr) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}
