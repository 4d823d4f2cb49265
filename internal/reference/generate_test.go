package main

import (
	"go/build"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../.."

func TestTheReferenceIsWhatTheDocCommentsSay(t *testing.T) {
	if !slices.Contains(build.Default.ReleaseTags, "go1.26") {
		t.Skip("go/doc of Go 1.25 and before takes [Type.Field] for no link, and writes another page")
	}
	want, err := generate(root)
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(root, page))
	require.NoError(t, err)
	if string(got) != string(want) {
		t.Errorf("%s is stale: run `go run ./internal/reference` in the root of the module", page)
	}
}

// module copies the package's files, without tests, to a folder of its own, in
// which edit changes config.go.
func module(t *testing.T, edit func(string) string) string {
	dir := t.TempDir()
	names, err := filepath.Glob(filepath.Join(root, "*.go"))
	require.NoError(t, err)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		if filepath.Base(name) == "config.go" {
			text = []byte(edit(string(text)))
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, filepath.Base(name)), text, 0o600))
	}
	return dir
}

func TestTheReferenceFollowsTheCode(t *testing.T) {
	begin := regexp.MustCompile(`(?m)^type Config struct \{\n`)
	heading := regexp.MustCompile(`(?m)^\t// # .*\n\t//\n`)
	colon := regexp.MustCompile(`(?m)^(\t// # [^:\n]+):`)

	changed, err := generate(module(t, func(s string) string {
		return heading.ReplaceAllString(s, "$0\t// Whoever reads the page sees what this line says.\n\t//\n")
	}))
	require.NoError(t, err)
	require.True(t, strings.Contains(string(changed), "Whoever reads the page sees what this line says."))

	_, err = generate(module(t, func(s string) string {
		return begin.ReplaceAllString(s, "$0\t// Colour is new.\n\tColour string\n\n")
	}))
	require.ErrorContains(t, err, "Config.Colour stands above the first heading")

	_, err = generate(module(t, func(s string) string {
		require.GreaterOrEqual(t, len(colon.FindAllString(s, -1)), 6, "the blocks of Config")
		return colon.ReplaceAllString(s, "$1,")
	}))
	require.ErrorContains(t, err, "not of the form")

	_, err = generate(t.TempDir())
	require.ErrorContains(t, err, "run this in the root")
}
