package realserver

import "syscall"

// process ends the server if the test's process is killed.
func process() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
