// Command gateway measures "connpool gateway" in front of a redis-server with
// redis-benchmark. It compares the gateway with the server itself and with the installed
// proxies, HAProxy in TCP mode and nutcracker (twemproxy). The measurements take turns,
// on loopback, for several rounds. The medians go to standard output and into the
// documents that quote them.
//
// It runs in the directory of the module bench:
//
//	go run ./cmd/gateway             some minutes
//	go run ./cmd/gateway -smoke      a short run that writes no document
package main

import (
	"bufio"
	"encoding/csv"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/bench"
)

const upstream = 8 // connections that a way with a limit may open

// way is one way to the server.
type way struct {
	name    string
	program string // must be installed; "": not a program of the machine
	// start runs it on a port; nil: the server itself.
	start func(port int, tmp string, server int) (*exec.Cmd, error)
}

// load is a set of arguments for redis-benchmark.
type load struct {
	name string
	args []string
}

var loads = []load{
	{"50 clients", []string{"-c", "50"}},
	{"50 clients, pipelines of 16", []string{"-c", "50", "-P", "16"}},
	{"1,000 clients", []string{"-c", "1000"}},
}

// figure is one measurement.
type figure struct {
	rate  float64 // requests a second
	p50   float64 // milliseconds
	p99   float64
	conns int // the most connections that the server had at once
}

func main() {
	rounds := flag.Int("rounds", 5, "how often everything is measured")
	requests := flag.Int("n", 100_000, "requests of one measurement")
	smoke := flag.Bool("smoke", false, "measure little, write no document")
	docs := flag.String("docs", "../docs/gateway.md", "documents that quote the table")
	flag.Parse()
	if *smoke {
		*rounds, *requests, *docs = 1, 2000, ""
	}
	if err := run(*rounds, *requests, *docs); err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
}

func run(rounds, requests int, docs string) error {
	for _, need := range []string{"redis-server", "redis-benchmark"} {
		if _, err := exec.LookPath(need); err != nil {
			return fmt.Errorf("there is no %s: install the packages redis-server and redis-tools", need)
		}
	}
	tmp, err := os.MkdirTemp("", "gwb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	build := exec.Command("go", "build", "-o", filepath.Join(tmp, "connpool"), "./cmd/connpool")
	build.Dir, build.Stderr = "..", os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go build: %w (run this in the directory bench)", err)
	}

	server, err := freePort()
	if err != nil {
		return err
	}
	redis := exec.Command("redis-server", "--bind", "127.0.0.1", "--port", strconv.Itoa(server), "--dir", tmp,
		"--save", "", "--appendonly", "no", "--maxclients", "5000")
	if err := redis.Start(); err != nil {
		return err
	}
	defer stop(redis)
	if err := answers(server); err != nil {
		return err
	}
	ways := []*way{
		{"direct", "", nil},
		{"connpool gateway", "", startGateway},
		{"HAProxy, TCP mode", "haproxy", startHAProxy},
		{"nutcracker", "nutcracker", startNutcracker},
	}
	ways = slices.DeleteFunc(ways, func(w *way) bool {
		left := w.program != "" && programPath(w.program) == ""
		if left {
			fmt.Fprintf(os.Stderr, "left out, as it is not installed: %s\n", w.name)
		}
		return left
	})
	figures := make(map[[2]int][]figure)
	for round := range rounds {
		for l := range loads {
			for i := range ways {
				at := (i + round) % len(ways) // so that no way is always the first
				f, err := measure(ways[at], loads[l], requests, tmp, server)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", ways[at].name, loads[l].name, err)
				}
				figures[[2]int{l, at}] = append(figures[[2]int{l, at}], f)
				fmt.Fprintf(os.Stderr, "\rround %d of %d: %-30s %-30s", round+1, rounds, loads[l].name, ways[at].name)
			}
		}
	}
	fmt.Fprintln(os.Stderr)

	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", machine(redis.Path))
	fmt.Fprintf(&b, "GET of 3 bytes, %d requests at a time, medians of %d rounds; at most %d connections to the server where that can be limited.\n\n", requests, rounds, upstream)
	b.WriteString("| clients | way | requests a second | of direct | p50 | p99 | connections to the server |\n|---|---|---|---|---|---|---|\n")
	for l := range loads {
		direct := median(figures[[2]int{l, 0}], func(f figure) float64 { return f.rate })
		for i, w := range ways {
			fs := figures[[2]int{l, i}]
			rate := median(fs, func(f figure) float64 { return f.rate })
			fmt.Fprintf(&b, "| %s | %s | %s | %.0f %% | %.2f ms | %.2f ms | %.0f |\n", loads[l].name, w.name, thousands(rate), 100*rate/direct,
				median(fs, func(f figure) float64 { return f.p50 }), median(fs, func(f figure) float64 { return f.p99 }),
				median(fs, func(f figure) float64 { return float64(f.conns) }))
		}
	}
	fmt.Print(b.String())
	for doc := range strings.SplitSeq(docs, ",") {
		if doc != "" {
			if err := bench.Quote(doc, "gateway", b.String()); err != nil {
				return err
			}
		}
	}
	return nil
}

// --- the ways ---

func startGateway(port int, tmp string, server int) (*exec.Cmd, error) {
	cmd := exec.Command(filepath.Join(tmp, "connpool"), "gateway", "-quiet", "-framing", "resp", "-max-open", strconv.Itoa(upstream),
		"-listen", "tcp://127.0.0.1:"+strconv.Itoa(port), "-to", "tcp://127.0.0.1:"+strconv.Itoa(server))
	cmd.Stderr = os.Stderr
	return cmd, cmd.Start()
}

func startHAProxy(port int, tmp string, server int) (*exec.Cmd, error) {
	return startWith("haproxy", filepath.Join(tmp, "haproxy.cfg"), fmt.Sprintf(`global
	maxconn 5000
defaults
	mode tcp
	timeout connect 5s
	timeout client 1m
	timeout server 1m
listen redis
	bind 127.0.0.1:%d
	server redis 127.0.0.1:%d
`, port, server), "-db", "-f")
}

func startNutcracker(port int, tmp string, server int) (*exec.Cmd, error) {
	stats, err := freePort()
	if err != nil {
		return nil, err
	}
	return startWith("nutcracker", filepath.Join(tmp, "nutcracker.yml"), fmt.Sprintf(`redis:
  listen: 127.0.0.1:%d
  redis: true
  server_connections: %d
  servers:
   - 127.0.0.1:%d:1
`, port, upstream, server), "-s", strconv.Itoa(stats), "-a", "127.0.0.1",
		"-o", filepath.Join(tmp, "nutcracker.log"), "-p", filepath.Join(tmp, "nutcracker.pid"), "-c")
}

func startWith(program, file, text string, args ...string) (*exec.Cmd, error) {
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(programPath(program), append(args, file)...)
	return cmd, cmd.Start()
}

// programPath looks in PATH and where Debian puts servers.
func programPath(name string) string {
	for _, at := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(at); err == nil {
			return path
		}
	}
	return ""
}

func stop(cmd *exec.Cmd) {
	cmd.Process.Kill()
	cmd.Wait()
}

// --- measuring ---

// measure runs redis-benchmark once and meanwhile asks the server for its number of
// connections.
func measure(w *way, l load, requests int, tmp string, server int) (f figure, err error) {
	port := server
	if w.start != nil { // no other way runs meanwhile
		if port, err = freePort(); err != nil {
			return f, err
		}
		cmd, err := w.start(port, tmp, server)
		if err != nil {
			return f, err
		}
		defer stop(cmd)
		if err := answers(port); err != nil {
			return f, err
		}
	}
	over := make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		nc, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(server))
		if err != nil {
			return
		}
		defer nc.Close()
		r := bufio.NewReader(nc)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			if n, err := connections(nc, r); err == nil {
				f.conns = max(f.conns, n-1) // without the one that asks
			}
			select {
			case <-over:
				return
			case <-tick.C:
			}
		}
	})
	args := append([]string{"-h", "127.0.0.1", "-p", strconv.Itoa(port), "-t", "get", "--csv", "-n", strconv.Itoa(requests)}, l.args...)
	out, err := exec.Command("redis-benchmark", args...).Output()
	close(over)
	wg.Wait()
	if err != nil {
		return f, err
	}
	rows, err := csv.NewReader(strings.NewReader(string(out))).ReadAll()
	if err != nil || len(rows) < 2 {
		return f, fmt.Errorf("redis-benchmark said %q", out)
	}
	for name, to := range map[string]*float64{"rps": &f.rate, "p50_latency_ms": &f.p50, "p99_latency_ms": &f.p99} {
		i := slices.Index(rows[0], name)
		if i < 0 {
			return f, fmt.Errorf("redis-benchmark tells no %s: it must be of version 6.2 or later", name)
		}
		if *to, err = strconv.ParseFloat(rows[len(rows)-1][i], 64); err != nil {
			return f, err
		}
	}
	return f, nil
}

// connections asks the server how many it has.
func connections(nc net.Conn, r *bufio.Reader) (n int, err error) {
	if _, err := io.WriteString(nc, "INFO clients\r\n"); err != nil {
		return 0, err
	}
	head, err := r.ReadString('\n')
	if err != nil {
		return 0, err
	}
	size, err := strconv.Atoi(strings.Trim(head, "$\r\n"))
	if err != nil {
		return 0, err
	}
	text := make([]byte, size+2)
	if _, err := io.ReadFull(r, text); err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "connected_clients:")
	_, err = fmt.Sscan(after, &n)
	return n, err
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// answers waits until a PING is answered at a port.
func answers(port int) (err error) {
	for range 200 {
		var nc net.Conn
		if nc, err = net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(port)); err == nil {
			nc.SetDeadline(time.Now().Add(time.Second))
			io.WriteString(nc, "*1\r\n$4\r\nPING\r\n")
			var line string
			line, err = bufio.NewReader(nc).ReadString('\n')
			nc.Close()
			if err == nil && strings.HasPrefix(line, "+PONG") {
				return nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("nothing answers at port %d: %w", port, err)
}

func median(fs []figure, of func(figure) float64) float64 {
	all := make([]float64, len(fs))
	for i, f := range fs {
		all[i] = of(f)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// thousands writes 12345.6 as 12,346.
func thousands(v float64) string {
	s := strconv.Itoa(int(v + 0.5))
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// machine describes the machine of the measurement.
func machine(redis string) string {
	version := ""
	if out, err := exec.Command(redis, "--version").Output(); err == nil {
		for _, word := range strings.Fields(string(out)) {
			if v, ok := strings.CutPrefix(word, "v="); ok {
				version = v
			}
		}
	}
	return fmt.Sprintf("`cd bench && go run ./cmd/gateway`, on %s; redis-server %s, all on one machine.", bench.Machine(), version)
}
