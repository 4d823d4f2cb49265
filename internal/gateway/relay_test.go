package gateway

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// PLT-09, PLT-11, PLT-17
func TestEveryTransportMeetsEveryOtherUnderOneTestBody(t *testing.T) {
	for _, down := range []string{"tcp", "tls", "unix"} {
		for _, up := range []string{"tcp", "tls", "unix"} {
			t.Run(down+" to "+up, func(t *testing.T) {
				dir, ca := shortDir(t), faultnet.NewCA()
				cert := ca.Server("127.0.0.1")
				k := writeKeys(t, dir, "server", cert)
				srv, to := serve(t, faultnet.Options{Network: up, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
				cfg := Config{Framing: "line", To: to, MaxOpen: 2}
				switch down {
				case "tls":
					cfg.Listen = "tls://127.0.0.1:0"
					cfg.Server = ServerFiles{Cert: k.cert, Key: k.key}
				case "unix":
					cfg.Listen = "unix:" + filepath.Join(dir, "s")
				}
				if up == "tls" {
					cfg.Upstream.CA = k.ca
				}
				g := begin(t, cfg)
				g.clientCA = ca.Pool()
				var callers []*caller
				for range 5 {
					callers = append(callers, g.call())
				}
				for i := range 20 {
					callers[i%5].token(fmt.Sprintf("t%d", i))
				}
				require.Equal(t, 1, srv.Accepts(), "clients in turn need one connection")
				g.end()
				require.NoError(t, g.wait())
			})
		}
	}
}

// PLT-07, PLT-10
func TestAHundredSilentClientsHoldNoConnection(t *testing.T) {
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 3})
	callers := make([]*caller, 100)
	for i := range callers {
		callers[i] = g.call()
	}
	soon(t, "all clients are in", func() bool { return g.Status().Clients == 100 })
	require.Zero(t, srv.Accepts(), "nobody has said anything")
	var wg tasks.Group
	for i, c := range callers {
		wg.Go(func() {
			for j := range 5 {
				c.token(fmt.Sprintf("c%d.%d", i, j))
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, srv.Peak(), 3)
	st := g.Status()
	require.Equal(t, uint64(500), st.Requests)
	require.Equal(t, uint64(500), st.Replies)
	require.Zero(t, st.Pool.InUse, "they are silent again")
	require.Equal(t, 100, st.Clients)
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to})
	c := g.call()
	var b strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&b, "p%d\n", i)
	}
	go io.WriteString(c, b.String())
	for i := range 1000 {
		require.True(t, strings.HasSuffix(c.hear(), fmt.Sprintf(" p%d", i)))
	}
	require.Equal(t, 1, srv.Accepts())
	require.Less(t, g.Status().Pool.Loans, uint64(500), "requests that came together went together")
}

func TestADeadServerIsToldInTheChosenWordsAndNothingIsSentTwice(t *testing.T) {
	lines := make(chan string, 100)
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		buf := make([]byte, 100)
		n, _ := p.Read(buf)
		lines <- string(buf[:n])
	}})
	for _, words := range []string{"", "ERR gone\n"} {
		g := begin(t, Config{Framing: "line", To: to, ErrorReply: words})
		c := g.call()
		c.say("one\n")
		if words == "" {
			c.hearEnd()
		} else {
			require.Equal(t, "ERR gone", c.hear())
			c.say("two\n")
			require.Equal(t, "ERR gone", c.hear(), "the client lives on")
			require.Equal(t, "one\n", <-lines)
			require.Equal(t, "two\n", <-lines)
			require.Equal(t, uint64(2), g.Status().Failures["lost"])
			continue
		}
		require.Equal(t, "one\n", <-lines)
		require.Empty(t, lines, "it was sent once")
	}
}

func TestAServerThatIsNotThereIsAFailureOfEachRequest(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	srv.Stop()
	g := begin(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n"})
	c := g.call()
	for range 10 {
		c.say("x\n")
		require.Equal(t, "ERR", c.hear())
	}
	require.Equal(t, uint64(10), g.Status().Failures["unreachable"])
	require.NoError(t, srv.Restart())
	soon(t, "requests work again", func() bool { c.say("x\n"); return c.hear() != "ERR" })
}

func TestAServerThatDoesNotAnswerCostsOneRequestAndItsConnection(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{ReplyDelay: func(serial, seq int) time.Duration {
		if serial == 1 {
			return forever
		}
		return 0
	}})
	g := begin(t, Config{Framing: "line", To: to, ErrorReply: "ERR\n", MaxOpen: 1, RequestTimeout: 2 * time.Second})
	c := g.call()
	c.say("late\n")
	require.Equal(t, "ERR", c.hear())
	require.Equal(t, uint64(1), g.Status().Failures["late"])
	serial, seq := c.token("next")
	require.Equal(t, 2, serial, "the connection that owes a reply is not used again")
	require.Equal(t, 1, seq)
	require.Equal(t, 2, srv.Accepts())
}

// A client that stops reading must not keep a connection from the others.
func TestAClientThatStopsReadingCostsOnlyItself(t *testing.T) {
	const size = 4 << 20
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		one := make([]byte, 1)
		for {
			if _, err := io.ReadFull(p, one); err != nil {
				return
			}
			if one[0] == '\n' {
				big := make([]byte, size)
				for i := range big {
					big[i] = 'x'
				}
				big[size-1] = '\n'
				if _, err := p.Write(big); err != nil {
					return
				}
			}
		}
	}})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1, WriteTimeout: 300 * time.Millisecond, Pipeline: 4})
	deaf := g.call()
	deaf.say("1\n2\n3\n4\n")
	soon(t, "its replies were fetched", func() bool { return g.Status().Pool.Loans == 1 })
	require.Zero(t, g.Status().Pool.InUse, "and nothing is held while it does not take them")
	other := g.call()
	other.say("1\n")
	require.Len(t, other.hear(), size-1)
	soon(t, "the one that does not read is closed", func() bool { return g.Status().Slow == 1 && g.Status().Clients == 1 })
	require.Equal(t, 1, g.Status().Pool.Open, "the connection survived it")
}

func TestMemoryIsBoundedForAllClientsTogether(t *testing.T) {
	const size = 8 << 20 // more than the sockets' buffers take
	srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		one := make([]byte, 1)
		big := []byte(strings.Repeat("x", size-1) + "\n")
		for {
			if _, err := io.ReadFull(p, one); err != nil {
				return
			}
			if one[0] == '\n' {
				p.Write(big)
			}
		}
	}})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1, MaxMemory: 20 << 20, ErrorReply: "ERR\n", WriteTimeout: time.Minute})
	var deaf []*caller
	for range 6 {
		c := g.call()
		c.say("1\n")
		deaf = append(deaf, c)
	}
	soon(t, "some were refused", func() bool { return g.Status().Failures["no-memory"] > 0 })
	require.LessOrEqual(t, g.Status().Memory, int64(20<<20))
	require.Equal(t, 1, srv.Accepts(), "a reply for which there is no room leaves the connection in step")
	for _, c := range deaf {
		c.Close()
	}
	soon(t, "all is given back", func() bool { return g.Status().Clients == 0 && g.Status().Memory == 0 })
	c := g.call()
	c.say("1\n")
	require.Len(t, c.hear(), size-1)
	require.Equal(t, 1, srv.Accepts())
}

func TestFramesThatAreTooLongCostTheirSender(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, MaxFrame: 64})
	c := g.call()
	c.token("a")
	c.Write([]byte(strings.Repeat("x", 65)))
	c.hearEnd()
	soon(t, "it is counted", func() bool { return g.Status().BadFrames == 1 })
	g.call().token("b")
	require.Equal(t, 1, srv.Accepts(), "the connection to the server survived it")

	// Errors of the server are its own fault, and close its connection.
	d := g.call()
	d.say("%s\n", strings.Repeat("y", 62)) // 63 bytes, and "1 3 " before it in the reply
	d.hearEnd()
	require.Equal(t, uint64(1), g.Status().Failures["too-long"])
}

func TestAHalfRequestIsClosedAfterAWhileAndNeverSent(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, RequestTimeout: 2 * time.Second, IdleTimeout: -1})
	c := g.call()
	c.say("hal")
	c.hearEnd()
	soon(t, "it is counted", func() bool { return g.Status().Stalled == 1 })
	require.Zero(t, srv.Accepts())

	idle := begin(t, Config{Framing: "line", To: to, IdleTimeout: -1}).call()
	idle.token("whole") // under the usual time-out, which a busy machine keeps

	quick := begin(t, Config{Framing: "line", To: to, IdleTimeout: 20 * time.Millisecond})
	c = quick.call()
	c.hearEnd()
	soon(t, "it is counted", func() bool { return quick.Status().Idle == 1 })
}

func TestOneClientTooManyIsTurnedAway(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, MaxClients: 2})
	a, b := g.call(), g.call()
	a.token("a")
	b.token("b")
	g.call().hearEnd()
	require.Equal(t, uint64(1), g.Status().Turned)
	a.Close()
	soon(t, "its place is free", func() bool { return g.Status().Clients == 1 })
	g.call().token("c")
}

// An unfinished request of a client that leaves never reaches the server, and a reply
// that is under way is received and dropped.
func TestAClientThatLeavesDuringARequestCostsNoConnection(t *testing.T) {
	arrived, proceed := make(chan bool), make(chan bool)
	srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		buf := make([]byte, 100)
		for {
			n, err := p.Read(buf)
			if err != nil {
				return
			}
			if string(buf[:n]) == "slow\n" {
				arrived <- true
				<-proceed
			}
			p.Write(buf[:n])
		}
	}})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1})
	c := g.call()
	c.say("slow\n")
	<-arrived
	c.Close()
	proceed <- true
	d := g.call()
	d.say("quick\n")
	require.Equal(t, "quick", d.hear())
	require.Equal(t, 1, srv.Accepts())
}

func TestDrainLetsRequestsEndAndClosesWhoWaits(t *testing.T) {
	arrived, proceed := make(chan bool), make(chan bool)
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		buf := make([]byte, 100)
		for {
			n, err := p.Read(buf)
			if err != nil {
				return
			}
			arrived <- true
			<-proceed
			p.Write(buf[:n])
		}
	}})
	g := begin(t, Config{Framing: "line", To: to, Listen: "unix:" + filepath.Join(shortDir(t), "s")})
	silent, half, busy := g.call(), g.call(), g.call()
	half.say("hal")
	busy.say("request\n")
	<-arrived
	soon(t, "all are in", func() bool { return g.Status().Clients == 3 })
	g.end()
	silent.hearEnd()
	half.hearEnd()
	require.NoFileExists(t, g.Addr().String())
	_, err := g.dial()
	require.Error(t, err, "nobody is let in any more")
	proceed <- true
	require.Equal(t, "request", busy.hear())
	busy.hearEnd()
	require.NoError(t, g.wait())
}

func TestDrainEndsByItsTimeAndAtOnceWhenHurried(t *testing.T) {
	for _, how := range []string{"by its time", "hurried"} {
		t.Run(how, func(t *testing.T) {
			arrived := make(chan bool, 1)
			_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
				buf := make([]byte, 100)
				p.Read(buf)
				arrived <- true
				p.Read(buf)
			}})
			g := begin(t, Config{Framing: "line", To: to, Drain: map[string]time.Duration{"by its time": 20 * time.Millisecond, "hurried": forever}[how]})
			c := g.call()
			c.say("request\n")
			<-arrived
			g.end()
			if how == "hurried" {
				g.hasten()
			}
			require.ErrorContains(t, g.wait(), "1 clients were cut off")
			c.hearEnd()
		})
	}
}

func TestLengthFramesOfEveryShape(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	for name, c := range map[string]struct {
		field  LengthField
		frames []string
	}{
		"one byte":       {LengthField{Size: 1}, []string{"\x00", "\x03abc", "\xff" + strings.Repeat("z", 255)}},
		"two, big":       {LengthField{Size: 2}, []string{"\x00\x00", "\x00\x03abc", "\x01\x00" + strings.Repeat("z", 256)}},
		"two, little":    {LengthField{Size: 2, Little: true}, []string{"\x00\x00", "\x03\x00abc", "\x00\x01" + strings.Repeat("z", 256)}},
		"four, big":      {LengthField{Size: 4}, []string{"\x00\x00\x00\x03abc", "\x00\x01\x00\x00" + strings.Repeat("z", 65536)}},
		"four, little":   {LengthField{Size: 4, Little: true}, []string{"\x03\x00\x00\x00abc", "\x00\x00\x01\x00" + strings.Repeat("z", 65536)}},
		"after an id":    {LengthField{Size: 2, Offset: 3}, []string{"idx\x00\x02hi"}},
		"with its head":  {LengthField{Size: 2, Offset: 1, WithHead: true}, []string{"t\x00\x05hi", "t\x00\x03"}},
		"little, headed": {LengthField{Size: 4, Little: true, WithHead: true}, []string{"\x06\x00\x00\x00hi"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := begin(t, Config{Framing: "length", Length: c.field, To: to})
			all := strings.Join(c.frames, "")
			for range 3 {
				cl := g.call()
				cl.say("%s", all)
				got := make([]byte, len(all))
				_, err := io.ReadFull(cl, got)
				require.NoError(t, err)
				require.Equal(t, all, string(got))
			}
			require.Equal(t, uint64(3*len(c.frames)), g.Status().Requests)
		})
	}
}

func TestALengthThatCannotBeIsRefusedBeforeItIsSent(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	for _, bad := range []string{"\xff\xff\xff\xff", "\x00\x00\x00\x03"} { // too long; shorter than its own header
		g := begin(t, Config{Framing: "length", Length: LengthField{Size: 4, WithHead: true}, To: to, MaxMemory: 1 << 20})
		c := g.call()
		c.say("%s", bad)
		c.hearEnd()
		soon(t, "it is counted", func() bool { return g.Status().BadFrames == 1 })
	}
	require.Zero(t, srv.Accepts())
}

// A request of many megabytes to a server that echoes while it reads: neither side may
// wait for the other for ever.
func TestALargeRequestToAServerThatAnswersAsItReads(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		buf := make([]byte, 1024)
		for {
			n, err := p.Read(buf)
			if err != nil {
				return
			}
			if _, err := p.Write(buf[:n]); err != nil {
				return
			}
		}
	}})
	g := begin(t, Config{Framing: "line", To: to})
	c := g.call()
	line := strings.Repeat("x", 12<<20) + "\n"
	go io.WriteString(c, line)
	require.Len(t, c.hear(), len(line)-1)
	require.Equal(t, 1, g.Status().Pool.Idle)
}

// A connection whose reply is complete before its request is sent still carries the rest
// of a request.
func TestAnEarlyReplyCostsTheConnectionUnlessTheRequestGetsOut(t *testing.T) {
	t.Parallel()
	hold := make(chan bool)
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		p.Read(make([]byte, 10)) // and no more
		io.WriteString(p, "early\n")
		<-hold
	}})
	t.Cleanup(func() { close(hold) })
	g := begin(t, Config{Framing: "line", To: to, RequestTimeout: 4 * time.Second}) // all of it must arrive within this time
	c := g.call()
	go io.WriteString(c, strings.Repeat("x", 12<<20)+"\n")
	require.Equal(t, "early", c.hear())
	soon(t, "the connection is gone", func() bool { return g.Status().Pool.Open == 0 })
	require.Equal(t, uint64(1), g.Status().Pool.Closed[connpool.ClosedCanceled], "after the request had its time to get out")
}

func TestUpstreamIsCheckedOnlyAgainstItsOwnAuthority(t *testing.T) {
	_, to := serve(t, faultnet.Options{Network: "tls"})
	other := writeKeys(t, t.TempDir(), "other", faultnet.NewCA().Server("127.0.0.1"))
	g := begin(t, Config{Framing: "line", To: to, Upstream: UpstreamFiles{CA: other.ca}, ErrorReply: "ERR\n"})
	c := g.call()
	c.say("secret\n")
	require.Equal(t, "ERR", c.hear())
	ctx, cancel := context.WithTimeout(t.Context(), forever)
	defer cancel()
	err := g.Reach(ctx)
	require.Equal(t, connpool.KindBadMessage, connpool.KindOf(err), "%v", err)
}
