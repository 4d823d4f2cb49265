package connpooltest_test

import (
	"context"
	"os"
	"os/exec"
	"testing"

	"github.com/seed-ecb488c9/connpool/internal/patience"
)

// child runs this test binary again, as a process that may fail. It returns what the
// process printed.
func child(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience.Bounded)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Skip("the test does not know its own binary: ", err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), "CONNPOOLTEST_CHILD=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
