// Package short says how much of a heavy test runs. Only tests import it.
package short

import "testing"

// Of returns full, or brief under go test -short. With brief the test must be the same
// test with fewer rounds, seeds or cases, and must still be able to fail.
func Of[T any](full, brief T) T {
	if testing.Short() {
		return brief
	}
	return full
}
