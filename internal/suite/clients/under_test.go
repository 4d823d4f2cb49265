package clients

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/smtp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// mailServer speaks as much SMTP as a client needs to log in and to reset.
func mailServer(p *faultnet.Peer) {
	fmt.Fprint(p, "220 mail.test\r\n")
	for in := bufio.NewScanner(p); in.Scan(); {
		switch verb, _, _ := strings.Cut(strings.ToUpper(in.Text()), " "); verb {
		case "EHLO":
			fmt.Fprint(p, "250-mail.test\r\n250 AUTH PLAIN\r\n")
		case "AUTH":
			fmt.Fprint(p, "235 welcome\r\n")
		case "QUIT":
			fmt.Fprint(p, "221 bye\r\n")
			return
		default:
			fmt.Fprint(p, "250 ok\r\n")
		}
	}
}

// ADO-10: net/smtp looks at the type of its connection before it sends a password.
func TestSMTPWithAPasswordOverTLS(t *testing.T) {
	n := pooltest.StartSock(t, "tls13", faultnet.Options{Handler: mailServer})
	login := func(c *smtp.Client) error { return c.Auth(smtp.PlainAuth("", "user", "secret", "mail.test")) }
	p := n.Pool(t, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			below, ok := connpool.Under[*tls.Conn](nc.(connpool.Conn))
			if !ok {
				return nil, errors.New("no TLS")
			}
			client, err := smtp.NewClient(below, "mail.test")
			if err != nil {
				return nil, err
			}
			return client, login(client)
		}
	})
	for range 10 {
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error { return connpool.State[*smtp.Client](c).Noop() }))
	}
	require.EqualValues(t, 1, p.Stats().Dials)
}
