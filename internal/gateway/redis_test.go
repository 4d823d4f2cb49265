package gateway

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// redis is a redis-server of the distribution that a test starts on loopback.
type redis struct {
	dir  string
	port int
	cmd  *exec.Cmd
	left chan struct{} // closed when the process is gone
	more []string      // arguments

	asked atomic.Int64 // connections of the test itself
}

// own is how many connections the test itself has made.
func (r *redis) own() int { return int(r.asked.Load()) }

func (r *redis) dial() (net.Conn, error) {
	nc, err := net.Dial("tcp", r.host())
	if err == nil {
		r.asked.Add(1)
	}
	return nc, err
}

func startRedis(t testing.TB, more ...string) *redis {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("there is no redis-server on this machine: install the package redis-server")
	}
	r := &redis{dir: shortDir(t), more: more}
	t.Cleanup(func() { r.kill(t) })
	// Another test may take a port that is free now before the server binds it.
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		r.port = l.Addr().(*net.TCPAddr).Port
		l.Close()
		if r.begin(t) {
			return r
		}
	}
	log, _ := os.ReadFile(filepath.Join(r.dir, "log"))
	require.FailNow(t, "redis-server ends at once", "%s", log)
	return nil
}

func (r *redis) addr() string   { return "tcp://" + r.host() }
func (r *redis) host() string   { return "127.0.0.1:" + strconv.Itoa(r.port) }
func (r *redis) socket() string { return filepath.Join(r.dir, "s") }

// start starts the server again, on the port that it had.
func (r *redis) start(t testing.TB) {
	t.Helper()
	soon(t, "redis-server begins on its port", func() bool { return r.begin(t) })
}

// begin reports whether the server answers. If not, its process is gone.
func (r *redis) begin(t testing.TB) bool {
	t.Helper()
	r.cmd = exec.Command("redis-server", append([]string{"--bind", "127.0.0.1", "--port", strconv.Itoa(r.port), "--unixsocket", r.socket(),
		"--dir", r.dir, "--save", "", "--appendonly", "no", "--loglevel", "warning", "--enable-debug-command", "yes"}, r.more...)...)
	r.cmd.SysProcAttr = dieWithParent()
	log, err := os.Create(filepath.Join(r.dir, "log"))
	require.NoError(t, err)
	defer log.Close()
	r.cmd.Stdout, r.cmd.Stderr = log, log
	started := make(chan error)
	cmd, left := r.cmd, make(chan struct{})
	r.left = left
	go func() {
		// The signal of dieWithParent comes when this thread ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(left)
	}()
	require.NoError(t, <-started)
	// The server listens on its socket after it has bound its port. Another server may
	// answer on the port, none on the socket.
	up, gone := false, false
	soon(t, "redis-server answers", func() bool {
		select {
		case <-left:
			gone = true
		default:
			up = r.answers()
		}
		return up || gone
	})
	return up
}

func (r *redis) answers() bool {
	nc, err := net.Dial("unix", r.socket())
	if err != nil {
		return false
	}
	defer nc.Close()
	r.asked.Add(1)
	nc.SetDeadline(time.Now().Add(forever))
	io.WriteString(nc, "PING\r\n")
	line, _ := bufio.NewReader(nc).ReadString('\n')
	return strings.HasPrefix(line, "+PONG") || strings.HasPrefix(line, "-NOAUTH")
}

func (r *redis) kill(t testing.TB) {
	t.Helper()
	if r.cmd == nil || r.cmd.Process == nil { // not started
		return
	}
	r.cmd.Process.Kill()
	<-r.left
}

// do asks the server directly.
func (r *redis) do(t testing.TB, args ...string) string {
	t.Helper()
	nc, err := r.dial()
	require.NoError(t, err)
	defer nc.Close()
	return (&caller{nc, t, bufio.NewReader(nc)}).do(args...)
}

// fakeRedis answers every command with its own words, as an array.
func fakeRedis(t testing.TB) (*running, *faultnet.Server) {
	t.Helper()
	srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		in := frames{r: p, sc: &respRequests{max: 1 << 20}, max: 1 << 20}
		for {
			frame, ok, err := in.take()
			if err != nil {
				return
			}
			if !ok {
				if in.fill() != nil {
					return
				}
				continue
			}
			if _, err := p.Write(frame); err != nil {
				return
			}
		}
	}})
	return begin(t, Config{Framing: "resp", To: to, MaxFrame: 1 << 20}), srv
}

func mustJSON(t testing.TB, g *running) []byte {
	t.Helper()
	b, err := json.Marshal(g.Status())
	require.NoError(t, err)
	return b
}
