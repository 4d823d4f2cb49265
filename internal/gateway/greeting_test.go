package gateway

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// protocol is what the tests of greetings need to know about a framing.
type protocol struct {
	cfg     Config
	request func(n int) []byte
	reply   func(n int) []byte
	// next reads one message of either side; n is its number, or -1 if it has none (a
	// failure, a PING, a greeting).
	next func(r *bufio.Reader) (n int, all []byte, err error)
}

func textNumber(s string) int {
	var n int
	if _, err := fmt.Sscanf(s, "n%d.", &n); err != nil {
		return -1
	}
	return n
}

var protocols = map[string]protocol{
	"line": {
		cfg:     Config{Framing: "line", ErrorReply: "ERR\n"},
		request: func(n int) []byte { return fmt.Appendf(nil, "n%d.\n", n) },
		reply:   func(n int) []byte { return fmt.Appendf(nil, "n%d.\n", n) },
		next: func(r *bufio.Reader) (int, []byte, error) {
			line, err := r.ReadString('\n')
			return textNumber(line), []byte(line), err
		},
	},
	"length": {
		cfg:     Config{Framing: "length", Length: LengthField{Size: 1}, ErrorReply: "\x03ERR"},
		request: func(n int) []byte { s := fmt.Sprintf("n%d.", n); return append([]byte{byte(len(s))}, s...) },
		reply:   func(n int) []byte { s := fmt.Sprintf("n%d.", n); return append([]byte{byte(len(s))}, s...) },
		next: func(r *bufio.Reader) (int, []byte, error) {
			size, err := r.ReadByte()
			if err != nil {
				return -1, nil, err
			}
			b := make([]byte, size)
			_, err = io.ReadFull(r, b)
			return textNumber(string(b)), append([]byte{size}, b...), err
		},
	},
	"resp": {
		cfg:     Config{Framing: "resp"},
		request: func(n int) []byte { return appendCommand(nil, []byte("ECHO"), fmt.Appendf(nil, "n%d.", n)) },
		reply:   func(n int) []byte { return []byte(bulk(fmt.Sprintf("n%d.", n))) },
		next: func(r *bufio.Reader) (int, []byte, error) {
			var all []byte
			sc := &respReplies{max: 1 << 20} // requests are arrays, and so replies
			for {
				b, err := r.ReadByte()
				if err != nil {
					return -1, all, err
				}
				all = append(all, b)
				if _, done, err := sc.scan([]byte{b}); err != nil || done {
					n := -1
					if i := strings.Index(string(all), "\r\nn"); i >= 0 {
						n = textNumber(string(all[i+2:]))
					}
					return n, all, err
				}
			}
		},
	},
	"modbus": {
		cfg:     Config{Framing: "modbus"},
		request: func(n int) []byte { return readRegisters(uint16(n), 7, uint16(n), 1) },
		reply: func(n int) []byte {
			return binary.BigEndian.AppendUint16([]byte{0, 0, 0, 0, 0, 5, 7, 3, 2}, uint16(n))
		},
		next: func(r *bufio.Reader) (int, []byte, error) {
			head := make([]byte, 6)
			if _, err := io.ReadFull(r, head); err != nil {
				return -1, nil, err
			}
			rest := make([]byte, binary.BigEndian.Uint16(head[4:]))
			_, err := io.ReadFull(r, rest)
			all := append(head, rest...)
			switch {
			case err != nil || len(rest) < 5 || rest[1] != 3:
				return -1, all, err
			case len(rest) == 6:
				return int(binary.BigEndian.Uint16(rest[2:])), all, nil
			}
			return int(binary.BigEndian.Uint16(rest[3:])), all, nil
		},
	},
}

// greets is a server that answers as p asks and also sends word unasked: after late or,
// if late is negative, between its first request and the reply. It does so from
// connection number from on.
func (p protocol) greets(word string, late time.Duration, from int, requests *atomic.Int64) func(*faultnet.Peer) {
	return func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		greet := func() { io.WriteString(peer, word) }
		if peer.Serial() < from {
			greet = func() {}
		}
		switch {
		case late == 0:
			greet()
		case late > 0:
			t := time.AfterFunc(late, greet)
			defer t.Stop()
		}
		for first := true; ; first = false {
			n, all, err := p.next(r)
			if err != nil {
				return
			}
			if first && late < 0 && n >= 0 {
				greet()
			}
			var reply []byte
			switch {
			case n >= 0:
				requests.Add(1)
				if reply = p.reply(n); p.cfg.Framing == "modbus" {
					copy(reply, all[:2])
				}
			case string(all) == "*1\r\n$4\r\nPING\r\n":
				reply = []byte("+PONG\r\n")
			case p.cfg.Framing == "resp":
				reply = []byte(bulk(string(words(all)[0])))
			default:
				return
			}
			if _, err := peer.Write(reply); err != nil {
				return
			}
		}
	}
}

// ask lets clients make requests, each with a number of its own, until enough were
// answered or refused, and fails the test if a client got another's reply. It returns how
// many clients got the right reply.
func (p protocol) ask(t *testing.T, g *running, clients, total int) (right int64) {
	t.Helper()
	var foreign atomic.Pointer[string]
	var numbers, done, good atomic.Int64
	var wg tasks.Group
	for range clients {
		wg.Go(func() {
			var nc net.Conn
			var r *bufio.Reader
			defer func() {
				if nc != nil {
					nc.Close()
				}
			}()
			for done.Load() < int64(total) && foreign.Load() == nil {
				if nc == nil {
					var err error
					if nc, err = net.Dial("tcp", g.Addr().String()); err != nil {
						s := err.Error()
						foreign.CompareAndSwap(nil, &s)
						return
					}
					nc.SetDeadline(time.Now().Add(forever))
					r = bufio.NewReader(nc)
				}
				// Pipelines of one to three requests; no number occurs twice.
				var mine []int
				var wire []byte
				for range 1 + numbers.Load()%3 {
					n := int(numbers.Add(1))
					mine = append(mine, n)
					wire = append(wire, p.request(n)...)
				}
				if p.cfg.Framing == "modbus" {
					mine, wire = mine[:1], p.request(mine[0])
				}
				nc.Write(wire)
				for _, n := range mine {
					got, all, err := p.next(r)
					done.Add(1)
					switch {
					case err != nil:
						nc.Close()
						nc = nil
					case got == n:
						good.Add(1)
					case got < 0 && strings.Contains(string(all), fmt.Sprintf("n%d.", n)): // with half a greeting before it
					case got >= 0 || !p.refusal(all):
						s := fmt.Sprintf("to request %d came %q", n, all)
						foreign.CompareAndSwap(nil, &s)
						return
					}
					if nc == nil {
						break
					}
				}
			}
		})
	}
	wg.Wait()
	if what := foreign.Load(); what != nil {
		t.Fatal(*what)
	}
	return good.Load()
}

// refusal reports whether a reply is the gateway's own error.
func (p protocol) refusal(reply []byte) bool {
	switch p.cfg.Framing {
	case "resp":
		return strings.HasPrefix(string(reply), "-ERR gateway: ")
	case "modbus":
		return len(reply) == 9 && reply[7]&0x80 != 0
	}
	return string(reply) == p.cfg.ErrorReply
}

// TRY-04
func TestAServerThatSpeaksFirstIsNeverTakenToHaveAnswered(t *testing.T) {
	t.Parallel()
	words := map[string][]string{
		"line":   {"220 hello\n", "220-one\n220-two\n220 three\n", "22"},
		"length": {"\x02hi", "\x02hi\x01x\x00", "\x05h"},
		"resp":   {"+OK ready\r\n", "-ERR max number of clients reached\r\n", "220 hello\r\n", "$5\r\nhello\r\n:7\r\n", "$5\r\nhe"},
		"modbus": {"\x00\x01\x00\x00\x00\x05\x07\x03\x02\x00\x00", "220 hello\r\n", "\x00\x01\x00\x00\x00\x05\x07"},
	}
	for name, p := range protocols {
		for i, word := range words[name] {
			for when, late := range map[string]time.Duration{
				"at once": 0, "after 5 ms": 5 * time.Millisecond, "after 50 ms": 50 * time.Millisecond,
				"after 300 ms": 300 * time.Millisecond, "within the first exchange": -1,
			} {
				t.Run(fmt.Sprintf("%s/%d/%s", name, i, when), func(t *testing.T) {
					t.Parallel()
					var requests atomic.Int64
					_, to := serve(t, faultnet.Options{Handler: p.greets(word, late, 0, &requests)})
					cfg := p.cfg
					// Much longer than needed, because the machine may be busy.
					cfg.To, cfg.MaxOpen, cfg.GreetingWait, cfg.RequestTimeout = to, 2, short.Of(3*time.Second, 2*time.Second), 5*time.Second
					if name == "modbus" { // half a greeting makes each reply late, and modbus does not wait for a greeting
						cfg.RequestTimeout = short.Of(5*time.Second, 700*time.Millisecond)
					}
					g := begin(t, cfg)
					partial, total := word == words[name][len(words[name])-1], 300
					if partial && name == "modbus" { // each request waits for its time-out
						total = short.Of(300, 24)
					}
					right := p.ask(t, g, 6, total)
					if !partial && (name == "line" || name == "length") {
						require.Zero(t, right, "nothing can be believed")
						require.NotZero(t, g.Status().Failures["speaks-first"]+g.Status().Failures["out-of-step"])
						require.Contains(t, g.log.String(), "the server speaks first")
					}
					if late == 0 && name != "modbus" {
						require.Zero(t, requests.Load(), "nothing was sent to it")
					}
				})
			}
		}
	}
}

// TRY-04: a finding about the server is not assumed for each connection.
func TestAServerThatBeginsToGreetLaterIsNoticed(t *testing.T) {
	t.Parallel()
	for name, p := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			word := map[string]string{"line": "220 hello\n", "length": "\x02hi", "resp": "+hello\r\n", "modbus": "220 hello\r\n"}[name]
			late := time.Duration(0)
			if name == "line" || name == "length" {
				late = 5 * time.Millisecond // after the pool's check at the end of Setup
			}
			srv, to := serve(t, faultnet.Options{Handler: p.greets(word, late, 3, &requests)})
			cfg := p.cfg
			cfg.To, cfg.MaxOpen, cfg.GreetingWait, cfg.RequestTimeout = to, 1, 60*time.Millisecond, 5*time.Second
			g := begin(t, cfg)
			g.greet.quick = 500 * time.Millisecond // for busy machines
			for range 2 {
				require.NotZero(t, p.ask(t, g, 1, 20))
				srv.CutIdle(1, faultnet.RST)
				soon(t, "the connection is gone", func() bool { return g.Status().Pool.Open == 0 })
			}
			require.Zero(t, p.ask(t, g, 4, 300))
		})
	}
}

// TRY-04: a full server sends its error unasked.
func TestAFullRedisIsToldAsAServerThatCannotBeReached(t *testing.T) {
	r := startRedis(t, "--maxclients", "1")
	hold, err := r.dial()
	require.NoError(t, err)
	defer hold.Close()
	own := &caller{hold, t, bufio.NewReader(hold)}
	soon(t, "the one client is in", func() bool { io.WriteString(hold, "PING\r\n"); return own.frame() == "+PONG\r\n" })
	g := begin(t, Config{Framing: "resp", To: r.addr()})
	for range 20 {
		c := g.call()
		c.send("PING")
		c.send("PING")
		for range 2 {
			require.Contains(t, c.frame(), "-ERR gateway: the server cannot be reached; the command was not sent")
		}
		c.Close()
	}
	require.EqualValues(t, 40, g.Status().Failures["unreachable"])
	require.Less(t, g.Status().Pool.Dials, uint64(20), "its refusals are not asked for with each request")
	hold.Close()
	soon(t, "it works when there is room", func() bool { return g.call().do("PING") == "+PONG\r\n" })
}

// TRY-04: a server that demands a password, is older than PING with an argument, or knows
// no PING at all, does not count as a server that speaks first.
func TestServersThatAnswerPingInTheirOwnWayAreServed(t *testing.T) {
	t.Run("password", func(t *testing.T) {
		r := startRedis(t, "--requirepass", "secret")
		g := begin(t, Config{Framing: "resp", To: r.addr()})
		c := g.call()
		require.Contains(t, c.do("PING"), "-NOAUTH")
		require.Equal(t, "+OK\r\n", c.do("AUTH", "secret"))
		require.Equal(t, "+PONG\r\n", c.do("PING"))
		require.Zero(t, g.Status().Failures["speaks-first"])
	})
	for name, answers := range map[string][2]string{
		"no word":   {"+PONG\r\n", "-ERR wrong number of arguments for 'ping' command\r\n"},
		"a proxy":   {"+PONG\r\n", "+PONG\r\n"},
		"no PING":   {"-ERR unknown command 'PING'\r\n", "-ERR unknown command 'PING'\r\n"},
		"something": {"+OK\r\n", "+OK\r\n"},
		"hangs up":  {"+PONG\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
				r := bufio.NewReader(peer)
				for {
					_, all, err := protocols["resp"].next(r)
					if err != nil {
						return
					}
					switch args := words(all); {
					case is(all[8:12], "ECHO"):
						io.WriteString(peer, bulk(string(args[0])))
					case len(args) > 0 && answers[1] == "":
						return
					default:
						io.WriteString(peer, answers[min(len(args), 1)])
					}
				}
			}})
			g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
			soon(t, "it is served", func() bool { return protocols["resp"].ask(t, g, 1, 10) == 10 })
			require.NotZero(t, protocols["resp"].ask(t, g, 4, 200))
		})
	}
}

// TRY-04: a server that refuses PING for a while does not count as one that speaks first.
func TestAServerThatIsBusyForAWhileIsNoServerThatSpeaksFirst(t *testing.T) {
	var busy atomic.Bool
	word := "-MASTERDOWN Link with MASTER is down\r\n"
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			switch args := words(all); {
			case busy.Load():
				io.WriteString(peer, word)
			case len(args) == 0:
				io.WriteString(peer, "+PONG\r\n")
			default:
				io.WriteString(peer, bulk(string(args[0])))
			}
		}
	}})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 1, GreetingWait: 200 * time.Millisecond})
	c := g.call()
	require.Equal(t, bulk("x"), c.do("ECHO", "x"))
	busy.Store(true)
	for range 3 {
		require.Equal(t, word, c.do("ECHO", "x"))
	}
	busy.Store(false)
	require.Equal(t, bulk("y"), c.do("ECHO", "y"))
	require.Zero(t, g.Status().Failures["speaks-first"]+g.Status().Failures["out-of-step"])
}

// TRY-04: a server that accepts and hangs up answers no request.
func TestAServerThatAcceptsAndHangsUpAnswersNobody(t *testing.T) {
	for name, p := range protocols {
		t.Run(name, func(t *testing.T) {
			_, to := serve(t, faultnet.Options{Handler: func(*faultnet.Peer) {}})
			cfg := p.cfg
			cfg.To, cfg.MaxOpen = to, 2
			g := begin(t, cfg)
			require.Zero(t, p.ask(t, g, 4, 40))
		})
	}
}

// TRY-04: the rule by time, tested without a server.
func TestTheFirstReplyOfAllIsHeldAndLaterOnesAreNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &greetings{wait: time.Second, quick: quickLook, framing: "line", log: slog.New(slog.DiscardHandler)}
		far := time.Now().Add(time.Hour)
		took := func(u *replies, asked time.Duration) (before, after time.Duration) {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			start := time.Now()
			require.NoError(t, k.before(a, u, far))
			before = time.Since(start)
			begun := time.Now()
			time.Sleep(asked) // the time the server takes
			done := time.Now()
			require.NoError(t, k.after(a, u, begun, far))
			return before, time.Since(done)
		}
		first := &replies{born: time.Now()}
		before, after := took(first, 10*time.Millisecond)
		require.Equal(t, time.Second/3, before, "a greeting that comes at once costs nobody's request")
		require.Equal(t, time.Second, before+10*time.Millisecond+after, "and one that comes within -greeting-wait no reply")
		_, after = took(first, 10*time.Millisecond)
		require.Equal(t, quickLook, after, "what was just learned is still looked after")
		slow := &replies{born: time.Now()}
		_, after = took(slow, 100*time.Millisecond)
		require.Equal(t, 200*time.Millisecond, after, "for as long as a reply takes")
		time.Sleep(time.Second)
		next := &replies{born: time.Now()}
		before, after = took(next, time.Millisecond)
		require.Equal(t, []time.Duration{quickLook, 200 * time.Millisecond}, []time.Duration{before, after})
		before, after = took(next, time.Millisecond)
		require.Equal(t, []time.Duration{0, 0}, []time.Duration{before, after}, "a connection that was found good is believed")

		// Unrequested bytes set the state to unknown again.
		var said *speaksFirst
		require.ErrorAs(t, k.surprised(&speaksFirst{"line", []byte("220")}), &said)
		require.Error(t, k.refusing())
		time.Sleep(firstPause)
		require.NoError(t, k.refusing())
		suspect := &replies{born: time.Now()}
		before, after = took(suspect, time.Millisecond)
		require.Equal(t, time.Second, before, "nothing is sent before it has been silent for long enough")
		require.Equal(t, time.Second, after, "nor believed")
		require.False(t, k.speaking())
		before, _ = took(&replies{born: time.Now()}, time.Millisecond)
		require.Equal(t, quickLook, before)
	})
}

// TRY-04: a server that ended in the middle of hello is still asked for proofs when it is
// back.
func TestAServerThatHungUpOnceStillProvesItsReplies(t *testing.T) {
	var hungUp, marks atomic.Int64
	hangs := int64(1)
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			switch args := words(all); {
			case len(args) == 0:
				io.WriteString(peer, "+PONG\r\n")
			case is(all[8:12], "PING") && hungUp.Add(1) <= hangs:
				return
			case is(all[8:12], "PING"):
				marks.Add(1)
				fallthrough
			default:
				io.WriteString(peer, bulk(string(args[0])))
			}
		}
	}})
	g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 1})
	c := g.call()
	soon(t, "it is served", func() bool { return c.do("ECHO", "x") == bulk("x") })
	require.NotZero(t, marks.Load(), "by a connection that is proven")

	// A server that keeps hanging up is judged by time, until the gateway starts anew.
	g.greet.hangsUp(time.Now())
	require.False(t, g.greet.isBare())
	g.greet.hangsUp(time.Now().Add(-time.Hour))
	require.False(t, g.greet.isBare(), "that was the same moment")
	g.greet.hangsUp(time.Now().Add(time.Second))
	require.True(t, g.greet.isBare())
	require.NoError(t, g.Renew())
	require.False(t, g.greet.isBare())
}
