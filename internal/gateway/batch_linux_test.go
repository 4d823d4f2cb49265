package gateway

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// smallServer answers each line with a long one, and reads the next line only after it
// has written all of the answer. Its sockets have small buffers.
func smallServer(t *testing.T, receive, send, reply int) string {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			if receive > 0 {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, receive)
			}
			if send > 0 {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, send)
			}
		})
	}}
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	answer := strings.Repeat("r", reply) + "\n"
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { nc.Close() })
			go func() {
				r := bufio.NewReaderSize(nc, 16)
				for {
					switch _, err := r.ReadSlice('\n'); err {
					case bufio.ErrBufferFull:
					case nil:
						if _, err := io.WriteString(nc, answer); err != nil {
							return
						}
					default:
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// TRY-33
func TestBatchesPassWhateverTheBuffers(t *testing.T) {
	atOnce(t)
	for _, c := range []struct {
		receive, send int
		options       string
	}{
		{0, 0, ""},
		{2304, 4608, ""},
		{0, 0, "?send-buffer=4608&recv-buffer=2304"},
		{2304, 4608, "?send-buffer=4608"},
		{2304, 4608, "?send-buffer=4608&recv-buffer=2304"},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			const reply = 30_000
			to := smallServer(t, c.receive, c.send, reply)
			g := begin(t, Config{Framing: "line", To: "tcp://" + to + c.options, MaxOpen: 1, RequestTimeout: 10 * time.Second})
			cl := g.call()
			cl.say("%s\n", strings.Repeat("q", 15_000)) // leaves room for a batch of the largest size
			require.Len(t, cl.hear(), reply)
			const many = 30
			go io.WriteString(cl, strings.Repeat(strings.Repeat("q", 500)+"\n", many))
			for range many {
				require.Len(t, cl.hear(), reply)
			}
			require.Empty(t, nonZero(g.Status().Failures))
		})
	}
}
