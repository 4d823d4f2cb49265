//go:build !linux

package sock

import "syscall"

// CanWatch says whether this system reports hang-ups without a goroutine for each
// connection. These systems do not; the sweep finds dead connections.
const CanWatch = false

// Watcher is never made on these systems; sock.go says what it promises elsewhere.
type Watcher struct{}

// NewWatcher is not called where CanWatch is false.
func NewWatcher() (*Watcher, error) { return nil, nil }

func (*Watcher) Run(func(fd uintptr, hungUp bool)) {}
func (*Watcher) Close()                            {}
func (*Watcher) Add(syscall.RawConn, bool) error   { return nil }
func (*Watcher) Rearm(syscall.RawConn, bool) error { return nil }
func (*Watcher) Remove(syscall.RawConn)            {}
