package main

import (
	"context"
	"fmt"
	"net"
	"net/url"

	"golang.org/x/net/proxy"

	"github.com/seed-ecb488c9/connpool"
)

// dialSOCKS connects to addr through a SOCKS5 proxy. The proxy looks up the name of the server.
func dialSOCKS(ctx context.Context, at *url.URL, addr connpool.Addr) (net.Conn, error) {
	var auth *proxy.Auth
	if u := at.User; u != nil {
		password, _ := u.Password()
		auth = &proxy.Auth{User: u.Username(), Password: password}
	}
	d, err := proxy.SOCKS5("tcp", at.Host, auth, nil)
	if err != nil {
		return nil, err
	}
	// DialContext of d would return a connection that hides its socket, so that the pool could
	// judge it by its age only. DialWithConn leaves us the socket.
	s, ok := d.(interface {
		DialWithConn(ctx context.Context, nc net.Conn, network, address string) (net.Addr, error)
	})
	if !ok {
		return nil, fmt.Errorf("this version of golang.org/x/net/proxy has no DialWithConn")
	}
	nc, err := dialProxy(ctx, at, addr)
	if err != nil {
		return nil, err
	}
	return during(ctx, nc, func() error {
		_, err := s.DialWithConn(ctx, nc, "tcp", target(addr))
		return err
	})
}
