package connpool_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"unicode"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
)

// markdown is the pages below root by their paths, but for those of dot folders
// and of testdata.
func markdown(root fs.FS) (map[string]string, error) {
	pages := make(map[string]string)
	err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && name != "." && (strings.HasPrefix(path.Base(name), ".") || path.Base(name) == "testdata"):
			return fs.SkipDir
		case entry.IsDir() || !strings.HasSuffix(name, ".md"):
			return nil
		}
		text, err := fs.ReadFile(root, name)
		pages[name] = string(text)
		return err
	})
	return pages, err
}

// prose is a page without its code: fenced blocks, indented blocks and spans.
func prose(page string) string {
	var out []string
	fenced, blank := false, true
	for _, line := range strings.Split(page, "\n") {
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "```"):
			fenced = !fenced
			line = ""
		case fenced, blank && (strings.HasPrefix(line, "    ") || strings.HasPrefix(line, "\t")):
			line = ""
		default:
			blank = line == ""
		}
		out = append(out, line)
	}
	return regexp.MustCompile("`[^`]*`").ReplaceAllString(strings.Join(out, "\n"), "``")
}

// anchors are the fragments that a page's headings have on the web.
func anchors(page string) map[string]bool {
	all := make(map[string]bool)
	fenced := false
	for _, line := range strings.Split(page, "\n") {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
		}
		title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if fenced || !ok || !strings.HasPrefix(line, "#") {
			continue
		}
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, title)
		for n := 1; all[slug]; n++ {
			if next := fmt.Sprintf("%s-%d", slug, n); !all[next] {
				slug = next
				break
			}
		}
		all[slug] = true
	}
	return all
}

var link = regexp.MustCompile(`\]\(([^()\s]+)\)`)

// linkFaults says which links between the pages below root lead nowhere.
func linkFaults(root fs.FS) (faults []string, links int, err error) {
	pages, err := markdown(root)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range slices.Sorted(maps.Keys(pages)) {
		for _, m := range link.FindAllStringSubmatch(prose(pages[name]), -1) {
			to, err := url.Parse(m[1])
			if err != nil {
				faults = append(faults, fmt.Sprintf("%s: %v", name, err))
				continue
			}
			if to.Scheme != "" {
				continue // another site
			}
			links++
			file := name
			if to.Path != "" {
				file = path.Join(path.Dir(name), to.Path)
			}
			if _, err := fs.Stat(root, file); err != nil {
				faults = append(faults, fmt.Sprintf("%s links to %s, which is not there", name, m[1]))
			} else if to.Fragment != "" && !anchors(pages[file])[to.Fragment] {
				faults = append(faults, fmt.Sprintf("%s links to %s, but %s has no such heading", name, m[1], file))
			}
		}
	}
	return faults, links, nil
}

func TestEveryLinkOfTheDocsLeadsSomewhere(t *testing.T) {
	if _, err := os.Stat("examples/go.mod"); err != nil {
		t.Skip("the repository's other modules are not here, as in a module cache, and the pages link to them")
	}
	faults, links, err := linkFaults(os.DirFS("."))
	require.NoError(t, err)
	for _, fault := range faults {
		t.Error(fault)
	}
	require.Greater(t, links, 50, "the search finds links")
}

func TestTheSearchForLinksSeesEachFault(t *testing.T) {
	for page, fault := range map[string]string{
		"[a](b.md)":                             "",
		"[a](b.md#two-words) [c](b.md#x-1)":     "",
		"[a](docs/c.md) and [d](#here)\n# Here": "",
		"[a](https://example.com/none)":         "",
		"`[a](none.md)` ":                       "",
		"```\n[a](none.md)\n```":                "",
		"\n    [a](none.md)":                    "",
		"[a](none.md)":                          "none.md, which is not there",
		"[a](docs/b.md)":                        "docs/b.md, which is not there",
		"text\n    [a](none.md)":                "none.md, which is not there",
		"```\n```\n[a](none.md)":                "none.md, which is not there",
		"[a](b.md#three)":                       "no such heading",
		"[a](b.md#x-2)":                         "no such heading",
		"[a](b.md#in-code)":                     "no such heading",
		"[a](#two-words)":                       "no such heading",
	} {
		faults, _, err := linkFaults(fstest.MapFS{
			"a.md":           {Data: []byte(page)},
			"b.md":           {Data: []byte("# Two `words`\n## X\n## X\n```\n# In code\n```\n")},
			"docs/c.md":      {Data: []byte("[up](../b.md)")},
			"testdata/d.md":  {Data: []byte("[a](none.md)")},
			".hidden/e.md":   {Data: []byte("[a](none.md)")},
			"docs/other.txt": {Data: []byte("[a](none.md)")},
		})
		require.NoError(t, err)
		if fault == "" {
			require.Empty(t, faults, "%q", page)
			continue
		}
		require.Len(t, faults, 1, "%q", page)
		require.Contains(t, faults[0], fault, "%q", page)
	}
}

// code is the lines of text without their indentation, and without those that are
// blank.
func code(text string) string {
	var lines []string
	for _, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return "\n" + strings.Join(lines, "\n") + "\n"
}

// TestTheCodeOfTheDocsIsCompiled: each block of Go on a page stands, as it is, in a
// test file.
func TestTheCodeOfTheDocsIsCompiled(t *testing.T) {
	names, err := fs.Glob(os.DirFS("."), "example*_test.go")
	require.NoError(t, err)
	ofTestKit, err := fs.Glob(os.DirFS("."), "connpooltest/example*_test.go")
	require.NoError(t, err)
	names = append(names, ofTestKit...)
	ofAdapters, err := fs.Glob(os.DirFS("."), "adapters/*/*.go")
	require.NoError(t, err)
	names = append(names, ofAdapters...)
	var compiled []string
	for _, name := range names {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		compiled = append(compiled, code(string(text)))
	}
	pages, err := markdown(os.DirFS("."))
	require.NoError(t, err)
	if len(ofAdapters) == 0 { // the repository's other modules are not in a module cache
		delete(pages, "docs/adopt.md")
	}
	blocks := 0
	for _, name := range slices.Sorted(maps.Keys(pages)) {
		for i, m := range regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(pages[name], -1) {
			blocks++
			if !slices.ContainsFunc(compiled, func(file string) bool { return strings.Contains(file, code(m[1])) }) {
				t.Errorf("%s: block %d of Go stands in none of %v, so nobody knows whether it compiles:\n%s", name, i+1, names, m[1])
			}
		}
	}
	require.Greater(t, blocks, 5, "the search finds code")
}

func read(t *testing.T, name string) string {
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(text)
}

// TestTheReadmeIsRead: it is short, and says first how to get the module and what to
// run.
func TestTheReadmeIsRead(t *testing.T) {
	readme, mod := read(t, "README.md"), read(t, "go.mod")
	require.LessOrEqual(t, len(readme), 8<<10)
	module := regexp.MustCompile(`(?m)^module (\S+)$`).FindStringSubmatch(mod)[1]
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(mod)[1]
	at := 0
	for _, part := range []string{"go get " + module, "Go " + version, "go run ./cmd/connpool demo", "go test ./...", "```go\n", "## What you get"} {
		i := strings.Index(readme[at:], part)
		require.GreaterOrEqual(t, i, 0, "README.md lacks %q, or has it too late", part)
		at += i
	}
	require.Less(t, strings.Count(readme[:at], "\n"), 45, "a screen")
}

// cells are the first cells of the rows of a page's tables that are one name in
// backquotes.
func cells(page string) (names []string) {
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(page, -1) {
		names = append(names, m[1])
	}
	return names
}

// section is what stands below a heading, to the next one of its rank or above.
func section(t *testing.T, page, heading string) string {
	_, rest, ok := strings.Cut(page, "\n"+heading+"\n")
	require.True(t, ok, "there is no %q", heading)
	rank := strings.IndexByte(heading, ' ')
	for i, line := range strings.Split(rest, "\n") {
		if n := len(line) - len(strings.TrimLeft(line, "#")); n > 0 && n <= rank && strings.HasPrefix(line[n:], " ") {
			return strings.Join(strings.Split(rest, "\n")[:i], "\n")
		}
	}
	return rest
}

// TestEveryReasonKindAndErrorHasAdvice: what the reference names, the pages say what
// to do about, and they name nothing else.
func TestEveryReasonKindAndErrorHasAdvice(t *testing.T) {
	reference, operations, guide := read(t, "docs/reference.md"), read(t, "docs/operations.md"), read(t, "docs/guide.md")
	for _, c := range []struct{ what, by string }{
		{section(t, reference, "## Close reasons"), section(t, operations, "## Why connections are closed")},
		{section(t, reference, "### Kind"), section(t, operations, "## What an error means")},
		{section(t, reference, "### Sentinels"), section(t, guide, "## Errors")},
	} {
		want, got := cells(c.what), cells(c.by)
		require.NotEmpty(t, want)
		for _, name := range want {
			if !slices.Contains(got, name) && name != "ClosedUnknown" {
				t.Errorf("no row of the guide or of operations.md says what %s means", name)
			}
		}
		for _, name := range got {
			if !slices.Contains(want, name) && name != "CloseReason" && name != "Kind" {
				t.Errorf("a row of the guide or of operations.md is about %s, which there is not", name)
			}
		}
	}
	// The texts of the reasons are what an operator reads.
	texts := regexp.MustCompile("(?m)^(\\| `Closed[A-Za-z]+` \\| [a-z-]+ \\|)")
	for _, row := range texts.FindAllString(section(t, reference, "## Close reasons"), -1) {
		if !strings.Contains(row, "`ClosedUnknown`") && !strings.Contains(operations, row) {
			t.Errorf("docs/operations.md has no row that begins with %s", row)
		}
	}
}

// TestTheGuideHasEveryOptionOfAnAddress: the error of an unknown option lists those
// that there are.
func TestTheGuideHasEveryOptionOfAnAddress(t *testing.T) {
	_, err := connpool.ParseAddr("tcp://host:1?nonesuch=1")
	require.Error(t, err)
	known := regexp.MustCompile(`known are ([a-z, -]+) \(`).FindStringSubmatch(err.Error())
	require.Len(t, known, 2, err)
	var told []string
	for _, name := range cells(section(t, read(t, "docs/guide.md"), "## Addresses")) {
		if !strings.Contains(name, ":") { // else it is of the table of text forms
			told = append(told, name)
		}
	}
	require.ElementsMatch(t, strings.Split(known[1], ", "), told)
}

// TestTheNamesOfTheDocsAreTheCodes: what a page writes as a name of this package is
// one. Names of other packages have that in front, or are listed here.
func TestTheNamesOfTheDocsAreTheCodes(t *testing.T) {
	elsewhere := []string{"Read", "Write", "ServerName", "ClientSessionCache",
		"VerifyPeerCertificate", "GetClientCertificate", "Buffered", "Expires", "NetConn", "SetDeadline", "Middleware", "PerConnection"}
	known := make(map[string]bool)
	names, err := fs.Glob(os.DirFS("."), "*.go")
	require.NoError(t, err)
	for _, name := range names {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		if strings.HasSuffix(name, "_test.go") && f.Name.Name != "connpool_test" {
			continue
		}
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				known[d.Name.Name] = true
			case *ast.GenDecl:
				ast.Inspect(d, func(n ast.Node) bool {
					switch n := n.(type) {
					case *ast.TypeSpec:
						known[n.Name.Name] = true
					case *ast.Field:
						for _, id := range n.Names {
							known[id.Name] = true
						}
					case *ast.ValueSpec:
						for _, id := range n.Names {
							known[id.Name] = true
						}
					}
					return true
				})
			}
		}
	}
	span := regexp.MustCompile("`((?:(?:Pool|Config|Conn|Lease|Stats|Trace|Error|Addr|QoS|Limits)\\.)?[A-Z][A-Za-z]+)(?:\\([^`]*\\))?`")
	found := 0
	for _, page := range []string{"README.md", "docs/guide.md", "docs/why.md", "docs/operations.md", "docs/decisions.md", "docs/sizing.md", "docs/adopt.md"} {
		for _, m := range span.FindAllStringSubmatch(read(t, page), -1) {
			found++
			name := m[1][strings.LastIndexByte(m[1], '.')+1:]
			if strings.ToUpper(name) != name && !known[name] && !slices.Contains(elsewhere, name) {
				t.Errorf("%s: `%s` is no name of the package", page, m[1])
			}
		}
	}
	require.Greater(t, found, 200, "the search finds names")
}

// The pages for who changes the code send nobody to a name that is gone.
func TestThePagesOnTheCodeNameWhatThereIs(t *testing.T) {
	var code strings.Builder
	files := make(map[string]bool)
	require.NoError(t, fs.WalkDir(os.DirFS("."), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && name != "." && strings.HasPrefix(entry.Name(), ".") {
			return fs.SkipDir
		}
		if err == nil && !entry.IsDir() && strings.HasSuffix(name, ".go") {
			files[entry.Name()], files[name] = true, true
			code.WriteString(read(t, name))
		}
		return err
	}))
	page := read(t, "ARCHITECTURE.md") + read(t, "docs/files.md")
	known := make(map[string]bool)
	for _, word := range regexp.MustCompile(`\w+`).FindAllString(code.String(), -1) {
		known[word] = true
	}
	names := regexp.MustCompile("`[A-Za-z][\\w.]*`").FindAllString(page, -1)
	require.Greater(t, len(names), 50)
	for _, name := range names {
		for _, part := range strings.Split(strings.Trim(name, "`."), ".") {
			require.True(t, known[part], "a page names %s, which is nothing in the code", name)
		}
	}
	for _, name := range regexp.MustCompile(`[\w/*]+\.go\b`).FindAllString(page, -1) {
		there := files[name]
		for file := range files {
			ok, _ := path.Match(name, file)
			there = there || ok
		}
		require.True(t, there, "a page names %s, which is no file", name)
	}
}
