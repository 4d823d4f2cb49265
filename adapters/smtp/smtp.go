// Package smtp sends mail over pooled connections, with github.com/emersion/go-smtp.
//
//	login := poolsmtp.Login{StartTLS: new(tls.Config), Auth: func(connpool.Addr) sasl.Client { return plain }}
//	pool, err := connpool.New(connpool.Config{MaxPerAddr: 4, Setup: login.Setup, Check: poolsmtp.Check})
//	client := poolsmtp.New(pool, connpool.MustParseAddr("tcp://mail.example:587"))
//	taken, err := client.Send(ctx, from, to, nil, message)
package smtp

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/seed-ecb488c9/connpool"
)

// Login is what is done once on each new connection. The zero Login says hello.
type Login struct {
	Hello    string                          // the name of this host; "": localhost
	StartTLS *tls.Config                     // with STARTTLS; an empty ServerName is that of the address. nil: without
	Auth     func(connpool.Addr) sasl.Client // logs in; nil: nobody does
}

// Setup is for Config.Setup of the pool.
func (l Login) Setup(_ context.Context, addr connpool.Addr, nc net.Conn) (_ any, err error) {
	c := smtp.NewClient(nc)
	if l.StartTLS != nil {
		cfg := l.StartTLS.Clone()
		cfg.ServerName = cmp.Or(cfg.ServerName, addr.ServerName, addr.Host)
		c, err = smtp.NewClientStartTLS(nc, cfg)
	} else if l.Auth != nil && addr.Transport == connpool.TCP {
		err = errors.New("smtp: a login over a connection that is not encrypted: set StartTLS, or use a tls:// address")
	}
	if err != nil {
		return nil, err
	}
	if err = c.Hello(cmp.Or(l.Hello, "localhost")); err == nil && l.Auth != nil {
		err = c.Auth(l.Auth(addr))
	}
	return session{c}, err
}

// Check is for Config.Check: a NOOP.
func Check(_ context.Context, nc connpool.Conn) error { return connpool.State[session](nc).Noop() }

type session struct{ *smtp.Client } // the state of a connection

func (s session) Close() error { s.Quit(); return s.Client.Close() } // the goodbye

// send makes one transaction. If message fails, the server has half of it, and must not hear an end.
func (s session) send(from string, to []string, opts *smtp.MailOptions, message io.Reader) (*smtp.DataResponse, error) {
	err := s.Mail(from, opts)
	for i := 0; err == nil && i < len(to); i++ {
		err = s.Rcpt(to[i], nil)
	}
	if err != nil {
		return nil, err
	}
	w, err := s.Data()
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(w, message); err != nil {
		s.Client.Close()
		return nil, err
	}
	return w.CloseWithResponse()
}

// Client sends through one server. Its methods may be called by many goroutines at once.
type Client struct {
	pool *connpool.Pool
	addr connpool.Addr
}

// New makes a client over a pool whose Config.Setup is that of a Login, or calls one for addr.
func New(pool *connpool.Pool, addr connpool.Addr) *Client { return &Client{pool, addr} }

// Send sends a message and returns what the server said when it took it. opts may be nil. An
// *smtp.SMTPError is the server's refusal, and leaves the connection open. After an
// *connpool.Error nothing was sent. After any other error the message may have been delivered.
func (c *Client) Send(ctx context.Context, from string, to []string, opts *smtp.MailOptions, message io.Reader) (taken *smtp.DataResponse, err error) {
	err = c.pool.With(ctx, c.addr, func(nc connpool.Conn) (err error) {
		s := connpool.State[session](nc)
		taken, err = s.send(from, to, opts, message)
		var refusal *smtp.SMTPError // 421: the server is about to close
		if errors.As(err, &refusal) && refusal.Code != 421 && s.Reset() == nil {
			return connpool.Keep(err)
		}
		return err
	})
	return taken, err
}
