//go:build !unix

package sock

// There is no small limit on open files here.
func FileLimit() (int, bool) { return 0, false }

func NoFileFree() bool { return false }
