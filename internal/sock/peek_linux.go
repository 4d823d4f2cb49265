package sock

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanPeek says whether this system lets anybody look into a socket.
const CanPeek = true

// ID is the socket's cookie: 64 bits that the kernel gives to one socket
// and never to another. It follows the socket through dup, and does not depend
// on the number of the descriptor.
type ID uint64

// Identify asks the system which socket fd is. false: fd is no open socket, or the
// system does not tell.
func Identify(fd uintptr) (ID, bool) {
	var cookie uint64
	size := uint32(unsafe.Sizeof(cookie))
	_, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_COOKIE,
		uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&size)), 0)
	return ID(cookie), errno == 0
}

// Still reports whether fd is the socket id. A descriptor that is closed, or
// no socket at all, is not.
func Still(fd uintptr, id ID) bool {
	now, ok := Identify(fd)
	return ok && now == id
}

// Peek looks into a socket without taking anything out of it or waiting. The
// raw system call is right, since MSG_DONTWAIT never blocks, and it spares the
// scheduler's part of an ordinary one.
func Peek(fd uintptr) Seen {
	var b [1]byte
	n, errno := recv(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errno == unix.EAGAIN:
		return Seen{}
	case errno != 0:
		return Seen{Err: os.NewSyscallError("recvfrom", errno)}
	case n == 0:
		return Seen{Err: io.EOF}
	}
	return Seen{Bytes: true}
}

// ReadNow reads what is there. It fails with os.ErrDeadlineExceeded if nothing is.
func ReadNow(fd uintptr, b []byte) (int, error) {
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
