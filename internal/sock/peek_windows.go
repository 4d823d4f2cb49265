package sock

import (
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// CanPeek says whether this system lets anybody look into a socket.
const CanPeek = true

// ID is the pair of addresses, all that this system tells of a socket.
type ID struct{ local, remote string }

// Identify asks the system which socket fd is. false: fd is no open socket, or the
// system does not tell.
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

// Still reports whether fd is the socket id. The system forgets the remote
// address of a connection that was reset, so a missing one is no difference.
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

// readable asks whether a read would return at once. Sockets here are in
// blocking mode (package net uses overlapped I/O), so this precedes each read.
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

// Peek looks into a socket without taking anything out of it or waiting.
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

// ReadNow reads what is there. It fails with os.ErrDeadlineExceeded if nothing is.
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
