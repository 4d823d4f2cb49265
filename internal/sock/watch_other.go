//go:build !linux

package sock

import "syscall"

// CanWatch says whether this system tells of a hang-up without a goroutine for each
// connection. Here the sweep finds it.
const CanWatch = false

// Watcher is never made here: see the one for Linux.
type Watcher struct{}

// NewWatcher is not called where CanWatch is false.
func NewWatcher() (*Watcher, error) { return nil, nil }

func (*Watcher) Run(func(fd uintptr, hungUp bool)) {}
func (*Watcher) Close()                            {}
func (*Watcher) Add(syscall.RawConn, bool) error   { return nil }
func (*Watcher) Rearm(syscall.RawConn, bool) error { return nil }
func (*Watcher) Remove(syscall.RawConn)            {}
