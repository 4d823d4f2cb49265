package gateway

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
)

// TRY-39
func TestItIsNotItsOwnServerUnderAnySpelling(t *testing.T) {
	dir := shortDir(t)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
	require.NoError(t, os.Symlink(filepath.Join(dir, "d"), filepath.Join(dir, "link")))
	work, err := os.Getwd()
	require.NoError(t, err)
	relative, err := filepath.Rel(work, filepath.Join(dir, "d", "s"))
	require.NoError(t, err)
	for _, c := range []struct {
		listen, to string
		same       bool
	}{
		{"tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000", true},
		{"127.0.0.1:7000", "tcp://localhost:7000", true},
		{"tcp://localhost:7000", "tcp://127.0.0.1:7000", true},
		{"tcp://localhost:7000", "tcp://LOCALHOST.:7000", true},
		{"tcp://[::1]:7000", "tcp://[0:0:0:0:0:0:0:1]:7000", true},
		{"tcp://[::1%25lo]:7000", "tcp://[::1]:7000", true},
		{"tcp://[::ffff:127.0.0.1]:7000", "tcp://127.0.0.1:7000", true},
		{"tcp://0.0.0.0:7000", "tcp://127.0.0.1:7000", true},
		{":7000", "tcp://localhost:7000", true},
		{":7000", "tcp://127.0.0.9:7000", true},
		{"tcp://[::]:7000", "tcp://[::1]:7000", true},
		{"tcp://127.0.0.1:7000", "tcp://0.0.0.0:7000", true},
		{"tcp://127.0.0.1:http", "tcp://127.0.0.1:80", true},
		{"tcp://127.0.0.1:7000", "tls://127.0.0.1:7000", true},
		{"unix:" + dir + "/d/s", "unix:" + dir + "/d/s", true},
		{"unix:" + dir + "/d/s", "unix:" + dir + "/link/s", true},
		{"unix:" + dir + "/d/../d//s", "unix:" + dir + "/d/s", true},
		{"unix:" + relative, "unix:" + dir + "/d/s", true},
		{"unix:@x", "unix:@x", true},

		{"tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001", false},
		{"tcp://127.0.0.1:7000", "tcp://127.0.0.2:7000", false},
		{"tcp://127.0.0.1:0", "tcp://127.0.0.1:7000", false},
		{":7000", "tcp://192.0.2.1:7000", false},
		{"tcp://127.0.0.1:7000", "tcp://[::1]:7000", false},
		{"unix:" + dir + "/d/s", "unix:" + dir + "/d/t", false},
		{"unix:@x", "unix:@y", false},
		{"tcp://127.0.0.1:7000", "unix:" + dir + "/d/s", false},
	} {
		if runtime.GOOS != "linux" && (c.to == "unix:@x" || c.to == "unix:@y") {
			continue
		}
		cfg := Config{Framing: "line", Listen: c.listen, To: c.to, InsecureListen: true, AnyoneCanConnect: true}
		g, err := New(cfg)
		if err == nil {
			g.Close()
		}
		if c.same {
			require.ErrorContains(t, err, "same address", "%+v", c)
		} else {
			require.NoError(t, err, "%+v", c)
		}
	}
	own, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range own {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil {
			_, err := New(Config{Framing: "line", Listen: ":7000", To: fmt.Sprintf("tcp://%v:7000", ip.IP), InsecureListen: true, AnyoneCanConnect: true})
			require.ErrorContains(t, err, "same address", "an address of this machine")
		}
	}
	_, err = New(Config{Framing: "line", Listen: "127.0.0.1:7000", To: "tcp://127.0.0.1:7001", StatusListen: "127.0.0.1:7001"})
	require.ErrorContains(t, err, "-status")
}

// TRY-39: the port that is found for port 0 may be the port in -to, which was free when
// -to was written.
func TestAFoundPortIsNotThatOfTheServer(t *testing.T) {
	g, err := New(Config{Framing: "line", Listen: "127.0.0.1:0", To: "tcp://127.0.0.1:1"})
	require.NoError(t, err)
	defer g.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	g.listen.address, g.to = l.Addr().String(), connpool.Addr{Transport: connpool.TCP, Host: "127.0.0.1", Port: uint16(port)}
	require.ErrorContains(t, g.ListenContext(context.Background()), "same address")
}
