package main

// knee is where more clients stop being of use: the smallest measured number of
// clients that gets at least kneeShare of the ceiling.
//
// The ceiling is the best mean of two neighbours among the levels, so that one
// lucky level does not set the bar. What is held against it is the throughput
// as measured: whatever else happens on the way makes a level slower, hardly
// ever faster, so the first that is good enough is to be believed, and a
// slower one after it only tells of a disturbance (or of a peer that declines
// under load, which does not move its knee either).
type knee struct {
	Clients   int     `json:"clients"`    // 0: nothing was measured
	PerSecond float64 `json:"per_second"` // there
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
	k := knee{Ceiling: sound[0].PerSecond}
	for i, l := range sound[1:] {
		if mean := (sound[i].PerSecond + l.PerSecond) / 2; i == 0 || mean > k.Ceiling {
			k.Ceiling = mean
		}
	}
	for i, l := range sound {
		if l.PerSecond >= kneeShare*k.Ceiling {
			k.Clients, k.PerSecond = l.Clients, l.PerSecond
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

// disturbed is whether something else was going on while the levels were
// measured: one of them is much slower than one with fewer clients and one with
// more, which no peer is by itself.
func disturbed(levels []level) bool {
	const much = 0.8
	for i, l := range levels {
		before, after := 0.0, 0.0
		for j, other := range levels {
			switch {
			case j < i:
				before = max(before, other.PerSecond)
			case j > i:
				after = max(after, other.PerSecond)
			}
		}
		if l.PerSecond < much*min(before, after) {
			return true
		}
	}
	return false
}
