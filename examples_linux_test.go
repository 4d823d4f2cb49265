package connpool_test

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TRY-34: the examples are a module of its own, whose tests nobody runs here;
// the codecs that were wrong about an int of 32 bits, and about a server's own
// errors, are tried all the same. `.ci/run nested` has all of them.
func TestTheExamplesHoldWhereAnIntHas32Bits(t *testing.T) {
	if testing.Short() {
		t.Skip("it compiles two programs")
	}
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "386" {
		t.Skip("this machine runs no programs for 386")
	}
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("there is no go command to compile the examples with")
	}
	run := func(args ...string) (string, error) {
		cmd := exec.Command("go", args...)
		cmd.Dir = "examples"
		cmd.Env = append(os.Environ(), "GOARCH=386", "CGO_ENABLED=0", "GOWORK=off")
		said, err := cmd.CombinedOutput()
		return string(said), err
	}
	if said, err := run("list", "-deps", "-test", "./ldap", "./memcached"); err != nil {
		t.Skipf("the modules of the examples are not there: %s", said)
	}
	said, err := run("test", "-run", "ALengthBeyond|AServersError|Nonsense|^Fuzz", "./ldap", "./memcached")
	if err != nil && strings.Contains(said, "exec format error") {
		t.Skip("this system runs no programs for 386")
	}
	require.NoError(t, err, said)
	require.Equal(t, 2, strings.Count(said, "ok "), said)
}
