//go:build unix

package sock

import (
	"math"
	"syscall"

	"golang.org/x/sys/unix"
)

// FileLimit returns how many files this process may have open at present. It returns
// false if there is no limit, or if the limit does not fit in 31 bits.
func FileLimit() (int, bool) {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil || uint64(r.Cur) > math.MaxInt32 {
		return 0, false
	}
	return int(r.Cur), true
}

// NoFileFree reports whether the process, or the system, can open no more files. It finds
// out by opening a pipe.
func NoFileFree() bool {
	syscall.ForkLock.RLock() // no child process may inherit the pipe
	defer syscall.ForkLock.RUnlock()
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return OutOfFiles(err)
	}
	unix.Close(p[0])
	unix.Close(p[1])
	return false
}
