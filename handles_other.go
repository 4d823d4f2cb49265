//go:build !unix

package connpool

// There is no small limit on handles here.
func handleLimit() (int, bool) { return 0, false }

func noHandleFree() bool { return false }
