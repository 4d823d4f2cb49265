package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// frame reads one whole reply, as text.
func (c *caller) frame() string {
	c.t.Helper()
	sc := &respReplies{max: 1 << 30}
	var all []byte
	for {
		b, err := c.r.ReadByte()
		require.NoError(c.t, err, "after %q", all)
		all = append(all, b)
		_, done, err := sc.scan([]byte{b})
		require.NoError(c.t, err, "%q", all)
		if done {
			return string(all)
		}
	}
}

// do sends one command and reads one reply.
func (c *caller) do(args ...string) string {
	c.t.Helper()
	c.send(args...)
	return c.frame()
}

func (c *caller) send(args ...string) {
	c.t.Helper()
	c.sendTogether(args)
}

// sendTogether sends the commands in one write, so that the gateway passes them on
// together. Of commands that are sent one after another the gateway may pass on the
// first before it reads the second.
func (c *caller) sendTogether(commands ...[]string) {
	c.t.Helper()
	var wire []byte
	for _, args := range commands {
		parts := make([][]byte, len(args))
		for i, a := range args {
			parts[i] = []byte(a)
		}
		wire = appendCommand(wire, parts...)
	}
	_, err := c.Write(wire)
	require.NoError(c.t, err)
}

func bulk(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }

// redisGateway is a gateway before a redis-server of its own.
func redisGateway(t testing.TB, change func(*Config)) (*running, *redis) {
	t.Helper()
	r := startRedis(t)
	cfg := Config{Framing: "resp", To: r.addr()}
	if change != nil {
		change(&cfg)
	}
	return begin(t, cfg), r
}

func TestRESPCommandsShareConnectionsAndPipelinesStayInOrder(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen = 2 })
	a, b := g.call(), g.call()
	require.Equal(t, "+OK\r\n", a.do("SET", "k", "v"))
	require.Equal(t, bulk("v"), b.do("GET", "k"))
	require.Equal(t, "$-1\r\n", b.do("get", "none"))
	require.Equal(t, "*3\r\n"+bulk("v")+"$-1\r\n"+bulk("v"), a.do("MGET", "k", "none", "k"))
	require.True(t, strings.HasPrefix(a.do("NOSUCH"), "-ERR unknown command"))
	var all strings.Builder
	for i := range 500 {
		all.Write(appendCommand(nil, []byte("ECHO"), fmt.Append(nil, i)))
	}
	go io.WriteString(a, all.String())
	for i := range 500 {
		require.Equal(t, bulk(fmt.Sprint(i)), a.frame())
	}
	require.Equal(t, 1, g.Status().Pool.PeakOpen)
}

// PLT-11: commands typed into netcat work, and mean what Redis takes them to mean.
func TestInlineCommandsAreUnderstoodAsRedisDoes(t *testing.T) {
	g, _ := redisGateway(t, nil)
	c := g.call()
	c.say("PING\r\n")
	require.Equal(t, "+PONG\r\n", c.frame())
	c.say("\r\n   \nSET 'a b' \"x\\x41\\n\"\n")
	require.Equal(t, "+OK\r\n", c.frame())
	require.Equal(t, bulk("xA\n"), c.do("GET", "a b"))
	c.say("*0\r\n*-1\r\nECHO last\r\n")
	require.Equal(t, bulk("last"), c.frame())
	c.say("\"SELE\\x43T\" 3\n") // means SELECT, and must not change the connection of other clients
	require.Equal(t, "+OK\r\n", c.frame())
	require.Equal(t, "$-1\r\n", c.do("GET", "a b"))
	require.Equal(t, bulk("xA\n"), g.call().do("GET", "a b"))
	c.say("GET 'a\n")
	require.Equal(t, "-ERR Protocol error: unbalanced quotes in request\r\n", c.frame())
	c.hearEnd()
	d := g.call()
	d.say("POST / HTTP/1.1\r\nHost: x\r\n\r\n")
	require.Contains(t, d.frame(), "Protocol error")
	d.hearEnd()
}

func TestDatabasesAndUsersDoNotShareConnections(t *testing.T) {
	g, r := redisGateway(t, nil)
	require.Equal(t, "+OK\r\n", r.do(t, "ACL", "SETUSER", "alice", "on", ">wonder", "~*", "+@all"))
	a, b := g.call(), g.call()
	require.Equal(t, "+OK\r\n", a.do("SELECT", "1"))
	require.Equal(t, "+OK\r\n", a.do("SET", "k", "in one"))
	require.Equal(t, "$-1\r\n", b.do("GET", "k"))
	require.Equal(t, "+OK\r\n", b.do("SELECT", "1"))
	require.Equal(t, bulk("in one"), b.do("GET", "k"))
	require.Equal(t, "+OK\r\n", a.do("SELECT", "0"))
	require.Equal(t, "$-1\r\n", a.do("GET", "k"))
	require.Equal(t, "-ERR DB index is out of range\r\n", a.do("SELECT", "999"))
	require.Equal(t, "-ERR invalid DB index\r\n", a.do("SELECT", "+1"))
	require.Equal(t, bulk("default"), a.do("ACL", "WHOAMI"), "and it is where it was")

	require.Equal(t, "-WRONGPASS invalid username-password pair or user is disabled.\r\n", a.do("AUTH", "alice", "guess"))
	require.Equal(t, bulk("default"), a.do("ACL", "WHOAMI"))
	require.Equal(t, "+OK\r\n", a.do("AUTH", "alice", "wonder"))
	require.Equal(t, bulk("alice"), a.do("ACL", "WHOAMI"))
	require.Equal(t, bulk("default"), b.do("ACL", "WHOAMI"))
	require.Equal(t, "+OK\r\n", a.do("CLIENT", "SETNAME", "me"))
	require.Equal(t, bulk("me"), a.do("CLIENT", "GETNAME"))
	require.Equal(t, "$-1\r\n", b.do("CLIENT", "GETNAME"))
	require.Equal(t, "+RESET\r\n", a.do("RESET"))
	require.Equal(t, bulk("default"), a.do("ACL", "WHOAMI"))

	// A second client with the same login shares the existing connections.
	before := g.Status().Pool.Dials
	c := g.call()
	require.Equal(t, "+OK\r\n", c.do("AUTH", "alice", "wonder"))
	require.Equal(t, bulk("alice"), c.do("ACL", "WHOAMI"))
	require.Equal(t, before, g.Status().Pool.Dials)

	// An old password is refused after a change, although connections that logged in with
	// it are open.
	require.Equal(t, "+OK\r\n", r.do(t, "ACL", "SETUSER", "alice", "resetpass", ">other"))
	require.Contains(t, g.call().do("AUTH", "alice", "wonder"), "-WRONGPASS")
	soon(t, "scopes are in the log", func() bool { return strings.Contains(g.log.String(), "scope=db0") })
	require.NotContains(t, g.log.String(), "wonder", "and passwords are not")
	require.NotContains(t, string(mustJSON(t, g)), "wonder")
}

func TestWrongPasswordsLeaveNothingBehind(t *testing.T) {
	g, _ := redisGateway(t, nil)
	c := g.call()
	for i := range 50 {
		require.Contains(t, c.do("AUTH", "alice", fmt.Sprint(i)), "-WRONGPASS")
	}
	require.LessOrEqual(t, g.Status().Pool.Addrs, 1)
	require.Zero(t, g.Status().Pool.DialErrors)
}

func TestRESP3IsAnIdentityToo(t *testing.T) {
	g, _ := redisGateway(t, nil)
	a, b := g.call(), g.call()
	hello := a.do("HELLO", "3")
	require.True(t, strings.HasPrefix(hello, "%"), hello)
	require.True(t, strings.HasPrefix(a.do("CONFIG", "GET", "save"), "%"), "a map")
	require.True(t, strings.HasPrefix(b.do("CONFIG", "GET", "save"), "*"), "an array")
	require.True(t, strings.HasPrefix(a.do("HELLO", "2"), "*"))
	require.True(t, strings.HasPrefix(a.do("CONFIG", "GET", "save"), "*"))
	require.Contains(t, a.do("HELLO", "4"), "-NOPROTO")
	require.Contains(t, a.do("HELLO", "3", "BOGUS"), "-ERR syntax error")
	require.Contains(t, a.do("HELLO", "3", "AUTH", "nobody", "x"), "-WRONGPASS")
	require.True(t, strings.HasPrefix(a.do("HELLO", "3", "SETNAME", "n"), "%"))
	require.Equal(t, bulk("n"), a.do("CLIENT", "GETNAME"))
	require.True(t, strings.HasPrefix(a.do("HELLO"), "%"))
}

func TestATransactionHasAConnectionOfItsOwnWhileItLasts(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen = 3 })
	a, b := g.call(), g.call()
	require.Equal(t, "+OK\r\n", a.do("MULTI"))
	require.Equal(t, "+QUEUED\r\n", a.do("SET", "k", "1"))
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "$-1\r\n", b.do("GET", "k"), "it is not queued with somebody else's")
	require.Equal(t, "+QUEUED\r\n", a.do("INCR", "k"))
	require.Equal(t, "*2\r\n+OK\r\n:2\r\n", a.do("EXEC"))
	soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
	require.Equal(t, bulk("2"), a.do("GET", "k"))
	require.Equal(t, 2, g.Status().Pool.Open, "and kept")

	for _, end := range [][]string{{"DISCARD"}, {"EXEC"}} {
		require.Equal(t, "+OK\r\n", a.do("MULTI"))
		require.Contains(t, a.do("NOSUCH"), "-ERR unknown")
		require.NotEmpty(t, a.do(end...))
		soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
	}
	require.Equal(t, "+OK\r\n", a.do("WATCH", "k"))
	require.EqualValues(t, 1, g.Status().Pinned)
	require.Equal(t, "+OK\r\n", b.do("SET", "k", "7"))
	require.Equal(t, "+OK\r\n", a.do("MULTI"))
	require.Equal(t, "+QUEUED\r\n", a.do("SET", "k", "8"))
	require.Equal(t, "*-1\r\n", a.do("EXEC"), "somebody had changed it")
	require.Equal(t, "+OK\r\n", a.do("WATCH", "k"))
	require.Equal(t, "+OK\r\n", a.do("UNWATCH"))
	soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
	require.Contains(t, a.do("EXEC"), "-ERR EXEC without MULTI")
	require.Contains(t, a.do("DISCARD"), "-ERR DISCARD without MULTI")
	require.Equal(t, bulk("7"), a.do("GET", "k"))

	// Everything in one write, with ordinary commands around the transaction.
	for _, args := range [][]string{{"SET", "n", "1"}, {"MULTI"}, {"INCR", "n"}, {"EXEC"}, {"GET", "n"}, {"WATCH", "n"}, {"UNWATCH"}, {"GET", "n"}} {
		a.send(args...)
	}
	var got []string
	for range 8 {
		got = append(got, a.frame())
	}
	require.Equal(t, []string{"+OK\r\n", "+OK\r\n", "+QUEUED\r\n", "*1\r\n:2\r\n", bulk("2"), "+OK\r\n", "+OK\r\n", bulk("2")}, got)
	require.Zero(t, g.Status().Failures["lost"])
}

// What a transaction does to its connection ends with it.
func TestATransactionThatSelectsADatabaseNeverGivesItsConnectionBack(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen = 2 })
	a, b := g.call(), g.call()
	require.Equal(t, "+OK\r\n", a.do("MULTI"))
	require.Equal(t, "+QUEUED\r\n", a.do("SELECT", "5"))
	require.Equal(t, "*1\r\n+OK\r\n", a.do("EXEC"))
	require.Equal(t, "+OK\r\n", a.do("SET", "five", "x"))
	for range 5 {
		require.Equal(t, "$-1\r\n", b.do("GET", "five"))
	}
	a.Close()
	soon(t, "it is closed with its client", func() bool { return g.Status().Clients == 1 && g.Status().Pool.InUse == 0 })
	for range 5 {
		require.Equal(t, "$-1\r\n", b.do("GET", "five"))
	}
}

func TestSubscribersHaveAConnectionUntilTheLastSubscriptionEnds(t *testing.T) {
	for _, proto := range []string{"2", "3"} {
		t.Run("RESP"+proto, func(t *testing.T) {
			g, _ := redisGateway(t, nil)
			a, b := g.call(), g.call()
			push := "*"
			if proto == "3" {
				a.do("HELLO", "3")
				push = ">"
			}
			said := func(kind, what string, n int) string {
				return fmt.Sprintf("%s3\r\n%s%s:%d\r\n", push, bulk(kind), bulk(what), n)
			}
			a.send("SUBSCRIBE", "x", "y")
			require.Equal(t, said("subscribe", "x", 1), a.frame())
			require.Equal(t, said("subscribe", "y", 2), a.frame())
			require.Equal(t, said("psubscribe", "z*", 3), a.do("PSUBSCRIBE", "z*"))
			require.EqualValues(t, 1, g.Status().Pinned)
			require.Equal(t, ":1\r\n", b.do("PUBLISH", "x", "hi"))
			require.Equal(t, push+"3\r\n"+bulk("message")+bulk("x")+bulk("hi"), a.frame())
			require.Equal(t, ":1\r\n", b.do("PUBLISH", "zz", "ho"))
			require.Equal(t, push+"4\r\n"+bulk("pmessage")+bulk("z*")+bulk("zz")+bulk("ho"), a.frame())
			if proto == "3" { // where other commands are allowed meanwhile
				require.Equal(t, "+OK\r\n", a.do("SET", "k", "v"))
				require.Equal(t, "+PONG\r\n", a.do("PING"))
			} else {
				require.Equal(t, "*2\r\n"+bulk("pong")+bulk(""), a.do("PING"))
				require.Contains(t, a.do("GET", "k"), "-ERR Can't execute 'get'")
			}
			a.send("UNSUBSCRIBE") // of x and y, in any order
			require.Contains(t, a.frame(), "unsubscribe")
			require.Contains(t, a.frame(), ":1\r\n")
			require.EqualValues(t, 1, g.Status().Pinned)
			require.Equal(t, said("punsubscribe", "z*", 0), a.do("PUNSUBSCRIBE", "z*"))
			soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
			require.Equal(t, bulk("e"), a.do("ECHO", "e"))
			require.Contains(t, a.do("UNSUBSCRIBE"), ":0\r\n", "without any there is one answer")
			require.Contains(t, a.do("SSUBSCRIBE", "s"), bulk("ssubscribe"))
			require.Contains(t, a.do("SUNSUBSCRIBE"), bulk("sunsubscribe"))
			soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
			require.Equal(t, bulk("e"), a.do("ECHO", "e"))
			require.Contains(t, a.do("SUBSCRIBE"), "-ERR wrong number")
			soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
			closed := g.Status().Pool.Closed
			delete(closed, connpool.ClosedByBorrower) // the connection on which HELLO was tried
			require.Empty(t, closed, "all connections were clean when they came back")
		})
	}
}

func TestABlockedCommandHoldsAConnectionAndNobodyUp(t *testing.T) {
	t.Parallel()
	g, r := redisGateway(t, func(c *Config) { c.MaxOpen, c.RequestTimeout = 2, 3*time.Second })
	a, b := g.call(), g.call()
	a.send("BLPOP", "list", "0")
	soon(t, "it blocks", func() bool { return g.Status().Pinned == 1 })
	require.Equal(t, ":1\r\n", b.do("RPUSH", "list", "v"))
	require.Equal(t, "*2\r\n"+bulk("list")+bulk("v"), a.frame())
	soon(t, "it is given back", func() bool { return g.Status().Pinned == 0 })
	require.Equal(t, "*-1\r\n", a.do("BRPOP", "list", "3.3"), "longer than a request may take")
	require.Equal(t, "*-1\r\n", a.do("XREAD", "COUNT", "1", "block", "10", "STREAMS", "s", "$"))
	require.Equal(t, "*-1\r\n", a.do("XREAD", "STREAMS", "BLOCK", "0"), "the name of a stream is no option")

	// A client that leaves must not take an element with it.
	a.send("BLPOP", "list", "0")
	soon(t, "it blocks", func() bool { return strings.Contains(r.do(t, "INFO", "clients"), "blocked_clients:1") })
	a.Close()
	soon(t, "it is gone", func() bool { return strings.Contains(r.do(t, "INFO", "clients"), "blocked_clients:0") })
	require.Equal(t, ":1\r\n", b.do("RPUSH", "list", "v"))
	require.Equal(t, ":1\r\n", b.do("LLEN", "list"))
}

func TestWhatCannotBeTakenBackKeepsItsConnectionToTheEnd(t *testing.T) {
	t.Parallel()
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned, c.RequestTimeout = 3, 2, time.Second })
	a, b := g.call(), g.call()
	a.do("HELLO", "3")
	require.Equal(t, "+OK\r\n", a.do("CLIENT", "TRACKING", "ON"))
	require.Equal(t, "_\r\n", a.do("GET", "k"))
	require.Equal(t, "+OK\r\n", b.do("SET", "k", "1"))
	require.Equal(t, ">2\r\n"+bulk("invalidate")+"*1\r\n"+bulk("k"), a.frame())
	m := g.call()
	require.Equal(t, "+OK\r\n", m.do("MONITOR"))
	b.do("GET", "k")
	said := m.frame()
	for strings.Contains(said, `"PING"`) { // the gateway's own, on young connections
		said = m.frame()
	}
	require.Contains(t, said, `"GET" "k"`)
	require.EqualValues(t, 2, g.Status().Pinned)

	// No connection is left for single clients; the others are not delayed.
	require.Contains(t, b.do("MULTI"), "-ERR gateway: as many clients as -max-pinned allows have a connection to themselves; the command was not sent")
	require.EqualValues(t, 1, g.Status().Failures["pinned"], "TRY-26: that is a reason of its own")
	require.Zero(t, g.Status().Failures["busy"])
	require.Equal(t, bulk("1"), b.do("GET", "k"))
	m.Close()
	a.Close()
	soon(t, "both are closed", func() bool { return g.Status().Pinned == 0 && g.Status().Pool.InUse == 0 })
	require.Equal(t, "+OK\r\n", b.do("MULTI"))
	b.Close()
}

func TestAServerThatDiesIsToldAsAnErrorOfRESP(t *testing.T) {
	g, r := redisGateway(t, func(c *Config) { c.RequestTimeout = 5 * time.Second })
	c, tx := g.call(), g.call()
	require.Equal(t, "+OK\r\n", tx.do("MULTI"))
	require.Equal(t, "+PONG\r\n", c.do("PING"))
	c.sendTogether([]string{"DEBUG", "SLEEP", "3"}, []string{"PING"})
	soon(t, "both are under way", func() bool { return g.Status().Pool.InUse == 2 })
	r.kill(t)
	require.Contains(t, c.frame(), "-ERR gateway: the connection to the server was lost")
	require.Contains(t, c.frame(), "-ERR gateway: the connection to the server was lost")
	require.Contains(t, c.do("PING"), "-ERR gateway: the server cannot be reached; the command was not sent")
	tx.hearEnd() // its transaction is gone, and it must not assume otherwise
	r.start(t)
	soon(t, "it works again", func() bool { return c.do("PING") == "+PONG\r\n" })
}

func TestATransactionThatIsForgottenIsClosed(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.HoldTimeout = 50 * time.Millisecond })
	c, sub := g.call(), g.call()
	require.Contains(t, sub.do("SUBSCRIBE", "x"), "subscribe")
	require.Equal(t, "+OK\r\n", c.do("MULTI"))
	c.hearEnd()
	soon(t, "it is counted", func() bool { return g.Status().Idle == 1 })
	require.EqualValues(t, 1, g.Status().Pinned, "a subscriber is not forgotten")
	d := g.call()
	require.Equal(t, "+PONG\r\n", d.do("PING"))
}

func TestDrainLetsATransactionEndAndClosesSubscribers(t *testing.T) {
	g, _ := redisGateway(t, nil)
	tx, sub, blocked := g.call(), g.call(), g.call()
	require.Equal(t, "+OK\r\n", tx.do("MULTI"))
	require.Contains(t, sub.do("SUBSCRIBE", "x"), "subscribe")
	blocked.send("BLPOP", "list", "0")
	soon(t, "all are pinned", func() bool { return g.Status().Pinned == 3 })
	g.end()
	sub.hearEnd()
	require.Equal(t, "+QUEUED\r\n", tx.do("RPUSH", "list", "v"))
	require.Equal(t, "*1\r\n:1\r\n", tx.do("EXEC"))
	tx.hearEnd()
	require.Equal(t, "*2\r\n"+bulk("list")+bulk("v"), blocked.frame())
	blocked.hearEnd()
	require.NoError(t, g.wait())
}

func TestQuitAndWhatIsNotPassedOn(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxClients = 2 })
	c := g.call()
	require.Contains(t, c.do("PSYNC", "?", "-1"), "-ERR gateway: replication")
	require.Equal(t, "+OK\r\n", c.do("CLIENT", "SETINFO", "LIB-NAME", "x"))
	d := g.call()
	require.Equal(t, "+PONG\r\n", d.do("PING"))
	extra, err := net.Dial("tcp", g.Addr().String())
	require.NoError(t, err)
	defer extra.Close()
	said, _ := io.ReadAll(extra)
	require.Equal(t, "-ERR max number of clients reached\r\n", string(said))
	require.Equal(t, "+OK\r\n", c.do("QUIT"))
	c.hearEnd()
}

func TestBrokenRESPCostsItsSender(t *testing.T) {
	for _, bad := range []string{"*1\r\n+PING\r\n", "*1\r\n$-1\r\n", "*01\r\n", "*1\r\n$4\r\nPINGxx", "*1\n$4\r\nPING\r\n", "*99999999999\r\n",
		"*1\r\n$99999999\r\n", "*1\r\n$?\r\n", "*+1\r\n", "*\r\n"} {
		g, _ := fakeRedis(t)
		c := g.call()
		c.say("%s", bad)
		require.Contains(t, c.frame(), "-ERR Protocol error: ", "%q", bad)
		c.hearEnd()
		require.Zero(t, g.Status().Pool.Dials)
	}
}

// scripted is a RESP server that answers the gateway's PINGs itself, and each other
// command, its words joined by single spaces, with the result of answer.
func scripted(t testing.TB, answer func(peer *faultnet.Peer, command string) string) string {
	t.Helper()
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			args := argsOf(all)
			name, _ := args.next()
			command := string(bytes.Join(append([][]byte{name}, words(all)...), []byte(" ")))
			reply := ""
			switch word, isMark := strings.CutPrefix(command, "PING "); {
			case command == "PING":
				reply = "+PONG\r\n"
			case isMark && strings.HasPrefix(word, "connpool:"):
				reply = bulk(word)
			default:
				reply = answer(peer, command)
			}
			if _, err := io.WriteString(peer, reply); err != nil {
				return
			}
		}
	}})
	return to
}

// TRY-04: RESP3 has a type for unrequested messages, which may come at any time.
func TestAPushIsNobodysReply(t *testing.T) {
	const push = ">2\r\n$6\r\nMOVING\r\n:1\r\n"
	to := scripted(t, func(_ *faultnet.Peer, command string) string {
		return push + push + bulk(command)
	})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 1})
	c := g.call()
	require.Equal(t, bulk("HELLO 3"), c.do("HELLO", "3"))
	n := 0
	for begun := time.Now(); n < 20 || time.Since(begun) < 50*time.Millisecond; n++ { // until the connection is settled
		for i := range 3 {
			c.send("ECHO", fmt.Sprint(n, " ", i))
		}
		for i := range 3 {
			require.Equal(t, bulk(fmt.Sprint("ECHO ", n, " ", i)), c.frame())
		}
	}
	require.EqualValues(t, 2, g.Status().Pool.Dials, "one for the claim, and one for all the rest")
}
