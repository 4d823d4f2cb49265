//go:build !unix && !windows

package sock

// Lingers returns false: these systems have no socket option to ask.
func Lingers(uintptr) bool { return false }

// ResetOnClose and Shutdown do nothing here.
func ResetOnClose(uintptr) {}
func Shutdown(uintptr)     {}
