package connpool

import (
	"go/ast"
	"go/build"
	"os/exec"
	"path/filepath"
	"slices"
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

// The methods of an error are foreign code, which may use the pool. So no function
// that needs the lock asks an error anything; see Error.classify and failedDial.
func TestNoErrorIsAskedUnderTheLock(t *testing.T) {
	asks := []string{"errors.Is", "errors.As", "KindOf", "unborn", "failedDial", "classify", "isLate"}
	locked := 0
	for _, f := range source(t, ".") {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasSuffix(fn.Name.Name, "Locked") {
				continue
			}
			locked++
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				name := ""
				switch f := call.Fun.(type) {
				case *ast.Ident:
					name = f.Name
				case *ast.SelectorExpr:
					name = f.Sel.Name
					if x, ok := f.X.(*ast.Ident); ok && x.Name == "errors" {
						name = "errors." + name
					}
				}
				if slices.Contains(asks, name) {
					t.Errorf("%s calls %s", fn.Name.Name, name)
				}
				return true
			})
		}
	}
	require.Greater(t, locked, 40)
}

// A method of Pool is about the pool: what is about a connection, a dial, a waiter, or
// another thing with a type is a method of that type. The number is what keeps Pool from
// becoming everybody's receiver again; whoever needs one more looks first for the type
// that the method is really about. The methods of books are not among them.
func TestThePoolHasFewMethods(t *testing.T) {
	const most = 60
	var methods []string
	for _, f := range source(t, ".") {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				if name, ok := strings.CutPrefix(nameOfFunc(fn), "Pool."); ok {
					methods = append(methods, name)
				}
			}
		}
	}
	slices.Sort(methods)
	t.Logf("%d methods of Pool: %s", len(methods), strings.Join(methods, ", "))
	require.Contains(t, methods, "With", "the search finds methods")
	require.LessOrEqual(t, len(methods), most)
}

// ORA-19
func TestThePoolDependsOnLittle(t *testing.T) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command, which knows the dependencies, is not here")
	}
	list := exec.CommandContext(t.Context(), goTool, "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".")
	out, err := list.Output()
	require.NoError(t, err)
	packages := strings.Fields(string(out))
	require.Contains(t, packages, "github.com/seed-ecb488c9/connpool")
	for _, path := range packages {
		known := path == "github.com/seed-ecb488c9/connpool" ||
			slices.Contains(groundFloor, strings.TrimPrefix(path, "github.com/seed-ecb488c9/connpool/"))
		for _, module := range []string{"golang.org/x/sync", "golang.org/x/sys", "github.com/hashicorp/golang-lru/v2"} {
			known = known || strings.HasPrefix(path, module+"/")
		}
		require.True(t, known, "%s is not to be imported", path)
	}
}
