// Command scale prints the figures of docs/sizing.md and writes them there. It runs in
// the directory of the module bench:
//
//	go run ./cmd/scale
//
// The memory of a connection, the cost of a sweep and the cost of a dial are measured on
// this machine, up to its limit of descriptors. Calculated and simulated figures are the
// same everywhere: the simulations are seeded.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool/bench"
)

func main() {
	if bench.Child() {
		return
	}
	smoke := flag.Bool("smoke", false, "measure little, write no document")
	doc := flag.String("doc", "../docs/sizing.md", "the document that quotes the figures")
	flag.Parse()
	var page strings.Builder
	if err := write(&page, *smoke); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
	fmt.Print(page.String())
	if *smoke {
		return
	}
	for name, text := range sections(page.String()) {
		if err := bench.Quote(*doc, name, text); err != nil {
			fmt.Fprintln(os.Stderr, "scale:", err)
			os.Exit(1)
		}
	}
}

// sections splits the page at its headings; each section has its own place in the
// document.
func sections(page string) map[string]string {
	parts := map[string]string{}
	for part := range strings.SplitSeq(page, "## ") {
		if name, text, ok := strings.Cut(part, "\n"); ok && name != "" {
			parts[name] = strings.TrimLeft(text, "\n")
		}
	}
	return parts
}

func write(w *strings.Builder, smoke bool) error {
	sizing(w, smoke)
	staffing(w)
	fleet(w, smoke)
	return errors.Join(crossover(w, smoke), weight(w, smoke))
}

// sizing compares connection counts for 10,000 users that think for 10 s and need a
// connection for 100 ms: first the mean, then the users' waits.
func sizing(w *strings.Builder, smoke bool) {
	m := closed{users: 10_000, think: 10, service: 0.1}
	fmt.Fprintf(w, "## sizing\n\n")
	fmt.Fprintf(w, "%s users think for %.0f s and use a connection for %.0f ms, both exponential. In use on average, by Little's law: %.0f.\n\n",
		count(float64(m.users)), m.think, m.service*1000, float64(m.users)*m.service/(m.think+m.service))
	w.WriteString("| connections | calls that wait | mean response, ms | simulated: wait | mean, ms | p99, ms |\n|---:|---:|---:|---:|---:|---:|\n")
	horizon := 400.0
	if smoke {
		horizon = 40
	}
	for _, c := range []int{90, 99, 100, 105, 110, 120, 130} {
		wait, mean := m.exact(c)
		s := m.simulate(c, horizon, 1)
		fmt.Fprintf(w, "| %d | %.1f %% | %.0f | %.1f %% | %.0f | %.0f |\n", c, wait*100, mean*1000, s.wait*100, s.mean*1000, s.p99*1000)
	}
	w.WriteString("\n")
}

// staffing is how many connections a load needs so that few requests wait.
func staffing(w *strings.Builder) {
	fmt.Fprintf(w, "## staffing\n\n")
	w.WriteString("| in use on average | connections so that 1 in 100 waits | times the mean | (c - mean) / √mean |\n|---:|---:|---:|---:|\n")
	for _, a := range []float64{0.1, 1, 10, 100, 1000} {
		c := staffed(a, 0.01)
		fmt.Fprintf(w, "| %g | %d | %.1f | %.1f |\n", a, c, float64(c)/a, (float64(c)-a)/sqrt(a))
	}
	w.WriteString("\n")
}

// fleet counts connections between clients and servers, directly and through gateways.
func fleet(w *strings.Builder, smoke bool) {
	const rate, service, keep, perGateway, homes = 100.0, 0.005, 120.0, 50_000.0, 2
	fmt.Fprintf(w, "## fleet\n\n")
	fmt.Fprintf(w, "Each client sends %.0f requests a second, to servers at random; a request holds a connection for %.0f ms; a pool keeps an idle one for %.0f s. A gateway takes %s requests a second, there are at least 2, and each client talks to %d of them.\n\n",
		rate, service*1000, keep, count(perGateway), homes)
	w.WriteString("| clients | servers | in use at once | straight: in all | per server | gateways | with them: in all | per server | straight / with |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	events := 400_000
	if smoke {
		events = 2000
	}
	for _, clients := range []float64{10, 100, 1000, 10_000} {
		for _, servers := range []float64{10, 100, 1000} {
			gateways := max(2, ceil(clients*rate/perGateway))
			direct := pair{rate / servers, service, keep}.open(events, 1)
			up := pair{rate / homes, service, keep}.open(events, 2)
			down := pair{clients * rate / gateways / servers, service, keep}.open(events, 3)
			straight := clients * servers * direct
			through := clients*homes*up + gateways*servers*down
			fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %.0f | %s | %s | %.1f |\n",
				count(clients), count(servers), count(clients*rate*service),
				count(straight), count(clients*direct),
				gateways, count(through), count(gateways*down), straight/through)
		}
	}
	w.WriteString("\n")
}

// crossover is the rate of uses above which a pool is worthwhile (APR-03).
func crossover(w *strings.Builder, smoke bool) error {
	n := 1000
	if smoke {
		n = 20
	}
	fmt.Fprintf(w, "## crossover\n\n%s.\n\n", bench.Machine())
	tcp, loan, err := bench.Opening(false, n)
	if err != nil {
		return err
	}
	tls, _, err := bench.Opening(true, n)
	if err != nil {
		return err
	}
	us := func(d time.Duration) float64 { return float64(d) / 1000 }
	fmt.Fprintf(w, "On loopback a dial and a close cost %.0f µs, with TLS 1.3 %.0f µs, a loan %.1f µs.\n\n", us(tcp), us(tls), us(loan))
	w.WriteString("| uses a minute, at random | share that dials, kept for 2 min | µs a use, TCP | µs a use, TLS | saved against a dial each time, TLS |\n|---:|---:|---:|---:|---:|\n")
	for _, perMinute := range []float64{0.1, 0.5, 1, 3, 10, 60, 600} {
		share := dialing(perMinute/60, 120)
		cost := func(dial time.Duration) float64 { return us(loan) + share*us(dial) }
		fmt.Fprintf(w, "| %g | %.1f %% | %.1f | %.1f | %.0f %% |\n", perMinute, share*100, cost(tcp), cost(tls), max(0, 100*(1-cost(tls)/us(tls))))
	}
	w.WriteString("\n")
	return nil
}

// weight is what idle connections cost one process, measured as far as the descriptors
// suffice, and extrapolated to a million.
func weight(w *strings.Builder, smoke bool) error {
	counts, window := []int{1000, 5000, 10_000, mostConns()}, 3*time.Second
	if smoke {
		counts, window = []int{100, 200}, 300*time.Millisecond
	}
	fmt.Fprintf(w, "## weight\n\n%s. The largest count is what the limit of %s descriptors leaves.\n\n", bench.Machine(), count(float64(descriptors())))
	w.WriteString("| idle connections | net.Conn, B each | pool, B each | kernel, both ends, B each | one sweep, ms CPU | at 20 s, % of a core | borrower's p99 with / without ten sweeps a second, µs |\n|---:|---:|---:|---:|---:|---:|---:|\n")
	var last bench.Weight
	for _, n := range counts {
		m, err := bench.Weigh(n, window)
		if err != nil {
			return err
		}
		kernel := "–"
		if m.Kernel > 0 {
			kernel = fmt.Sprintf("%.0f", m.Kernel)
		}
		fmt.Fprintf(w, "| %s | %.0f | %.0f | %s | %.1f | %.3f | %.1f / %.1f |\n", count(float64(n)), m.Bare, m.Pool, kernel,
			m.Sweep.Seconds()*1000, m.Sweep.Seconds()/20*100, float64(m.BorrowP99)/1000, float64(m.QuietP99)/1000)
		last = m
	}
	w.WriteString("\nCarried on in proportion from the last line:\n\n")
	w.WriteString("| idle connections | heap, MB | of it the pool's, MB | one sweep, s CPU | at 20 s, % of a core | server addresses needed, 28,000 ports each |\n|---:|---:|---:|---:|---:|---:|\n")
	for _, n := range []float64{100_000, 1_000_000} {
		sweep := last.Sweep.Seconds() / float64(last.N) * n
		fmt.Fprintf(w, "| %s | %.0f | %.0f | %.2f | %.1f | %.0f |\n", count(n), n*(last.Bare+last.Pool)/1e6, n*last.Pool/1e6, sweep, sweep/20*100, ceil(n/28_000))
	}
	w.WriteString("\n")
	return nil
}

func count(v float64) string {
	text := fmt.Sprintf("%.0f", v)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
