// Package patience is for tests that meet the real machine, which is as slow as it
// likes: what they wait for, and what they may leave behind. Only tests import it.
package patience

import (
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Bounded is how long a test waits for what the system delivers when it likes.
const Bounded = time.Minute

// Soon waits for something that only the system can bring about.
func Soon(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(Bounded); !happened(); {
		if time.Now().After(end) {
			t.Fatal("still not: " + what)
		}
		<-time.After(500 * time.Microsecond)
	}
}

// QuickOnce requires that f ends within a bound at least once. A busy machine may
// make any run of it slow; what breaks the bound makes each slow.
func QuickOnce(t *testing.T, bound time.Duration, f func()) {
	t.Helper()
	for tries := 0; ; tries++ {
		start := time.Now()
		f()
		took := time.Since(start)
		if took < bound {
			return
		}
		if tries == 7 {
			t.Fatalf("%v, and %v at most are right, %d times in a row", took, bound, tries+1)
		}
	}
}

// Allocs is testing.AllocsPerRun for a process in which goroutines of earlier tests may still
// allocate, which AllocsPerRun counts, too: the least of several measurements. f runs more than
// runs times.
func Allocs(runs int, f func()) float64 {
	least := testing.AllocsPerRun(runs, f)
	for pause := time.Millisecond; least > 0 && pause < 250*time.Millisecond; pause *= 2 {
		time.Sleep(pause)
		least = min(least, testing.AllocsPerRun(runs, f))
	}
	return least
}

// InTime receives what should come soon.
func InTime[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(Bounded):
		t.Fatal("nothing comes")
	}
	return v
}

// WarmNet makes the runtime open what its poller needs, which are descriptors too.
var WarmNet = sync.OnceFunc(func() {
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close()
	}
})

// NothingLeaks fails the test if, when everything that is cleaned up after this
// call has been, there are more descriptors or goroutines than now, but for those that others
// excuses.
func NothingLeaks(t *testing.T, others ...goleak.Option) {
	t.Helper()
	WarmNet()
	before := OpenDescriptors()
	others = append(others, goleak.IgnoreCurrent())
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		for end := time.Now().Add(Bounded); ; { // goleak alone has less patience than a loaded machine needs
			if err := goleak.Find(others...); err == nil {
				break
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		Soon(t, "descriptors back at the baseline", func() bool { return OpenDescriptors() <= before })
	})
}

// OpenDescriptors counts the descriptors of the process; 0 where nobody tells.
func OpenDescriptors() int {
	if runtime.GOOS != "linux" {
		return 0
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		// Package net keeps the pipes that splice needs until the next GC. To
		// ask for one would hide a socket that nobody closed.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// Stress is by how much the long tests multiply their loops: CONNPOOL_STRESS, and 1
// without it.
func Stress() int {
	n, err := strconv.Atoi(os.Getenv("CONNPOOL_STRESS"))
	if err != nil || n < 1 {
		return 1
	}
	return max(n, 8)
}
