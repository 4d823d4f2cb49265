package sock

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanPeek says whether this system lets a process look at a socket's waiting data without
// taking it.
const CanPeek = true

// ID is the socket's cookie: 64 bits that the kernel gives to one socket and never to
// another. The cookie stays the same through dup and does not depend on the number of the
// descriptor.
type ID uint64

// Identify asks the system which socket fd is. It returns false if fd is no open socket,
// or if the system does not tell.
func Identify(fd uintptr) (ID, bool) {
	var cookie uint64
	size := uint32(unsafe.Sizeof(cookie))
	_, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_COOKIE,
		uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&size)), 0)
	return ID(cookie), errno == 0
}

// Still reports whether fd is the socket id. It returns false if the descriptor is closed
// or is no socket.
func Still(fd uintptr, id ID) bool {
	now, ok := Identify(fd)
	return ok && now == id
}

// Peek looks into a socket without waiting and without taking any data out of it. It uses
// a raw system call: MSG_DONTWAIT never blocks, and a raw call saves the work that an
// ordinary one gives to Go's scheduler.
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

// ReadNow reads the data that is waiting. It fails with os.ErrDeadlineExceeded if there
// is none.
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
