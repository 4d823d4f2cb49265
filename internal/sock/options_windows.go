package sock

import (
	"errors"

	"golang.org/x/sys/windows"
)

// Windows accepts IP_TOS without an error and then, as a rule, does not send it, so dscp
// is false.
var socketsCan = capabilities{noDelay: true, keepAlive: true, buffers: true}

func setTrafficClass(uintptr, bool, int) error { return errors.ErrUnsupported }

func setUserTimeout(uintptr, int) error { return errors.ErrUnsupported }

func setSendBuffer(fd uintptr, n int) error { return setBuffer(fd, n, windows.SO_SNDBUF) }

func setRecvBuffer(fd uintptr, n int) error { return setBuffer(fd, n, windows.SO_RCVBUF) }

func setBuffer(fd uintptr, n, option int) error {
	if err := windows.SetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, option, n); err != nil {
		return err
	}
	got, err := windows.GetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, option)
	if err == nil && got < n {
		err = tooSmall(n, got, "use a size that Windows grants")
	}
	return err
}
