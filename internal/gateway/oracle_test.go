package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The desync oracle through the gateway: no client ever reads a reply to another client's
// request, whatever clients do at whatever byte and however late the server answers.

// dier is a client that breaks off at random bytes.
type dier struct {
	rng     *rand.Rand
	network string
	addr    string
	foreign *atomic.Pointer[string]

	whole, partial, errors *atomic.Int64
}

var tokens atomic.Int64

// exchangeLines has one conversation with a faultnet.Tokens server behind the gateway and
// returns how many complete requests were sent.
func (d *dier) exchangeLines() (n int) {
	nc, err := net.Dial(d.network, d.addr)
	if err != nil {
		d.accuse("%v", err)
		return 1
	}
	defer func() {
		if tc, ok := nc.(*net.TCPConn); ok && d.rng.IntN(2) == 0 {
			tc.SetLinger(0) // RST
		}
		nc.Close()
	}()
	nc.SetDeadline(time.Now().Add(forever))
	r := bufio.NewReader(nc)
	for range 1 + d.rng.IntN(20) {
		count := 1
		if d.rng.IntN(4) == 0 {
			count += d.rng.IntN(5)
		}
		var request bytes.Buffer
		mine := make([]string, count)
		for i := range mine {
			mine[i] = fmt.Sprintf("t%d", tokens.Add(1))
			fmt.Fprintf(&request, "%s\n", mine[i])
		}
		dies := d.rng.IntN(10)
		if dies == 0 { // in its request
			nc.Write(request.Bytes()[:d.rng.IntN(request.Len())])
			d.partial.Add(1)
			return n + 1
		}
		nc.Write(request.Bytes())
		n += count
		if dies == 1 { // at once
			d.partial.Add(1)
			return n
		}
		for _, token := range mine {
			if dies == 2 { // in its reply
				part := make([]byte, 1+d.rng.IntN(4)) // "ERR\n" has no more
				io.ReadFull(r, part)
				d.partial.Add(1)
				return n
			}
			line, err := r.ReadString('\n')
			switch {
			case err != nil:
				d.accuse("the reply to %s: %q, %v", token, line, err)
				return n
			case line == "ERR\n":
				d.errors.Add(1)
			case !strings.HasSuffix(line, " "+token+"\n"):
				d.accuse("to %s came %q", token, line)
				return n
			default:
				d.whole.Add(1)
			}
		}
	}
	return n
}

func (d *dier) accuse(format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	d.foreign.CompareAndSwap(nil, &what)
}

func oracleTotal() int64 {
	if stress {
		return 100_000
	}
	return short.Of[int64](10_000, 1_000)
}

// PLT-10. 10,000 exchanges, 100,000 with CONNPOOL_STRESS set, 1,000 with -short.
func TestDesyncNoClientEverReadsAReplyThatIsNotItsOwn(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "tls"} {
		t.Run(network, func(t *testing.T) {
			// On a busy machine most replies are late. A run in which too few were
			// read whole proves too little, and is repeated with more time; that no
			// reply is another's is required of each.
			patience := 20 * time.Millisecond
			for !oracleOver(t, network, patience) {
				require.Less(t, patience, 5*time.Second, "the replies are late whatever their time")
				patience *= 4
			}
		})
	}
}

// oracleOver reports whether enough replies came in time and enough did not.
func oracleOver(t *testing.T, network string, patience time.Duration) bool {
	t.Helper()
	{
		{
			total := oracleTotal() / 3
			srv, to := serve(t, faultnet.Options{Network: network, ReplyDelay: func(serial, seq int) time.Duration {
				switch seq % 64 {
				case 17: // too late
					return 2 * patience
				case 33: // the reply and the time-out coincide
					return patience*3/4 + time.Duration(serial%10)*patience/20
				}
				return 0
			}})
			cfg := Config{Framing: "line", To: to, MaxOpen: 4, RequestTimeout: patience, ErrorReply: "ERR\n", IdleTimeout: forever}
			g := begin(t, cfg)
			if network == "tls" {
				g.certs.forServer.Store(srv.ClientTLS())
			}
			var foreign atomic.Pointer[string]
			var whole, partial, failed, done atomic.Int64
			var wg tasks.Group
			for w := range 16 {
				wg.Go(func() {
					d := &dier{rand.New(rand.NewPCG(uint64(w), 7)), "tcp", g.Addr().String(), &foreign, &whole, &partial, &failed}
					for done.Load() < total && foreign.Load() == nil {
						done.Add(int64(d.exchangeLines()))
					}
				})
			}
			wg.Wait()
			if what := foreign.Load(); what != nil {
				t.Fatal(*what)
			}
			st := g.Status()
			t.Logf("%d requests, %d replies read whole, %d clients died, %d got an error; failures %v; closed %v",
				done.Load(), whole.Load(), partial.Load(), failed.Load(), st.Failures, st.Pool.Closed)
			require.LessOrEqual(t, st.Pool.PeakOpen, 4)
			g.end()
			require.NoError(t, g.wait())
			return whole.Load() > total/3 && partial.Load() > total/100 && st.Failures["late"] > 0 && st.Pool.Reused > 0
		}
	}
}

// The same with a real redis-server, and with commands in between that pin a connection.
func TestDesyncNoRedisClientEverReadsAReplyThatIsNotItsOwn(t *testing.T) {
	g, _ := redisGateway(t, func(c *Config) { c.MaxOpen, c.MaxPinned = 6, 3 })
	total := oracleTotal()
	var foreign atomic.Pointer[string]
	var whole, partial, done atomic.Int64
	var wg tasks.Group
	for w := range 16 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 11))
			d := &dier{rng: rng, foreign: &foreign}
			for done.Load() < total && foreign.Load() == nil {
				done.Add(redisDier(d, g.Addr().String(), &whole, &partial))
			}
		})
	}
	wg.Wait()
	if what := foreign.Load(); what != nil {
		t.Fatal(*what)
	}
	st := g.Status()
	t.Logf("%d commands, %d replies read whole, %d clients died; failures %v; pool %v; closed %v", done.Load(), whole.Load(), partial.Load(), st.Failures, st.Pool, st.Pool.Closed)
	require.Greater(t, whole.Load(), total/3)
	require.Greater(t, partial.Load(), total/200)
	require.LessOrEqual(t, st.Pool.PeakOpen, 6)
	soon(t, "all is given back", func() bool { st := g.Status(); return st.Clients == 0 && st.Pool.InUse == 0 && st.Pinned == 0 })
	c := g.call()
	for range 10 { // no connection was left in a transaction, a database or a subscription
		require.Equal(t, bulk("x"), c.do("ECHO", "x"))
		require.Equal(t, "$-1\r\n", c.do("GET", "db3"))
	}
}

func redisDier(d *dier, addr string, whole, partial *atomic.Int64) (n int64) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		d.accuse("%v", err)
		return 1
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(forever))
	r := bufio.NewReader(nc)
	sc := &respReplies{max: 1 << 20}
	read := func() (string, error) {
		var all []byte
		for {
			b, err := r.ReadByte()
			if err != nil {
				return string(all), err
			}
			all = append(all, b)
			if _, done, err := sc.scan(all[len(all)-1:]); err != nil || done {
				return string(all), err
			}
		}
	}
	db := "0"
	for range 1 + d.rng.IntN(10) {
		token := fmt.Sprintf("t%d", tokens.Add(1))
		var commands [][]string
		var want []string
		switch d.rng.IntN(8) {
		case 0:
			commands = [][]string{{"MULTI"}, {"ECHO", token}, {"EXEC"}}
			want = []string{"+OK\r\n", "+QUEUED\r\n", "*1\r\n" + bulk(token)}
		case 1:
			commands = [][]string{{"WATCH", token}, {"ECHO", token}, {"UNWATCH"}, {"ECHO", token + "b"}}
			want = []string{"+OK\r\n", bulk(token), "+OK\r\n", bulk(token + "b")}
		case 2:
			commands = [][]string{{"SUBSCRIBE", token}, {"UNSUBSCRIBE", token}, {"ECHO", token}}
			want = []string{"*3\r\n" + bulk("subscribe") + bulk(token) + ":1\r\n", "*3\r\n" + bulk("unsubscribe") + bulk(token) + ":0\r\n", bulk(token)}
		case 3:
			db = fmt.Sprint(d.rng.IntN(4))
			commands = [][]string{{"SELECT", db}, {"SET", "db" + db, token}, {"ECHO", token}}
			want = []string{"+OK\r\n", "+OK\r\n", bulk(token)}
			if db != "3" {
				commands[1], want[1] = []string{"GET", "db3"}, "$-1\r\n" // it exists in its own database only
			}
		case 4:
			commands = [][]string{{"RPUSH", token, token}, {"BLPOP", token, "0"}, {"DEL", token}}
			want = []string{":1\r\n", "*2\r\n" + bulk(token) + bulk(token), ":0\r\n"}
		default:
			for range 1 + d.rng.IntN(4) {
				commands = append(commands, []string{"ECHO", token})
				want = append(want, bulk(token))
			}
		}
		var request []byte
		for _, c := range commands {
			parts := make([][]byte, len(c))
			for i := range c {
				parts[i] = []byte(c[i])
			}
			request = appendCommand(request, parts...)
		}
		n += int64(len(commands))
		dies := d.rng.IntN(12)
		switch dies {
		case 0:
			nc.Write(request[:d.rng.IntN(len(request))])
			partial.Add(1)
			return n
		case 1:
			nc.Write(request)
			nc.(*net.TCPConn).SetLinger(0)
			partial.Add(1)
			return n
		}
		nc.Write(request)
		for i := range want {
			if dies == 2 {
				io.ReadFull(r, make([]byte, 1+d.rng.IntN(4)))
				partial.Add(1)
				return n
			}
			if got, err := read(); err != nil || got != want[i] {
				d.accuse("to %q came %q (%v) instead of %q", commands[i], got, err, want[i])
				return n
			}
			whole.Add(1)
		}
	}
	return n
}

// A client that breaks off at any byte of its request or reply affects only itself: the
// one connection to the server serves all others to the end.
func TestAClientThatDiesAtAnyByteCostsNoConnection(t *testing.T) {
	echo := func(p *faultnet.Peer) { io.Copy(p, p) }
	for name, c := range map[string]struct {
		cfg     Config
		request string
		handler func(*faultnet.Peer)
		reply   string
	}{
		"line":   {Config{Framing: "line"}, "hello world\n", echo, "hello world\n"},
		"length": {Config{Framing: "length", Length: LengthField{Size: 4}}, "\x00\x00\x00\x08hi there", echo, "\x00\x00\x00\x08hi there"},
		"resp":   {Config{Framing: "resp"}, "*2\r\n$4\r\nECHO\r\n$5\r\nhello\r\n", echo, "*2\r\n$4\r\nECHO\r\n$5\r\nhello\r\n"},
		"modbus": {Config{Framing: "modbus"}, string(readRegisters(7, 1, 9, 1)), device(nil), "\x00\x07\x00\x00\x00\x05\x01\x03\x02\x00\x09"},
	} {
		t.Run(name, func(t *testing.T) {
			srv, to := serve(t, faultnet.Options{Handler: c.handler})
			c.cfg.To, c.cfg.MaxOpen = to, 1
			g := begin(t, c.cfg)
			whole := func() {
				cl := g.call()
				cl.say("%s", c.request)
				got := make([]byte, len(c.reply))
				_, err := io.ReadFull(cl, got)
				require.NoError(t, err)
				require.Equal(t, c.reply, string(got))
				cl.Close()
			}
			for _, rst := range []bool{false, true} {
				die := func(cl *caller) {
					if rst {
						cl.Conn.(*net.TCPConn).SetLinger(0)
					}
					cl.Close()
				}
				for k := range len(c.request) + 1 {
					cl := g.call()
					cl.Write([]byte(c.request[:k]))
					die(cl)
					whole()
				}
				for k := range len(c.reply) {
					cl := g.call()
					cl.say("%s", c.request)
					io.ReadFull(cl, make([]byte, k))
					die(cl)
					whole()
				}
			}
			require.Equal(t, 1, srv.Accepts())
			require.Empty(t, g.Status().Pool.Closed, "and was never given up")
		})
	}
}

// A reply to no request, and a reply that comes twice, do not reach the next client.
func TestWhatTheServerSaysUnaskedReachesNobody(t *testing.T) {
	for _, when := range []string{"with the reply", "later"} {
		t.Run(when, func(t *testing.T) {
			srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
				buf := make([]byte, 100)
				for {
					n, err := p.Read(buf)
					if err != nil {
						return
					}
					reply := string(buf[:n])
					if when == "with the reply" {
						reply += "unasked\n"
					}
					io.WriteString(p, reply)
				}
			}})
			g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1, GreetingWait: -1})
			for i := range 10 {
				c := g.call()
				c.say("r%d\n", i)
				require.Equal(t, fmt.Sprintf("r%d", i), c.hear())
				if when == "later" {
					soon(t, "something unasked was sent", func() bool { return srv.PushIdle(1, []byte("unasked\n")) > 0 || srv.Open() == 0 })
				}
			}
			require.Greater(t, srv.Accepts(), 5)
			require.NotZero(t, g.Status().Pool.Closed[connpool.ClosedDirty])
		})
	}
}

// TRY-04: the same with servers that sometimes greet, at once or late, and servers that
// hang up on some clients after accepting them.
func TestDesyncNoClientReadsAnothersReplyBeforeAServerThatSpeaksFirstNowAndThen(t *testing.T) {
	t.Parallel()
	total := short.Of(oracleTotal()/3, 100) // each new connection waits for a greeting
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		switch p.Serial() % 8 {
		case 3:
			io.WriteString(p, "220 hello\n")
		case 5:
			io.WriteString(p, "220-hello\n220 again\n")
		case 6:
			late := time.AfterFunc(3*time.Millisecond, func() { io.WriteString(p, "220 late\n") })
			defer late.Stop()
		case 7:
			return
		}
		faultnet.Tokens(p)
	}})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 8, MaxUses: 50, GreetingWait: 300 * time.Millisecond, // for busy machines
		RequestTimeout: 5 * time.Second, ErrorReply: "ERR\n", IdleTimeout: forever})
	var foreign atomic.Pointer[string]
	var whole, partial, failed, done atomic.Int64
	var wg tasks.Group
	for w := range 16 {
		wg.Go(func() {
			d := &dier{rand.New(rand.NewPCG(uint64(w), 13)), "tcp", g.Addr().String(), &foreign, &whole, &partial, &failed}
			for done.Load() < total && foreign.Load() == nil {
				done.Add(int64(d.exchangeLines()))
			}
		})
	}
	wg.Wait()
	if what := foreign.Load(); what != nil {
		t.Fatal(*what)
	}
	st := g.Status()
	t.Logf("%d requests, %d replies read whole, %d clients died, %d got an error; failures %v; closed %v",
		done.Load(), whole.Load(), partial.Load(), failed.Load(), st.Failures, st.Pool.Closed)
	require.NotZero(t, whole.Load())
	require.NotZero(t, failed.Load(), "the hazard was there")
}
