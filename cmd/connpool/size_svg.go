package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"strings"
)

// plot draws throughput (left scale) and response (right scale) over the number
// of clients, with the knee and the limit.
func (e *experiment) plot() string {
	const (
		width, height            = 860, 460
		left, right, top, bottom = 80, 80, 60, 60
	)
	first, last := float64(e.Levels[0].Clients), float64(e.Levels[len(e.Levels)-1].Clients)
	highest, slowest := e.Knee.Ceiling, 0.0
	for _, l := range e.Levels {
		highest = max(highest, l.PerSecond)
		slowest = max(slowest, l.Mean, l.P99)
	}
	rateTop, timeTop := roundUp(highest), roundUp(slowest)
	x := func(clients float64) float64 { // logarithmic: each doubling has the same width
		if last <= first {
			return left + (width-left-right)/2
		}
		return left + (width-left-right)*math.Log(clients/first)/math.Log(last/first)
	}
	y := func(v, topValue float64) float64 {
		return top + (height-top-bottom)*(1-v/topValue)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<title>connpool size: %s, probe %s</title>
<rect width="100%%" height="100%%" fill="white"/>
<text x="%d" y="24" font-size="15">%s, probe %s</text>
`, width, height, html.EscapeString(e.Address), html.EscapeString(e.Probe), left, html.EscapeString(e.Address), html.EscapeString(e.Probe))
	for i := range 6 {
		at := float64(i) / 5
		h := y(at, 1)
		fmt.Fprintf(&b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/>
<text x="%d" y="%.1f" text-anchor="end" fill="#1f5fa8">%s</text>
<text x="%d" y="%.1f" fill="#b3471b">%s</text>
`, left, h, width-right, h, left-8, h+4, rate(at*rateTop), width-right+8, h+4, seconds(at*timeTop))
	}
	for n := 1; float64(n) <= last; n *= 2 {
		if float64(n) >= first {
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", x(float64(n)), height-bottom+18, n)
		}
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">clients, each back to back on a connection of its own</text>
`, width/2, height-bottom+42)

	line := func(colour, dash string, value func(level) float64, topValue float64) {
		points := make([]string, len(e.Levels))
		for i, l := range e.Levels {
			points[i] = fmt.Sprintf("%.1f,%.1f", x(float64(l.Clients)), y(value(l), topValue))
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="%s"/>`+"\n",
			strings.Join(points, " "), colour, dash)
	}
	line("#1f5fa8", "none", func(l level) float64 { return l.PerSecond }, rateTop)
	line("#b3471b", "none", func(l level) float64 { return l.Mean }, timeTop)
	line("#b3471b", "4 3", func(l level) float64 { return l.P99 }, timeTop)

	mark := func(clients int, what string, row int) {
		at := x(float64(clients))
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#555" stroke-dasharray="2 3"/>
<text x="%.1f" y="%d" text-anchor="middle">%s %d</text>
`, at, top, at, height-bottom, at, top-4-14*row, what, clients)
	}
	if e.Knee.Reached {
		mark(e.Knee.Clients, "knee", 0)
	}
	if e.Within > 0 {
		mark(e.Within, "limit", 1)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#1f5fa8">requests/s</text>
<text x="%d" y="%d" fill="#b3471b" text-anchor="end">response: mean, p99 dashed</text>
</svg>
`, 8, top-14, width-8, 24)
	return b.String()
}

// roundUp is the next number of the form 1, 2 or 5 times a power of ten.
func roundUp(v float64) float64 {
	if v <= 0 {
		return 1
	}
	p := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 5} {
		if v <= f*p {
			return f * p
		}
	}
	return 10 * p
}

// canWrite finds out early, before minutes of measuring, that a file cannot be written.
func canWrite(name string) error {
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		return fmt.Errorf("%s is a directory", name)
	}
	f, err := newNeighbour(name)
	if err != nil {
		return err
	}
	f.Close()
	return os.Remove(f.Name())
}

func newNeighbour(name string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-*.tmp")
}

// writeFileAtOnce writes the file whole or not at all: an existing file stays until the
// new one is complete.
func writeFileAtOnce(name string, data []byte) (err error) {
	f, err := newNeighbour(name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
