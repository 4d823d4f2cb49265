package adaptertest

import (
	"fmt"
	"go/parser"
	"go/scanner"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// linesOfCode is how many lines of the source have code on them, and how many there are.
func linesOfCode(t *testing.T, name string) (code, all int) {
	src, err := os.ReadFile(name)
	require.NoError(t, err)
	files := token.NewFileSet()
	_, err = parser.ParseFile(files, name, src, parser.SkipObjectResolution)
	require.NoError(t, err)
	var s scanner.Scanner
	file := files.AddFile(name, files.Base(), len(src))
	s.Init(file, src, nil, 0) // comments are left out
	lines := map[int]bool{}
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return len(lines), strings.Count(string(src), "\n")
		}
		if tok == token.SEMICOLON && lit == "\n" {
			continue
		}
		for n := range strings.Count(lit, "\n") + 1 {
			lines[file.Line(pos)+n] = true
		}
	}
}

// ADO-14: an adapter is one file of at most a hundred lines, with tests, in a module of its own,
// and docs/adopt.md says how long it is.
func TestAnAdapterIsOneShortFileAndThePageKnowsIt(t *testing.T) {
	page, err := os.ReadFile("../../docs/adopt.md")
	require.NoError(t, err)
	modules, err := filepath.Glob("../../adapters/*/go.mod")
	require.NoError(t, err)
	if len(modules) == 0 {
		t.Skip("the repository's other modules are not here, as in a module cache")
	}
	require.GreaterOrEqual(t, len(modules), 5)
	for _, mod := range modules {
		dir := filepath.Dir(mod)
		name := filepath.Base(dir)
		t.Run(name, func(t *testing.T) {
			files, err := filepath.Glob(filepath.Join(dir, "*.go"))
			require.NoError(t, err)
			var sources []string
			for _, f := range files {
				if !strings.HasSuffix(f, "_test.go") {
					sources = append(sources, filepath.Base(f))
				}
			}
			require.Equal(t, []string{name + ".go"}, sources)
			require.FileExists(t, filepath.Join(dir, name+"_test.go"))
			code, all := linesOfCode(t, filepath.Join(dir, name+".go"))
			require.LessOrEqual(t, all, 100)
			require.Contains(t, string(page), fmt.Sprintf("[adapters/%s](../adapters/%[1]s/%[1]s.go) %d (%d) |", name, code, all))
		})
	}
}
