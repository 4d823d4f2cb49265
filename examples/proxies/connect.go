package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/seed-ecb488c9/connpool"
)

// maxReply bounds what a proxy may say before the connection is the server's.
const maxReply = 64 << 10

// dialConnect connects to addr through an HTTP proxy, with CONNECT.
func dialConnect(ctx context.Context, proxy *url.URL, addr connpool.Addr) (net.Conn, error) {
	nc, err := dialProxy(ctx, proxy, addr)
	if err != nil {
		return nil, err
	}
	return during(ctx, nc, func() error {
		target := target(addr)
		req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: target}, Host: target, Header: make(http.Header)}
		if u := proxy.User; u != nil {
			password, _ := u.Password()
			req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)))
		}
		if err := req.Write(nc); err != nil {
			return fmt.Errorf("proxy %s: %w", proxy.Host, err)
		}
		// The server may speak at once, so the reply of the proxy and the first bytes of the server
		// may come together. A bufio.Reader over nc would take both out of the socket. Over
		// byteByByte it takes no byte beyond the reply: the rest stays for the pool's user.
		reply, err := http.ReadResponse(bufio.NewReader(io.LimitReader(byteByByte{nc}, maxReply)), req)
		switch {
		case err == io.ErrUnexpectedEOF || err == io.EOF:
			return fmt.Errorf("proxy %s hung up before it answered CONNECT %s: %w", proxy.Host, target, io.ErrUnexpectedEOF)
		case err != nil:
			return fmt.Errorf("proxy %s, in its answer to CONNECT %s: %w", proxy.Host, target, err)
		case reply.StatusCode == http.StatusProxyAuthRequired, reply.StatusCode == http.StatusUnauthorized: // tinyproxy says 401 to a wrong password
			return fmt.Errorf("proxy %s wants a user and a password, or other ones (%s, %q)", proxy.Host, reply.Status, reply.Header.Get("Proxy-Authenticate"))
		case reply.StatusCode/100 != 2:
			return fmt.Errorf("proxy %s refuses CONNECT %s: %s", proxy.Host, target, reply.Status)
		}
		return nil // the body, if there is one, is what the server says
	})
}

// byteByByte reads one byte at a time. That is a system call for each, some hundred in the life of
// a connection.
type byteByByte struct{ io.Reader }

func (r byteByByte) Read(b []byte) (int, error) { return r.Reader.Read(b[:min(len(b), 1)]) }
