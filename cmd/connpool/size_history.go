package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

// sample is the part of a line of a history that the advice needs: Stats of a pool, or
// AddrStats with an address.
type sample struct {
	Time time.Time
	Addr string

	Open, Idle, InUse, Waiting, Limit, Addrs int

	Loans, Dials, Waits, WaitsFailed, Exhausted uint64
	WaitDuration                                time.Duration
}

// history is the result for one pool, or for one address, of a file.
type history struct {
	Addr     string  `json:"addr,omitempty"`
	Samples  int     `json:"samples"`
	Seconds  float64 `json:"seconds"`
	Average  float64 `json:"average_in_use"` // over time
	P99      int     `json:"p99_in_use"`     // not exceeded 99 % of the time
	Peak     int     `json:"peak_in_use"`
	MostWait int     `json:"most_waiting"`
	Limit    int     `json:"limit,omitempty"` // at the end of the file
	Addrs    int     `json:"addresses,omitempty"`

	Loans       uint64  `json:"loans"`
	Dials       uint64  `json:"dials"`
	Waits       uint64  `json:"waits"`
	WaitsFailed uint64  `json:"waits_failed"`
	MeanWait    float64 `json:"mean_wait_s"`

	Min    int       `json:"min_spare"`
	Max    int       `json:"max_per_addr"`
	Cut    bool      `json:"cut_by_limit"` // the peak may have been higher without it
	Share  *division `json:"max_division,omitempty"`
	Advice []advice  `json:"advice"`
}

// histories is the report.
type histories struct {
	File string    `json:"file"`
	Of   []history `json:"of"`
}

func adviseFromFile(o sizeOptions) (*histories, error) {
	f, err := os.Open(o.history)
	if err != nil {
		return nil, fmt.Errorf("-history: %w", err)
	}
	defer f.Close()
	byAddr, err := readHistory(f)
	if err != nil {
		return nil, fmt.Errorf("-history %s: %w", o.history, err)
	}
	h := &histories{File: o.history}
	for addr, samples := range byAddr {
		one, err := adviseFrom(samples, o.processes)
		if err != nil {
			return nil, fmt.Errorf("-history %s: %w", strings.TrimSpace(o.history+" "+addr), err)
		}
		h.Of = append(h.Of, one)
	}
	slices.SortFunc(h.Of, func(a, b history) int { return cmp.Compare(a.Addr, b.Addr) })
	return h, nil
}

// readHistory reads one JSON object per line. An incomplete last line is no error: a
// program that is still writing, or was killed, leaves one.
func readHistory(r io.Reader) (map[string][]sample, error) {
	in := bufio.NewReader(r)
	out := make(map[string][]sample)
	for n := 1; ; n++ {
		line, err := in.ReadString('\n')
		if err != nil && err != io.EOF {
			return nil, err
		}
		whole := err == nil
		if text := strings.TrimSpace(line); text != "" {
			var s sample
			var has map[string]json.RawMessage
			bad := json.Unmarshal([]byte(text), &has)
			if bad == nil {
				bad = json.Unmarshal([]byte(text), &s)
			}
			switch {
			case bad != nil && !whole:
			case bad != nil:
				return nil, fmt.Errorf("line %d: %w; each line must be one JSON object", n, bad)
			case s.Time.IsZero():
				return nil, fmt.Errorf("line %d has no Time, such as \"Time\":\"2006-01-02T15:04:05Z\"", n)
			case has["InUse"] == nil:
				return nil, fmt.Errorf("line %d has no InUse: are these Stats of a pool?", n)
			case s.InUse < 0:
				return nil, fmt.Errorf("line %d: InUse is %d", n, s.InUse)
			default:
				out[s.Addr] = append(out[s.Addr], s)
			}
		}
		if !whole {
			break
		}
	}
	if len(out) == 0 {
		return nil, errors.New("there is no line in it; connpool size -h shows how to write one")
	}
	return out, nil
}

// adviseFrom looks at the samples of one pool. Each sample holds until the next.
func adviseFrom(samples []sample, processes int) (history, error) {
	slices.SortStableFunc(samples, func(a, b sample) int { return a.Time.Compare(b.Time) })
	first, last := samples[0], samples[len(samples)-1]
	h := history{Addr: first.Addr, Samples: len(samples), Seconds: last.Time.Sub(first.Time).Seconds(), Limit: last.Limit}
	if h.Samples < 2 || h.Seconds <= 0 {
		return h, errors.New("there is only one point in time; an average needs at least two")
	}
	spent := make(map[int]float64) // seconds with that many in use
	for i, s := range samples {
		h.Peak, h.MostWait, h.Addrs = max(h.Peak, s.InUse), max(h.MostWait, s.Waiting), max(h.Addrs, s.Addrs)
		h.Cut = h.Cut || s.Waiting > 0 && s.Idle == 0 && s.Limit > 0 && s.Open >= s.Limit
		if i == 0 {
			continue
		}
		before := samples[i-1]
		spent[before.InUse] += s.Time.Sub(before.Time).Seconds()
		h.Loans += since(before.Loans, s.Loans)
		h.Dials += since(before.Dials, s.Dials)
		h.Waits += since(before.Waits, s.Waits)
		h.WaitsFailed += since(before.WaitsFailed, s.WaitsFailed) + since(before.Exhausted, s.Exhausted)
		if s.WaitDuration >= before.WaitDuration {
			h.MeanWait += (s.WaitDuration - before.WaitDuration).Seconds()
		}
	}
	if h.Waits > 0 {
		h.MeanWait /= float64(h.Waits)
	}
	atMost := 0.0
	for _, n := range sortedKeys(spent) {
		h.Average += float64(n) * spent[n] / h.Seconds
		if atMost < 0.99*h.Seconds {
			h.P99 = n
		}
		atMost += spent[n]
	}
	// Just below the average: spares for the average minute, and none for the peaks.
	h.Min = max(0, int(math.Ceil(h.Average))-1)
	// Between average and peak: enough for 99 % of the time, and never less than the
	// average, rounded up.
	h.Max = max(h.P99, int(math.Ceil(h.Average)), 1)
	if processes > 1 {
		d := divide(h.Max, processes)
		h.Share = &d
	}
	h.advise(processes)
	return h, nil
}

// since returns how much a counter grew; a counter that fell has started anew.
func since(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

func sortedKeys(m map[int]float64) []int {
	keys := make([]int, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (h *history) advise(processes int) {
	to := "ADDR"
	if h.Addr != "" {
		to = quoted(h.Addr)
	}
	experiment := "connpool size -to " + to + " -probe PROBE"
	if processes > 1 {
		experiment += fmt.Sprintf(" -processes %d", processes)
	}
	again := "connpool size -history FILE"
	h.Advice = append(h.Advice,
		advice{fmt.Sprintf("MinIdlePerAddr: %d, below the average in use (%.1f): in a normal minute nobody waits for a dial.", h.Min, h.Average), again})
	text := fmt.Sprintf("MaxPerAddr: %d, between the average and the peak (%d): 99 %% of the time it is enough, and then the pool queues.", h.Max, h.Peak)
	if h.Addrs > 1 {
		text = fmt.Sprintf("MaxOpen: %d, between the average and the peak (%d). The pool has up to %d addresses: record AddrStats with a field Addr for MinIdlePerAddr and MaxPerAddr of each.", h.Max, h.Peak, h.Addrs)
	}
	h.Advice = append(h.Advice, advice{text, experiment})
	if h.Cut {
		h.Advice = append(h.Advice, advice{fmt.Sprintf("Borrowers waited at the limit of %d, so the need was higher than the peak shows. If the peer can take it, raise the limit and record again.", h.Limit), experiment})
	}
	if h.Loans > 0 && float64(h.Dials) > 0.1*float64(h.Loans) {
		h.Advice = append(h.Advice, advice{fmt.Sprintf("%d dials for %d loans: the pool keeps too little, or the peer hangs up. Look at Stats.Closed, and raise IdleTimeout or MaxIdle.", h.Dials, h.Loans),
			"connpool load -to " + to + " -probe PROBE"})
	}
}

func (r *histories) text() string {
	var b strings.Builder
	for i, h := range r.Of {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "connpool size: %s%s, %s samples over %s\n\n", r.File, prefixed(", ", h.Addr), grouped(uint64(h.Samples)), seconds(h.Seconds))
		fmt.Fprintf(&b, "  in use     %.1f on average, %d or less for 99 %% of the time, %d at most\n", h.Average, h.P99, h.Peak)
		fmt.Fprintf(&b, "  waiting    %d at most; %s borrowers queued, %s on average, %s got none\n", h.MostWait, grouped(h.Waits), seconds(h.MeanWait), grouped(h.WaitsFailed))
		fmt.Fprintf(&b, "  loans      %s, and %s dials\n", grouped(h.Loans), grouped(h.Dials))
		if h.Share != nil {
			fmt.Fprintf(&b, "  shares     %v\n", h.Share)
		}
		b.WriteString(adviceText(h.Advice))
	}
	return b.String()
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}
