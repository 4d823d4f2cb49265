//go:build unix && !linux

package sock

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// CanPeek says whether this system lets a process look at a socket's waiting data without
// taking it.
const CanPeek = true

// ID is what these systems tell about a socket: device and inode, which identify Unix
// sockets only, and the two addresses, which identify TCP sockets. Where the system gives
// sockets no inode, two Unix connections to one path can look alike; then a descriptor
// that was stolen and now refers to the other one is not noticed.
type ID struct {
	dev, ino      uint64
	local, remote string
}

// Identify asks the system which socket fd is. It returns false if fd is no open socket,
// or if the system does not tell.
func Identify(fd uintptr) (ID, bool) {
	var id ID
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil || uint32(st.Mode)&unix.S_IFMT != unix.S_IFSOCK {
		return ID{}, false
	}
	id.dev, id.ino = uint64(st.Dev), uint64(st.Ino)
	local, err := unix.Getsockname(int(fd))
	if err != nil {
		return ID{}, false
	}
	id.local = fmt.Sprint(local)
	if remote, err := unix.Getpeername(int(fd)); err == nil {
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

// Peek looks into a socket without waiting and without taking any data out of it.
func Peek(fd uintptr) Seen {
	var b [1]byte
	n, err := recv(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case err == unix.EAGAIN:
		return Seen{}
	case err != nil:
		return Seen{Err: os.NewSyscallError("recvfrom", err)}
	case n == 0:
		return Seen{Err: io.EOF}
	}
	return Seen{Bytes: true}
}

// ReadNow reads the data that is waiting. It fails with os.ErrDeadlineExceeded if there
// is none.
func ReadNow(fd uintptr, b []byte) (int, error) {
	n, err := recv(fd, b, unix.MSG_DONTWAIT)
	switch {
	case err == unix.EAGAIN:
		return 0, os.ErrDeadlineExceeded
	case err != nil:
		return 0, os.NewSyscallError("recvfrom", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func recv(fd uintptr, b []byte, flags int) (int, error) {
	for {
		n, _, err := unix.Recvfrom(int(fd), b, flags)
		if err != unix.EINTR {
			return n, err
		}
	}
}
