//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package gateway

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// lockDirectoryOf makes gateways that start in one directory take turns. The
// lock is on the directory itself, so that it leaves no file behind.
func lockDirectoryOf(path string) (unlock func(), err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		dir.Close()
		return nil, fmt.Errorf("locking %s: %w", filepath.Dir(path), err)
	}
	return func() { dir.Close() }, nil
}
