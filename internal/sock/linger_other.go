//go:build !unix && !windows

package sock

// Lingers says no: there is no socket option to ask here.
func Lingers(uintptr) bool { return false }

// ResetOnClose and Shutdown do nothing here.
func ResetOnClose(uintptr) {}
func Shutdown(uintptr)     {}
