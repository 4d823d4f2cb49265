package connpool

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// check fails the test if the books contradict themselves. It may run at any
// moment; the stronger promises of a pool at rest are in checkAtRest.
func (p *Pool) check(t testing.TB) {
	t.Helper()
	if err := p.inconsistency(); err != nil {
		t.Fatal(err)
	}
}

// inconsistency is auditLocked.
func (p *Pool) inconsistency() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.auditLocked()
}

// every lists all connections, least recently used first.
func (p *Pool) every() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recency.all()
}

// In debug mode a pool whose books are wrong says so at the next give-back, and
// when it is asked for its Stats. Else nobody looks.
func TestInDebugModeThePoolAuditsItsBooks(t *testing.T) {
	for _, debug := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{Debug: debug})
			p := n.p
			n.idle(at("a"), 1)
			p.mu.Lock()
			p.eager++
			p.mu.Unlock()
			const says = "connpool: the books contradict themselves: 0 wanted by addresses that answer, the pool counts 1"
			for _, use := range []func(){
				func() { p.With(bg, at("a"), func(Conn) error { return nil }) },
				func() { p.Stats() },
			} {
				if debug {
					require.PanicsWithValue(t, says, use)
				} else {
					require.NotPanics(t, use)
				}
			}
			require.ErrorContains(t, p.inconsistency(), "0 wanted")
			p.mu.Lock()
			p.eager--
			p.mu.Unlock()
			n.idle(at("b"), 2)
			n.check()
		})
	}
}

// An audit looks at all the books, so a large pool is audited the more seldom.
func TestALargePoolIsAuditedTheMoreSeldom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxPerAddr: 200, MaxIdle: 200, MaxDialing: 200, Debug: true})
		n.idle(at("a"), 100)
		n.p.Stats()
		audits := 0
		for last, k := 0, 0; k < 12; k++ {
			n.use(at("a"))
			n.p.mu.Lock()
			if n.p.auditIn > last {
				audits++
			}
			last = n.p.auditIn
			n.p.mu.Unlock()
		}
		require.Equal(t, 3, audits)
	})
}
