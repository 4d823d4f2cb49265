// Command table measures this pool and its rivals, all workloads in turn, five times
// over. It writes the medians as one Markdown table to standard output and into the
// documents that quote it.
//
// It runs in the directory of the module bench:
//
//	go run ./cmd/table                   everything, some minutes
//	go run ./cmd/table -raw raw.txt      keeps the output for benchstat
//	go run ./cmd/table -smoke            each workload once, writes no document
//	go run ./cmd/table -addr HOST:PORT   a server of yours, pooled and unpooled
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool/bench"
)

func main() {
	rounds := flag.Int("rounds", 5, "how often everything is measured")
	raw := flag.String("raw", "", "file for the output that benchstat reads")
	smoke := flag.Bool("smoke", false, "run each workload once, in its smallest form, to see that it runs")
	only := flag.String("only", "", "measure the workloads whose names begin with one of these, separated by commas, and write no document")
	addr := flag.String("addr", "", "measure loans of connections to this server, as connpool.ParseAddr takes it")
	docs := flag.String("docs", "../docs/performance.md", "documents that quote the table")
	flag.Parse()
	if err := run(*rounds, *raw, *only, *addr, *docs, *smoke); err != nil {
		fmt.Fprintln(os.Stderr, "table:", err)
		os.Exit(1)
	}
}

func run(rounds int, raw, only, addr, docs string, smoke bool) error {
	tmp, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "bench.test")
	build := exec.Command("go", "test", "-c", "-o", bin, ".")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go test -c: %w (run this in the directory bench)", err)
	}
	if addr != "" {
		cmd := exec.Command(bin, "-test.run=^$", "-test.bench=^BenchmarkYours$")
		cmd.Env = append(os.Environ(), "CONNPOOL_BENCH_ADDR="+addr)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	}
	out := io.Discard
	if raw != "" {
		f, err := os.Create(raw)
		if err != nil {
			return err
		}
		defer f.Close()
		out = f
	}
	if smoke {
		rounds = 1
	}
	got := results{}
	began := time.Now()
	for round := range rounds {
		for _, w := range workloads {
			if only != "" && !slices.ContainsFunc(strings.Split(only, ","), func(p string) bool { return strings.HasPrefix(w.name, p) }) {
				continue
			}
			args := []string{"-test.run=^$", "-test.bench=^Benchmark" + w.name + "$", "-test.benchtime=" + w.time, "-test.timeout=10m"}
			if smoke {
				args = append(args, "-test.short", "-test.benchtime=1x")
			}
			fmt.Fprintf(os.Stderr, "\r%3.0f s  round %d of %d  %-20s", time.Since(began).Seconds(), round+1, rounds, w.name)
			cmd := exec.Command(bin, args...)
			var text bytes.Buffer
			cmd.Stdout, cmd.Stderr = &text, &text
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("%s: %w\n%s", w.name, err, text.String())
			}
			if _, err := out.Write(text.Bytes()); err != nil {
				return err
			}
			got.add(text.String())
		}
	}
	fmt.Fprintf(os.Stderr, "\r%3.0f s  done%40s\n", time.Since(began).Seconds(), "")
	var page strings.Builder
	got.write(&page, fmt.Sprintf("`go run ./cmd/table -rounds %d` in `bench`", rounds), !smoke)
	fmt.Print(page.String())
	if smoke || only != "" {
		return nil
	}
	for _, doc := range strings.Split(docs, ",") {
		if err := errors.Join(bench.Quote(doc, "table", page.String()), bench.Quote(doc, "parts", got.parts())); err != nil {
			return err
		}
	}
	return nil
}

// workloads are the benchmarks, in the order in which a round runs them, with the time
// for each of their parts.
var workloads = []struct{ name, time string }{
	{"W1", "120ms"},
	{"Used", "60ms"},
	{"UsedCodec", "60ms"},
	{"UsedW2", "150ms"},
	{"UsedW4", "8000x"},
	{"UsedW5", "6000x"},
	{"UsedW5Own", "6000x"},
	{"Cheap", "30ms"},
	{"W2", "150ms"},
	{"W3", "30000x"},
	{"W4", "12000x"},
	{"W5", "8000x"},
	{"W6", "80ms"},
	{"W7", "1x"},
	{"W8", "9x"},
	{"W8Warm", "1x"},
	{"W9", "1x"},
	{"W11", "2000x"},
	{"W12", "1x"},
	{"Primed", "1x"},
	{"Handle", "100ms"},
	{"Workers", "1x"},
	{"Cores", "100ms"},
	{"Parts", "60ms"},
}

// results are the figures by benchmark and unit, one for each round.
type results map[string]map[string][]float64

func (r results) add(text string) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(f[0], "Benchmark")
		if i := strings.LastIndexByte(name, '-'); i >= 0 {
			name = name[:i] // the number of processors
		}
		if r[name] == nil {
			r[name] = map[string][]float64{}
		}
		for i := 2; i+1 < len(f); i += 2 {
			if v, err := strconv.ParseFloat(f[i], 64); err == nil {
				r[name][f[i+1]] = append(r[name][f[i+1]], v)
			}
		}
	}
}

func (r results) median(name, unit string) (float64, bool) {
	v := slices.Clone(r[name][unit])
	if len(v) == 0 {
		return 0, false
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2, true
}
