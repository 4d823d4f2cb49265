//go:build !go1.25 && !goexperiment.synctest

// Package synctest is testing/synctest, and, with a Go that does not have it, a way to skip the
// tests that need it. Only tests and package connpooltest import this package.
package synctest

import "testing"

// Available reports whether tests can have bubbles.
const Available = false

// Test skips the test.
func Test(t *testing.T, _ func(t *testing.T)) {
	t.Helper()
	t.Skip("testing/synctest needs Go 1.25, or Go 1.24 with GOEXPERIMENT=synctest")
}

// Wait panics, as outside a bubble.
func Wait() {
	panic("there is no bubble: testing/synctest needs Go 1.25, or Go 1.24 with GOEXPERIMENT=synctest")
}
