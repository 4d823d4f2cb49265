package gateway

import (
	"bufio"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// BenchmarkExchange is one request and its reply, by one client after the other, compared
// with the same without a gateway.
func BenchmarkExchange(b *testing.B) {
	_, to := serve(b, faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }})
	run := func(b *testing.B, addr string) {
		nc, err := net.Dial("tcp", addr)
		require.NoError(b, err)
		defer nc.Close()
		r := bufio.NewReader(nc)
		request := []byte("*2\r\n$4\r\nECHO\r\n$5\r\nhello\r\n")
		reply := make([]byte, len(request))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := nc.Write(request); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(r, reply); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("direct", func(b *testing.B) { run(b, to[len("tcp://"):]) })
	b.Run("gateway", func(b *testing.B) {
		g := begin(b, Config{Framing: "resp", To: to})
		run(b, g.Addr().String())
	})
}
