package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheCommandPageIsWhatHelpSays(t *testing.T) {
	var page bytes.Buffer
	require.Equal(t, exitOK, run(t.Context(), []string{"help", "-markdown"}, &page, &page))
	on, err := os.ReadFile("../../docs/command.md")
	require.NoError(t, err)
	if string(on) != page.String() {
		t.Error("docs/command.md is stale: run `go run ./cmd/connpool help -markdown >docs/command.md` in the root of the module")
	}
	for _, c := range commands {
		var help bytes.Buffer
		require.Equal(t, exitOK, run(t.Context(), []string{c.name, "-h"}, &help, &help))
		require.True(t, strings.Contains(page.String(), "\n## connpool "+c.name+"\n"), c.name)
		require.True(t, strings.Contains(page.String(), help.String()), c.name)
	}
}

// Each flag that a page names is a flag of a command.
func TestTheFlagsOfThePagesAreTheCommands(t *testing.T) {
	known := make(map[string]bool)
	for _, c := range commands {
		var help bytes.Buffer
		require.Equal(t, exitOK, run(t.Context(), []string{c.name, "-h"}, &help, &help))
		for _, m := range regexp.MustCompile(`(?m)^  -([a-z0-9-]+)`).FindAllStringSubmatch(help.String(), -1) {
			known[m[1]] = true
		}
	}
	require.Greater(t, len(known), 50)
	found := 0
	for _, page := range []string{"gateway.md", "sizing.md", "guide.md", "why.md", "operations.md", "security.md", "contract.md"} {
		text, err := os.ReadFile("../../docs/" + page)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile("`-([a-z][a-z0-9-]*)(?:[ `])").FindAllStringSubmatch(string(text), -1) {
			found++
			if !known[m[1]] {
				t.Errorf("docs/%s names -%s, which is no flag of any command", page, m[1])
			}
		}
	}
	require.Greater(t, found, 50)
}
