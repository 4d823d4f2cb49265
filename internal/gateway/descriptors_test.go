package gateway

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// TRY-17
func TestClientsGetTheDescriptorsThatTheServerSideCannotUse(t *testing.T) {
	for _, c := range []struct{ limit, server, status, least, most int }{
		{64, 16, 0, 20, 40},
		{64, 16, statusClients, 12, 32},
		{1024, 16, statusClients, 900, 1000},
		{1 << 20, 16, 0, 900_000, 1 << 20},
		{30, 16, 0, -100, 0},
	} {
		d := descriptors{limit: c.limit, server: c.server, status: c.status, reserve: ownDescriptors + max(10, c.limit/16)}
		n := d.clients()
		require.GreaterOrEqual(t, n, c.least)
		require.LessOrEqual(t, n, c.most)
		require.LessOrEqual(t, n+c.server+c.status+max(10, c.limit/16), c.limit, "the pool still sees some free")
	}
	require.Greater(t, descriptors{server: 16}.clients(), 1<<30, "without a limit there is none")
	p := &plan{Config: Config{MaxOpen: 1 << 30, MaxClients: 5}}
	if descriptorLimit() > 0 {
		require.ErrorContains(t, p.fit(), "ulimit -n")
	}
}

// starved is a listener that at first has no descriptor left.
type starved struct {
	net.Listener
	fails atomic.Int32
}

func (s *starved) Accept() (net.Conn, error) {
	if s.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return s.Listener.Accept()
}

// TRY-17
func TestAClientForWhomThereIsNoDescriptorIsToldSo(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	g, err := New(Config{Framing: "resp", To: to, Listen: "127.0.0.1:0"})
	require.NoError(t, err)
	require.NoError(t, g.Listen())
	lack := &starved{Listener: g.listener.Listener}
	lack.fails.Store(1)
	g.listener.Listener = lack
	r := &running{t: t, Gateway: g, log: new(logged), ended: make(chan error, 1)}
	done := make(chan struct{})
	go func() { defer close(done); g.accept(t.Context()) }()
	c := r.call()
	require.Equal(t, "-ERR max number of clients reached\r", c.hear())
	c.hearEnd()
	second := r.call()
	soon(t, "with a descriptor one is let in", func() bool { return g.Status().Clients == 1 })
	require.EqualValues(t, 1, g.Status().AcceptErr)
	second.Close()
	soon(t, "it has left", func() bool { return g.Status().Clients == 0 })
	require.NoError(t, g.Close())
	<-done
}

// TRY-17
func TestOneClientTooManyIsToldSoUnderTLSToo(t *testing.T) {
	t.Parallel()
	ca := faultnet.NewCA()
	k := writeKeys(t, t.TempDir(), "k", ca.Server("127.0.0.1"))
	_, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "resp", To: to, MaxClients: 1, Listen: "tls://127.0.0.1:0", Server: ServerFiles{Cert: k.cert, Key: k.key}})
	g.clientCA = ca.Pool()
	first := g.call()
	soon(t, "it is in", func() bool { return g.Status().Clients == 1 })
	second := g.call()
	require.Equal(t, "-ERR max number of clients reached\r", second.hear())
	second.hearEnd()
	for range 3 * leavingClients { // the gateway does not wait for silent ones
		nc, err := net.Dial("tcp", g.Addr().String())
		require.NoError(t, err)
		defer nc.Close()
	}
	first.Close()
	g.end()
	require.NoError(t, g.wait())
}

// TRY-09, TRY-17: clients that connect to the status and stay silent have a few
// connections at most, keep nobody else out, and do not delay the end.
func TestSilentVisitorsOfTheStatusAreFew(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, StatusListen: "tcp://127.0.0.1:0"})
	var silent []net.Conn
	for range 10 * statusClients {
		nc, err := net.Dial("tcp", g.StatusAddr().String())
		require.NoError(t, err)
		defer nc.Close()
		silent = append(silent, nc)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + g.StatusAddr().String() + "/metrics")
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Body.Close()
	require.Contains(t, string(body), "connpool_gateway_log_lines_dropped_total 0")
	open := 0
	for i, nc := range silent {
		nc.SetReadDeadline(time.Now().Add(forever))
		if i >= len(silent)-statusClients {
			nc.SetReadDeadline(time.Now())
		}
		if _, err := nc.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			open++
		}
	}
	require.LessOrEqual(t, open, statusClients)
	g.end()
	require.NoError(t, g.wait())
}

func TestAVisitorWithARequestUnderWayIsNotPutOut(t *testing.T) {
	c := &crowd{most: 2}
	a, b, d := &visitor{}, &visitor{}, &visitor{}
	require.Nil(t, c.enter(a))
	require.Nil(t, c.enter(b))
	c.follow(a, http.StateActive)
	c.follow(b, http.StateActive)
	require.Equal(t, d, c.enter(d), "there is no room")
	c.follow(b, http.StateIdle)
	require.Equal(t, b, c.enter(d))
	c.follow(b, http.StateClosed)
	c.follow(a, http.StateClosed)
	require.Equal(t, []*visitor{d}, c.all)
}
