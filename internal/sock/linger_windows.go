package sock

import (
	"unsafe"

	"golang.org/x/sys/windows"
)

// Lingers reports whether closing the socket waits until the data written to it has
// arrived (SO_LINGER with a time above zero). A linger time of zero does not wait: it
// makes the close a reset.
func Lingers(fd uintptr) bool {
	var l struct{ onoff, seconds uint16 }
	size := int32(unsafe.Sizeof(l))
	err := windows.Getsockopt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_LINGER, (*byte)(unsafe.Pointer(&l)), &size)
	return err == nil && l.onoff != 0 && l.seconds != 0
}

// ResetOnClose makes the close of a socket a reset: data that was written and has not
// arrived is lost, and the peer learns that the stream is incomplete.
func ResetOnClose(fd uintptr) {
	windows.SetsockoptLinger(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_LINGER, &windows.Linger{Onoff: 1})
}

// Shutdown ends both directions of a socket. The descriptor stays open.
func Shutdown(fd uintptr) { windows.Shutdown(windows.Handle(fd), windows.SHUT_RDWR) }
