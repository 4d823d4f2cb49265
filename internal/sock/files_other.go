//go:build !unix

package sock

// FileLimit returns false: these systems have no small limit on open files.
func FileLimit() (int, bool) { return 0, false }

// NoFileFree returns false: these systems have no limit that could be reached.
func NoFileFree() bool { return false }
