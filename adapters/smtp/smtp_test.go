//go:build unix

package smtp_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	poolsmtp "github.com/seed-ecb488c9/connpool/adapters/smtp"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

const sender = "app@localhost"

var everybody = []string{"a@localhost", "b@localhost"}

func message(text any) io.Reader {
	return strings.NewReader(fmt.Sprintf("Subject: x\r\n\r\n%v\r\n", text))
}

func login(password string) func(connpool.Addr) sasl.Client {
	return func(connpool.Addr) sasl.Client { return sasl.NewPlainClient("", "user", password) }
}

// ADO-14: mail in the clear and, after STARTTLS and a login, over TLS; with aiosmtpd.
func TestMailOverPooledConnections(t *testing.T) {
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	for name, c := range map[string]struct {
		kind  realserver.Kind
		login poolsmtp.Login
	}{
		"plain":    {realserver.SMTP(nil), poolsmtp.Login{}},
		"STARTTLS": {realserver.SMTP(&cert), poolsmtp.Login{Hello: "app.test", StartTLS: &tls.Config{RootCAs: ca.Pool()}, Auth: login("secret")}},
	} {
		t.Run(name, func(t *testing.T) {
			srv := realserver.Start(t, c.kind)
			adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
				cfg.Setup, cfg.Check = c.login.Setup, poolsmtp.Check
				pool, err := connpool.New(cfg)
				require.NoError(t, err)
				addr := connpool.Addr{Transport: connpool.TCP, Host: host, Port: port}
				mail := poolsmtp.New(pool, addr)
				return adaptertest.Client{Pool: pool, Addr: addr,
					Exchange: func(ctx context.Context, n int) error {
						got, err := mail.Send(ctx, sender, everybody, nil, message(n))
						if err == nil && !strings.HasSuffix(got.StatusText, fmt.Sprintf("taken as %d", n)) {
							err = fmt.Errorf("sent %d, got %q", n, got.StatusText)
						}
						return err
					},
					Refused: func(ctx context.Context) error {
						_, err := mail.Send(ctx, sender, []string{"a@localhost", "nobody@localhost"}, nil, message("x"))
						return err
					},
					IsRefusal: func(err error) bool {
						var e *smtp.SMTPError
						return errors.As(err, &e) && e.Code == 550
					},
				}
			})
		})
	}
}

// one is a client of a pool of one connection to a server without TLS.
func one(t *testing.T, cfg connpool.Config) (*poolsmtp.Client, *connpool.Pool, *realserver.Server) {
	srv := realserver.Start(t, realserver.SMTP(nil))
	cfg.MaxOpen, cfg.Setup = 1, poolsmtp.Login{}.Setup
	pool, err := connpool.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { pool.Close() })
	return poolsmtp.New(pool, connpool.MustParseAddr("tcp://"+srv.Addr)), pool, srv
}

// ADO-14: nothing of a message that was refused is in the next one, and a message whose source
// fails half-way is not delivered by half.
func TestAMessageThatFailsLeavesNothingBehind(t *testing.T) {
	mail, pool, _ := one(t, connpool.Config{})
	for n := range 3 {
		_, err := mail.Send(t.Context(), sender, everybody, nil, message("spam"))
		var e *smtp.SMTPError
		require.ErrorAs(t, err, &e)
		require.Equal(t, 554, e.Code)
		_, err = mail.Send(t.Context(), "a\r\nb", everybody, nil, message("x"))
		require.Error(t, err)
		dials := pool.Stats().Dials
		_, err = mail.Send(t.Context(), sender, []string{"nobody@localhost"}, nil, message("x"))
		require.ErrorAs(t, err, &e)
		reply, err := mail.Send(t.Context(), sender, everybody, nil, message(n))
		require.NoError(t, err)
		require.Contains(t, reply.StatusText, fmt.Sprintf("taken as %d", n))
		require.LessOrEqual(t, pool.Stats().Dials, dials+1)

		boom := &smtp.SMTPError{Code: 552, Message: "of the message's source, which is another server"}
		_, err = mail.Send(t.Context(), sender, everybody, nil, io.MultiReader(message("half"), iotest.ErrReader(boom)))
		require.ErrorIs(t, err, boom)
		patience.Soon(t, "it is closed", func() bool { return pool.Stats().Closed[connpool.ClosedByBorrower] == uint64(n+1) })
	}
}

// ADO-14: an idle connection is asked before it is lent, and says QUIT when it is not needed.
func TestAConnectionIsCheckedAndSaysQuit(t *testing.T) {
	checks := 0
	mail, pool, srv := one(t, connpool.Config{CheckAfterIdle: -1, Check: func(ctx context.Context, nc connpool.Conn) error {
		checks++
		return poolsmtp.Check(ctx, nc)
	}})
	for n := range 3 {
		_, err := mail.Send(t.Context(), sender, everybody, nil, message(n))
		require.NoError(t, err)
	}
	require.Equal(t, 2, checks)
	require.NoError(t, pool.Shutdown(t.Context()))
	patience.Soon(t, "the server has heard it", func() bool {
		log, err := os.ReadFile(filepath.Join(srv.Dir, "log"))
		return err == nil && bytes.Count(log, []byte("QUIT")) == 1
	})
}

// ADO-14: a wrong password is the error of the borrower, and no password goes over a connection
// that anybody can read.
func TestALoginThatFailsIsSaid(t *testing.T) {
	ca := faultnet.NewCA()
	cert := ca.Server("127.0.0.1")
	srv := realserver.Start(t, realserver.SMTP(&cert))
	for want, l := range map[string]poolsmtp.Login{
		"535":           {StartTLS: &tls.Config{RootCAs: ca.Pool()}, Auth: login("guess")},
		"not encrypted": {Auth: login("secret")},
		"authority":     {StartTLS: new(tls.Config), Auth: login("secret")},
	} {
		pool, err := connpool.New(connpool.Config{Setup: l.Setup})
		require.NoError(t, err)
		defer pool.Close()
		_, err = poolsmtp.New(pool, connpool.MustParseAddr("tcp://"+srv.Addr)).Send(t.Context(), sender, everybody, nil, message("x"))
		var e *connpool.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, connpool.StageSetup, e.Stage)
		require.ErrorContains(t, err, want)
	}
}
