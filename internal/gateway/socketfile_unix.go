//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// lockDirectoryOf makes gateways that start or end in one directory take turns. It locks
// the directory itself, so that no lock file is left behind. Any process that may read
// the directory may lock it, so lockDirectoryOf waits only until ctx is done; after a
// second it calls tell, once.
func lockDirectoryOf(ctx context.Context, path string, tell func(dir string)) (unlock func(), err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	began, told := time.Now(), false
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		switch err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
		case err == nil:
			return func() { dir.Close() }, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			dir.Close()
			return nil, fmt.Errorf("locking %s: %w", filepath.Dir(path), err)
		}
		if !told && time.Since(began) >= time.Second {
			told = true
			tell(filepath.Dir(path))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			dir.Close()
			return nil, fmt.Errorf("somebody holds a lock on the directory %s, waited %v: find out who (fuser), or choose another directory: %w",
				filepath.Dir(path), time.Since(began).Round(10*time.Millisecond), context.Cause(ctx))
		}
	}
}

// bound is called when a socket has its name and its mode, and does not listen yet. It is
// for tests.
var bound = func(path string) {}

// bindUnix makes a socket at path that nobody can connect to before it has its mode:
// until the socket listens, connections are refused.
func bindUnix(path string, mode fs.FileMode) (net.Listener, error) {
	fail := func(call string, err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: "unix", Addr: &net.UnixAddr{Name: path, Net: "unix"}, Err: os.NewSyscallError(call, err)}
	}
	syscall.ForkLock.RLock() // no child process may inherit the descriptor
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return fail("socket", err)
	}
	f := os.NewFile(uintptr(fd), "unix:"+path)
	defer f.Close() // the listener has a descriptor of its own
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return fail("bind", err)
	}
	err = os.Chmod(path, mode)
	bound(path)
	if err == nil {
		err = os.NewSyscallError("listen", syscall.Listen(fd, 4096)) // the system may lower the backlog
	}
	var l net.Listener
	if err == nil {
		l, err = net.FileListener(f)
	}
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	return l, nil
}
