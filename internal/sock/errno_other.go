//go:build !windows

package sock

import "syscall"

// The system's error numbers that connpool.KindOf tells apart. Compare with errors.Is.
const (
	ErrRefused      = syscall.ECONNREFUSED
	ErrTimedOut     = syscall.ETIMEDOUT
	ErrReset        = syscall.ECONNRESET
	ErrAborted      = syscall.ECONNABORTED
	ErrPipe         = syscall.EPIPE
	ErrNetUnreach   = syscall.ENETUNREACH
	ErrHostUnreach  = syscall.EHOSTUNREACH
	ErrAFNoSupport  = syscall.EAFNOSUPPORT
	ErrAddrNotAvail = syscall.EADDRNOTAVAIL
	ErrNoMem        = syscall.ENOMEM
	ErrNoBufs       = syscall.ENOBUFS
	ErrProcessFiles = syscall.EMFILE
	ErrSystemFiles  = syscall.ENFILE
)
