// Package ldap lends connections of github.com/go-ldap/ldap/v3 from a pool.
//
//	login := func(addr connpool.Addr, l *ldap.Conn) error { return l.Bind("cn=app,dc=example", secret) }
//	pool, err := connpool.New(connpool.Config{MaxPerAddr: 8, Setup: poolldap.Setup(login)})
//	client := poolldap.New(pool, connpool.MustParseAddr("tls://ldap.example:636"))
//	found, err := client.Search(ctx, request)
//
// The library reads its connection all the time and matches replies by their id, so it is a
// resident of its connection, see connpool.Resident.
package ldap

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/go-ldap/ldap/v3"

	"github.com/seed-ecb488c9/connpool"
)

// Setup makes a function for Config.Setup of the pool. bind logs in on each new connection; nil:
// nobody logs in. Users who differ need addresses that differ, for example in their Scope.
func Setup(bind func(addr connpool.Addr, l *ldap.Conn) error) func(context.Context, connpool.Addr, net.Conn) (any, error) {
	return func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
		s := session{ldap.NewConn(nc, addr.Transport == connpool.TLS)}
		s.Start()
		if bind != nil {
			if err := bind(addr, s.Conn); err != nil {
				return nil, err
			}
		}
		return connpool.Resident(s, s.alive), nil
	}
}

// session is the state of a connection.
type session struct{ *ldap.Conn }

func (s session) alive() error {
	if s.IsClosing() {
		return net.ErrClosed
	}
	return nil
}

// Close takes leave of the server, if the connection works.
func (s session) Close() error {
	s.Unbind()
	return s.Conn.Close()
}

// Client uses one server. Its methods may be called by many goroutines at once.
type Client struct {
	pool *connpool.Pool
	addr connpool.Addr
}

// New makes a client over a pool whose Config.Setup is of Setup, or calls one of Setup for addr.
func New(pool *connpool.Pool, addr connpool.Addr) *Client { return &Client{pool, addr} }

// Do lends a connection to fn, which has it alone. fn must not keep it, and must not bind. When
// ctx is done, the connection is closed, and the call that fn is in fails. An error that is the
// server's answer leaves the connection open: every result code up to LDAPResultOther but
// LDAPResultUnavailable and LDAPResultInvalidCredentials. So does a filter that does not compile.
func (c *Client) Do(ctx context.Context, fn func(l *ldap.Conn) error) error {
	return c.pool.With(ctx, c.addr, func(nc connpool.Conn) error {
		err := fn(connpool.State[session](nc).Conn)
		var e *ldap.Error
		switch {
		case err != nil && ctx.Err() != nil:
			return fmt.Errorf("%w: %w", context.Cause(ctx), err) // go-ldap says "connection closed"
		case errors.As(err, &e) && (e.ResultCode <= ldap.LDAPResultOther || e.ResultCode == ldap.ErrorFilterCompile) &&
			e.ResultCode != ldap.LDAPResultUnavailable && e.ResultCode != ldap.LDAPResultInvalidCredentials:
			return connpool.Keep(err)
		}
		return err
	})
}

// Search makes one search. With a result code such as LDAPResultNoSuchObject the error is an
// *ldap.Error, as in the library.
func (c *Client) Search(ctx context.Context, request *ldap.SearchRequest) (found *ldap.SearchResult, err error) {
	err = c.Do(ctx, func(l *ldap.Conn) error { found, err = l.Search(request); return err })
	return found, err
}

// Authenticate asks the server whether this is the password of dn, with a bind. A connection is
// somebody else's after a bind, and nobody's after one that failed, so it is closed.
func (c *Client) Authenticate(ctx context.Context, dn, password string) error {
	return c.pool.With(ctx, c.addr, func(nc connpool.Conn) error {
		defer nc.Close()
		return connpool.State[session](nc).Bind(dn, password)
	})
}
