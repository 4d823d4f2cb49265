package main

import (
	"math"
	"testing"
)

// The textbook's figures: ORA-08 of the contract asks for these.
func TestTheExactModelHasTheKnownFigures(t *testing.T) {
	m := closed{users: 10_000, think: 10, service: 0.1}
	for c, want := range map[int][2]float64{100: {0.83, 0.144}, 110: {0.19, 0.102}, 120: {0.03, 0.100}, 130: {0, 0.100}} {
		wait, mean := m.exact(c)
		if math.Abs(wait-want[0]) > 0.01 || math.Abs(mean-want[1]) > 0.002 {
			t.Errorf("%d connections: %.3f wait, mean %.3f s; want %v", c, wait, mean, want)
		}
	}
}

func TestTheSimulationAgreesWithTheExactModel(t *testing.T) {
	m := closed{users: 1000, think: 1, service: 0.1}
	for _, c := range []int{85, 92, 100, 110} {
		wait, mean := m.exact(c)
		s := m.simulate(c, 400, 1)
		if math.Abs(s.mean-mean) > 0.1*mean || math.Abs(s.wait-wait) > 0.04 {
			t.Errorf("%d connections: simulated %.3f wait, mean %.3f s; exact %.3f, %.3f", c, s.wait, s.mean, wait, mean)
		}
	}
}

func TestALonePairHoldsWhatItsRateSays(t *testing.T) {
	// Uses so rare that two never overlap: the connection is open during a use and, after
	// it, until the next use or its expiry.
	p := pair{rate: 1.0 / 120, service: 0.005, keep: 120}
	want := 1 - math.Exp(-1)
	if got := p.open(200_000, 1); math.Abs(got-want) > 0.01 {
		t.Errorf("open on average %.3f, want %.3f", got, want)
	}
	// Uses so frequent that it is never closed.
	if got := (pair{rate: 10, service: 1e-9, keep: 120}).open(100_000, 1); math.Abs(got-1) > 0.01 {
		t.Errorf("open on average %.3f, want 1", got)
	}
}

func TestStaffingIsErlangs(t *testing.T) {
	if got := staffed(10, 0.01); got != 19 {
		t.Errorf("10 in use on average: %d connections, want 19", got)
	}
}
