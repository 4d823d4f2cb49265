package connpool

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// answerOf is the answer whose addresses are written as letters.
func answerOf(letters string) (ips []netip.Addr) {
	for _, l := range letters {
		ips = append(ips, netip.AddrFrom4([4]byte{10, 0, 0, byte(l)}))
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	return ips
}

// ADO-12: the first letters are what was dialled; a word is an answer ("-" is an empty one), a word
// with a + a dial; a word in parentheses is who is gone then.
func TestWhoIsGoneFromTheAnswers(t *testing.T) {
	for _, tc := range []string{
		"A: A A A A ()",
		"A: B () B (A)",
		"A: A B () B (A)",
		"A: A B () BC (A)",
		"AB: AB A () A (B)",
		"AB: AB A () AC (B)",
		"ABC: ABC BCD () BCD () BCD (A)",
		"ABC: ABC BC () B (A) B (AC)",
		"A: A - () - (A)",
		"A: A B A B A B () B () B () A ()", // it comes back again and again
		"ABC: ABC BEG () ADE () CDF () CDF () CDF ()",
		"A: A B () +A B () B (A)", // a dial still got it
		"A: A B () B (A) A () A (B)",
		"AB: A () A (B) B () B (A)",
		"AB: BC () BC () BC (A)", // it may have been ABC
		"AB: CD () CD (AB)",
		"ABCDEFG: ABC ADE AFG ADE ADE ADE ()",
	} {
		dialled, script, _ := strings.Cut(tc, ": ")
		var a dnsAnswers
		for _, ip := range answerOf(dialled) {
			a.dialled(ip)
		}
		for i, word := range strings.Fields(script) {
			switch {
			case word[0] == '(':
				var gone []netip.Addr
				for ip := range a.seen {
					if a.gone(ip) {
						gone = append(gone, ip)
					}
				}
				slices.SortFunc(gone, netip.Addr.Compare)
				require.Equal(t, answerOf(strings.Trim(word, "()")), gone, "%s: word %d", tc, i)
			case word[0] == '+':
				a.dialled(answerOf(word[1:])[0])
			case word == "-":
				a.learn(nil)
			default:
				a.learn(answerOf(word))
			}
		}
	}
}

// ADO-12: a server that has n addresses and answers with some of them at random closes hardly any
// connection, however long that goes on, and none later than in the first answers.
func TestAnswersWithSomeOfManyAddressesRetireNobody(t *testing.T) {
	if raceEnabled {
		t.Skip("a long computation on one goroutine")
	}
	for _, tc := range []struct {
		some, of, each int     // each answer is given so often, as by a cache
		early          float64 // what share of the pools may lose any in the first answers, when it looks like a switch
	}{
		{3, 10, 1, 0.02}, {8, 100, 1, 0}, {1, 20, 1, 0.3}, {1, 2, 1, 1}, {2, 5, 1, 0.1}, {3, 10, 3, 1},
	} {
		t.Run(fmt.Sprint(tc.some, " of ", tc.of, ", each ", tc.each), func(t *testing.T) {
			early, late, runs := 0, 0, 300
			for seed := range runs {
				rng := rand.New(rand.NewPCG(uint64(seed), 12))
				var all []netip.Addr
				for i := range tc.of {
					all = append(all, netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}))
				}
				draw := func() []netip.Addr {
					rng.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
					some := slices.Clone(all[:tc.some])
					slices.SortFunc(some, netip.Addr.Compare)
					return some
				}
				var a dnsAnswers
				for _, ip := range append(draw(), draw()...) {
					a.dialled(ip)
				}
				lost := func() (n int) {
					for ip := range a.seen {
						if a.gone(ip) {
							n++
						}
					}
					return n
				}
				wasEarly := false
				for i := range 400 {
					answer := draw()
					for range tc.each {
						a.learn(answer)
						switch {
						case lost() == 0:
						case i < 16*tc.each:
							wasEarly = true
						default:
							late++
						}
					}
				}
				if wasEarly {
					early++
				}
			}
			require.LessOrEqual(t, float64(early)/float64(runs), tc.early, "early")
			require.LessOrEqual(t, late, runs/20, "late")
			t.Log(early, late)
		})
	}
}

// ADO-12: what has really gone from such a server is retired in the end, and after a time of calm
// a switch is one again.
func TestUnrestDelaysAndEnds(t *testing.T) {
	var a dnsAnswers
	rng := rand.New(rand.NewPCG(3, 3))
	all := []rune("ABCDEFGHIK")
	draw := func(from []rune) []netip.Addr {
		rng.Shuffle(len(from), func(i, k int) { from[i], from[k] = from[k], from[i] })
		return answerOf(string(from[:3]))
	}
	for range 100 {
		a.learn(draw(all))
	}
	dead := answerOf(string(all[0]))[0]
	rest := slices.Clone(all[1:])
	sweeps := 0
	for ; !a.gone(dead); sweeps++ {
		a.learn(draw(rest))
	}
	require.Greater(t, sweeps, 2*patientAnswers)
	require.Less(t, sweeps, 300)
	for range unrestMemory {
		a.learn(answerOf("Z"))
	}
	a.learn(answerOf("Z"))
	require.True(t, a.calm())
	require.Zero(t, a.gap)
	a.learn(answerOf("Y"))
	require.False(t, a.gone(answerOf("Z")[0]))
	a.learn(answerOf("Y"))
	require.True(t, a.gone(answerOf("Z")[0]))
}

// ADO-12: a server that never repeats itself fills no memory.
func TestTheAddressesOfANameAreBounded(t *testing.T) {
	var a dnsAnswers
	for i := range 3 * maxSeen {
		a.learn([]netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})})
		require.LessOrEqual(t, len(a.seen), maxSeen)
	}
}
