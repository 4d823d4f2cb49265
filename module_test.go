package connpool

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// ADO-15: who imports the pool needs Go 1.24.1 (Go 1.24.0 compiles an atomic Or wrongly) and two
// modules, in old versions. Newer ones would make the importer upgrade.
func TestImportingCostsLittle(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	require.Regexp(t, regexp.MustCompile(`(?m)^go 1\.24\.1$`), string(mod))
	for _, line := range []string{"golang-lru/v2 v2.0.1\n", "golang.org/x/sync v0.1.0\n", "golang.org/x/sys v0.1.0\n"} {
		require.Contains(t, string(mod), line)
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command is not here")
	}
	out, err := exec.CommandContext(t.Context(), goTool, "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", ".").Output()
	require.NoError(t, err)
	modules := strings.Fields(string(out))
	slices.Sort(modules)
	require.Equal(t, []string{"github.com/hashicorp/golang-lru/v2", "github.com/seed-ecb488c9/connpool", "golang.org/x/sys"}, slices.Compact(modules))
}
