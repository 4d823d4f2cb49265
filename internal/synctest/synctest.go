//go:build go1.25

// Package synctest is testing/synctest, and, with a Go that does not have it, a way to skip the
// tests that need it. Only tests and package connpooltest import this package.
package synctest

import (
	"testing"
	"testing/synctest"
)

// Available reports whether tests can have bubbles.
const Available = true

// Test is [synctest.Test]: it runs f in a bubble.
func Test(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// Wait is [synctest.Wait]: it waits until every other goroutine of the bubble is blocked.
func Wait() { synctest.Wait() }
