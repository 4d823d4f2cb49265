package main

import (
	"math"
	"sort"
)

// closedModel is a closed group of users, each of whom thinks, asks for a connection,
// waits in line if all are in use, uses one, gives it back, and thinks again. Both times
// are exponential; the line is first come, first served. (M/M/c//N in textbooks, or the
// machine-repairman model.)
//
// Unlike an open stream of requests, the group slows down when it has to wait, because a
// waiting user asks for nothing else. So the model has a solution for any number of
// connections.
type closedModel struct {
	users   int
	think   float64 // seconds between an answer and the next request, on average; 0: none
	service float64 // seconds that a request has the connection, on average
}

// offered is the mean number of connections in use if nobody ever waits.
func (m closedModel) offered() float64 {
	return float64(m.users) * m.service / (m.think + m.service)
}

// occupancy is the distribution of the number of users that have or want a connection.
// The parts left out below from and above the end are less than 1e-30 of the whole.
type occupancy struct {
	from int
	p    []float64 // of from, from+1, ...
}

// occupancy is the stationary distribution for a number of users that may
// differ from m's.
//
// The weights follow from balance: users move from k to k+1 at the rate
// (users-k)/think, back at min(k+1,conns)/service. Their ratio falls with k, so
// there is one maximum, and the recursion runs from there to both sides, always
// downwards: nothing overflows, and rounding stays relative however many users
// there are.
func (m closedModel) occupancy(users, conns int) occupancy {
	if m.think <= 0 || users == 0 { // no user ever thinks
		return occupancy{from: users, p: []float64{1}}
	}
	ratio := func(k int) float64 { // weight of k+1 divided by the weight of k
		return float64(users-k) / m.think * m.service / float64(min(k+1, conns))
	}
	const negligible = 1e-40
	mode := sort.Search(users, func(k int) bool { return ratio(k) < 1 })
	var above, below []float64 // below is in reverse order
	for k, w := mode, 1.0; k < users; k++ {
		if w *= ratio(k); w < negligible {
			break
		}
		above = append(above, w)
	}
	for k, w := mode, 1.0; k > 0; k-- {
		if w /= ratio(k - 1); w < negligible {
			break
		}
		below = append(below, w)
	}
	o := occupancy{from: mode - len(below), p: make([]float64, 0, len(below)+1+len(above))}
	for i := len(below) - 1; i >= 0; i-- {
		o.p = append(o.p, below[i])
	}
	o.p = append(append(o.p, 1), above...)
	sum := 0.0
	for _, w := range o.p {
		sum += w
	}
	for i := range o.p {
		o.p[i] /= sum
	}
	return o
}

// service is what a user of the model gets with a number of connections; times are in
// seconds.
type service struct {
	Connections  int     `json:"connections"`
	WaitShare    float64 `json:"wait_share"` // of requests that find no connection free
	MeanWait     float64 `json:"mean_wait_s"`
	P99Wait      float64 `json:"p99_wait_s"`
	MeanResponse float64 `json:"mean_response_s"`
	PerSecond    float64 `json:"per_second"`
	Busy         float64 `json:"busy"` // share of the connections in use
}

// with solves the model exactly. By the arrival theorem of closed networks a
// request finds the others as an outside observer would find a group of one
// user less. A request that finds k >= conns of them waits until k-conns+1 have
// left, one after another at conns/service a second: an Erlang distribution.
func (m closedModel) with(conns int) service {
	seen := m.occupancy(m.users-1, conns)
	s := service{Connections: conns}
	for i, p := range seen.p {
		if k := seen.from + i; k >= conns {
			s.MeanWait += p * float64(k-conns+1)
		}
	}
	s.WaitShare = seen.atLeast(conns)
	s.MeanWait *= m.service / float64(conns)
	s.MeanResponse = s.MeanWait + m.service
	s.PerSecond = float64(m.users) / (m.think + s.MeanResponse)
	s.Busy = s.PerSecond * m.service / float64(conns)
	s.P99Wait = m.waitQuantile(seen, conns, 0.99)
	return s
}

// waitQuantile is the wait that the share q of all requests does not exceed.
func (m closedModel) waitQuantile(seen occupancy, conns int, q float64) float64 {
	tail := seen.tails()
	longer := func(t float64) float64 { return waitsLonger(seen, tail, conns, t*float64(conns)/m.service) }
	if longer(0) <= 1-q {
		return 0
	}
	lo, hi := 0.0, m.service/float64(conns)
	for longer(hi) > 1-q {
		lo, hi = hi, 2*hi
	}
	for range 50 {
		mid := (lo + hi) / 2
		if longer(mid) > 1-q {
			lo = mid
		} else {
			hi = mid
		}
	}
	return hi
}

// atLeast is the probability of k users or more.
func (o occupancy) atLeast(k int) float64 {
	sum := 0.0
	for i := max(0, k-o.from); i < len(o.p); i++ {
		sum += o.p[i]
	}
	return min(sum, 1)
}

// tails is the probability of at least from+i, for each i.
func (o occupancy) tails() []float64 {
	t := make([]float64, len(o.p)+1)
	for i := len(o.p) - 1; i >= 0; i-- {
		t[i] = t[i+1] + o.p[i]
	}
	return t
}

// waitsLonger is the share of requests that are still in line after a time in which x
// departures are expected: j departures have happened with the Poisson probability, and
// at least conns+j users were ahead. Terms beyond 12 deviations from the Poisson mean add
// nothing.
func waitsLonger(seen occupancy, tail []float64, conns int, x float64) float64 {
	atLeast := func(k int) float64 {
		switch i := k - seen.from; {
		case i <= 0:
			return 1
		case i < len(tail):
			return tail[i]
		}
		return 0
	}
	reach := 12*math.Sqrt(x) + 30
	first := max(0, int(x-reach))
	last := min(int(x+reach), seen.from+len(seen.p)-1-conns)
	if first > last {
		return 0
	}
	logGamma, _ := math.Lgamma(float64(first) + 1)
	pois := math.Exp(-x - logGamma)
	if first > 0 {
		pois = math.Exp(float64(first)*math.Log(x) - x - logGamma)
	}
	sum := 0.0
	for j := first; j <= last; j++ {
		sum += pois * atLeast(conns+j)
		pois *= x / float64(j+1)
	}
	return min(sum, 1)
}

// fewest is the smallest number of connections with which at most the given share of
// requests waits. With as many connections as users no request waits.
func (m closedModel) fewest(mayWait float64) int {
	return 1 + sort.Search(m.users-1, func(i int) bool {
		conns := i + 1
		return m.occupancy(m.users-1, conns).atLeast(conns) <= mayWait
	})
}
