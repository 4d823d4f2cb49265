//go:build unix

package dns_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	pooldns "github.com/seed-ecb488c9/connpool/adapters/dns"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

var errRefused = errors.New("refused")

// ask asks for the text of a name, and makes an error of a reply without it.
func ask(ctx context.Context, c *pooldns.Client, name string) (string, error) {
	m := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
	reply, err := c.Exchange(ctx, m)
	switch {
	case err != nil:
		return "", err
	case reply.Rcode == dns.RcodeRefused:
		return "", errRefused
	case len(reply.Answer) != 1:
		return "", fmt.Errorf("asked for %s, got %v", name, reply)
	}
	return strings.Join(reply.Answer[0].(*dns.TXT).Txt, ""), nil
}

// ADO-14: DNS over TCP and over TLS, with unbound.
func TestDNSOverPooledConnections(t *testing.T) {
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	for transport, kind := range map[connpool.Transport]realserver.Kind{
		connpool.TCP: realserver.Unbound(nil),
		connpool.TLS: realserver.Unbound(&cert),
	} {
		t.Run(string(transport), func(t *testing.T) {
			srv := realserver.Start(t, kind)
			adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
				cfg.Setup = pooldns.Setup
				cfg.TLS = &tls.Config{RootCAs: ca.Pool(), NextProtos: []string{"dot"}}
				pool, err := connpool.New(cfg)
				require.NoError(t, err)
				addr := connpool.Addr{Transport: transport, Host: host, Port: port}
				c := pooldns.New(pool, addr)
				c.Options.Timeout = time.Minute
				hasty := pooldns.New(pool, addr)
				hasty.Options.Timeout = 20 * time.Millisecond
				exchange := func(ctx context.Context, c *pooldns.Client, n int) error {
					got, err := ask(ctx, c, fmt.Sprintf("n%d.test.", n))
					if err == nil && got != fmt.Sprint(n) {
						err = fmt.Errorf("asked for %d, got %s", n, got)
					}
					return err
				}
				return adaptertest.Client{Pool: pool, Addr: addr,
					Exchange: func(ctx context.Context, n int) error { return exchange(ctx, c, n) },
					Hasty:    func(ctx context.Context, n int) error { return exchange(ctx, hasty, n) },
					Refused: func(ctx context.Context) error {
						_, err := ask(ctx, c, "n1.refused.test.")
						return err
					},
					IsRefusal: func(err error) bool { return err == errRefused },
				}
			})
		})
	}
}

// answering is a client of a server that answers the queries with what reply makes of them.
func answering(t *testing.T, reply func(*dns.Msg) *dns.Msg) (*pooldns.Client, *connpool.Pool) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	started := make(chan struct{})
	srv := &dns.Server{Listener: l, TsigSecret: map[string]string{"key.": "b3RoZXI="}, NotifyStartedFunc: func() { close(started) },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) { w.WriteMsg(reply(m)) })}
	go srv.ActivateAndServe()
	<-started
	t.Cleanup(func() { srv.Shutdown() })
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, Setup: pooldns.Setup})
	require.NoError(t, err)
	t.Cleanup(func() { pool.Close() })
	return pooldns.New(pool, connpool.MustParseAddr("tcp://"+l.Addr().String())), pool
}

// ADO-14: a connection whose replies are those to other queries is out of step, and is closed.
func TestAReplyToAnotherQueryClosesTheConnection(t *testing.T) {
	for name, c := range map[string]struct {
		reply func(*dns.Msg) *dns.Msg
		want  error
	}{
		"another id": {func(m *dns.Msg) *dns.Msg { m.Response = true; m.Id++; return m }, dns.ErrId},
		"another question": {func(m *dns.Msg) *dns.Msg {
			m.Response, m.Question[0].Name = true, "b.test."
			return m
		}, pooldns.ErrQuestion},
		"no question": {func(m *dns.Msg) *dns.Msg { m.Response, m.Question = true, nil; return m }, pooldns.ErrQuestion},
		"a query":     {func(m *dns.Msg) *dns.Msg { return m }, pooldns.ErrQuestion},
	} {
		t.Run(name, func(t *testing.T) {
			client, pool := answering(t, c.reply)
			for range 3 {
				_, err := client.Exchange(t.Context(), new(dns.Msg).SetQuestion("a.test.", dns.TypeTXT))
				require.ErrorIs(t, err, c.want)
			}
			require.EqualValues(t, 3, pool.Stats().Dials)
		})
	}
}

// ADO-14: what never reached the server, or is complete, costs no connection.
func TestAQueryThatCannotBeSentCostsNoConnection(t *testing.T) {
	client, pool := answering(t, func(m *dns.Msg) *dns.Msg {
		return new(dns.Msg).SetReply(m)
	})
	for range 3 {
		_, err := client.Exchange(t.Context(), new(dns.Msg).SetQuestion("A.test.", dns.TypeTXT))
		require.NoError(t, err)
		_, err = client.Exchange(t.Context(), new(dns.Msg).SetQuestion(strings.Repeat("a", 64)+".test.", dns.TypeTXT))
		require.Error(t, err)
	}
	require.EqualValues(t, 1, pool.Stats().Dials)
}

// ADO-14: a reply with a wrong signature was read to its end.
func TestAWrongSignatureCostsNoConnection(t *testing.T) {
	client, pool := answering(t, func(m *dns.Msg) *dns.Msg {
		reply := new(dns.Msg).SetReply(m)
		reply.SetTsig("key.", dns.HmacSHA256, 300, time.Now().Unix())
		return reply
	})
	client.Options.TsigSecret = map[string]string{"key.": "c2VjcmV0"}
	for range 3 {
		for key, want := range map[string]error{"key.": dns.ErrSig, "another.": dns.ErrSecret} {
			m := new(dns.Msg).SetQuestion("a.test.", dns.TypeTXT)
			m.SetTsig(key, dns.HmacSHA256, 300, time.Now().Unix())
			_, err := client.Exchange(t.Context(), m)
			require.ErrorIs(t, err, want)
		}
	}
	require.EqualValues(t, 1, pool.Stats().Dials)
}
