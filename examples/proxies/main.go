// Connections through proxies: HTTP CONNECT, SOCKS5, and vsock, which is no proxy but is dialled
// in the same place. Run it as it is, or with a proxy and a server that repeats lines:
//
//	go run ./proxies [http://user:password@proxy:3128 tcp://host:port]
//	go run ./proxies socks5://proxy:1080 tcp://host:port
//
// What is in it to copy:
//
//   - through, a dialer for Config.Dialers[TCP] that goes through the proxy of the address, or
//     none. TLS needs nothing more: the pool's own TLS runs over the dialer of TCP, from end to
//     end, and the proxy sees none of it.
//   - A dialer returns the *net.TCPConn to the proxy itself. So the pool hears at once when the
//     proxy hangs up because the server did, looks for unread bytes before each loan, and closes
//     without waiting. A wrapper that hides the socket would take all that away.
//   - What the server says at once is not lost, though it arrives together with the proxy's reply.
//   - A refusal of the proxy is one clear line, the error of the borrower's dial, and counts for
//     back-off as any failed dial.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// newPool opens a pool whose connections go through the proxies that proxyOf names.
func newPool(proxyOf func(connpool.Addr) *url.URL) (*connpool.Pool, error) {
	return connpool.New(connpool.Config{
		Dialers: map[connpool.Transport]connpool.DialFunc{
			connpool.TCP: through(proxyOf), // of TLS, too
			"vsock":      dialVsock,
		},
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return bufio.NewReader(nc), nil
		},
	})
}

// through is a dialer that connects through the proxy that proxyOf names for an address. The
// scheme of the proxy is http or socks5. Where proxyOf returns nil there is no proxy.
func through(proxyOf func(connpool.Addr) *url.URL) connpool.DialFunc {
	return func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
		switch proxy := proxyOf(addr); {
		case proxy == nil:
			return dialFrom(addr).DialContext(ctx, "tcp", target(addr))
		case proxy.Scheme == "http":
			return dialConnect(ctx, proxy, addr)
		case proxy.Scheme == "socks5":
			return dialSOCKS(ctx, proxy, addr)
		default:
			return nil, fmt.Errorf("proxy %s: the scheme is http or socks5", proxy.Redacted())
		}
	}
}

// dialFrom is package net's dialer with the quality of service of addr. It is that of the
// connection to the proxy.
func dialFrom(addr connpool.Addr) *net.Dialer { return &net.Dialer{Control: addr.QoS.Control} }

func dialProxy(ctx context.Context, proxy *url.URL, addr connpool.Addr) (net.Conn, error) {
	nc, err := dialFrom(addr).DialContext(ctx, "tcp", proxy.Host)
	if err != nil {
		return nil, fmt.Errorf("proxy %s: %w", proxy.Host, err)
	}
	return nc, nil
}

// target is addr as package net writes it.
func target(addr connpool.Addr) string {
	return net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port)))
}

// during returns nc if f, the greeting of a proxy, succeeds, and no deadline of the greeting is
// left then. Otherwise it closes nc. The end of ctx ends f.
func during(ctx context.Context, nc net.Conn, f func() error) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() {
		err = context.Cause(ctx) // and f may have succeeded: the deadline is set, or will be
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nil
}

// ask sends a line and returns the reply.
func ask(ctx context.Context, p *connpool.Pool, addr connpool.Addr, line string) (reply string, err error) {
	err = p.With(ctx, addr, func(c connpool.Conn) error {
		if _, err := fmt.Fprintln(c, line); err != nil {
			return err
		}
		reply, err = connpool.State[*bufio.Reader](c).ReadString('\n')
		return err
	})
	return strings.TrimSuffix(reply, "\n"), err
}

// repeat is a server that repeats each line.
func repeat(nc net.Conn) { io.Copy(nc, nc) }

// serveConnect is one connection of a small HTTP proxy.
func serveConnect(nc net.Conn) {
	req, err := http.ReadRequest(bufio.NewReader(nc))
	if err != nil {
		return
	}
	server, err := net.Dial("tcp", req.Host)
	if err != nil {
		fmt.Fprint(nc, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
		return
	}
	defer server.Close()
	fmt.Fprint(nc, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		io.Copy(server, nc)
		server.Close()
	}()
	io.Copy(nc, server)
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var proxy *url.URL
	var addr connpool.Addr
	var err error
	switch len(args) {
	case 0:
		server, err := loopback.Start(repeat)
		if err != nil {
			return err
		}
		defer server.Close()
		small, err := loopback.Start(serveConnect)
		if err != nil {
			return err
		}
		defer small.Close()
		proxy, addr = &url.URL{Scheme: "http", Host: target(small.Addr())}, server.Addr()
	case 2:
		if proxy, err = url.Parse(args[0]); err != nil {
			return err
		}
		if addr, err = connpool.ParseAddr(args[1]); err != nil {
			return err
		}
	default:
		return fmt.Errorf("give a proxy and a server, or nothing")
	}
	p, err := newPool(func(connpool.Addr) *url.URL { return proxy })
	if err != nil {
		return err
	}
	defer p.Close()
	for _, line := range []string{"one", "two", "three"} {
		reply, err := ask(ctx, p, addr, line)
		if err != nil {
			return err
		}
		fmt.Fprintln(w, reply)
	}
	fmt.Fprintf(w, "connections through the proxy: %d\n", p.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
