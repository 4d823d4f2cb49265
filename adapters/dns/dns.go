// Package dns sends DNS queries over pooled connections: over TCP (RFC 7766) or TLS (RFC 7858),
// with the messages and the connections of github.com/miekg/dns.
//
//	pool, err := connpool.New(connpool.Config{Setup: pooldns.Setup, IdleTimeout: 8 * time.Second})
//	client := pooldns.New(pool, connpool.MustParseAddr("tls://192.0.2.53:853?server-name=dns.example"))
//	reply, err := client.Exchange(ctx, query)
//
// A dns.Client of the library dials for each query over TCP or TLS. Most servers close a
// connection that was idle for some seconds; an IdleTimeout below that avoids most new dials.
package dns

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/miekg/dns"

	"github.com/seed-ecb488c9/connpool"
)

// ErrQuestion is the error of a reply with the right id to another question.
var ErrQuestion = errors.New("dns: the reply is to another question")

// Setup is for Config.Setup of the pool. The state of a connection is its *dns.Conn, which reads
// no further than the end of a message.
func Setup(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	return &dns.Conn{Conn: nc}, nil
}

// Client sends queries to one server. Its methods may be called by many goroutines at once.
type Client struct {
	// Options has the time-outs and the TSIG keys; its other fields have no effect. A zero
	// Timeout means 2 seconds. It must not change while the client is used.
	Options dns.Client

	pool *connpool.Pool
	addr connpool.Addr
}

// New makes a client over a pool whose Config.Setup is Setup, or calls Setup for addr.
func New(pool *connpool.Pool, addr connpool.Addr) *Client {
	return &Client{pool: pool, addr: addr}
}

// Exchange sends a query and returns the reply. The end of ctx and the time-out of Options end
// the exchange, whichever is first; then the connection is closed, and so is one whose reply is
// not a reply to m. A reply that says NXDOMAIN, SERVFAIL or REFUSED is a reply: look at its Rcode.
//
// An *connpool.Error means that nothing was sent. After any other error the query may have been
// answered, and a query can be sent again.
func (c *Client) Exchange(ctx context.Context, m *dns.Msg) (reply *dns.Msg, err error) {
	err = c.pool.With(ctx, c.addr, func(nc connpool.Conn) error {
		reply, _, err = c.Options.ExchangeWithConnContext(ctx, m, connpool.State[*dns.Conn](nc))
		switch {
		case err == nil && !answers(reply, m):
			return ErrQuestion
		case errors.Is(err, dns.ErrSig), errors.Is(err, dns.ErrTime), errors.Is(err, dns.ErrSecret):
			return connpool.Keep(err) // the signature is wrong; the message was read to its end
		case err != nil && !packs(m):
			return connpool.Keep(err) // nothing was sent
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// answers reports whether reply repeats the question of m. Some servers leave the question out
// of a reply that refuses it.
func answers(reply, m *dns.Msg) bool {
	if len(reply.Question) == 0 || len(m.Question) == 0 {
		return reply.Rcode != dns.RcodeSuccess || len(m.Question) == 0
	}
	got, want := reply.Question[0], m.Question[0]
	return reply.Response && got.Qtype == want.Qtype && got.Qclass == want.Qclass && strings.EqualFold(got.Name, want.Name)
}

// packs reports whether m can be sent at all.
func packs(m *dns.Msg) bool {
	_, err := m.Pack()
	return err == nil
}
