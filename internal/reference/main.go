// Command reference writes docs/reference.md from the doc comments of package connpool,
// so that the page agrees with the code. Run it in the root of the module after a change
// of a doc comment, a field or a constant:
//
//	go run ./internal/reference
//
// A test of this package fails while the page is stale.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// page is the path of the reference in the module.
const page = "docs/reference.md"

func main() {
	if err := write("."); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

// write writes the page of the module at root.
func write(root string) error {
	text, err := generate(root)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, page), text, 0o644)
}
