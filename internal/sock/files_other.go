//go:build !unix

package sock

// FileLimit says that there is no small limit on open files here.
func FileLimit() (int, bool) { return 0, false }

// NoFileFree says that there is no limit that could be reached.
func NoFileFree() bool { return false }
