package connpool

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// sources are the positions in what source has parsed.
var sources = token.NewFileSet()

// source is what is in the folders as it is written, without tests, for all systems.
func source(t *testing.T, dirs ...string) []*ast.File {
	var files []*ast.File
	for _, dir := range dirs {
		names, err := filepath.Glob(filepath.Join(dir, "*.go"))
		require.NoError(t, err)
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(sources, name, nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			files = append(files, f)
		}
	}
	return files
}

// waitsIn names the functions of f in which something is waited for: a receive, a
// send, a select without a default, a Wait, a Sleep. Those that lock a mutex
// are not among them: what is done under one cannot block.
func waitsIn(f *ast.File) (names []string) {
	for _, decl := range f.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		waits := false
		var visit func(ast.Node) bool
		visit = func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectStmt:
				polls := slices.ContainsFunc(n.Body.List, func(s ast.Stmt) bool { return s.(*ast.CommClause).Comm == nil })
				waits = waits || !polls
				for _, s := range n.Body.List { // what is done then; the cases themselves were judged
					for _, s := range s.(*ast.CommClause).Body {
						ast.Inspect(s, visit)
					}
				}
				return false
			case *ast.UnaryExpr:
				waits = waits || n.Op == token.ARROW
			case *ast.SendStmt:
				waits = true
			case *ast.CallExpr:
				if sel, ok := n.Fun.(*ast.SelectorExpr); ok {
					waits = waits || slices.Contains([]string{"Wait", "Sleep"}, sel.Sel.Name)
				}
			}
			return true
		}
		ast.Inspect(fn.Body, visit)
		if waits {
			names = append(names, nameOfFunc(fn))
		}
	}
	return names
}

func nameOfFunc(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	recv := fn.Recv.List[0].Type
	if star, ok := recv.(*ast.StarExpr); ok {
		recv = star.X
	}
	if ix, ok := recv.(*ast.IndexExpr); ok {
		recv = ix.X
	}
	return recv.(*ast.Ident).Name + "." + fn.Name.Name
}

// TestTheTableOfWaitsIsComplete: whatever the pool, the gateway and the command wait
// for has a row in docs/waits.md, and each name in the table is one of the code's.
func TestTheTableOfWaitsIsComplete(t *testing.T) {
	text, err := os.ReadFile("docs/waits.md")
	require.NoError(t, err)
	pool, gateway, found := strings.Cut(string(text), "\n## In the gateway\n")
	require.True(t, found)
	for _, part := range []struct {
		text  string
		dirs  []string
		least int // functions that wait
	}{
		{pool, append([]string{"."}, groundFloor...), 15},
		{gateway, []string{"internal/gateway", "cmd/connpool"}, 30},
	} {
		var named []string
		for _, line := range strings.Split(part.text, "\n") {
			if strings.HasPrefix(line, "|") {
				for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(line, -1) {
					named = append(named, m[1])
				}
			}
		}
		files := source(t, part.dirs...)
		known := names(append(files, source(t, ".")...))
		waiting := make(map[string]bool)
		for _, f := range files {
			for _, name := range waitsIn(f) {
				waiting[name] = true
			}
		}
		for _, name := range slices.Sorted(maps.Keys(waiting)) {
			if !slices.Contains(named, name) {
				t.Errorf("%v: %s waits for something, and no row of docs/waits.md says for what, how long, and what then", part.dirs, name)
			}
		}
		for _, name := range named {
			if !known[name] {
				t.Errorf("docs/waits.md names `%s`, which is nothing in %v", name, part.dirs)
			}
		}
		require.Greater(t, len(waiting), part.least, "the search finds what waits")
	}
}

// names are those of functions, values, types and fields.
func names(files []*ast.File) map[string]bool {
	known := make(map[string]bool)
	for _, f := range files {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				known[nameOfFunc(n)] = true
			case *ast.ValueSpec:
				for _, id := range n.Names {
					known[id.Name] = true
				}
			case *ast.TypeSpec:
				known[n.Name.Name] = true
				if st, ok := n.Type.(*ast.StructType); ok {
					for _, field := range st.Fields.List {
						for _, id := range field.Names {
							known[n.Name.Name+"."+id.Name] = true
						}
					}
				}
			}
			return true
		})
	}
	return known
}

// The search itself is tested with the ways in which code can wait.
func TestTheSearchForWaitsSeesEachKind(t *testing.T) {
	for body, waits := range map[string]bool{
		"<-ch": true, "x := <-ch; _ = x": true, "ch <- 1": true, "select {case <-ch: case <-d:}": true,
		"select {case <-ch: default:}": false, "select {case <-ch: default: <-d}": true, "g.Wait()": true,
		"time.Sleep(1)": true, "go func() { c.Wait() }()": true, "mu.Lock()": false, "close(ch)": false,
		"defer func() { ch <- 1 }()": true, "f(<-ch)": true,
	} {
		f, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x; func (p *T) f() { "+body+" }", parser.SkipObjectResolution)
		require.NoError(t, err, body)
		require.Equal(t, waits, len(waitsIn(f)) == 1, body)
	}
}
