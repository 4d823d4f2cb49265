package gateway

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

var metricLine = regexp.MustCompile(`^connpool_gateway_[a-z_]+(\{[a-z]+="[a-z_-]+"\})? [0-9.e+-]+$`)

func TestStatusIsServedAsMetricsAndAsJSON(t *testing.T) {
	_, to := serve(t, faultnet.Options{})
	for _, at := range []string{"tcp://127.0.0.1:0", "unix:" + filepath.Join(shortDir(t), "st")} {
		g := begin(t, Config{Framing: "line", To: to, StatusListen: at})
		g.call().token("x")
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
			a := g.StatusAddr()
			return net.Dial(a.Network(), a.String())
		}}
		get := func(host, path string) (int, string) {
			req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+host+path, nil)
			require.NoError(t, err)
			resp, err := transport.RoundTrip(req)
			require.NoError(t, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			return resp.StatusCode, string(body)
		}
		code, text := get("127.0.0.1", "/metrics")
		require.Equal(t, 200, code)
		values := make(map[string]string)
		typed := make(map[string]bool)
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
				name, _, _ = strings.Cut(name, " ")
				require.False(t, typed[name], "one TYPE for each metric")
				typed[name] = true
			}
			if strings.HasPrefix(line, "#") {
				continue
			}
			require.Regexp(t, metricLine, line)
			name, value, _ := strings.Cut(line, " ")
			base, _, _ := strings.Cut(name, "{")
			require.True(t, typed[base], "%s has no TYPE", base)
			values[name] = value
		}
		require.Equal(t, "1", values["connpool_gateway_clients"])
		require.Equal(t, "1", values["connpool_gateway_requests_total"])
		require.Equal(t, "1", values[`connpool_gateway_upstream_connections{state="idle"}`])
		require.Equal(t, "0", values[`connpool_gateway_failures_total{reason="lost"}`])
		require.Equal(t, "2", values["connpool_gateway_client_bytes_in_total"])

		code, text = get("localhost", "/status.json")
		require.Equal(t, 200, code)
		var st Status
		require.NoError(t, json.Unmarshal([]byte(text), &st))
		require.Equal(t, "line", st.Framing)
		require.Equal(t, 1, st.Pool.Open)
		require.Equal(t, uint64(1), st.Replies)
		require.Contains(t, text, `"lost": 0`)

		code, _ = get("127.0.0.1", "/other")
		require.Equal(t, 404, code)
		if strings.HasPrefix(at, "tcp") {
			code, _ = get("rebound.example", "/metrics")
			require.Equal(t, 403, code, "a web page that had its name point here gets nothing")
		}
		g.end()
		require.NoError(t, g.wait())
		_, err := net.Dial(g.StatusAddr().Network(), g.StatusAddr().String())
		require.Error(t, err)
	}
}
