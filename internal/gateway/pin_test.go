package gateway

import (
	"bufio"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// TRY-26
func TestACommandThatTheServerRefusedPinsNobody(t *testing.T) {
	g, r := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned, c.RequestTimeout = 3, 1, 5*time.Second })
	require.Equal(t, "+OK\r\n", r.do(t, "ACL", "SETUSER", "alice", "on", ">wonder", "~*", "+@all", "-monitor", "-client|reply", "-client|tracking"))
	for _, refused := range []string{
		"READONLY", "READWRITE", "ASKING", "CLIENT BOGUS", "CLIENT NO-EVICT PERHAPS", "CLIENT TRACKING SOMETIMES",
		"CLIENT REPLY BOGUS", "CLIENT REPLY OFF TOO", "CLIENT CACHING YES", "SCRIPT DEBUG BOGUS", "MONITOR TOO MUCH",
		"CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type none",
	} {
		c := g.call()
		require.Contains(t, c.do(strings.Fields(refused)...), "-ERR", refused)
		soon(t, refused+" pins nobody", func() bool { return g.Status().Pinned == 0 })
		require.Equal(t, "+PONG\r\n", c.do("PING"))
	}
	alice := g.call()
	require.Equal(t, "+OK\r\n", alice.do("AUTH", "alice", "wonder"))
	for _, refused := range []string{"MONITOR", "CLIENT REPLY OFF", "CLIENT TRACKING ON"} {
		require.Contains(t, alice.do(strings.Fields(refused)...), "-NOPERM", refused)
		soon(t, refused+" pins nobody", func() bool { return g.Status().Pinned == 0 })
		require.Equal(t, "+PONG\r\n", alice.do("PING"))
	}
	// Within what pins for a reason of its own.
	c := g.call()
	for _, refused := range []string{"SELECT 999", "AUTH alice guess", "HELLO 3 AUTH alice guess", "CLIENT SETNAME a\x01b"} {
		require.Equal(t, "+OK\r\n", c.do("WATCH", "k"))
		require.True(t, isError([]byte(c.do(strings.Fields(refused)...))), refused)
		require.Equal(t, "+OK\r\n", c.do("UNWATCH"))
		soon(t, refused+" pins nobody", func() bool { return g.Status().Pinned == 0 })
	}
	require.Equal(t, "+OK\r\n", c.do("MULTI"))
	require.Equal(t, "+QUEUED\r\n", c.do("SELECT", "5"))
	require.Equal(t, "+OK\r\n", c.do("DISCARD"))
	soon(t, "what was not carried out pins nobody", func() bool { return g.Status().Pinned == 0 })
	closed := g.Status().Pool.Closed
	require.Zero(t, closed[0])
	require.LessOrEqual(t, g.Status().Pool.PeakOpen, 3)
}

// TRY-26
func TestWhatWasTakenBackIsOver(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned = 3, 1 })
	c, other := g.call(), g.call()
	require.True(t, strings.HasPrefix(c.do("HELLO", "3"), "%"))
	for _, pair := range [][2]string{
		{"CLIENT TRACKING ON", "CLIENT TRACKING OFF"},
		{"CLIENT TRACKING ON OPTIN", "client tracking off"},
		{"CLIENT NO-EVICT ON", "CLIENT NO-EVICT OFF"},
		{"", "CLIENT TRACKING OFF"},
		{"", "CLIENT NO-EVICT OFF"},
		{"", "CLIENT REPLY ON"},
		{"", "SCRIPT DEBUG NO"},
	} {
		if pair[0] != "" {
			require.Equal(t, "+OK\r\n", c.do(strings.Fields(pair[0])...))
			require.Equal(t, bulk("x"), c.do("ECHO", "x"))
			require.EqualValues(t, 1, g.Status().Pinned, pair[0])
		}
		require.Equal(t, "+OK\r\n", c.do(strings.Fields(pair[1])...))
		soon(t, pair[1]+" frees the connection", func() bool { return g.Status().Pinned == 0 })
		require.Equal(t, "+OK\r\n", other.do("MULTI"), "which is there for the next")
		require.Equal(t, "*0\r\n", other.do("EXEC"))
		soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
	}
	// The invalidations of a client that tracks no more reach nobody.
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "ON"))
	require.Equal(t, "_\r\n", c.do("GET", "k"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "OFF"))
	require.Equal(t, "+OK\r\n", other.do("SET", "k", "v"))
	require.Equal(t, bulk("v"), c.do("GET", "k"))

	// One of two states is no reason to let go.
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "ON"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "NO-EVICT", "ON"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "OFF"))
	require.Equal(t, bulk("x"), c.do("ECHO", "x"))
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "NO-EVICT", "OFF"))
	soon(t, "both are over", func() bool { return g.Status().Pinned == 0 })

	// RESET takes everything back, and ends a transaction.
	plain := g.call()
	require.Equal(t, "+OK\r\n", plain.do("MULTI"))
	require.Equal(t, "+RESET\r\n", plain.do("RESET"))
	soon(t, "RESET frees the connection", func() bool { return g.Status().Pinned == 0 })
	require.Equal(t, bulk("x"), plain.do("ECHO", "x"))
}

// TRY-26: the words of a cluster's clients, where the server agrees to them.
func TestWhatAClustersClientSaysHoldsAsLongAsTheServerHoldsIt(t *testing.T) {
	r := startRedis(t, "--cluster-enabled", "yes")
	g := begin(t, Config{Framing: "resp", To: r.addr(), MaxOpen: 2, MaxPinned: 1})
	c := g.call()
	require.Equal(t, "+OK\r\n", c.do("READONLY"))
	require.Equal(t, "+PONG\r\n", c.do("PING"))
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "+OK\r\n", c.do("READWRITE"))
	soon(t, "READWRITE takes it back", func() bool { return g.Status().Pinned == 0 })
	require.Equal(t, "+OK\r\n", c.do("ASKING"))
	require.EqualValues(t, 1, g.Status().Pinned, "it is for the command that comes next")
	require.Equal(t, "+PONG\r\n", c.do("PING"))
	soon(t, "and for that one only", func() bool { return g.Status().Pinned == 0 })
}

// TRY-26: what clients say of themselves within a pin is not left to the next.
func TestALibrarysNameIsNotLeftToTheNextClient(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			switch args := words(all); {
			case string(all) == "*1\r\n$4\r\nPING\r\n":
				io.WriteString(peer, "+PONG\r\n")
			case is(all[8:12], "PING"):
				io.WriteString(peer, bulk(string(args[0])))
			default:
				io.WriteString(peer, "+OK\r\n")
			}
		}
	}})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
	c := g.call()
	for _, command := range []string{"WATCH k", "CLIENT SETINFO LIB-NAME x", "UNWATCH"} {
		require.Equal(t, "+OK\r\n", c.do(strings.Fields(command)...))
	}
	soon(t, "the client goes on without the connection", func() bool { return g.Status().Pinned == 0 && g.Status().Pool.Open == 0 })
	require.Equal(t, "+PONG\r\n", c.do("PING"))
	require.Equal(t, uint64(1), g.Status().Pool.Closed[connpool.ClosedByBorrower])
}

// TRY-26: twelve clients greet as current clients do, and there is one pin.
func TestTheGreetingOfCurrentClientsNeedsNoConnectionOfItsOwn(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned, c.RequestTimeout = 4, 1, 2*time.Second })
	holder := g.call()
	require.Equal(t, "+OK\r\n", holder.do("MULTI"))
	var all []*caller
	for range 12 {
		c := g.call()
		c.send("HELLO", "3")
		c.send("CLIENT", "MAINT_NOTIFICATIONS", "ON", "moving-endpoint-type", "none")
		c.send("CLIENT", "SETINFO", "LIB-NAME", "x")
		c.send("PING")
		require.True(t, strings.HasPrefix(c.frame(), "%"))
		require.Contains(t, c.frame(), "-ERR unknown subcommand 'MAINT_NOTIFICATIONS'")
		require.Equal(t, "+OK\r\n", c.frame())
		require.Equal(t, "+PONG\r\n", c.frame())
		all = append(all, c)
	}
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "*0\r\n", holder.do("EXEC"))
	require.Zero(t, g.Status().Failures["pinned"])
	require.NotEmpty(t, all)
}
