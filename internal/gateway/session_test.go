package gateway

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

func TestASessionHasOneConnectionFromItsFirstByteToItsEnd(t *testing.T) {
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "session", To: to, MaxOpen: 2})
	a, b, silent := g.call(), g.call(), g.call()
	for i := range 5 {
		serial, seq := a.token("a")
		require.Equal(t, []int{1, i + 1}, []int{serial, seq})
		serial, seq = b.token("b")
		require.Equal(t, []int{2, i + 1}, []int{serial, seq})
	}
	require.Equal(t, 2, srv.Accepts(), "the silent one has none")
	require.EqualValues(t, 2, g.Status().Pinned)
	go silent.Write([]byte("late\n")) // has to wait for a connection
	soon(t, "it waits", func() bool { return g.Status().Pool.Waiting == 1 })
	a.Close()
	require.Equal(t, "3 1 late", silent.hear(), "a connection that served a session serves nobody else")
}

// PLT-11: clients' uses of half-close work through the gateway.
func TestASessionPassesTheEndOfEachDirectionOn(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix"} {
		t.Run(network, func(t *testing.T) {
			ca := faultnet.NewCA()
			cert := ca.Server("127.0.0.1")
			k := writeKeys(t, t.TempDir(), "server", cert)
			srv, to := serve(t, faultnet.Options{Network: network, TLS: &tls.Config{Certificates: []tls.Certificate{cert}},
				Handler: func(p *faultnet.Peer) {
					all, _ := io.ReadAll(p) // to the end of the client's direction
					for range 3 {
						p.Write(all)
					}
				}})
			cfg := Config{Framing: "session", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}}
			if network == "tls" {
				cfg.Upstream.CA = k.ca
			}
			g := begin(t, cfg)
			g.clientCA = ca.Pool()
			c := g.call()
			load := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
			_, err := c.Write(load)
			require.NoError(t, err)
			require.NoError(t, c.Conn.(*tls.Conn).CloseWrite())
			got, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, bytes.Repeat(load, 3), got)
			soon(t, "it is over", func() bool { return g.Status().Clients == 0 && srv.Open() == 0 })
		})
	}
}

func TestAnEagerSessionLetsTheServerSpeakFirst(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		io.WriteString(p, "220 welcome\n")
		io.Copy(io.Discard, p)
	}})
	g := begin(t, Config{Framing: "session", To: to, Eager: true})
	require.Equal(t, "220 welcome", g.call().hear())
}

func TestASessionEndsWhenEitherSideFailsOrBothAreSilent(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "session", To: to})
	c := g.call()
	c.token("x")
	srv.CutIdle(1, faultnet.RST)
	c.hearEnd()
	d := g.call()
	d.token("x")
	d.Conn.(*net.TCPConn).SetLinger(0)
	d.Close()
	soon(t, "the server is told", func() bool { return srv.Open() == 0 })

	q := begin(t, Config{Framing: "session", To: to, IdleTimeout: time.Second})
	e := q.call()
	e.token("x")
	e.hearEnd()
	soon(t, "it is counted", func() bool { return q.Status().Idle == 1 })
}

// A client that does not notice that its server has ended its direction must not keep the
// slot.
func TestAClientWhoseServerIsDoneDoesNotKeepTheSlot(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { p.Read(make([]byte, 10)) }})
	g := begin(t, Config{Framing: "session", To: to, RequestTimeout: 50 * time.Millisecond})
	c := g.call()
	c.say("x\n")
	c.hearEnd()
	soon(t, "the slot is free, although the client is still there", func() bool { return g.Status().Pool.Open == 0 })
}

func TestADrainLetsSessionsEndByThemselves(t *testing.T) {
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "session", To: to})
	c, silent := g.call(), g.call()
	c.token("x")
	g.end()
	silent.hearEnd()
	c.token("y")
	c.Close()
	require.NoError(t, g.wait())

	g = begin(t, Config{Framing: "session", To: to, Drain: 20 * time.Millisecond})
	c = g.call()
	c.token("x")
	g.end()
	require.Error(t, g.wait(), "one that does not end is cut")
	soon(t, "the server is told", func() bool { return srv.Open() == 0 })
}

func TestASessionWithoutAServerIsClosed(t *testing.T) {
	srv, to := serve(t, faultnet.Options{})
	srv.Stop()
	g := begin(t, Config{Framing: "session", To: to})
	c := g.call()
	c.say("x\n")
	c.hearEnd()
	require.Equal(t, uint64(1), g.Status().Failures["unreachable"])
}

// TRY-21: setting the clock does not end a session as idle.
func TestTheSilenceOfASessionIsMeasuredByAClockThatNobodySets(t *testing.T) {
	q := quiet{begun: time.Now()}
	q.moved()
	require.Contains(t, q.since().String(), " m=", "without a monotonic reading a step of the clock would count")
	require.Contains(t, q.since().Add(time.Hour).String(), " m=")
	require.WithinDuration(t, time.Now(), q.since(), forever)
}

// TRY-30: data that ends with its direction must not look complete when it is not.
func TestASessionThatBreaksDoesNotLookLikeOneThatEnded(t *testing.T) {
	part := []byte("the first half\n")
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	k := writeKeys(t, t.TempDir(), "server", cert)
	for _, network := range []string{"tcp", "tls"} {
		for _, how := range []string{"the server resets", "the client is reset", "it is cut"} {
			t.Run(network+", "+how, func(t *testing.T) {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				require.NoError(t, err)
				defer l.Close()
				heard, end := make(chan bool), make(chan error, 1)
				go func() {
					nc, err := l.Accept()
					if err != nil {
						return
					}
					defer nc.Close()
					p := net.Conn(nc)
					if network == "tls" {
						p = tls.Server(whole{nc}, &tls.Config{Certificates: []tls.Certificate{cert}})
					}
					p.Write(part)
					if how == "the server resets" {
						<-heard
						nc.(*net.TCPConn).SetLinger(0)
						return
					}
					_, err = io.ReadAll(p)
					end <- err
				}()
				cfg := Config{Framing: "session", Eager: true, To: network + "://" + l.Addr().String()}
				if network == "tls" {
					cfg.Upstream.CA = k.ca
				}
				g := begin(t, cfg)
				c := g.call()
				require.Equal(t, "the first half", c.hear())
				switch how {
				case "the server resets":
					close(heard)
				case "the client is reset":
					c.leave(true)
				default:
					g.end()
					g.hasten()
				}
				if how != "the client is reset" {
					_, err := io.ReadAll(c.r)
					require.Error(t, err, "the client must not take it for the end")
				}
				if how != "the server resets" {
					require.Error(t, <-end, "the server must not take it for the end")
				}
			})
		}
	}
}

// TRY-33: under TLS, data without close_notify may have been cut off in the middle.
func TestALineThatWasCutOffIsNotCarriedOut(t *testing.T) {
	ca := faultnet.NewCA()
	k := writeKeys(t, t.TempDir(), "server", ca.Server("127.0.0.1"))
	srv, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}})
	g.clientCA = ca.Pool()
	c := g.call()
	c.say("pay 1") // of 100
	c.Conn.(*tls.Conn).NetConn().(*net.TCPConn).CloseWrite()
	c.hearEnd()
	soon(t, "it is counted", func() bool { return g.Status().BadFrames == 1 })
	require.Zero(t, srv.Accepts())

	d := g.call()
	d.say("whole")
	require.NoError(t, d.Conn.(*tls.Conn).CloseWrite())
	require.Contains(t, d.hear(), "whole")
}
