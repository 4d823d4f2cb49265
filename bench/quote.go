package bench

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Quote writes text between the marks <!-- name:begin --> and <!-- name:end --> of a
// document. It leaves a document alone that does not exist or has no marks.
func Quote(doc, name, text string) error {
	begin, end := "<!-- "+name+":begin -->", "<!-- "+name+":end -->"
	page, err := os.ReadFile(doc)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(page), begin)
	if !ok {
		return nil
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return fmt.Errorf("%s: %s without %s", doc, begin, end)
	}
	return os.WriteFile(doc, []byte(before+begin+"\n"+text+end+after), 0o644)
}
