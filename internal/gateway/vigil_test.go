package gateway

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// leave ends a caller by a reset, or by the end of its direction.
func (c *caller) leave(rst bool) {
	if tc, ok := c.Conn.(*net.TCPConn); ok && rst {
		tc.SetLinger(0)
	}
	c.Close()
}

// TRY-27
func TestARequestOfAClientThatWasResetWhileItWaitedIsNotCarriedOut(t *testing.T) {
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	for name, p := range protocols {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int64
			arrived, proceed := make(chan bool), make(chan bool)
			_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
				r := bufio.NewReader(peer)
				for {
					n, all, err := p.next(r)
					if err != nil {
						return
					}
					var reply []byte
					switch {
					case n < 0 && string(all) == "*1\r\n$4\r\nPING\r\n":
						reply = []byte("+PONG\r\n")
					case n < 0:
						reply = []byte(bulk(string(words(all)[0])))
					default:
						if requests.Add(1) == 1 {
							arrived <- true
							<-proceed
						}
						if reply = p.reply(n); name == "modbus" {
							copy(reply, all[:2])
						}
					}
					peer.Write(reply)
				}
			}})
			cfg := p.cfg
			cfg.To, cfg.MaxOpen = to, 1
			g := begin(t, cfg)
			first, next := g.call(), g.call()
			first.Write(p.request(1))
			<-arrived
			const many = 20
			var waiting []*caller
			for i := range many {
				c := g.call()
				c.Write(p.request(100 + i))
				waiting = append(waiting, c)
			}
			soon(t, "all wait", func() bool { return g.Status().Pool.Waiting == many })
			waiting[0].Write(p.request(99)) // unread data does not hide its end
			for _, c := range waiting {
				c.leave(true)
			}
			soon(t, "their waits have ended", func() bool { return g.Status().Pool.Waiting == 0 && g.Status().Clients == 2 })
			require.EqualValues(t, many, g.Status().Failures["left"])
			next.Write(p.request(2))
			close(proceed)
			for i, c := range []*caller{first, next} {
				n, _, err := p.next(c.r)
				require.NoError(t, err)
				require.Equal(t, i+1, n)
			}
			require.EqualValues(t, 2, requests.Load(), "and nothing else was carried out")
			require.Equal(t, 1, g.Status().Pool.Open)
			require.Empty(t, g.Status().Pool.Closed, "it cost no connection")
		})
	}
}

// TRY-27: "printf ... | nc" ends its direction and still waits for its reply.
func TestTheEndOfAClientsDirectionIsNoWayToLeaveAPlainRequest(t *testing.T) {
	arrived, proceed := make(chan bool), make(chan bool)
	var first atomic.Bool
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		buf := make([]byte, 100)
		for {
			n, err := p.Read(buf)
			if err != nil {
				return
			}
			if first.CompareAndSwap(false, true) {
				arrived <- true
				<-proceed
			}
			p.Write(buf[:n])
		}
	}})
	g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1})
	a, b := g.call(), g.call()
	a.say("a\n")
	<-arrived
	b.say("b\n")
	require.NoError(t, b.Conn.(*net.TCPConn).CloseWrite())
	soon(t, "it waits", func() bool { return g.Status().Pool.Waiting == 1 })
	close(proceed)
	require.Equal(t, "a", a.hear())
	require.Equal(t, "b", b.hear())
	b.hearEnd()
}

// TRY-27
func TestABlockingCommandWhoseClientLeftWhileItWaitedTakesNothing(t *testing.T) {
	t.Parallel()
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	for _, full := range []string{"pins", "connections"} {
		for _, rst := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, reset %v", full, rst), func(t *testing.T) {
				g, r := redisGateway(t, func(c *Config) {
					c.MaxOpen, c.MaxPinned = 2, 1
					if full == "connections" {
						c.MaxOpen, c.MaxPinned = 1, 1
					}
				})
				holder := g.call()
				if full == "pins" {
					require.Equal(t, "+OK\r\n", holder.do("MULTI"))
				} else {
					holder.send("DEBUG", "SLEEP", "0.5")
					soon(t, "it is under way", func() bool { return g.Status().Pool.InUse == 1 })
				}
				gone := g.call()
				gone.send("BLPOP", "list", "0")
				soon(t, "it was read", func() bool {
					return g.Status().BytesIn >= uint64(len("*3\r\n$5\r\nBLPOP\r\n$4\r\nlist\r\n$1\r\n0\r\n")) && g.Status().Clients == 2
				})
				gone.leave(rst)
				soon(t, "its wait has ended", func() bool { return g.Status().Clients == 1 })
				if full == "pins" {
					require.Equal(t, "*0\r\n", holder.do("EXEC"))
				} else {
					require.Equal(t, "+OK\r\n", holder.frame())
				}
				require.Equal(t, ":1\r\n", r.do(t, "RPUSH", "list", "v"))
				require.Equal(t, "+OK\r\n", holder.do("MULTI"), "the next in line has its place")
				require.Equal(t, "*0\r\n", holder.do("EXEC"))
				require.Equal(t, ":1\r\n", r.do(t, "LLEN", "list"))
				require.EqualValues(t, 1, g.Status().Failures["left"])
			})
		}
	}
}

// TRY-27
func TestASessionWhoseClientLeftBeforeItsTurnIsNotOpened(t *testing.T) {
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	for _, rst := range []bool{true, false} {
		t.Run(fmt.Sprint("reset ", rst), func(t *testing.T) {
			srv, to := serve(t, faultnet.Options{})
			g := begin(t, Config{Framing: "session", To: to, MaxOpen: 1})
			a := g.call()
			a.token("a")
			var waiting []*caller
			for range 20 {
				c := g.call()
				c.say("x\n")
				waiting = append(waiting, c)
			}
			soon(t, "all wait", func() bool { return g.Status().Pool.Waiting == 20 })
			for _, c := range waiting {
				c.leave(rst)
			}
			soon(t, "they are not counted any more", func() bool { return g.Status().Clients == 1 })
			b := g.call()
			b.say("b\n")
			soon(t, "it waits", func() bool { return g.Status().Pool.Waiting == 1 })
			a.Close()
			require.True(t, strings.HasSuffix(b.hear(), " b"))
			require.Equal(t, 2, srv.Accepts(), "the server saw those two only")
			require.EqualValues(t, 20, g.Status().Failures["left"])
		})
	}
}

// A session that has a place may end its direction at once: the end is part of its data.
func TestASessionMayEndItsDirectionWhileItsConnectionIsOpened(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		all, _ := io.ReadAll(p)
		p.Write(append(all, '\n'))
	}})
	g := begin(t, Config{Framing: "session", To: to, MaxOpen: 4, ConnectDelay: 50 * time.Millisecond})
	for range 4 {
		c := g.call()
		c.say("all")
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		require.Equal(t, "all", c.hear())
		c.hearEnd()
	}
}
