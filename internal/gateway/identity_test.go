package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

func TestEveryPartOfAnIdentityIsPartOfItsScope(t *testing.T) {
	all := []identity{
		{}, {resp3: true}, {db: 1}, {name: "n"}, {auth: true}, {auth: true, pass: "p"}, {auth: true, pass: "q"},
		{auth: true, user: "u", pass: "p"}, {auth: true, user: "up", pass: ""}, {auth: true, pass: "up"}, {auth: true, user: "u", pass: "p", name: "n"},
		{auth: true, user: "u", pass: "pn"}, {auth: true, user: "u", pass: "p", db: 1}, {auth: true, user: "u", pass: "p", resp3: true},
	}
	seen := make(map[string]identity)
	for _, id := range all {
		scope := id.scope()
		if twin, ok := seen[scope]; ok {
			t.Errorf("%+v and %+v share the scope %q", id, twin, scope)
		}
		seen[scope] = id
		require.Equal(t, scope, id.scope())
		require.NotEqual(t, loginScope, scope)
		require.NoError(t, connpool.Addr{Transport: connpool.TCP, Host: "h", Port: 1, Scope: scope}.Validate())
	}
}

func TestScopesDoNotTellCredentials(t *testing.T) {
	id := identity{auth: true, user: "alice", pass: "wonder"}
	require.NotContains(t, id.scope(), "alice")
	require.NotContains(t, id.scope(), "wonder")
	require.NotContains(t, fmt.Sprint(id), "wonder")

	// A reader of the log must not be able to try passwords against the hash.
	mac := hmac.New(sha256.New, nil)
	for _, part := range []string{"true", "alice", "wonder", ""} {
		mac.Write([]byte{0, 0, 0, 0, 0, 0, 0, byte(len(part))})
		mac.Write([]byte(part))
	}
	require.NotContains(t, id.scope(), hex.EncodeToString(mac.Sum(nil)[:16]))
	require.Regexp(t, `^db0,[0-9a-f]{32}$`, id.scope())
}

// A login of one client is tried on a connection that no other client gets, even if both
// log in at the same moment.
func TestClaimsAreTriedOnConnectionsThatServeNobodyElse(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen = 4 })
	var wg tasks.Group
	for i := range 40 {
		c := g.call()
		wg.Go(func() {
			name := fmt.Sprintf("n%d", i)
			if got := c.do("CLIENT", "SETNAME", name); got != "+OK\r\n" {
				t.Errorf("%q", got)
			}
			if got := c.do("CLIENT", "GETNAME"); got != bulk(name) {
				t.Errorf("%s is %q", name, got)
			}
			if got := c.do("CLIENT", "LIST"); strings.Count(got, " name="+name+" ") > 1 {
				t.Errorf("%s on more than the connections of its own: %q", name, got)
			}
		})
	}
	wg.Wait()
	for addr, st := range g.pool.Addrs() {
		if addr.Scope == loginScope {
			require.Zero(t, st.Idle, "none of these is ever lent again")
		}
	}
	require.GreaterOrEqual(t, g.Status().Pool.Closed[connpool.ClosedByBorrower], uint64(40))
}

// A pipeline with the end of a transaction in its middle: the command after EXEC may
// arrive at any moment of the connection's release.
func TestACommandThatMeetsTheReleaseIsNotLost(t *testing.T) {
	g, _ := redisGateway(t, nil)
	var wg tasks.Group
	for range 8 { // keep the machine busy, so that the two coincide at all
		c := g.call()
		wg.Go(func() {
			for i := range 200 {
				c.send("WATCH", "k")
				c.send("UNWATCH")
				require.Equal(t, "+OK\r\n", c.frame())
				require.Equal(t, "+OK\r\n", c.frame())
				// The reply has arrived, so the connection is about to be released.
				require.Equal(t, bulk(fmt.Sprint(i)), c.do("ECHO", fmt.Sprint(i)))
			}
		})
	}
	wg.Wait()
}

// TRY-26: if the reply to a SELECT or HELLO is lost, the client keeps its identity, and the
// error says so.
func TestALoginWhoseReplyIsLostSaysThatNothingHasChanged(t *testing.T) {
	to := scripted(t, func(_ *faultnet.Peer, command string) string {
		if command == "HELLO 3" {
			return bulk(strings.Repeat("x", 200))
		}
		return "+" + command + "\r\n"
	})
	g := begin(t, Config{Framing: "resp", To: to, MaxFrame: 100})
	c := g.call()
	told := c.do("HELLO", "3")
	require.Contains(t, told, respErrors[tooLong])
	require.Contains(t, told, "; the client's identity is unchanged\r\n")
	require.Equal(t, "+GET k\r\n", c.do("GET", "k"))
}
