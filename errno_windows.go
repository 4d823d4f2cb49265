package connpool

import "golang.org/x/sys/windows"

// The numbers that sockets give here; those of package syscall are invented.
const (
	errRefused      = windows.WSAECONNREFUSED
	errTimedOut     = windows.WSAETIMEDOUT
	errReset        = windows.WSAECONNRESET
	errAborted      = windows.WSAECONNABORTED
	errPipe         = windows.WSAESHUTDOWN
	errNetUnreach   = windows.WSAENETUNREACH
	errHostUnreach  = windows.WSAEHOSTUNREACH
	errAFNoSupport  = windows.WSAEAFNOSUPPORT
	errAddrNotAvail = windows.WSAEADDRNOTAVAIL
	errNoMem        = windows.ERROR_NOT_ENOUGH_MEMORY
	errNoBufs       = windows.WSAENOBUFS
	errProcessFiles = windows.WSAEMFILE
	errSystemFiles  = windows.ERROR_TOO_MANY_OPEN_FILES
)
