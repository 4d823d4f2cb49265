package connpool_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// This file is left out of the search for ids: the faults it makes up below
// would count as proofs.
const (
	contractPage = "docs/contract.md"
	contractTest = "contract_test.go"
)

var contractID = regexp.MustCompile(`\b(?:BETA|TDBC|APR|ORA|PLT|G|TRY|USE|ADO)-X?\d+\b`)

func TestEveryContractLineMarkedDoneIsNamedByATest(t *testing.T) {
	faults, err := contractFaults(os.DirFS("."))
	require.NoError(t, err)
	for _, fault := range faults {
		t.Error(fault)
	}
}

// A check of this kind rots unseen: it would pass as well if it looked at
// nothing.
func TestContractCheckSeesEachFault(t *testing.T) {
	const sound = "| id | what holds | status |\n|---|---|---|\n" +
		"| G-1 | one | done |\n| APR-X02 | two | done |\n| PLT-3 | three | open |\n"
	tree := func(page string, tests ...string) fstest.MapFS {
		fsys := fstest.MapFS{contractPage: {Data: []byte(page)}}
		for i := 0; i < len(tests); i += 2 {
			fsys[tests[i]] = &fstest.MapFile{Data: []byte(tests[i+1])}
		}
		return fsys
	}
	for name, c := range map[string]struct {
		fsys fstest.MapFS
		want []string
	}{
		"none":                       {tree(sound, "a_test.go", "// G-1", "cmd/x/b_test.go", "// (APR-X02, PLT-3)"), nil},
		"done but unnamed":           {tree(sound, "a_test.go", "// G-1"), []string{"APR-X02"}},
		"not a whole word":           {tree(sound, "a_test.go", "G-1 APR-X021 APR-X02b XAPR-X02"), []string{"APR-X02 is done", "APR-X021"}},
		"named outside tests":        {tree(sound, "a_test.go", "G-1", "b.go", "APR-X02", "test.go", "APR-X02"), []string{"APR-X02"}},
		"named in testdata":          {tree(sound, "a_test.go", "G-1", "testdata/a_test.go", "APR-X02"), []string{"APR-X02"}},
		"named in another module":    {tree(sound, "a_test.go", "G-1", "bench/go.mod", "module b", "bench/a_test.go", "APR-X02"), []string{"APR-X02"}},
		"named in this file only":    {tree(sound, "a_test.go", "G-1", contractTest, "APR-X02"), []string{"APR-X02"}},
		"unknown id in a test":       {tree(sound, "a_test.go", "G-1 APR-X02 ORA-9"), []string{"ORA-9"}},
		"id twice":                   {tree(sound+"| PLT-3 | again | open |\n", "a_test.go", "G-1 APR-X02"), []string{"PLT-3"}},
		"unknown status":             {tree(sound+"| G-2 | x | soon |\n", "a_test.go", "G-1 APR-X02"), []string{`"soon"`}},
		"no status":                  {tree(sound+"| G-2 | x |\n", "a_test.go", "G-1 APR-X02"), []string{"3 cells"}},
		"nothing said":               {tree(sound+"| G-2 | | open |\n", "a_test.go", "G-1 APR-X02"), []string{"says nothing"}},
		"an id of no known origin":   {tree(sound+"| XYZ-1 | x | open |\n", "a_test.go", "G-1 APR-X02"), []string{"XYZ-1"}},
		"a page without any promise": {tree("# The contract\n", "a_test.go", ""), []string{"no promise"}},
	} {
		t.Run(name, func(t *testing.T) {
			faults, err := contractFaults(c.fsys)
			require.NoError(t, err)
			require.Len(t, faults, len(c.want), "%q", faults)
			for i, want := range c.want {
				assert.Contains(t, faults[i], want)
			}
		})
	}
	_, err := contractFaults(fstest.MapFS{})
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// contractFaults says in what the contract and the tests below root disagree.
func contractFaults(root fs.FS) (faults []string, err error) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }

	page, err := fs.ReadFile(root, contractPage)
	if err != nil {
		return nil, err
	}
	status := make(map[string]string)
	var done []string // in the order of the page
	inTable := false
	for i, line := range strings.Split(string(page), "\n") {
		at := fmt.Sprintf("%s:%d", contractPage, i+1)
		cells := tableCells(line)
		switch {
		case cells == nil:
			inTable = false
			continue
		case !inTable: // the header decides: the page has other tables too
			inTable = slices.Equal(cells, []string{"id", "what holds", "status"})
			continue
		case strings.Trim(strings.Join(cells, ""), "-:") == "":
			continue
		case len(cells) != 3:
			fault("%s: a line of the contract has 3 cells, this one %d", at, len(cells))
			continue
		}
		id, what, state := cells[0], cells[1], cells[2]
		if _, twice := status[id]; twice {
			fault("%s: %s stands here for the second time", at, id)
		}
		status[id] = state
		if contractID.FindString(id) != id {
			fault("%s: %q is no id", at, id)
		}
		if what == "" {
			fault("%s: %s says nothing", at, id)
		}
		switch state {
		case "done":
			done = append(done, id)
		case "open":
		default:
			fault("%s: the status of %s is %q; it can be done or open", at, id, state)
		}
	}
	if len(status) == 0 {
		fault("%s: no promise found", contractPage)
	}

	named, err := idsNamedByTests(root)
	if err != nil {
		return nil, err
	}
	for _, id := range done {
		if named[id] == "" {
			fault("%s is done, but no test names it", id)
		}
	}
	var strangers []string
	for id, file := range named {
		if _, known := status[id]; !known {
			strangers = append(strangers, fmt.Sprintf("%s names %s, which %s does not have", file, id, contractPage))
		}
	}
	slices.Sort(strangers)
	return append(faults, strangers...), nil
}

// tableCells returns the cells of a line of a Markdown table, nil for any
// other line.
func tableCells(line string) []string {
	line = strings.TrimSpace(line)
	if len(line) < 2 || line[0] != '|' || line[len(line)-1] != '|' {
		return nil
	}
	cells := strings.Split(line[1:len(line)-1], "|")
	for i := range cells {
		cells[i] = strings.TrimSpace(cells[i])
	}
	return cells
}

// idsNamedByTests maps each id to a test file of this module that names it.
func idsNamedByTests(root fs.FS) (map[string]string, error) {
	named := make(map[string]string)
	err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := path.Base(name)
		if entry.IsDir() {
			if name == "." {
				return nil
			}
			_, err := fs.Stat(root, path.Join(name, "go.mod"))
			if err == nil || base == "testdata" || base == "vendor" || strings.HasPrefix(base, ".") {
				return fs.SkipDir
			}
			return nil
		}
		if name == contractTest || !strings.HasSuffix(base, "_test.go") {
			return nil
		}
		text, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		for _, id := range contractID.FindAllString(string(text), -1) {
			named[id] = name
		}
		return nil
	})
	return named, err
}
