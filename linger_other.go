//go:build !unix && !windows

package connpool

// lingers says no: there is no socket option to ask here.
func lingers(uintptr) bool { return false }
