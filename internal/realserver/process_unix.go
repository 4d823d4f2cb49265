//go:build unix && !linux

package realserver

import "syscall"

func process() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
