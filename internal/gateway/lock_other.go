//go:build !(linux || darwin || freebsd || netbsd || openbsd || dragonfly)

package gateway

// lockDirectoryOf does nothing where directories cannot be locked: two gateways
// that start on one stale socket at the same moment may then both take it.
func lockDirectoryOf(string) (unlock func(), err error) { return func() {}, nil }
