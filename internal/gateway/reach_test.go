package gateway

import (
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// saying is a server that sends words after a while, and then answers requests.
func saying(after time.Duration, words string) func(*faultnet.Peer) {
	return func(p *faultnet.Peer) {
		time.Sleep(after)
		io.WriteString(p, words)
		io.Copy(io.Discard, p)
	}
}

func answering(words string) func(*faultnet.Peer) {
	return func(p *faultnet.Peer) {
		b := make([]byte, 100)
		for {
			if _, err := p.Read(b); err != nil {
				return
			}
			io.WriteString(p, words)
		}
	}
}

// TRY-29
func TestReachSaysYesOnlyIfARequestWouldWork(t *testing.T) {
	t.Parallel()
	require.NotContains(t, tlsHello, "\n", "it is no line")
	require.Len(t, tlsHello, 5+0x45)
	dir, ca := t.TempDir(), faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	k := writeKeys(t, dir, "server", cert)
	withTLS := faultnet.Options{Network: "tls", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
	_, secret := serve(t, withTLS)
	for name, c := range map[string]struct {
		framing string
		serve   faultnet.Options
		to      string
		says    string // "": the server answers
	}{
		"a good one":                 {framing: "line"},
		"a good one, length":         {framing: "length"},
		"a good one, modbus":         {framing: "modbus"},
		"a good one, session":        {framing: "session"},
		"a good one, tls":            {framing: "line", to: secret},
		"an echo":                    {framing: "line", serve: faultnet.Options{Handler: func(p *faultnet.Peer) { io.Copy(p, p) }}},
		"redis":                      {framing: "resp", serve: faultnet.Options{Handler: answering("+PONG\r\n")}},
		"redis with a password":      {framing: "resp", serve: faultnet.Options{Handler: answering("-NOAUTH Authentication required.\r\n")}},
		"hangs up":                   {framing: "line", serve: faultnet.Options{Handler: func(*faultnet.Peer) {}}, says: "ends them at once"},
		"hangs up, session":          {framing: "session", serve: faultnet.Options{Handler: func(*faultnet.Peer) {}}, says: "ends them at once"},
		"greets":                     {framing: "line", serve: faultnet.Options{Handler: saying(0, "220 hello\r\n")}, says: "speaks first"},
		"greets late":                {framing: "line", serve: faultnet.Options{Handler: saying(300*time.Millisecond, "220 hello\r\n")}, says: "speaks first"},
		"greets, length":             {framing: "length", serve: faultnet.Options{Handler: saying(0, "\x00\x00\x00\x01x")}, says: "speaks first"},
		"greets, modbus":             {framing: "modbus", serve: faultnet.Options{Handler: saying(0, "\x00\x00\x00\x00\x00\x02\x01\x01")}, says: "speaks first"},
		"greets, session":            {framing: "session", serve: faultnet.Options{Handler: saying(0, "220 hello\r\n")}},
		"redis is full":              {framing: "resp", serve: faultnet.Options{Handler: saying(0, "-ERR max number of clients reached\r\n")}, says: "max number"},
		"redis is loading":           {framing: "resp", serve: faultnet.Options{Handler: answering("-LOADING Redis is loading\r\n")}, says: "LOADING"},
		"no redis":                   {framing: "resp", serve: faultnet.Options{Handler: answering("HTTP/1.1 400 Bad Request\r\n\r\n")}, says: "-framing resp"},
		"hangs up when asked":        {framing: "resp", serve: faultnet.Options{Handler: func(p *faultnet.Peer) { p.Read(make([]byte, 1)) }}, says: "ends them"},
		"tls without saying":         {framing: "line", to: strings.Replace(secret, "tls://", "tcp://", 1), says: "tls://"},
		"tls without saying, length": {framing: "length", to: strings.Replace(secret, "tls://", "tcp://", 1), says: "tls://"},
		"tls without saying, modbus": {framing: "modbus", to: strings.Replace(secret, "tls://", "tcp://", 1), says: "tls://"},
		"tls, session":               {framing: "session", to: strings.Replace(secret, "tls://", "tcp://", 1), says: "tls://"},
		"tls, resp":                  {framing: "resp", to: strings.Replace(secret, "tls://", "tcp://", 1), says: "TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			to := c.to
			if to == "" {
				_, to = serve(t, c.serve)
			}
			cfg := Config{Framing: c.framing, To: to, Listen: "127.0.0.1:0", RequestTimeout: 5 * time.Second}
			if c.framing == "length" {
				cfg.Length.Size = 4
			}
			if strings.HasPrefix(to, "tls") {
				cfg.Upstream.CA = k.ca
			}
			g, err := New(cfg)
			require.NoError(t, err)
			defer g.Close()
			remark, err := g.Examine(t.Context())
			if c.says == "" {
				require.NoError(t, err)
				require.Equal(t, name == "greets, session", remark != "", "where nothing else is to be said, nothing is")
				return
			}
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

// TRY-29: PostgreSQL accepts plain connections and TLS at one address.
func TestReachBelievesAServerThatSpeaksPlainTooWithItsQuestion(t *testing.T) {
	t.Parallel()
	_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
		b := make([]byte, 100)
		n, _ := p.Read(b)
		if n > 0 && b[0] == 0x16 {
			io.WriteString(p, "\x15\x03\x01\x00\x02\x02\x28")
			return
		}
		io.WriteString(p, "S")
		p.Read(b)
	}})
	g, err := New(Config{Framing: "session", To: to, Listen: "127.0.0.1:0"})
	require.NoError(t, err)
	defer g.Close()
	require.NoError(t, g.Reach(t.Context()))
}

// TRY-29
func TestReachTellsThatACertificateIsWanted(t *testing.T) {
	_, k, to := demanding(t)
	g, err := New(Config{Framing: "line", To: to, Listen: "127.0.0.1:0", Upstream: UpstreamFiles{CA: k.ca}})
	require.NoError(t, err)
	defer g.Close()
	require.ErrorContains(t, g.Reach(t.Context()), "give -upstream-cert")
}
