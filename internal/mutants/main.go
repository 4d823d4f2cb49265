// Command mutants removes the pool's defences one at a time and demands that the tests
// notice. Run it in the module's root:
//
//	go run ./internal/mutants              all of them
//	go run ./internal/mutants -run theft   those whose name matches
//	go run ./internal/mutants -part 2/4    the second of four parts
//	go run ./internal/mutants -list        the list
//	go run ./internal/mutants -in internal/gateway    the gateway's defences
//
// A mutant is a piece of the source, which must occur exactly once, and its replacement
// (see table.go). Each mutant is compiled into the tests of the package, and the named
// tests must fail. The piece may be in a package below, and so may the tests; or the tests
// are a suite of internal/suite. A test that passes without the defence it tests proves
// nothing. A mutant whose text is not found, that does not compile, or that has no test is
// an error in the table. The exit status is 1 if there was any of these.
//
// The tree itself is not touched: everything happens in a copy.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// mutant is one defence removed.
type mutant struct {
	name  string
	file  string // the file with old, with its folder if that is another; "": any file of the package, if old occurs once
	in    string // the folder of the package whose tests must fail; "": the table's package. old is there, too, if it has anything but tests
	old   string
	new   string
	tests string // the pattern of the tests that must fail
}

type outcome struct {
	err  error // nil: the tests failed, as they should
	how  string
	took time.Duration
}

var errSurvived = errors.New("SURVIVED")

func main() {
	in := flag.String("in", ".", "the `package` whose defences are removed: . or internal/gateway")
	only := flag.String("run", "", "only mutants whose name matches this regular `expression`")
	part := flag.String("part", "1/1", "`i/n`: only the i-th of n parts of these, so that several runs share the work")
	tests := flag.String("tests", "", "run the tests of this `pattern` in the place of those in the table")
	list := flag.Bool("list", false, "list the mutants and do nothing")
	jobs := flag.Int("j", max(1, runtime.NumCPU()/2), "how many `mutants` run at the same time")
	timeout := flag.Duration("timeout", 30*time.Second, "of the tests of one mutant; hanging counts as noticing")
	verbose := flag.Bool("v", false, "show the output of the tests")
	flag.Parse()
	table, known := map[string][]mutant{".": mutants, "internal/gateway": gatewayMutants}[filepath.Clean(*in)]
	if !known {
		fatal(fmt.Errorf("there is no table for the package %q", *in))
	}
	chosen, err := choose(table, *only)
	if err == nil {
		chosen, err = partOf(chosen, *part)
	}
	if err != nil {
		fatal(err)
	}
	for i := range chosen {
		if *tests != "" {
			chosen[i].tests = *tests
		}
	}
	if *list {
		for _, m := range chosen {
			fmt.Printf("%-28s %s\n", m.name, m.tests)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	faults, err := run(ctx, *in, chosen, *jobs, *timeout, *verbose)
	stop()
	if err != nil {
		fatal(err)
	}
	if faults > 0 {
		fmt.Printf("%d of %d mutants: no test fails, or the table is wrong\n", faults, len(chosen))
		os.Exit(1)
	}
	fmt.Printf("all %d mutants were noticed\n", len(chosen))
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "mutants:", err)
	os.Exit(1)
}

func choose(all []mutant, only string) ([]mutant, error) {
	re, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	var chosen []mutant
	names := make(map[string]bool)
	for _, m := range all {
		if names[m.name] {
			return nil, fmt.Errorf("two mutants are called %q", m.name)
		}
		names[m.name] = true
		if re.MatchString(m.name) {
			chosen = append(chosen, m)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no mutant matches %q", only)
	}
	return chosen, nil
}

// partOf returns every n-th mutant, beginning with the i-th, for a part of the form i/n.
// The n parts together are all mutants, and take about equally long.
func partOf(all []mutant, part string) ([]mutant, error) {
	first, count, found := strings.Cut(part, "/")
	i, errI := strconv.Atoi(first)
	n, errN := strconv.Atoi(count)
	if !found || errI != nil || errN != nil || i < 1 || n < i {
		return nil, fmt.Errorf("-part %q: write i/n, where i is between 1 and n, for example 2/4", part)
	}
	var chosen []mutant
	for k := i - 1; k < len(all); k += n {
		chosen = append(chosen, all[k])
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("-part %s is empty: there are %d mutants only", part, len(all))
	}
	return chosen, nil
}

// lab is the copy of the module in which everything happens.
type lab struct {
	module  string            // the copy
	dir     string            // of the package whose tests are run, in the copy
	home    string            // of the package that is changed: dir, or the table's if dir has only tests
	scratch string            // folder for build results
	source  map[string]string // text of the package's files, and of the files beside it that mutants name
	verbose bool
	timeout time.Duration
}

func run(ctx context.Context, in string, chosen []mutant, jobs int, timeout time.Duration, verbose bool) (faults int, err error) {
	root, err := moduleRoot()
	if err != nil {
		return 0, err
	}
	tmp, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	module := filepath.Join(tmp, "module")
	if err := copyModule(root, module); err != nil {
		return 0, err
	}
	labs := make(map[string]*lab) // by the folder whose tests are run
	for _, m := range chosen {
		dir := cmp.Or(m.in, in)
		if labs[dir] != nil {
			continue
		}
		l := &lab{module: module, dir: filepath.Join(module, dir), scratch: tmp, verbose: verbose, timeout: timeout}
		those := slices.DeleteFunc(slices.Clone(chosen), func(m mutant) bool { return cmp.Or(m.in, in) != dir })
		l.home = l.dir
		if l.source, err = readSource(l.home); err == nil && len(l.source) == 0 {
			l.home = filepath.Join(module, in)
			l.source, err = readSource(l.home)
		}
		if err != nil {
			return 0, err
		}
		if err := l.readBeside(those); err != nil {
			return 0, err
		}
		if err := l.sound(ctx, those); err != nil {
			return 0, err
		}
		labs[dir] = l
	}

	fmt.Printf("%-28s %-9s %6s  %s\n", "without", "", "", "noticed by")
	var group tasks.Group
	var mu sync.Mutex // orders the lines of the table, and guards faults
	next := make(chan mutant)
	for range jobs {
		group.Go(func() {
			for m := range next {
				o := labs[cmp.Or(m.in, in)].try(ctx, m)
				mu.Lock()
				verdict := "noticed"
				if o.err != nil {
					faults++
					verdict = "FAULT"
					if errors.Is(o.err, errSurvived) {
						verdict = "SURVIVED"
					}
					o.how = strings.TrimSpace(o.err.Error())
				}
				fmt.Printf("%-28s %-9s %5.1fs  %s\n", m.name, verdict, o.took.Seconds(), o.how)
				mu.Unlock()
			}
		})
	}
	for _, m := range chosen {
		if ctx.Err() == nil {
			next <- m
		}
	}
	close(next)
	group.Wait()
	return faults, ctx.Err()
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	file := strings.TrimSpace(string(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("run it inside the module")
	}
	return filepath.Dir(file), nil
}

func copyModule(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.Name() == ".git":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, name), 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), b, 0o644)
	})
}

// readSource reads the package without its tests.
func readSource(dir string) (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	source := make(map[string]string)
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		source[filepath.Base(f)] = string(b)
	}
	return source, nil
}

// readBeside reads the files of other packages that mutants name.
func (l *lab) readBeside(chosen []mutant) error {
	for _, m := range chosen {
		if path.Dir(m.file) == "." {
			continue
		}
		b, err := os.ReadFile(filepath.Join(l.module, m.file))
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		l.source[m.file] = string(b)
	}
	return nil
}

// where returns the path of a file in the copy.
func (l *lab) where(file string) string {
	if path.Dir(file) == "." {
		return filepath.Join(l.home, file)
	}
	return filepath.Join(l.module, file)
}

// sound runs all the needed tests on the unchanged source. If a test fails there, its
// failure with a mutant would prove nothing.
func (l *lab) sound(ctx context.Context, chosen []mutant) error {
	binary := filepath.Join(l.scratch, "sound.test")
	if out, err := l.command(ctx, "go", "test", "-c", "-vet=off", "-o", binary, ".").CombinedOutput(); err != nil {
		return fmt.Errorf("the tests do not compile: %w\n%s", err, out)
	}
	var whole, apart []string // patterns of whole tests, which run in one go, and of subtests
	for _, m := range chosen {
		p, _, part := strings.Cut(m.tests, "/")
		out, err := l.command(ctx, binary, "-test.list", p).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", m.name, err, out)
		}
		if len(bytes.TrimSpace(out)) == 0 {
			return fmt.Errorf("%s: there is no test %s", m.name, m.tests)
		}
		if part {
			apart = append(apart, m.tests)
		} else if !slices.Contains(whole, p) {
			whole = append(whole, p)
		}
	}
	if len(whole) > 0 {
		apart = append(apart, strings.Join(whole, "|"))
	}
	began := time.Now()
	for _, pattern := range apart {
		out, err := l.command(ctx, binary, "-test.run", pattern, "-test.timeout", "10m").CombinedOutput()
		if err != nil {
			return fmt.Errorf("the tests fail already with every defence in place: %w\n%s", err, out)
		}
	}
	fmt.Printf("with every defence in place the tests pass, in %.1fs\n", time.Since(began).Seconds())
	return nil
}

func (l *lab) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = l.dir
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// try compiles the tests with one mutation, and runs the tests that must fail.
func (l *lab) try(ctx context.Context, m mutant) (o outcome) {
	began := time.Now()
	defer func() { o.took = time.Since(began) }()
	file, mutated, err := m.apply(l.source)
	if err != nil {
		return outcome{err: err}
	}
	work, err := os.MkdirTemp(l.scratch, "")
	if err != nil {
		return outcome{err: err}
	}
	defer os.RemoveAll(work)
	replacement := filepath.Join(work, path.Base(file))
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {l.where(file): replacement}})
	if err != nil {
		return outcome{err: err}
	}
	for name, content := range map[string][]byte{replacement: []byte(mutated), filepath.Join(work, "overlay.json"): overlay} {
		if err := os.WriteFile(name, content, 0o644); err != nil {
			return outcome{err: err}
		}
	}
	binary := filepath.Join(work, "mutant.test")
	out, err := l.command(ctx, "go", "test", "-c", "-vet=off", "-overlay", filepath.Join(work, "overlay.json"), "-o", binary, ".").CombinedOutput()
	if err != nil {
		return outcome{err: fmt.Errorf("it does not compile: %s", out)}
	}

	limited, cancel := context.WithTimeout(ctx, l.timeout+10*time.Second)
	defer cancel()
	out, err = l.command(limited, binary, "-test.run", m.tests, "-test.failfast", "-test.timeout", l.timeout.String()).CombinedOutput()
	if l.verbose {
		fmt.Printf("--- %s\n%s", m.name, out)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return outcome{err: fmt.Errorf("%w %s", errSurvived, m.tests)}
	case ctx.Err() != nil:
		return outcome{err: ctx.Err()}
	case !errors.As(err, &exit) && limited.Err() == nil:
		return outcome{err: err}
	}
	return outcome{how: whoNoticed(out)}
}

// apply returns the source with the mutation in it.
func (m *mutant) apply(source map[string]string) (file, mutated string, err error) {
	total := 0
	for name, text := range source {
		if m.file != "" && m.file != name || m.file == "" && path.Dir(name) != "." {
			continue
		}
		if n := strings.Count(text, m.old); n > 0 {
			total += n
			file = name
		}
	}
	if total != 1 {
		return "", "", fmt.Errorf("its text occurs %d times, not once: %q", total, m.old)
	}
	return file, strings.Replace(source[file], m.old, m.new, 1), nil
}

var (
	failed = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)
	hung   = regexp.MustCompile(`panic: test timed out`)
	died   = regexp.MustCompile(`(?m)^(?:panic|fatal error): (.*)$`)
)

// whoNoticed returns the first test that failed, with its subtest.
func whoNoticed(out []byte) string {
	if hung.Match(out) {
		return "a test that hangs"
	}
	var name string
	for _, f := range failed.FindAllSubmatch(out, -1) {
		if len(f[1]) > len(name) && strings.HasPrefix(string(f[1]), name) {
			name = string(f[1])
		}
	}
	switch d := died.FindSubmatch(out); {
	case name != "":
		return name
	case d != nil:
		return "a crash: " + string(d[1])
	}
	return "a failure that names no test"
}
