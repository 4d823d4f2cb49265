//go:build !(linux || darwin || freebsd || netbsd || openbsd || dragonfly)

package gateway

import (
	"context"
	"io/fs"
	"net"
	"os"
)

// lockDirectoryOf does nothing, because these systems cannot lock directories: two
// gateways that start on one stale socket at the same moment may both take it.
func lockDirectoryOf(context.Context, string, func(string)) (unlock func(), err error) {
	return func() {}, nil
}

// bindUnix gives the socket its mode as soon as it can.
func bindUnix(path string, mode fs.FileMode) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		os.Remove(path)
		return nil, err
	}
	return l, nil
}
