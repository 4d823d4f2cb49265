package sock

import "golang.org/x/sys/windows"

// The system's numbers for what connpool.KindOf tells apart, to be asked for with
// errors.Is. They are those that sockets give here; those of package syscall are invented.
const (
	ErrRefused      = windows.WSAECONNREFUSED
	ErrTimedOut     = windows.WSAETIMEDOUT
	ErrReset        = windows.WSAECONNRESET
	ErrAborted      = windows.WSAECONNABORTED
	ErrPipe         = windows.WSAESHUTDOWN
	ErrNetUnreach   = windows.WSAENETUNREACH
	ErrHostUnreach  = windows.WSAEHOSTUNREACH
	ErrAFNoSupport  = windows.WSAEAFNOSUPPORT
	ErrAddrNotAvail = windows.WSAEADDRNOTAVAIL
	ErrNoMem        = windows.ERROR_NOT_ENOUGH_MEMORY
	ErrNoBufs       = windows.WSAENOBUFS
	ErrProcessFiles = windows.WSAEMFILE
	ErrSystemFiles  = windows.ERROR_TOO_MANY_OPEN_FILES
)
