//go:build unix && !linux

package connpool

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const canPeek = true

// peek looks into a socket without taking anything out of it or waiting.
func peek(fd uintptr) peeked {
	var b [1]byte
	n, err := recv(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case err == unix.EAGAIN:
		return peeked{}
	case err != nil:
		return peeked{err: os.NewSyscallError("recvfrom", err)}
	case n == 0:
		return peeked{err: io.EOF}
	}
	return peeked{bytes: true}
}

// readNow reads what is there. It fails with os.ErrDeadlineExceeded if nothing is.
func readNow(fd uintptr, b []byte) (int, error) {
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
