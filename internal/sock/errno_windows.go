package sock

import "golang.org/x/sys/windows"

// The system's error numbers that connpool.KindOf tells apart. Compare with errors.Is.
// Sockets on Windows return WSA errors; the constants of package syscall (ECONNREFUSED,
// …) are invented numbers that no socket returns.
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
