package connpooltest

import (
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"testing"
)

// Desync searches for a script under which the client fails, with [Harness.Search], and
// fails the test with the shortest one that it finds.
func Desync(t *testing.T, h Harness) {
	t.Helper()
	if err := h.Search(t); err != nil {
		t.Fatal(err)
	}
}

// Fuzz makes a fuzz target: go test -fuzz looks for bytes of which [FromBytes] makes a
// script under which the client fails. Without -fuzz the target plays a script for each
// fault, as [Desync] does, and what earlier runs left in testdata/fuzz.
//
// When a script fails, Fuzz prints the shortest one that it can make of it, with what
// happened in it.
func Fuzz(f *testing.F, h Harness) {
	for _, script := range corpus() {
		f.Add(script.Bytes())
	}
	var explained atomic.Bool
	f.Fuzz(func(t *testing.T, b []byte) {
		err := h.Run(t, FromBytes(b))
		var failure *Failure
		switch {
		case err == nil:
		case errors.As(err, &failure) && explained.CompareAndSwap(false, true):
			t.Fatal(h.Shrink(t, failure))
		case failure != nil: // the seeds are many, and all fail for the same reason as a rule
			t.Fatalf("connpooltest: %s\nscript: %s", failure.Text, failure.Script)
		default:
			t.Fatal(err)
		}
	})
}

// Search plays one script for each fault and position, then Executions random scripts. At
// the first that fails it stops, shrinks the script, and returns the *[Failure]. The
// error is another one if no script can be played, and nil if none failed. t is what it is
// for Run.
func (h Harness) Search(t *testing.T) error {
	for _, script := range corpus() {
		if err := h.try(t, script); err != nil {
			return err
		}
	}
	return h.searchAtRandom(t)
}

// searchAtRandom plays random scripts only.
func (h Harness) searchAtRandom(t *testing.T) error {
	n := h.Executions
	switch {
	case n == 0 && h.Loopback:
		n = 20
	case n == 0:
		n = 500
	}
	rng := rand.New(rand.NewPCG(h.Seed, uint64(max(n, 0))))
	for range n {
		if err := h.try(t, randomScript(rng)); err != nil {
			return err
		}
	}
	return nil
}

func (h Harness) try(t *testing.T, script Script) error {
	err := h.Run(t, script)
	var failure *Failure
	if errors.As(err, &failure) {
		return h.Shrink(t, failure)
	}
	return err
}

// corpus has scripts for each fault at the positions where faults are most often found:
// the fault on a connection that is used again at once, and while others wait.
func corpus() (all []Script) {
	for f := range numFaults {
		positions := []int{0}
		switch {
		case f == Drip:
			positions = []int{1, 3}
		case f.hasPosition():
			positions = []int{0, 1, 4, -1, End}
		}
		for _, at := range positions {
			fault := Step{Fault: f, At: at}
			beside := fault
			beside.Overlap = true
			all = append(all, Script{{}, fault, {}, {}}, Script{fault, fault, {}, {}}, Script{{Overlap: true}, beside, beside, {Overlap: true}, {}, {}})
		}
	}
	return all
}

// randomScript has two to eight steps, a third of which are OK.
func randomScript(rng *rand.Rand) Script {
	s := make(Script, 2+rng.IntN(7))
	for i := range s {
		step := Step{Overlap: rng.IntN(4) == 0}
		if rng.IntN(3) > 0 {
			step.Fault = Fault(rng.IntN(int(numFaults)))
		}
		switch {
		case step.Fault == Drip:
			step.At = 1 + rng.IntN(longestPiece)
		case !step.Fault.hasPosition():
		default:
			// Near the beginning, near the end, or anywhere in the first bytes.
			step.At = []int{0, rng.IntN(8), -1 - rng.IntN(8), End, rng.IntN(64)}[rng.IntN(5)]
		}
		s[i] = step
	}
	return s
}

// mostShrinks bounds the scripts that Shrink plays.
const mostShrinks = 400

// Shrink makes the script of a failure shorter and plainer for as long as the client fails
// in the same way: it leaves out steps, takes faults and overlaps away, and moves positions
// to 0. It returns the failure of the last script that failed. t is what it is for Run.
func (h Harness) Shrink(t *testing.T, failure *Failure) *Failure {
	left := mostShrinks
	// simpler plays the candidate, and adopts it if it fails too.
	simpler := func(candidate Script) bool {
		if left == 0 {
			return false
		}
		left--
		var f *Failure
		if !errors.As(h.Run(t, candidate), &f) || f.Kind != failure.Kind {
			return false
		}
		failure = f
		return true
	}
	for again := true; again && left > 0; {
		again = false
		for i := 0; i < len(failure.Script); {
			if len(failure.Script) > 1 && simpler(without(failure.Script, i)) {
				again = true
			} else {
				i++
			}
		}
		for i := range failure.Script {
			for _, step := range plainer(failure.Script[i]) {
				if simpler(with(failure.Script, i, step)) {
					again = true
					break
				}
			}
		}
	}
	return failure
}

func without(s Script, i int) Script {
	return append(append(Script{}, s[:i]...), s[i+1:]...)
}

func with(s Script, i int, step Step) Script {
	s = append(Script{}, s...)
	s[i] = step
	return s
}

// plainer are the steps to try in place of s, the plainest first. Each is plainer by an
// order without circles, so that Shrink ends.
func plainer(s Step) (all []Step) {
	if s == (Step{}) {
		return nil
	}
	all = append(all, Step{})
	if s.Fault != OK && s.Overlap {
		alone := s
		alone.Overlap = false
		all = append(all, Step{Overlap: true}, alone)
	}
	least := 0
	switch {
	case !s.Fault.hasPosition():
		return all
	case s.Fault == Drip: // one gap is plainer than many
		least = 1
		for at := range mostPieces {
			all = append(all, Step{Fault: Split, At: at, Overlap: s.Overlap})
		}
	}
	for _, at := range []int{least, s.At / 2} {
		if at >= least && at < s.At && s.At != End || at == least && s.At != least {
			nearer := s
			nearer.At = at
			all = append(all, nearer)
		}
	}
	if s.At > least && s.At != End {
		nearer := s
		nearer.At--
		all = append(all, nearer)
	}
	return all
}
