package gateway

import (
	"bufio"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
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
	// A refused command within a pin that has another reason.
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
	// No client gets the invalidations of a client that has stopped tracking.
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "ON"))
	require.Equal(t, "_\r\n", c.do("GET", "k"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "OFF"))
	require.Equal(t, "+OK\r\n", other.do("SET", "k", "v"))
	require.Equal(t, bulk("v"), c.do("GET", "k"))

	// One of two states that is undone does not release the pin.
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "ON"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "NO-EVICT", "ON"))
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "TRACKING", "OFF"))
	require.Equal(t, bulk("x"), c.do("ECHO", "x"))
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "NO-EVICT", "OFF"))
	soon(t, "both are over", func() bool { return g.Status().Pinned == 0 })

	// RESET undoes everything, and ends a transaction.
	plain := g.call()
	require.Equal(t, "+OK\r\n", plain.do("MULTI"))
	require.Equal(t, "+RESET\r\n", plain.do("RESET"))
	soon(t, "RESET frees the connection", func() bool { return g.Status().Pinned == 0 })
	require.Equal(t, bulk("x"), plain.do("ECHO", "x"))
}

// TRY-26: commands of a cluster's clients, if the server accepts them.
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

// TRY-26: a library name that a client sets within a pin does not stay for the next
// client.
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

// TRY-26: twelve clients send the greeting of current clients, and there is one pin.
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

// TRY-27: the gateway does not read from a client with the maximum of pending commands.
func TestAClientThatSentMuchBehindABlockedCommandIsMissedWhenItLeaves(t *testing.T) {
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	for name, rst := range map[string]bool{"reset": true, "end": false} {
		t.Run(name, func(t *testing.T) {
			g, r := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned = 2, 1 })
			c := g.call()
			all := appendCommand(nil, []byte("BLPOP"), []byte("list"), []byte("0"))
			for range 100 {
				all = appendCommand(all, []byte("PING"))
			}
			c.Write(all)
			soon(t, "it is blocked", func() bool { return strings.Contains(r.do(t, "INFO", "clients"), "blocked_clients:1") })
			soon(t, "all was read", func() bool { return g.Status().BytesIn == uint64(len(all)) })
			c.leave(rst)
			soon(t, "its connection is free", func() bool { return g.Status().Pinned == 0 && g.Status().Clients == 0 })
			soon(t, "the server knows", func() bool { return strings.Contains(r.do(t, "INFO", "clients"), "blocked_clients:0") })
			require.Equal(t, ":1\r\n", r.do(t, "RPUSH", "list", "x"))
			require.Equal(t, ":1\r\n", r.do(t, "LLEN", "list"), "nothing was taken for nobody")
		})
	}
}

// TRY-27: no client with a connection of its own waits for ever for a server that stops
// reading.
func TestAServerThatStopsReadingIsNotWaitedForInAPinEither(t *testing.T) {
	t.Parallel()
	for name, word := range map[string]string{"silent": "", "answers first": "-ERR that is too large\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stop := make(chan bool)
			defer close(stop)
			to := scripted(t, func(peer *faultnet.Peer, command string) string {
				io.WriteString(peer, "+OK\r\n")
				if word != "" {
					peer.Read(make([]byte, 1))
					io.WriteString(peer, word)
				}
				<-stop
				return ""
			})
			g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2, RequestTimeout: short.Of(12*time.Second, 4*time.Second)})
			c := g.call()
			require.Equal(t, "+OK\r\n", c.do("WATCH", "k"))
			go c.Write(appendCommand(nil, []byte("SET"), []byte("k"), make([]byte, 15<<20)))
			told := strings.TrimSuffix(word, "\r\n")
			if word == "" {
				told = respErrors[late]
			}
			require.Contains(t, c.frame(), told)
			soon(t, "the connection is given up", func() bool { return g.Status().Pinned == 0 && g.Status().Pool.Open == 0 })
		})
	}
}

// TRY-33: each command gets its own reply, or the error that says why it has none.
func TestAReplyThatCannotBePassedOnCostsNoReplyBeforeIt(t *testing.T) {
	for word, told := range map[string]failure{"$99999999\r\n": tooLong, "?\r\n": outOfStep} {
		to := scripted(t, func(_ *faultnet.Peer, command string) string {
			switch command {
			case "GET a", "GET b":
				return ""
			case "GET c":
				return bulk("a") + word // in one segment, when all were sent
			}
			return "+OK\r\n"
		})
		g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
		c := g.call()
		require.Equal(t, "+OK\r\n", c.do("WATCH", "k"))
		for _, key := range []string{"a", "b", "c"} {
			c.send("GET", key)
		}
		require.Equal(t, bulk("a"), c.frame())
		require.Contains(t, c.frame(), respErrors[told])
		require.Contains(t, c.frame(), "may have been carried out", "nobody knows")
		c.hearEnd()
	}
}

// TRY-33
func TestWhatAClientIsClosedForIsToldBehindTheRepliesThatItWaitsFor(t *testing.T) {
	for _, bad := range []string{"GET 'a\r\n", "*1\r\n$4\r\nSYNC\r\n", "POST /\r\n", "*x\r\n"} {
		proceed := make(chan bool)
		to := scripted(t, func(_ *faultnet.Peer, command string) string {
			if command == "GET a" {
				<-proceed
				return bulk("a")
			}
			return "+OK\r\n"
		})
		g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
		c := g.call()
		require.Equal(t, "+OK\r\n", c.do("WATCH", "k"))
		before, all := g.Status().BytesIn, append(appendCommand(nil, []byte("GET"), []byte("a")), bad...)
		c.Write(all)
		soon(t, "all was read", func() bool { return g.Status().BytesIn == before+uint64(len(all)) })
		time.AfterFunc(20*time.Millisecond, func() { close(proceed) }) // for a gateway that does not wait
		require.Equal(t, bulk("a"), c.frame(), "%q", bad)
		require.Contains(t, c.frame(), "-ERR Protocol error", "%q", bad)
		c.hearEnd()
	}
}

// TRY-04: a reply too many in a pin is detected before another client gets the
// connection.
func TestAPinThatHeardAWordTooManyLeavesNoReplyToTheNextClient(t *testing.T) {
	proceed, stop := make(chan bool), make(chan bool)
	defer close(stop)
	to := scripted(t, func(peer *faultnet.Peer, command string) string {
		if command == "BLPOP a 0" {
			io.WriteString(peer, "+hello\r\n") // late, and before the reply
			<-proceed
			return "*2\r\n" + bulk("a") + bulk("of a")
		}
		<-stop
		return ""
	})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 1, GreetingWait: time.Second})
	a, b := g.call(), g.call()
	a.send("BLPOP", "a", "0")
	require.Equal(t, "+hello\r\n", a.frame(), "its words are a client's own affair")
	b.send("BLPOP", "b", "0")
	sent := len(appendCommand(nil, []byte("BLPOP"), []byte("a"), []byte("0")))
	soon(t, "it has come", func() bool { return g.Status().BytesIn == uint64(2*sent) })
	time.AfterFunc(50*time.Millisecond, func() { close(proceed) }) // for a gateway that lets it in
	require.Contains(t, b.frame(), "was not sent")
	a.hearEnd()
	require.NotZero(t, g.Status().Failures["out-of-step"])
	require.NotZero(t, g.Status().Failures["speaks-first"])
}

// TRY-26: attributes of a reply do not hide the reply.
func TestAttributesHideNothing(t *testing.T) {
	const attribute = "|1\r\n$3\r\nttl\r\n*2\r\n:3\r\n+s\r\n"
	to := scripted(t, func(_ *faultnet.Peer, command string) string {
		if strings.HasSuffix(command, "guess") {
			return attribute + "-WRONGPASS no\r\n"
		}
		switch command {
		case "MULTI", "HELLO 3":
			return attribute + "+OK\r\n"
		case "EXEC":
			return attribute + "*0\r\n"
		case "MONITOR":
			return attribute + "-NOPERM not you\r\n"
		}
		return attribute + "+QUEUED\r\n"
	})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
	c := g.call()
	require.Equal(t, attribute+"+OK\r\n", c.do("HELLO", "3"))
	require.Equal(t, attribute+"+OK\r\n", c.do("MULTI"))
	for range 20 {
		require.Equal(t, attribute+"+QUEUED\r\n", c.do("INCR", "x"))
		require.EqualValues(t, 1, g.Status().Pinned)
	}
	require.Equal(t, attribute+"*0\r\n", c.do("EXEC"))
	soon(t, "the transaction is over", func() bool { return g.Status().Pinned == 0 })
	require.Contains(t, c.do("MONITOR"), "-NOPERM")
	soon(t, "a refused command pins nobody", func() bool { return g.Status().Pinned == 0 })
	require.Contains(t, c.do("AUTH", "guess"), "-WRONGPASS")
	dials := g.Status().Pool.Dials
	require.Contains(t, c.do("INCR", "x"), "+QUEUED")
	require.Equal(t, dials, g.Status().Pool.Dials, "it is who it was, and has the connections of that")
	require.True(t, isDemotion([]byte(attribute+"-READONLY no\r\n")))
}

// TRY-27: a blocking command is recognised whatever the names in it are.
func TestAGroupMayHaveTheNameOfAWordOfTheCommand(t *testing.T) {
	for command, want := range map[string]class{
		"XREADGROUP GROUP streams c BLOCK 0 STREAMS k >": blocks,
		"XREADGROUP GROUP g streams BLOCK 0 STREAMS k >": blocks,
		"XREADGROUP GROUP block block STREAMS k >":       plain,
		"XREAD COUNT 1 BLOCK 0 STREAMS k 0":              blocks,
		"XREAD STREAMS block 0":                          plain,
	} {
		var args [][]byte
		for _, w := range strings.Fields(command) {
			args = append(args, []byte(w))
		}
		require.Equal(t, want, classify(appendCommand(nil, args...)).class, command)
	}
}

// TRY-27: the proof of a pin's replies may take any time.
func TestAClientThatLeavesWhileItsPinIsProvenHasNothingCarriedOut(t *testing.T) {
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	var marks, incr atomic.Int64
	asked, stop := make(chan bool), make(chan bool)
	defer close(stop)
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			reply := "+OK\r\n"
			switch args := words(all); {
			case is(all[8:12], "PING") && len(args) == 0:
				reply = "+PONG\r\n"
			case is(all[8:12], "PING"):
				if peer.Serial() == 1 && marks.Add(1) == 2 {
					close(asked)
					<-stop
				}
				reply = bulk(string(args[0]))
			case is(all[8:12], "INCR"):
				incr.Add(1)
			}
			io.WriteString(peer, reply)
		}
	}})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2, MaxPinned: 1, GreetingWait: forever, RequestTimeout: 10 * forever})
	c := g.call()
	require.Equal(t, "+OK\r\n", c.do("WATCH", "k"))
	require.Equal(t, "+OK\r\n", c.do("UNWATCH"))
	<-asked
	c.send("INCR", "x")
	c.leave(true)
	soon(t, "its place is free", func() bool { return g.Status().Pinned == 0 && g.Status().Clients == 0 })
	require.Zero(t, incr.Load())
}

// TRY-27: a blocked command was sent, whatever follows it.
func TestWhatAClientIsClosedForIsNotTheReplyToItsBlockedCommand(t *testing.T) {
	stop := make(chan bool)
	defer close(stop)
	for _, bad := range []string{"GET 'a\r\n", "*1\r\n$4\r\nSYNC\r\n", "*x\r\n", "*2\r\n$3\r\nGET\r\n$9999999\r\n"} {
		to := scripted(t, func(_ *faultnet.Peer, command string) string {
			<-stop
			return ""
		})
		g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2, MaxFrame: 1 << 20})
		c := g.call()
		c.Write(append(appendCommand(nil, []byte("BLPOP"), []byte("a"), []byte("0")), bad...))
		require.Contains(t, c.frame(), "may have been carried out", "%q", bad)
		require.Contains(t, c.frame(), "-ERR Protocol error", "%q", bad)
		c.hearEnd()
	}
}
