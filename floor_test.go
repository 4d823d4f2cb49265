package connpool

import (
	"go/ast"
	"go/build"
	"go/importer"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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

// floors are the floors of the pool, from the top down, as the headings in docs/files.md
// name them, each with the prefix that only its files have.
var floors = []struct{ name, prefix string }{
	{"faces", ""}, {"flows", "pool_"}, {"connections", "conn_"}, {"books", "books_"}, {"parts", ""}, {"words", ""},
}

// arrowsUp are what a file names although it stands on a higher floor, by file and name, with
// the reason. Whoever wants to add one looks first whether the declaration can move.
var arrowsUp = map[string]string{
	"config.go Conn":                   "Reset, Check and Push get one: the types of public fields",
	"env.go Pool":                      "the way of the flows, whose methods are those of connections and dials, to the books",
	"conn_foreign.go discard":          "an interrupt closes a connection whose deadline has no effect, and its slot becomes free",
	"conn_loan.go noteLived":           "the first answer of a peer ends the doubt about its address",
	"conn_resident.go noteClientEnded": "the failed read of a client that owns the I/O is how the pool hears of the end",
}

// floorsOf is the floor of each file: the greater, the higher.
func floorsOf(t *testing.T) map[string]int {
	doc, err := os.ReadFile("docs/files.md")
	require.NoError(t, err)
	_, table, found := strings.Cut(string(doc), "| **"+floors[0].name+"** |")
	require.True(t, found)
	on := map[string]int{}
	for i, f := range floors {
		rows, below, found := strings.Cut(table, "\n| **")
		require.True(t, found)
		for _, row := range strings.Split(rows, "\n") {
			cells := strings.Split(row, "|")
			if len(cells) < 3 {
				continue
			}
			for _, name := range regexp.MustCompile(`\w+\.go`).FindAllString(cells[1], -1) {
				require.NotContains(t, on, name, "it stands on one floor")
				require.FileExists(t, name)
				on[name] = len(floors) - i
				for _, o := range floors {
					if o.prefix != "" && strings.HasPrefix(name, o.prefix) {
						require.Equal(t, o.name, f.name, "the prefix of %s names the floor", name)
					}
				}
			}
		}
		if i+1 < len(floors) {
			name, rest, _ := strings.Cut(below, "** |")
			require.Equal(t, floors[i+1].name, name)
			table = rest
		}
	}
	return on
}

// namesAbove is what the files name that is declared on a floor above their own: a function, a
// method, a type, a field, a variable or a constant, each as "file name".
func namesAbove(t *testing.T, on map[string]int, extra string) (arrows []string) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command, which knows the types of imported packages, is not here")
	}
	list := exec.CommandContext(t.Context(), goTool, "list", "-deps", "-export", "-f", "{{.ImportPath}} {{.Export}}", ".")
	list.Stderr = os.Stderr
	out, err := list.Output()
	require.NoError(t, err)
	exported := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		exported[path] = file
	}
	files, fset := parsed(t, extra)
	info := types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(exported[path])
	})}
	pkg, err := conf.Check("connpool", fset, files, &info)
	require.NoError(t, err)
	seen := map[string]bool{}
	for id, obj := range info.Uses {
		if obj.Pkg() != pkg {
			continue
		}
		from, to := fset.Position(id.Pos()).Filename, fset.Position(obj.Pos()).Filename
		require.Contains(t, on, from, "it stands on no floor of docs/files.md")
		require.Contains(t, on, to, "it stands on no floor of docs/files.md")
		if on[to] > on[from] {
			seen[from+" "+obj.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// A file can be read without those that stand above it.
func TestNoFileNamesWhatStandsAboveIt(t *testing.T) {
	on := floorsOf(t)
	on["extra.go"] = on["addr.go"]
	extra := `package connpool
		func extra(l *Lease, x *call) {
			const phases = numPhases
			var b books
			briefly("", 0, nil)
			l.Discard()
			_, _, _ = noQueue, x.step, b.sites.last.top
		}`
	var found, ofExtra []string
	for _, arrow := range namesAbove(t, on, extra) {
		if name, ok := strings.CutPrefix(arrow, "extra.go "); ok {
			ofExtra = append(ofExtra, name)
		} else {
			found = append(found, arrow)
		}
	}
	require.Equal(t, slices.Sorted(maps.Keys(arrowsUp)), found)
	require.ElementsMatch(t, strings.Fields("Lease call numPhases books briefly Discard noQueue step sites last top"), ofExtra, "the search sees each kind of name")
}

// The methods of an error are foreign code, which may use the pool. So no function
// that needs the lock asks an error anything; see Error.classify and failedDial.
func TestNoErrorIsAskedUnderTheLock(t *testing.T) {
	asks := []string{"errors.Is", "errors.As", "KindOf", "lostBeforeUse", "failedDial", "classify", "isLate"}
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
