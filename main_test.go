package connpool

import (
	"flag"
	"os"
	"runtime/debug"
	"testing"
)

// The heap of the tests is so small that it is collected many times a second. A brief
// run has it grow a bit more in between, which saves a tenth of its time; the tests that
// are about what the collector finds call it themselves.
func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		debug.SetGCPercent(400)
	}
	os.Exit(m.Run())
}
