package main

// knee is where more clients stop being of use: the smallest measured number of
// clients that gets at least kneeShare of the best throughput.
//
// A single measurement is not to be trusted, so the throughputs are smoothed
// first: up to the best of them they are made to rise, by giving neighbours in
// the wrong order their common mean (isotonic regression, weighted by time). A
// lucky level on the plateau thus counts no more than its neighbours, and what
// comes after the best, where some peers get slower again, does not weigh it
// down.
type knee struct {
	Clients   int     `json:"clients"`    // 0: nothing was measured
	PerSecond float64 `json:"per_second"` // there, smoothed
	Ceiling   float64 `json:"ceiling_per_second"`

	// Reached is false if the throughput was still growing where the
	// measurement ended: then the knee lies further up.
	Reached bool `json:"reached"`

	// Line is where the straight line of a single client's throughput meets
	// the ceiling, which is the number of exchanges that the peer (and the
	// way to it) has under way when it is just saturated: Little's law. If
	// the knee lies far above it, exchanges get in each other's way early.
	Line float64 `json:"line_meets_ceiling_at"`

	below int // the next smaller number measured
}

const kneeShare = 0.95

// kneeOf looks at levels in the order of their numbers of clients. Those with
// errors do not count.
func kneeOf(levels []level) knee {
	var sound []level
	for _, l := range levels {
		if l.sound() {
			sound = append(sound, l)
		}
	}
	if len(sound) == 0 {
		return knee{}
	}
	best := 0
	for i, l := range sound {
		if l.PerSecond > sound[best].PerSecond {
			best = i
		}
	}
	rising := smoothed(sound[:best+1])
	k := knee{Ceiling: rising[best]}
	for i, x := range rising {
		if x >= kneeShare*k.Ceiling {
			k.Clients, k.PerSecond = sound[i].Clients, x
			if i > 0 {
				k.below = sound[i-1].Clients
			}
			break
		}
	}
	k.Reached = float64(sound[len(sound)-1].Clients) >= 1.3*float64(k.Clients)
	if first := sound[0]; first.PerSecond > 0 {
		k.Line = k.Ceiling / (first.PerSecond / float64(first.Clients))
	}
	return k
}

// bracket is the two measured numbers between which the knee lies.
func (k knee) bracket() (below, at int, ok bool) {
	return k.below, k.Clients, k.below > 0
}

// smoothed makes throughputs rise (pool adjacent violators).
func smoothed(levels []level) []float64 {
	type block struct {
		mean, weight float64
		n            int
	}
	var blocks []block
	for _, l := range levels {
		b := block{l.PerSecond, max(l.Seconds, 1e-9), 1}
		for len(blocks) > 0 && blocks[len(blocks)-1].mean > b.mean {
			last := blocks[len(blocks)-1]
			blocks = blocks[:len(blocks)-1]
			w := last.weight + b.weight
			b = block{(last.mean*last.weight + b.mean*b.weight) / w, w, last.n + b.n}
		}
		blocks = append(blocks, b)
	}
	out := make([]float64, 0, len(levels))
	for _, b := range blocks {
		for range b.n {
			out = append(out, b.mean)
		}
	}
	return out
}
