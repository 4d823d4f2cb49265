package gateway

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// replica is a server that answers each SET with say and counts it, and answers GET with
// the number of its connection.
func replica(say *atomic.Pointer[string], sets *atomic.Int64) func(*faultnet.Peer) {
	return func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			_, all, err := protocols["resp"].next(r)
			if err != nil {
				return
			}
			args := argsOf(all)
			switch name, _ := args.next(); {
			case is(name, "PING") && args.left == 0:
				io.WriteString(peer, "+PONG\r\n")
			case is(name, "PING"):
				word, _ := args.next()
				io.WriteString(peer, bulk(string(word)))
			case is(name, "GET"):
				fmt.Fprintf(peer, ":%d\r\n", peer.Serial())
			case is(name, "EXEC"):
				io.WriteString(peer, "*2\r\n:1\r\n"+*say.Load())
			case is(name, "SET"):
				sets.Add(1)
				io.WriteString(peer, *say.Load())
			default:
				io.WriteString(peer, "+OK\r\n")
			}
		}
	}
}

// TRY-28
func TestAServerThatSaysItIsNotTheOneToAskIsLeft(t *testing.T) {
	for _, word := range []string{
		"-READONLY You can't write against a read only replica.\r\n",
		"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
		"-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)\r\n",
		"!21\r\nREADONLY and so forth\r\n",
	} {
		for _, how := range []string{"plain", "pinned", "exec"} {
			t.Run(how+" "+word[:8], func(t *testing.T) {
				var say atomic.Pointer[string]
				ok := "+OK\r\n"
				say.Store(&ok)
				srv, to := serve(t, faultnet.Options{Handler: replica(&say, new(atomic.Int64))})
				g := begin(t, Config{Framing: "resp", To: to, MaxOpen: 2})
				c, other := g.call(), g.call()
				require.Equal(t, ok, c.do("SET", "k", "v"))
				require.Equal(t, ":1\r\n", other.do("GET", "k"))
				say.Store(&word)
				switch how {
				case "plain":
					require.Equal(t, word, c.do("SET", "k", "v"), "it is passed on")
				case "pinned":
					require.Equal(t, ok, c.do("WATCH", "k"))
					require.Equal(t, word, c.do("SET", "k", "v"))
					require.Equal(t, ok, c.do("UNWATCH"))
				case "exec":
					if word[0] == '!' {
						t.Skip("within an array it has the form of RESP2 here")
					}
					require.Equal(t, ok, c.do("MULTI"))
					require.Equal(t, "*2\r\n:1\r\n"+word, c.do("EXEC"))
				}
				soon(t, "the connection is given up", func() bool { return g.Status().Pool.Closed[connpool.ClosedRetired] >= 1 && g.Status().Pool.InUse == 0 })
				require.NotEqual(t, ":1\r\n", other.do("GET", "k"), "whoever comes next asks anew")

				// A client that repeats the write is answered, and replaces at most one
				// connection a second for the others.
				before := srv.Accepts()
				begun := time.Now()
				for range 200 {
					require.Equal(t, word, c.do("SET", "k", "v"))
				}
				require.LessOrEqual(t, srv.Accepts()-before, 3+2*int(time.Since(begun)/renewEvery))

				// TRY-38: and the log reports it once a minute.
				g.renewal.mu.Lock()
				g.renewal.last = time.Now().Add(-2 * renewEvery)
				g.renewal.mu.Unlock()
				retired := g.Status().Pool.Closed[connpool.ClosedRetired]
				require.Equal(t, word, c.do("SET", "k", "v"))
				soon(t, "it is left once more", func() bool { return g.Status().Pool.Closed[connpool.ClosedRetired] > retired })
				require.LessOrEqual(t, strings.Count(g.log.String(), "not the one to ask"), 1+int(time.Since(begun)/noticeEvery))
			})
		}
	}
}

// TRY-28
func TestConnectionsAreReplacedByAgeAndOnRequestAlthoughTheyAreBusy(t *testing.T) {
	t.Run("by age", func(t *testing.T) {
		srv, to := serve(t, faultnet.Options{})
		g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1, MaxLifetime: 50 * time.Millisecond})
		c := g.call()
		soon(t, "three connections have served it", func() bool { c.token("x"); return srv.Accepts() > 2 })
		require.Greater(t, g.Status().Pool.Closed[connpool.ClosedLifetime], uint64(1))
	})
	t.Run("on request", func(t *testing.T) {
		_, to := serve(t, faultnet.Options{})
		g := begin(t, Config{Framing: "line", To: to, MaxOpen: 1})
		c := g.call()
		serial, _ := c.token("x")
		require.Equal(t, 1, serial)
		require.NoError(t, g.Renew())
		serial, _ = c.token("x")
		require.Equal(t, 2, serial)
		require.True(t, strings.Contains(g.log.String(), "are replaced"))
	})
	t.Run("by default", func(t *testing.T) {
		p, err := Config{Framing: "line", Listen: "tcp://127.0.0.1:0", To: "tcp://127.0.0.1:1"}.plan()
		require.NoError(t, err)
		require.Equal(t, 30*time.Minute, p.MaxLifetime)
	})
}
