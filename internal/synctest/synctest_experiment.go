//go:build !go1.25 && goexperiment.synctest

package synctest

import (
	"testing"
	"testing/synctest"
)

// Available reports whether tests can have bubbles.
const Available = true

// Test runs f in a bubble, as a test inside t, so that what f hands to Cleanup runs in the bubble.
func Test(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Run(func() { t.Run("bubble", f) })
}

// Wait waits until every other goroutine of the bubble is blocked.
func Wait() { synctest.Wait() }
