package sock

import (
	"unsafe"

	"golang.org/x/sys/windows"
)

// Lingers reports whether the close of a socket waits until what was written has
// arrived. One that lingers for no time at all does not wait, but resets.
func Lingers(fd uintptr) bool {
	var l struct{ onoff, seconds uint16 }
	size := int32(unsafe.Sizeof(l))
	err := windows.Getsockopt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_LINGER, (*byte)(unsafe.Pointer(&l)), &size)
	return err == nil && l.onoff != 0 && l.seconds != 0
}

// ResetOnClose makes the close of a socket a reset: what was written and has not
// arrived is lost, and the peer learns that the stream is not whole.
func ResetOnClose(fd uintptr) {
	windows.SetsockoptLinger(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_LINGER, &windows.Linger{Onoff: 1})
}

// Shutdown ends both directions of a socket, which stays open.
func Shutdown(fd uintptr) { windows.Shutdown(windows.Handle(fd), windows.SHUT_RDWR) }
