package main

// knee is where more clients stop helping: the smallest measured number of clients that
// reaches at least kneeShare of the ceiling.
//
// The ceiling is the best mean of two neighbouring levels, so that one lucky level does
// not set it. Each level is compared with the ceiling by its measured throughput:
// disturbances make a level slower, hardly ever faster. So the first level that is good
// enough is trusted; a slower level after it only shows a disturbance (or a peer that
// declines under load, which does not move its knee).
type knee struct {
	Clients   int     `json:"clients"`    // 0: nothing was measured
	PerSecond float64 `json:"per_second"` // at the knee
	Ceiling   float64 `json:"ceiling_per_second"`

	// Reached is false if the throughput was still growing where the measurement ended:
	// then the knee is higher.
	Reached bool `json:"reached"`

	// Line is where the straight line of a single client's throughput meets the ceiling:
	// the number of exchanges that the peer (and the network) has in flight when it is
	// just saturated, by Little's law. If the knee is far above Line, exchanges delay
	// each other early.
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

// disturbed reports whether something disturbed the measurement of the levels: one of
// them is much slower than one with fewer clients and one with more, which no peer is by
// itself.
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
