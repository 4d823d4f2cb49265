package connpool_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A test fails for what is wrong, and not because the machine is busy. In a
// bubble time is the test's own, and any bound will do. Outside, what is
// waited for is given at least leastPatience, and no test demands that real time
// be shorter than that: what must be quick is told by the order of events, by
// counts, or by a bubble. What has a longer run for those with time has a shorter one
// for those without.

const leastPatience = 30 * time.Second

// unsteady are the functions that may do otherwise, and why.
var unsteady = map[string]string{
	"TestCtxBoundsAllReadsOfALoanTogether": "exact in a bubble, half a minute over sockets",
	"inChild":                              "it has no loop",
}

// steadier reads the tests of one directory.
type steadier struct {
	files  *token.FileSet
	consts map[string]ast.Expr // of the directory
	shared map[string]ast.Expr // of the packages that tests share, as package.Name
	wrong  *[]string
	used   map[string]bool // of unsteady
	in     string          // the function
}

// TRY-40
func TestNoTestFailsBecauseTheMachineIsBusy(t *testing.T) {
	dirs := make(map[string][]string)
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != "."):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go"):
			dirs[filepath.Dir(path)] = append(dirs[filepath.Dir(path)], path)
		}
		return nil
	}))
	require.Greater(t, len(dirs["."]), 100)
	var wrong []string
	used := make(map[string]bool)
	shared := make(map[string]ast.Expr)
	for _, dir := range []string{"internal/patience", "internal/pooltest"} {
		s := &steadier{files: token.NewFileSet(), consts: make(map[string]ast.Expr)}
		for _, path := range dirs[dir] {
			f, err := parser.ParseFile(s.files, path, nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			s.learn(f)
		}
		for name, value := range s.consts {
			shared[filepath.Base(dir)+"."+name] = value
		}
	}
	require.Contains(t, shared, "patience.Bounded")
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		s := &steadier{files: token.NewFileSet(), consts: make(map[string]ast.Expr), shared: shared, wrong: &wrong, used: used}
		var tests []*ast.File
		for _, path := range dirs[dir] {
			f, err := parser.ParseFile(s.files, path, nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			s.learn(f)
			if strings.HasSuffix(path, "_test.go") {
				tests = append(tests, f)
			}
		}
		for _, f := range tests {
			s.read(f)
		}
	}
	require.Empty(t, wrong, strings.Join(wrong, "\n"))
	for name := range unsteady {
		require.True(t, used[name], "%s needs no exception", name)
	}
}

// learn collects the constants of a file, by name.
func (s *steadier) learn(f *ast.File) {
	ast.Inspect(f, func(n ast.Node) bool {
		if d, ok := n.(*ast.GenDecl); ok && d.Tok == token.CONST {
			for _, spec := range d.Specs {
				v := spec.(*ast.ValueSpec)
				for i, name := range v.Names {
					if i < len(v.Values) {
						s.consts[name.Name] = v.Values[i]
					}
				}
			}
		}
		return true
	})
}

func (s *steadier) read(f *ast.File) {
	for _, decl := range f.Decls {
		d, ok := decl.(*ast.FuncDecl)
		if !ok || d.Body == nil {
			continue
		}
		s.in = d.Name.Name
		if (refers(d.Body, "stress") || refers(d.Body, "Stress")) && !refers(d.Body, "short") {
			s.accuse(d, "has a longer run (CONNPOOL_STRESS), and must ask internal/short for a shorter one")
		}
		elapsed := timesOf(d.Body)
		ast.Inspect(d.Body, func(n ast.Node) bool { return s.look(n, elapsed) })
	}
}

// look judges one node, and says whether to look into it.
func (s *steadier) look(n ast.Node, elapsed map[string]bool) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		switch called(n) {
		case "bubble", "synctest.Test":
			return false
		case "require.Eventually", "assert.Eventually", "eventually":
			longest := time.Duration(-1)
			for _, arg := range n.Args {
				if d, ok := s.duration(arg); ok {
					longest = max(longest, d)
				}
			}
			if longest >= 0 && longest < leastPatience {
				s.accuse(n, "waits for %v only", longest)
			}
		case "require.Less", "require.LessOrEqual", "assert.Less", "assert.LessOrEqual":
			if len(n.Args) > 2 && mentions(n.Args[1], elapsed) {
				if d, ok := s.duration(n.Args[2]); !ok || d < leastPatience {
					s.accuse(n, "demands that real time be short")
				}
			}
		}
	case *ast.CommClause:
		// case <-time.After(d): t.Fatal(...)
		if call := afterOf(n.Comm); call != nil && fails(n.Body) {
			if d, ok := s.duration(call.Args[0]); !ok || d < leastPatience {
				s.accuse(n, "gives up after too short a time")
			}
		}
	case *ast.IfStmt:
		if b, ok := n.Cond.(*ast.BinaryExpr); ok && fails(n.Body.List) && (b.Op == token.GTR || b.Op == token.GEQ) && mentions(b.X, elapsed) {
			if d, ok := s.duration(b.Y); !ok || d < leastPatience {
				s.accuse(n, "demands that real time be short")
			}
		}
	}
	return true
}

func (s *steadier) accuse(n ast.Node, format string, args ...any) {
	if unsteady[s.in] != "" {
		s.used[s.in] = true
		return
	}
	*s.wrong = append(*s.wrong, fmt.Sprintf("%s: %s %s", s.files.Position(n.Pos()), s.in, fmt.Sprintf(format, args...)))
}

// duration is the value of an expression of literals, units and constants.
func (s *steadier) duration(e ast.Expr) (time.Duration, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		n, err := strconv.ParseInt(strings.ReplaceAll(e.Value, "_", ""), 10, 64)
		return time.Duration(n), err == nil && e.Kind == token.INT
	case *ast.ParenExpr:
		return s.duration(e.X)
	case *ast.SelectorExpr:
		unit, ok := map[string]time.Duration{"Nanosecond": 1, "Microsecond": time.Microsecond, "Millisecond": time.Millisecond,
			"Second": time.Second, "Minute": time.Minute, "Hour": time.Hour}[e.Sel.Name]
		if x, isName := e.X.(*ast.Ident); isName && !ok {
			if value := s.shared[x.Name+"."+e.Sel.Name]; value != nil {
				return s.duration(value)
			}
		}
		return unit, ok
	case *ast.Ident:
		if value := s.consts[e.Name]; value != nil {
			return s.duration(value)
		}
	case *ast.BinaryExpr:
		x, ok := s.duration(e.X)
		y, alsoOK := s.duration(e.Y)
		if !ok || !alsoOK {
			return 0, false
		}
		switch e.Op {
		case token.ADD:
			return x + y, true
		case token.SUB:
			return x - y, true
		case token.MUL:
			return x * y, true
		case token.QUO:
			return x / max(y, 1), true
		}
	}
	return 0, false
}

// timesOf are the variables of a function that hold elapsed time.
func timesOf(body ast.Node) map[string]bool {
	elapsed := make(map[string]bool)
	ast.Inspect(body, func(n ast.Node) bool {
		if a, ok := n.(*ast.AssignStmt); ok && len(a.Lhs) == len(a.Rhs) {
			for i, value := range a.Rhs {
				if id, ok := a.Lhs[i].(*ast.Ident); ok && mentions(value, nil) {
					elapsed[id.Name] = true
				}
			}
		}
		return true
	})
	return elapsed
}

// mentions reports whether time.Since, or a variable of elapsed time, is in e. What
// is in a function inside e does not count.
func mentions(e ast.Expr, elapsed map[string]bool) (yes bool) {
	ast.Inspect(e, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.CallExpr:
			yes = yes || called(n) == "time.Since"
		case *ast.Ident:
			yes = yes || elapsed[n.Name]
		}
		return true
	})
	return yes
}

// refers reports whether a name, or the variable of the environment that it stands
// for, is in a body.
func refers(body ast.Node, name string) (yes bool) {
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Ident:
			yes = yes || n.Name == name
		case *ast.BasicLit:
			yes = yes || n.Value == `"CONNPOOL_`+strings.ToUpper(name)+`"`
		}
		return true
	})
	return yes
}

// called is the name of what is called.
func called(c *ast.CallExpr) string {
	switch f := c.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			return x.Name + "." + f.Sel.Name
		}
		return f.Sel.Name
	}
	return ""
}

// afterOf is the call in `case <-time.After(d)`.
func afterOf(comm ast.Stmt) *ast.CallExpr {
	if x, ok := comm.(*ast.ExprStmt); ok {
		if u, ok := x.X.(*ast.UnaryExpr); ok && u.Op == token.ARROW {
			if c, ok := u.X.(*ast.CallExpr); ok && called(c) == "time.After" {
				return c
			}
		}
	}
	return nil
}

var failing = map[string]bool{"Fatal": true, "Fatalf": true, "Error": true, "Errorf": true, "Fail": true, "FailNow": true, "panic": true}

// fails reports whether a test fails here.
func fails(body []ast.Stmt) (yes bool) {
	for _, stmt := range body {
		ast.Inspect(stmt, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok {
				yes = yes || failing[called(c)[strings.LastIndexByte(called(c), '.')+1:]]
			}
			return true
		})
	}
	return yes
}
