package sock

import (
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// CanPeek says whether this system lets a process look at a socket's waiting data without
// taking it.
const CanPeek = true

// ID is the pair of addresses of a socket. Windows tells nothing else about it.
type ID struct{ local, remote string }

// Identify asks the system which socket fd is. It returns false if fd is no open socket,
// or if the system does not tell.
func Identify(fd uintptr) (ID, bool) {
	local, err := windows.Getsockname(windows.Handle(fd))
	if err != nil {
		return ID{}, false
	}
	id := ID{local: fmt.Sprint(local)}
	if remote, err := windows.Getpeername(windows.Handle(fd)); err == nil {
		id.remote = fmt.Sprint(remote)
	}
	return id, true
}

// Still reports whether fd is the socket id. The system forgets the remote address of a
// connection that was reset, so a missing remote address does not count as a difference.
func Still(fd uintptr, id ID) bool {
	now, ok := Identify(fd)
	if now.remote == "" {
		now.remote = id.remote
	}
	return ok && now == id
}

var wsaPoll = windows.NewLazySystemDLL("ws2_32.dll").NewProc("WSAPoll")

const (
	pollRdNorm = 0x0100
	msgPeek    = 0x2
)

// readable reports whether a read would return at once. Sockets on Windows are in
// blocking mode (package net uses overlapped I/O), so Peek and ReadNow call readable
// before each read.
func readable(fd uintptr) (bool, error) {
	pfd := struct {
		fd              uintptr
		events, revents int16
	}{fd: fd, events: pollRdNorm}
	n, _, err := wsaPoll.Call(uintptr(unsafe.Pointer(&pfd)), 1, 0)
	if int32(n) < 0 {
		return false, os.NewSyscallError("WSAPoll", err)
	}
	return int32(n) > 0, nil
}

func recv(fd uintptr, b []byte, flags uint32) (int, error) {
	buf := windows.WSABuf{Len: uint32(len(b)), Buf: unsafe.SliceData(b)}
	var n uint32
	if err := windows.WSARecv(windows.Handle(fd), &buf, 1, &n, &flags, nil, nil); err != nil {
		return 0, os.NewSyscallError("WSARecv", err)
	}
	return int(n), nil
}

// Peek looks into a socket without waiting and without taking any data out of it.
func Peek(fd uintptr) Seen {
	switch ready, err := readable(fd); {
	case err != nil:
		return Seen{Err: err}
	case !ready:
		return Seen{}
	}
	var b [1]byte
	switch n, err := recv(fd, b[:], msgPeek); {
	case err != nil:
		return Seen{Err: err}
	case n == 0:
		return Seen{Err: io.EOF}
	}
	return Seen{Bytes: true}
}

// ReadNow reads the data that is waiting. It fails with os.ErrDeadlineExceeded if there
// is none.
func ReadNow(fd uintptr, b []byte) (int, error) {
	switch ready, err := readable(fd); {
	case err != nil:
		return 0, err
	case !ready:
		return 0, os.ErrDeadlineExceeded
	}
	n, err := recv(fd, b, 0)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return n, err
}
