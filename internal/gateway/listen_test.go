package gateway

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// PLT-18
func TestItIsNeverOpenToANetworkByMistake(t *testing.T) {
	k := writeKeys(t, t.TempDir(), "k", faultnet.NewCA().Server("127.0.0.1"))
	for _, c := range []struct {
		listen            string
		one, two, withTLS bool
		refused           bool
	}{
		{listen: "tcp://127.0.0.1:0"},
		{listen: "127.0.0.1:0"},
		{listen: "tcp://localhost:0"},
		{listen: "tcp://[::1]:0"},
		{listen: "unix:" + filepath.Join(t.TempDir(), "s")},
		{listen: ":9000", refused: true},
		{listen: "tcp://:9000", refused: true},
		{listen: "tcp://0.0.0.0:9000", refused: true},
		{listen: "tcp://[::]:9000", refused: true},
		{listen: "tcp://192.0.2.1:9000", refused: true},
		{listen: "tcp://gateway.example:9000", refused: true},
		{listen: "tcp://127.0.0.1.example:9000", refused: true},
		{listen: ":9000", one: true, refused: true},
		{listen: ":9000", two: true, refused: true},
		{listen: ":9000", one: true, two: true},
		{listen: "tls://:9000", withTLS: true},
	} {
		cfg := Config{Listen: c.listen, To: "tcp://127.0.0.1:1", Framing: "line", InsecureListen: c.one, AnyoneCanConnect: c.two}
		if c.withTLS {
			cfg.Server = ServerFiles{Cert: k.cert, Key: k.key}
		}
		g, err := New(cfg)
		if c.refused {
			require.ErrorContains(t, err, "-listen", "%+v", c)
			require.ErrorContains(t, err, "-i-know-that-anyone-can-connect", "it says what to change")
			continue
		}
		require.NoError(t, err, "%+v", c)
		g.Close()
	}
	for _, status := range []string{":9100", "tcp://0.0.0.0:9100", "tls://127.0.0.1:9100", "tcp://status.example:9100"} {
		_, err := New(Config{Listen: "127.0.0.1:0", To: "tcp://127.0.0.1:1", Framing: "line", StatusListen: status,
			InsecureListen: true, AnyoneCanConnect: true})
		require.ErrorContains(t, err, "-status", "no flag opens the status to a network")
	}
}

func TestWhatItListensOnIsLoopbackOnly(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	g := begin(t, Config{Framing: "line", To: to, Listen: "tcp://localhost:0"})
	require.True(t, g.Addr().(*net.TCPAddr).IP.IsLoopback())
}

// TRY-31
func TestAZoneMayBeWrittenInBothWays(t *testing.T) {
	for text, want := range map[string]string{
		"tcp://[fe80::1%25eth0]:80": "[fe80::1%eth0]:80",
		"tcp://[fe80::1%eth0]:80":   "[fe80::1%eth0]:80",
		"[fe80::1%25eth0]:80":       "[fe80::1%eth0]:80",
		"tls://[fe80::1]:80":        "[fe80::1]:80",
	} {
		e, err := parseEndpoint(text)
		require.NoError(t, err)
		require.Equal(t, want, e.address, text)
	}
}

func TestAStaleSocketIsReplacedAndALiveOneIsLeftAlone(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	path := filepath.Join(shortDir(t), "s")
	dead, err := net.Listen("unix", path)
	require.NoError(t, err)
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	require.FileExists(t, path)

	cfg := Config{Framing: "line", To: to, Listen: "unix:" + path}
	g := begin(t, cfg)
	g.call().token("x")
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode().Perm())

	second, err := New(cfg)
	require.NoError(t, err)
	defer second.Close()
	require.ErrorContains(t, second.Listen(), "in use")
	g.call().token("y")

	file := filepath.Join(filepath.Dir(path), "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	third, err := New(Config{Framing: "line", To: to, Listen: "unix:" + file})
	require.NoError(t, err)
	defer third.Close()
	require.ErrorContains(t, third.Listen(), "no socket")
	content, _ := os.ReadFile(file)
	require.Equal(t, "precious", string(content))
}

// Of several gateways that find the same stale socket at the same moment one gets it, and
// the others do not remove it.
func TestOneOfManyGatewaysTakesAStaleSocket(t *testing.T) {
	for range short.Of(100, 20) { // a start that does not wait its turn is seen in some rounds only
		path := filepath.Join(shortDir(t), "s")
		dead, err := net.Listen("unix", path)
		require.NoError(t, err)
		dead.(*net.UnixListener).SetUnlinkOnClose(false)
		dead.Close()
		var mu sync.Mutex
		var won []net.Listener
		var wg tasks.Group
		for range 8 {
			wg.Go(func() {
				if l, err := listenUnix(t.Context(), path, 0o600, func(string) {}); err == nil {
					mu.Lock()
					won = append(won, l)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		require.Len(t, won, 1)
		nc, err := net.Dial("unix", path)
		require.NoError(t, err, "and it can be reached")
		nc.Close()
		won[0].Close()
	}
}

func TestEveryMistakeInTheConfigIsNamedAtOnce(t *testing.T) {
	_, err := New(Config{})
	require.ErrorContains(t, err, "-listen")
	require.ErrorContains(t, err, "-to is missing")
	require.ErrorContains(t, err, "-framing is missing")
	good := Config{Listen: "127.0.0.1:0", To: "tcp://127.0.0.1:1", Framing: "line"}
	for want, spoil := range map[string]func(*Config){
		"-framing is":            func(c *Config) { c.Framing = "lines" },
		"-length-bytes":          func(c *Config) { c.Framing = "length" },
		"-length-offset":         func(c *Config) { c.Framing, c.Length = "length", LengthField{Size: 1, Offset: 65} },
		"-max-clients":           func(c *Config) { c.MaxClients = -1 },
		"-max-open":              func(c *Config) { c.MaxOpen = -1 },
		"-max-pinned":            func(c *Config) { c.MaxPinned, c.MaxOpen = 5, 4 },
		"-max-frame":             func(c *Config) { c.MaxFrame = 1<<30 + 1 },
		"-max-memory":            func(c *Config) { c.MaxMemory = 5 },
		"-pipeline":              func(c *Config) { c.Framing, c.Pipeline = "modbus", 2 },
		"-request-timeout":       func(c *Config) { c.RequestTimeout = -1 },
		"-socket-mode":           func(c *Config) { c.SocketMode = 0o1777 },
		"-error-reply":           func(c *Config) { c.ErrorReply = "ERR" },
		"-eager":                 func(c *Config) { c.Eager = true },
		"-listen is tls":         func(c *Config) { c.Listen = "tls://127.0.0.1:0" },
		"-cert":                  func(c *Config) { c.Server.Cert = "x" },
		"-ca":                    func(c *Config) { c.Upstream.CA = "x" },
		"-upstream-key":          func(c *Config) { c.To, c.Upstream.Cert = "tls://127.0.0.1:1", "x" },
		"-server-name":           func(c *Config) { c.To, c.Upstream.ServerName = "tls://127.0.0.1:1?server-name=a", "b" },
		"no such file":           func(c *Config) { c.To, c.Upstream.CA = "tls://127.0.0.1:1", "/nonexistent" },
		"scope":                  func(c *Config) { c.To = "tcp://127.0.0.1:1?scope=x" },
		"reaches tcp, tls":       func(c *Config) { c.To = "quic://127.0.0.1:1" },
		"begins with http":       func(c *Config) { c.Listen = "http://127.0.0.1:1" },
		"no path":                func(c *Config) { c.Listen = "unix:" },
		"107":                    func(c *Config) { c.Listen = "unix:/" + strings.Repeat("x", 107) },
		"no host:port":           func(c *Config) { c.Listen = "127.0.0.1" },
		"no port":                func(c *Config) { c.Listen = "127.0.0.1:nosuchport" },
		"one whole frame":        func(c *Config) { c.Framing, c.Length.Size, c.ErrorReply = "length", 1, "\x05ERR" },
		"use line, length, resp": func(c *Config) { c.Framing = "x" },
	} {
		cfg := good
		spoil(&cfg)
		g, err := New(cfg)
		if err == nil {
			g.Close()
		}
		require.ErrorContains(t, err, want)
	}
}
