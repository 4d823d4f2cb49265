package main

import (
	"bytes"
	"os"
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
