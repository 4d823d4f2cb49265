//go:build !unix

package gateway

const canWatch = false

// hasLeft returns false: on these systems the gateway notices that a client left when it
// writes to the client.
func hasLeft(uintptr, bool) bool { return false }
