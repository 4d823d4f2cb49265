//go:build !windows

package connpool

import "syscall"

// The system's numbers for what KindOf tells apart.
const (
	errRefused      = syscall.ECONNREFUSED
	errTimedOut     = syscall.ETIMEDOUT
	errReset        = syscall.ECONNRESET
	errAborted      = syscall.ECONNABORTED
	errPipe         = syscall.EPIPE
	errNetUnreach   = syscall.ENETUNREACH
	errHostUnreach  = syscall.EHOSTUNREACH
	errAFNoSupport  = syscall.EAFNOSUPPORT
	errAddrNotAvail = syscall.EADDRNOTAVAIL
	errNoMem        = syscall.ENOMEM
	errNoBufs       = syscall.ENOBUFS
	errProcessFiles = syscall.EMFILE
	errSystemFiles  = syscall.ENFILE
)
