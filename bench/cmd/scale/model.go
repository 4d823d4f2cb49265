package main

import (
	"cmp"
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
)

func sqrt(v float64) float64 { return math.Sqrt(v) }
func ceil(v float64) float64 { return math.Ceil(v) }

// closed is a number of users, each of which thinks, needs a connection, waits for one if
// there is none, uses it, and thinks again.
type closed struct {
	users          int
	think, service float64 // mean, in seconds
}

// exact is the solution of the model for exponential times: the share of calls
// that wait, and the mean from call to end of use.
//
// Of n users k are not thinking with a probability in proportion to
// n!/(n-k)! (service/think)^k / (k! up to c, then c! c^(k-c)). A user that calls
// finds the others as they would be without it, and Little's law makes the
// mean number of calls into their mean time.
func (m closed) exact(c int) (wait, mean float64) {
	p := m.states(m.users-1, c)
	for k := c; k < len(p); k++ {
		wait += p[k]
	}
	var calls float64
	for k, p := range m.states(m.users, c) {
		calls += float64(k) * p
	}
	return wait, calls / ((float64(m.users) - calls) / m.think)
}

func (m closed) states(n, c int) []float64 {
	logs := make([]float64, n+1)
	most := 0.0
	for k := 1; k <= n; k++ {
		logs[k] = logs[k-1] + math.Log(float64(n-k+1)*m.service/m.think/float64(min(k, c)))
		most = max(most, logs[k])
	}
	sum := 0.0
	for k := range logs {
		logs[k] = math.Exp(logs[k] - most)
		sum += logs[k]
	}
	for k := range logs {
		logs[k] /= sum
	}
	return logs
}

type outcome struct{ wait, mean, p99 float64 }

// simulate runs the model for some seconds, with a queue that is first come, first
// served. The first tenth is not counted.
func (m closed) simulate(c int, seconds float64, seed uint64) outcome {
	rnd := rand.New(rand.NewPCG(seed, uint64(c)))
	var events agenda
	for range m.users {
		heap.Push(&events, event{at: rnd.ExpFloat64() * m.think, calls: true})
	}
	var queue []float64 // when they called
	var took []float64
	free, calls, waited := c, 0, 0
	begin := func(now, called float64) {
		free--
		heap.Push(&events, event{at: now + rnd.ExpFloat64()*m.service, called: called})
	}
	for {
		e := heap.Pop(&events).(event)
		if e.at > seconds {
			break
		}
		counts := e.at > seconds/10
		if counts && e.calls {
			calls++
		}
		switch {
		case !e.calls:
			free++
			if counts {
				took = append(took, e.at-e.called)
			}
			heap.Push(&events, event{at: e.at + rnd.ExpFloat64()*m.think, calls: true})
			if len(queue) > 0 {
				begin(e.at, queue[0])
				queue = queue[1:]
			}
		case free > 0:
			begin(e.at, e.at)
		default:
			queue = append(queue, e.at)
			if counts {
				waited++
			}
		}
	}
	var sum float64
	for _, t := range took {
		sum += t
	}
	slices.Sort(took)
	return outcome{float64(waited) / float64(calls), sum / float64(len(took)), took[len(took)*99/100]}
}

type event struct {
	at     float64
	calls  bool    // a user calls; otherwise a use ends
	called float64 // when the use that ends was asked for
}

type agenda []event

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].at < a[j].at }
func (a agenda) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(e any)        { *a = append(*a, e.(event)) }
func (a *agenda) Pop() any {
	last := (*a)[len(*a)-1]
	*a = (*a)[:len(*a)-1]
	return last
}

// staffed is the smallest number of connections with which at most a share of calls
// waits, when load connections are in use on average and calls come at random (Erlang's
// second formula).
func staffed(load, share float64) int {
	b := 1.0 // Erlang's first formula, for 0
	for c := 1; ; c++ {
		b = load * b / (float64(c) + load*b)
		if util := load / float64(c); util < 1 && b/(1-util*(1-b)) <= share {
			return c
		}
	}
}

// pair is a client and a server with a pool between them that lends the connection given
// back last, and closes one that nobody used for a while.
type pair struct{ rate, service, keep float64 }

// open is the mean number of connections of the pair, idle ones included, over
// a run of so many requests, or of five times keep if that is more.
func (p pair) open(requests int, seed uint64) float64 {
	requests = max(requests, int(5*p.keep*p.rate))
	rnd := rand.New(rand.NewPCG(seed, 7))
	var idle []float64 // since when, the one given back last at the end
	var busy ends
	var now, area, from float64
	var start float64 // when counting starts
	step := func(to float64) {
		// Connections that expire meanwhile are open until then.
		for len(idle) > 0 && idle[0]+p.keep <= to {
			if now = idle[0] + p.keep; now > from {
				area += float64(len(idle)+len(busy)) * (now - from)
				from = now
			}
			idle = idle[1:]
		}
		area += float64(len(idle)+len(busy)) * (to - from)
		now, from = to, to
	}
	for i := range requests {
		at := now + rnd.ExpFloat64()/p.rate
		for len(busy) > 0 && busy[0] <= at {
			end := heap.Pop(&busy).(float64)
			step(end)
			idle = append(idle, end)
		}
		step(at)
		if len(idle) > 0 {
			idle = idle[:len(idle)-1]
		}
		heap.Push(&busy, at+rnd.ExpFloat64()*p.service)
		if i == requests/5 {
			area, start = 0, at
		}
	}
	return area / (now - start)
}

type ends []float64

func (e ends) Len() int           { return len(e) }
func (e ends) Less(i, j int) bool { return cmp.Less(e[i], e[j]) }
func (e ends) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *ends) Push(v any)        { *e = append(*e, v.(float64)) }
func (e *ends) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

// dialing is the share of uses that find no connection, when uses come at random at a
// rate, one at a time, and an idle connection is kept for some seconds.
func dialing(rate, keep float64) float64 { return math.Exp(-rate * keep) }

// mostConns is how many connections the limit of descriptors, and the ports between two
// loopback addresses, allow one process.
func mostConns() int { return int(min(descriptors(), 26_000)) - 200 }
