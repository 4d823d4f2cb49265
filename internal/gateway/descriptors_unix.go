//go:build unix

package gateway

import (
	"math"
	"os"
	"syscall"
)

// descriptorLimit returns the soft limit of the process, which Go raises to the hard
// limit at the start.
func descriptorLimit() int {
	var r syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r) != nil || uint64(r.Cur) > math.MaxInt32 {
		return 0
	}
	return int(r.Cur)
}

// descriptorsOpen returns how many descriptors are open, as far as the system tells.
func descriptorsOpen() int {
	dir, err := os.Open("/dev/fd")
	if err != nil {
		return 0
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	return len(names) - 1 // not counting the descriptor of this directory read
}
