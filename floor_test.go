package connpool

import (
	"go/build"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// groundFloor are the packages below the pool, which know nothing of it.
var groundFloor = []string{"internal/clock", "internal/sock", "internal/tlsrecord"}

// Whatever differs from system to system is in internal/sock: every other file of the
// pool is compiled everywhere, and calls no system by itself.
func TestOnlyTheGroundFloorKnowsTheSystem(t *testing.T) {
	for _, dir := range append([]string{"."}, groundFloor...) {
		names, err := filepath.Glob(filepath.Join(dir, "*.go"))
		require.NoError(t, err)
		require.NotEmpty(t, names)
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") || dir == "internal/sock" {
				continue
			}
			for _, goos := range []string{"linux", "darwin", "freebsd", "windows", "js", "a system to come"} {
				everywhere := build.Context{GOOS: goos, GOARCH: "an architecture to come", Compiler: "gc"}
				matches, err := everywhere.MatchFile(dir, filepath.Base(name))
				require.NoError(t, err)
				require.True(t, matches, "%s is not compiled for %s: move what differs to internal/sock", name, goos)
			}
		}
		for _, f := range source(t, dir) {
			for _, spec := range f.Imports {
				imported := strings.Trim(spec.Path.Value, `"`)
				if dir != "internal/sock" {
					require.False(t, strings.HasPrefix(imported, "golang.org/x/sys/"), "%s imports %s", dir, imported)
				}
				if dir != "." {
					require.NotContains(t, imported, "connpool", "%s is below the pool, and imports %s", dir, imported)
				}
			}
		}
	}
}
