package gateway

import (
	"bufio"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// PLT-07, PLT-10, PLT-11: 1,000 clients on 8 connections, each with data of its own; no
// client sees another's data.
func TestAThousandRedisClientsOnEightConnections(t *testing.T) {
	g, r := redisGateway(t, func(c *Config) { c.MaxOpen = 8 })
	var wrong atomic.Pointer[string]
	var replies atomic.Int64
	var ready, wg tasks.Group
	start := make(chan bool)
	const clients = 1000
	exchanges := short.Of(20, 5)
	ready.Add(clients)
	for i := range clients {
		wg.Go(func() {
			nc, err := net.Dial("tcp", g.Addr().String())
			ready.Done()
			if err != nil {
				s := err.Error()
				wrong.CompareAndSwap(nil, &s)
				return
			}
			defer nc.Close()
			<-start
			nc.SetDeadline(time.Now().Add(2 * forever))
			c := &caller{nc, t, bufio.NewReader(nc)}
			key := fmt.Sprintf("key%d", i)
			for j := range exchanges {
				value := fmt.Sprintf("value%d.%d", i, j)
				for _, x := range []struct{ want, got string }{
					{"+OK\r\n", c.do("SET", key, value)},
					{bulk(value), c.do("GET", key)},
				} {
					if x.want != x.got {
						s := fmt.Sprintf("client %d expected %q and got %q", i, x.want, x.got)
						wrong.CompareAndSwap(nil, &s)
					}
					replies.Add(1)
				}
			}
		})
	}
	ready.Wait()
	soon(t, "all are connected at once", func() bool { return g.Status().Clients == clients })
	require.Zero(t, g.Status().Pool.Open, "and hold nothing")
	close(start)
	wg.Wait()
	if what := wrong.Load(); what != nil {
		t.Fatal(*what)
	}
	require.EqualValues(t, 2*exchanges*clients, replies.Load())
	require.LessOrEqual(t, g.Status().Pool.PeakOpen, 8)
	require.LessOrEqual(t, received(t, r), 8, "the server agrees")
}

// received is how many connections the server has accepted, without the test's own.
func received(t *testing.T, r *redis) int {
	t.Helper()
	_, after, _ := strings.Cut(r.do(t, "INFO", "stats"), "total_connections_received:")
	n, err := strconv.Atoi(after[:strings.IndexByte(after, '\r')])
	require.NoError(t, err)
	return n - r.own()
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("there is no %s on this machine: install the package redis-tools", name)
	}
	runtime.LockOSThread() // the signal of dieWithParent comes when this thread ends
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.SysProcAttr = dieWithParent()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// PLT-11: the distribution's own clients, unchanged.
func TestRedisBenchmarkRunsThroughItUnchanged(t *testing.T) {
	atOnce(t)
	g, r := redisGateway(t, func(c *Config) { c.MaxOpen = 8 })
	_, port, _ := net.SplitHostPort(g.Addr().String())
	n := func(full int) string { return strconv.Itoa(full / short.Of(1, 10)) }
	for _, args := range [][]string{
		{"-t", "set,get,incr,lpush,rpop,sadd,hset,zadd,lrange_100,mset", "-n", n(2000), "-c", "50"},
		{"-t", "set,get", "-n", n(20_000), "-c", "1000"},
		{"-t", "set,get", "-n", n(20_000), "-c", "50", "-P", "16"},
		{"-t", "get", "-n", n(2000), "-c", "20", "-d", "100000", "--threads", "2"},
		{"-t", "set", "-n", n(2000), "-c", "20", "-3"},
	} {
		out := run(t, "redis-benchmark", append([]string{"-h", "127.0.0.1", "-p", port, "-q"}, args...)...)
		require.NotContains(t, out, "Error")
		require.Contains(t, out, "requests per second", "%v", args)
	}
	st := g.Status()
	require.LessOrEqual(t, st.Pool.PeakOpen, 8)
	require.Greater(t, st.Requests, short.Of[uint64](80_000, 8_000))
	for why, n := range st.Failures {
		require.Zero(t, n, why)
	}
	soon(t, "its clients have left", func() bool { return g.Status().Clients == 0 })
	require.LessOrEqual(t, received(t, r), 8+8+20, "8 for RESP2, 8 for RESP3, and those on which HELLO was tried by 20 at once")
}

func TestRedisCLIRunsThroughItUnchanged(t *testing.T) {
	g, _ := redisGateway(t, nil)
	_, port, _ := net.SplitHostPort(g.Addr().String())
	cli := func(args ...string) string {
		return strings.TrimSpace(run(t, "redis-cli", append([]string{"-h", "127.0.0.1", "-p", port}, args...)...))
	}
	require.Equal(t, "PONG", cli("PING"))
	require.Equal(t, "OK", cli("-n", "3", "SET", "k", "three"))
	require.Equal(t, "three", cli("-3", "-n", "3", "GET", "k"))
	require.Equal(t, "", cli("GET", "k"))
	require.Contains(t, cli("INFO", "server"), "redis_version")
	require.Contains(t, cli("COMMAND", "DOCS", "GET"), "Get the value of a key")
	require.Contains(t, cli("-a", "wrong", "PING"), "AUTH failed")
	require.Equal(t, "4", cli("EVAL", "return 4", "0"))
	require.Equal(t, "OK", cli("SET", "k", "zero"))
	require.Contains(t, cli("--bigkeys"), "Biggest string")
}
