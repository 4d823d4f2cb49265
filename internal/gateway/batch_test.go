package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// longPipeline is how many bytes a client writes before it reads.
func longPipeline() int {
	if stress {
		return 64 << 20
	}
	return short.Of(24<<20, 8<<20)
}

// TRY-33
func TestAPipelineThatIsWrittenBeforeAnyReplyIsReadIsServed(t *testing.T) {
	atOnce(t)
	value := strings.Repeat("x", 1000)
	echo := func(p *faultnet.Peer) { io.Copy(p, p) }
	command := func(args ...string) string {
		parts := make([][]byte, len(args))
		for i, a := range args {
			parts[i] = []byte(a)
		}
		return string(appendCommand(nil, parts...))
	}
	for name, c := range map[string]struct {
		cfg           Config
		handler       func(*faultnet.Peer)
		first, answer string // sent before the pipeline
		one, reply    string
		network       string
	}{
		"line":           {cfg: Config{Framing: "line"}, handler: echo, one: value + "\n", reply: value + "\n"},
		"line over unix": {cfg: Config{Framing: "line"}, handler: echo, one: value + "\n", reply: value + "\n", network: "unix"},
		"length":         {cfg: Config{Framing: "length", Length: LengthField{Size: 2}}, handler: echo, one: "\x03\xe8" + value, reply: "\x03\xe8" + value},
		"resp":           {cfg: Config{Framing: "resp"}, one: command("ECHO", value), reply: bulk(value)},
		// Not over TCP: many small replies fill the memory of the client's receive buffer
		// before its window. Linux then drops arriving segments, also the one that says
		// that the gateway reads again. Both kernels then wait for ever.
		"resp, a transaction": {cfg: Config{Framing: "resp"}, first: command("MULTI"), answer: "+OK\r\n",
			one: command("PING"), reply: "+QUEUED\r\n", network: "unix"},
		"resp, with tracking": {cfg: Config{Framing: "resp"}, first: command("CLIENT", "NO-EVICT", "ON"), answer: "+OK\r\n",
			one: command("ECHO", value), reply: bulk(value)},
		"resp, and nothing counted": {cfg: Config{Framing: "resp"}, first: command("WATCH", "k") + command("SELECT", "1"), answer: "+OK\r\n+OK\r\n",
			one: command("ECHO", value), reply: bulk(value)},
	} {
		t.Run(name, func(t *testing.T) {
			atOnce(t)
			cfg := c.cfg
			if c.handler != nil {
				_, cfg.To = serve(t, faultnet.Options{Handler: c.handler})
			} else {
				cfg.To = startRedis(t).addr()
			}
			if c.network == "unix" {
				cfg.Listen = "unix:" + shortDir(t) + "/s"
			}
			g := begin(t, cfg)
			cl := g.call()
			if tc, ok := cl.Conn.(*net.TCPConn); ok {
				tc.SetReadBuffer(64 << 10)
				tc.SetWriteBuffer(64 << 10)
			}
			cl.SetDeadline(time.Now().Add(3 * forever))
			cl.say("%s", c.first)
			got := make([]byte, len(c.answer))
			_, err := io.ReadFull(cl, got)
			require.NoError(t, err)
			require.Equal(t, c.answer, string(got))
			size := longPipeline()
			if len(c.one) < 100 { // of small commands there are enough anyway
				size /= 8
			}
			n := size / len(c.one)
			block := strings.Repeat(c.one, 64)
			for range n / 64 {
				_, err := io.WriteString(cl, block)
				require.NoError(t, err, "all of it is taken although nothing is read")
			}
			reply, all := []byte(c.reply), bufio.NewReaderSize(cl.Conn, 1<<16)
			one := make([]byte, len(reply))
			for i := range n / 64 * 64 {
				_, err := io.ReadFull(all, one)
				require.NoError(t, err, "reply %d", i)
				require.True(t, bytes.Equal(reply, one), "reply %d is %q", i, one)
			}
			st := g.Status()
			require.Zero(t, st.Slow)
			require.Empty(t, nonZero(st.Failures), "no request failed")
		})
	}
}

func nonZero(m map[string]uint64) (list []string) {
	for k, n := range m {
		if n > 0 {
			list = append(list, fmt.Sprintf("%s=%d", k, n))
		}
	}
	return list
}

// TRY-33, TRY-39: requests for which there is no room get an error reply, which the
// client reads after it has written everything.
func TestAPipelineForWhichThereIsNoRoomIsRefusedInWords(t *testing.T) {
	t.Parallel()
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	g := begin(t, Config{Framing: "line", To: to, MaxMemory: 1 << 20, MaxFrame: 64 << 10, ErrorReply: "ERR\n"})
	c := g.call()
	line := strings.Repeat("x", 1000) + "\n"
	block := strings.Repeat(line, 1000)
	for range 24 {
		_, err := io.WriteString(c, block)
		require.NoError(t, err)
	}
	all, err := io.ReadAll(c.r)
	require.NoError(t, err, "it is no reset")
	replies := strings.TrimSuffix(string(all), "ERR\n")
	require.Len(t, all, len(replies)+4, "the last word says why")
	require.NotEmpty(t, replies)
	require.Empty(t, strings.ReplaceAll(replies, line, ""), "and before it there are whole replies")
	soon(t, "it is counted", func() bool { return g.Status().Failures["no-memory"] == 1 })
	require.LessOrEqual(t, g.Status().Memory, int64(1<<20))
}

// TRY-39
func TestALargeValueIsRefusedInWordsAndNotByAReset(t *testing.T) {
	const size = 48 << 20 // more than all buffers between the two hold
	for name, c := range map[string]struct {
		cfg         Config
		head, words string
	}{
		"resp":         {Config{Framing: "resp", MaxFrame: 1 << 20}, fmt.Sprintf("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n", size), "-ERR Protocol error: the request is longer than the gateway passes on\r\n"},
		"resp, inline": {Config{Framing: "resp"}, "SET k ", "-ERR Protocol error: too big inline request\r\n"},
		"resp, pinned": {Config{Framing: "resp", MaxFrame: 1 << 20}, fmt.Sprintf("*2\r\n$5\r\nWATCH\r\n$1\r\nk\r\n*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n", size), "+OK\r\n-ERR Protocol error: the request is longer than the gateway passes on\r\n"},
		"resp, no room": {Config{Framing: "resp", MaxFrame: 64 << 20, MaxMemory: 2 << 20}, fmt.Sprintf("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n", size),
			"-ERR gateway: there is no room for the request\r\n"},
		"line":                  {Config{Framing: "line", MaxFrame: 1 << 20, ErrorReply: "ERR\n"}, "SET ", "ERR\n"},
		"line, without a word":  {Config{Framing: "line", MaxFrame: 1 << 20}, "SET ", ""},
		"length":                {Config{Framing: "length", Length: LengthField{Size: 4}, MaxFrame: 1 << 20, ErrorReply: "\x00\x00\x00\x03ERR"}, "\x03\x00\x00\x00", "\x00\x00\x00\x03ERR"},
		"modbus has no word it": {Config{Framing: "modbus"}, "\x00\x01\x00\x00\xff\xff", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			var say atomic.Pointer[string]
			ok := "+OK\r\n"
			say.Store(&ok)
			_, to := serve(t, faultnet.Options{Handler: replica(&say, &asked)})
			c.cfg.To = to
			g := begin(t, c.cfg)
			cl := g.call()
			cl.say("%s", c.head)
			block := make([]byte, 1<<20)
			for i := range block {
				block[i] = 'x'
			}
			for range size >> 20 {
				_, err := cl.Write(block)
				require.NoError(t, err, "it is read to the end")
			}
			got, err := io.ReadAll(cl.r)
			require.NoError(t, err)
			require.Equal(t, c.words, string(got))
			require.Zero(t, asked.Load(), "nothing of it was carried out")
		})
	}
}

// TRY-33
func TestTheLastLineNeedsNoEndAndHalfAFrameIsCounted(t *testing.T) {
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	ask := func(g *running, what string) string {
		c := g.call()
		c.say("%s", what)
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		all, err := io.ReadAll(c.r)
		require.NoError(t, err)
		return string(all)
	}
	g := begin(t, Config{Framing: "line", To: to})
	require.Equal(t, "one\ntwo\n", ask(g, "one\ntwo"))
	require.Equal(t, "one\ntwo\n", ask(g, "one\ntwo\n"))
	require.Equal(t, "two\n", ask(g, "two"))
	require.Equal(t, "", ask(g, ""))
	require.EqualValues(t, 5, g.Status().Requests)
	require.Zero(t, g.Status().BadFrames)

	// A line that was cut off by a reset is not a request.
	c := g.call()
	c.say("cut")
	soon(t, "it was read", func() bool { return g.Status().Clients == 1 && g.Status().BytesIn >= 7+8+3+3 })
	c.leave(true)
	soon(t, "it is gone", func() bool { return g.Status().Clients == 0 })
	require.EqualValues(t, 5, g.Status().Requests)

	for name, half := range map[string]struct {
		cfg  Config
		sent string
		want string
	}{
		"length":            {Config{Framing: "length", Length: LengthField{Size: 1}}, "\x05ab", ""},
		"length, in words":  {Config{Framing: "length", Length: LengthField{Size: 1}, ErrorReply: "\x03ERR"}, "\x01a\x05ab", "\x01a\x03ERR"},
		"resp":              {Config{Framing: "resp"}, "*1\r\n$4\r\nPI", ""},
		"resp, a command":   {Config{Framing: "resp"}, "PI", ""},
		"modbus":            {Config{Framing: "modbus"}, "\x00\x01\x00", ""},
		"length, the field": {Config{Framing: "length", Length: LengthField{Size: 4}}, "\x00", ""},
	} {
		t.Run(name, func(t *testing.T) {
			half.cfg.To = to
			g := begin(t, half.cfg)
			require.Equal(t, half.want, ask(g, half.sent))
			soon(t, "it is counted", func() bool { return g.Status().BadFrames == 1 })
		})
	}
}

// TRY-39: while a store grows, both its old and its new buffer are counted.
func TestBothBuffersOfAGrowingStoreAreCounted(t *testing.T) {
	b := &budget{limit: 3 << 20}
	s := store{budget: b}
	require.NoError(t, s.append(make([]byte, 1<<20)))
	require.ErrorIs(t, s.append(make([]byte, 2<<20)), errNoMemory, "4 MiB beside 1")
	require.NoError(t, s.append(make([]byte, 1<<20)), "2 MiB beside 1")
	require.LessOrEqual(t, b.held.Load(), int64(2<<20))
	s.release()
	require.Zero(t, b.held.Load())
}
