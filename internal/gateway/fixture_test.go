package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/race"
)

func TestMain(m *testing.M) {
	// The parallel tests wait for time-outs, or to see that nothing comes; there may be
	// more of them than processors. Under the race detector they work, too.
	flag.Set("test.parallel", "32")
	if race.Enabled {
		flag.Set("test.parallel", "4")
	}
	goleak.VerifyTestMain(m)
}

// atOnce lets a test that works, rather than waits, run beside others in a brief run. In a full
// run the test would make the others late.
func atOnce(t *testing.T) {
	if testing.Short() && !race.Enabled {
		t.Parallel()
	}
}

// forever is longer than any step here takes; a wait that long means a hang.
const forever = time.Minute

var stress = os.Getenv("CONNPOOL_STRESS") != ""

// logged is a gateway's log; it is shown if the test fails.
type logged struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is a gateway that serves until the end of the test.
type running struct {
	*Gateway
	t        testing.TB
	log      *logged
	clientCA *x509.CertPool // of the authority that a TLS client trusts

	end, hasten context.CancelFunc
	ended       chan error
}

// begin starts a gateway. When the gateway ends, at the end of the test at the latest, it
// must leave nothing behind.
func begin(t testing.TB, cfg Config) *running {
	t.Helper()
	r := &running{t: t, log: new(logged), ended: make(chan error, 1)}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if cfg.Listen == "" {
		cfg.Listen = "tcp://127.0.0.1:0"
	}
	if cfg.GreetingWait == 0 { // most servers here are silent at first, and answer at once
		cfg.GreetingWait = 6 * time.Millisecond
	}
	g, err := New(cfg)
	require.NoError(t, err)
	r.Gateway = g
	require.NoError(t, g.Listen())
	ctx, end := context.WithCancel(context.Background())
	hurry, hasten := context.WithCancel(context.Background())
	r.end, r.hasten = end, hasten
	go func() { r.ended <- g.Serve(ctx, hurry) }()
	t.Cleanup(func() {
		end()
		hasten()
		r.wait()
		if t.Failed() {
			log := r.log.String()
			t.Logf("the gateway said:\n%s", log[max(0, len(log)-4000):])
		}
	})
	return r
}

// wait returns what Serve returned, once it has.
func (r *running) wait() error {
	r.t.Helper()
	select {
	case err := <-r.ended:
		r.ended <- err
		st := r.Status()
		require.Zero(r.t, st.Clients, "clients are left")
		require.Zero(r.t, st.Pool.Open, "connections are left: %v", st.Pool)
		require.Zero(r.t, st.Memory, "bytes are held for nobody")
		require.Zero(r.t, st.Pinned)
		if a, ok := r.Addr().(*net.UnixAddr); ok && !strings.HasPrefix(a.Name, "@") {
			require.NoFileExists(r.t, a.Name, "the socket is left")
		}
		return err
	case <-time.After(forever):
		buf := make([]byte, 1<<20)
		r.t.Fatalf("the gateway does not end\n%s", buf[:runtime.Stack(buf, true)])
		return nil
	}
}

// caller is a client of a gateway.
type caller struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func (r *running) call() *caller {
	r.t.Helper()
	c, err := r.dial()
	require.NoError(r.t, err)
	return c
}

// dial connects as any client would, knowing only the address.
func (r *running) dial() (*caller, error) {
	a := r.Addr()
	var nc net.Conn
	var err error
	if r.listen.tls {
		nc, err = tls.Dial(a.Network(), a.String(), &tls.Config{RootCAs: r.clientCA, ServerName: "127.0.0.1"})
	} else {
		nc, err = net.Dial(a.Network(), a.String())
	}
	if err != nil {
		return nil, err
	}
	r.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(forever))
	return &caller{nc, r.t, bufio.NewReader(nc)}, nil
}

func (c *caller) say(format string, args ...any) {
	c.t.Helper()
	_, err := fmt.Fprintf(c, format, args...)
	require.NoError(c.t, err)
}

func (c *caller) hear() string {
	c.t.Helper()
	line, err := c.r.ReadString('\n')
	require.NoError(c.t, err, "after %q", line)
	return strings.TrimSuffix(line, "\n")
}

// hearEnd requires that nothing more comes.
func (c *caller) hearEnd() {
	c.t.Helper()
	rest, _ := io.ReadAll(c.r)
	require.Empty(c.t, string(rest))
}

// token exchanges one line with a faultnet.Tokens server.
func (c *caller) token(token string) (serial, seq int) {
	c.t.Helper()
	c.say("%s\n", token)
	var echo string
	line := c.hear()
	_, err := fmt.Sscanf(line, "%d %d %s", &serial, &seq, &echo)
	require.NoError(c.t, err, line)
	require.Equal(c.t, token, echo)
	return serial, seq
}

// serve starts a server and returns it with its address.
func serve(t testing.TB, o faultnet.Options) (*faultnet.Server, string) {
	t.Helper()
	srv, err := faultnet.Start(o)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	addr := connpool.Addr{Transport: connpool.Transport(o.Network), Host: srv.Host(), Port: srv.Port()}
	if o.Network == "" {
		addr.Transport = connpool.TCP
	}
	return srv, addr.String()
}

// soon waits for an event that has no signal.
func soon(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(forever); !done(); <-tick.C {
		if time.Now().After(deadline) {
			require.FailNow(t, "this did not happen: "+what)
		}
	}
}

// keys are the PEM files of one certificate.
type keys struct{ cert, key, ca string }

func writeKeys(t testing.TB, dir, name string, c tls.Certificate) keys {
	t.Helper()
	k := keys{filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"), filepath.Join(dir, name+".ca")}
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	require.NoError(t, err)
	for file, block := range map[string]*pem.Block{
		k.cert: {Type: "CERTIFICATE", Bytes: c.Certificate[0]},
		k.key:  {Type: "PRIVATE KEY", Bytes: der},
		k.ca:   {Type: "CERTIFICATE", Bytes: c.Certificate[1]},
	} {
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
	}
	return k
}

// shortDir returns a directory whose name is short enough for the path of a socket in it.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "gw")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
