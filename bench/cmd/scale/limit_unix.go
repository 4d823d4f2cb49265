//go:build unix

package main

import "syscall"

// descriptors is how many descriptors this process may have.
func descriptors() uint64 {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return 1024
	}
	return min(uint64(l.Cur), 1<<20)
}
