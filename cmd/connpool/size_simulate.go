package main

import (
	"context"
	"math/rand/v2"
	"time"
)

// simulated is the result of a simulation of the model. The simulation does not use the
// formulas: it follows each user from event to event.
type simulated struct {
	WaitShare    float64 `json:"wait_share"`
	MeanWait     float64 `json:"mean_wait_s"`
	P99Wait      float64 `json:"p99_wait_s"`
	MeanResponse float64 `json:"mean_response_s"`
	PerSecond    float64 `json:"per_second"`
	Requests     int     `json:"requests"`
}

// event is the end of a user's thinking, or of the use of a connection.
type event struct {
	at    float64
	user  int32
	using bool
}

// agenda is a heap with the next event first. (container/heap would allocate for each of
// some ten million events.)
type agenda []event

func (a *agenda) push(e event) {
	h := append(*a, e)
	i := len(h) - 1
	for i > 0 && h[(i-1)/2].at > e.at {
		h[i] = h[(i-1)/2]
		i = (i - 1) / 2
	}
	h[i] = e
	*a = h
}

func (a *agenda) pop() event {
	h := *a
	next, e := h[0], h[len(h)-1]
	h = h[:len(h)-1]
	*a = h
	for i := 0; len(h) > 0; {
		child := 2*i + 1
		if child+1 < len(h) && h[child+1].at < h[child].at {
			child++
		}
		if child >= len(h) || h[child].at >= e.at {
			h[i] = e
			break
		}
		h[i] = h[child]
		i = child
	}
	return next
}

// simulate follows the users for a number of requests. The first fifth only brings the
// line to its usual length and is not counted. The same seed gives the same result. The
// error is that of ctx.
func (m closedModel) simulate(ctx context.Context, conns, requests int, seed uint64) (simulated, error) {
	rng := rand.New(rand.NewPCG(seed, uint64(conns)))
	spell := func(mean float64) float64 { return rng.ExpFloat64() * mean }

	var events agenda
	line := make([]int32, m.users) // a ring: each user is in it at most once
	head, waiting, busy := 0, 0, 0
	asked := make([]float64, m.users) // when each user asked

	use := func(now float64, user int32) { events.push(event{now + spell(m.service), user, true}) }
	for user := range m.users {
		if busy < min(conns, int(m.offered())) {
			busy++
			use(0, int32(user))
		} else {
			events.push(event{spell(m.think), int32(user), false})
		}
	}

	var s simulated
	var waits latencies
	warmUp := requests / 5
	begun, ended := 0, 0 // uses since the end of the warm-up
	since, now := 0.0, 0.0
	begin := func(user int32) {
		use(now, user)
		if warmUp > 0 {
			warmUp--
			since = now
			return
		}
		w := now - asked[user]
		if begun++; w > 0 {
			s.WaitShare++
		}
		s.MeanWait += w
		waits.add(time.Duration(w * float64(time.Second)))
	}
	s.Requests = requests - warmUp
	for i := 0; ended < s.Requests; i++ {
		if i%(1<<16) == 0 && ctx.Err() != nil {
			return s, context.Cause(ctx)
		}
		e := events.pop()
		now = e.at
		if !e.using {
			asked[e.user] = now
			if busy < conns {
				busy++
				begin(e.user)
			} else {
				line[(head+waiting)%m.users] = e.user
				waiting++
			}
			continue
		}
		if warmUp == 0 {
			ended++
			s.MeanResponse += now - asked[e.user]
		}
		events.push(event{now + spell(m.think), e.user, false})
		if waiting == 0 {
			busy--
			continue
		}
		next := line[head]
		head, waiting = (head+1)%m.users, waiting-1
		begin(next)
	}
	s.WaitShare /= float64(begun)
	s.MeanWait /= float64(begun)
	s.MeanResponse /= float64(ended)
	s.P99Wait = waits.quantile(0.99).Seconds()
	s.PerSecond = float64(ended) / (now - since)
	return s, nil
}
