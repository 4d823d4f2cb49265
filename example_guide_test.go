package connpool_test

import (
	"bufio"
	"context"
	"errors"
	"expvar"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// The code of README.md and of the pages in docs/ is here, so that it compiles.
// TestTheCodeOfTheDocsIsCompiled keeps both together.

// readme is the example of README.md, for a server at a fixed port.
func readme(ctx context.Context) error {
	setup := func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		return bufio.NewReader(nc), nil // once per connection: the reader lives as long as the connection
	}
	pool, err := connpool.New(connpool.Config{Setup: setup})
	if err != nil {
		return err
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://127.0.0.1:7000")
	return pool.With(ctx, addr, func(c connpool.Conn) error {
		if _, err := fmt.Fprintln(c, "hello"); err != nil {
			return err
		}
		reply, err := connpool.State[*bufio.Reader](c).ReadString('\n')
		fmt.Print(reply)
		return err // nil gives the connection back; an error closes it
	})
}

var _ = readme

// client speaks the protocol over one connection: a line there, a line back.
type client struct {
	in  *bufio.Reader
	out *bufio.Writer
}

func (k *client) call(request string) (string, error) {
	if _, err := k.out.WriteString(request + "\n"); err != nil {
		return "", err
	}
	if err := k.out.Flush(); err != nil {
		return "", err
	}
	reply, err := k.in.ReadString('\n')
	return strings.TrimSuffix(reply, "\n"), err
}

// Example_guide is the client of docs/guide.md against a server that knows one
// key and tells what else it is asked.
func Example_guide() {
	address, stop := serve(lines(func(line string) string {
		switch line {
		case "GET colour":
			return "blue\n"
		case "GET size":
			return "\n"
		}
		fmt.Println("server:", line)
		return "ok\n"
	}))
	defer stop()

	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 8,
		Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			k := &client{bufio.NewReader(nc), bufio.NewWriter(nc)}
			_, err := k.call("LOGIN " + addr.Scope)
			return k, err
		},
		Reset: func(_ context.Context, c connpool.Conn) error {
			_, err := connpool.State[*client](c).call("ROLLBACK")
			return err
		},
		Check: func(_ context.Context, c connpool.Conn) error {
			_, err := connpool.State[*client](c).call("PING")
			return err
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address + "?scope=tenant7")

	errNoSuchKey := errors.New("no such key")
	get := func(ctx context.Context, key string) (value string, err error) {
		err = pool.With(ctx, addr, func(c connpool.Conn) error {
			value, err = connpool.State[*client](c).call("GET " + key)
			if err == nil && value == "" {
				return connpool.Keep(errNoSuchKey) // the server has answered: the connection is in step
			}
			return err // nil gives the connection back, an I/O error closes it
		})
		return value, err // errNoSuchKey, without a mark
	}
	for _, key := range []string{"size", "colour"} {
		value, err := get(context.Background(), key)
		fmt.Printf("%s: %q, %v\n", key, value, err)
	}
	fmt.Println("connections:", pool.Stats().Dials)
	// Output:
	// server: LOGIN tenant7
	// server: ROLLBACK
	// size: "", no such key
	// server: ROLLBACK
	// colour: "blue", <nil>
	// connections: 1
}

// The rest of the pages' code only compiles.
func pages(ctx context.Context, pool *connpool.Pool, addr connpool.Addr, request func(connpool.Conn) error) error {
	{
		ctx, end := pool.Session(ctx) // every With under this ctx gets the same connection for an address, nested or not
		defer end()                   // and gives them all back here

		lease, err := pool.Lease(ctx, addr) // a net.Conn whose Close gives it back
		if err != nil {
			return err
		}
		defer lease.Return()
	}
	{
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := pool.Warm(ctx, addr, 5); err != nil {
			log.Fatal(err) // the server is down, and we know before the first request
		}
	}
	{
		client := http.Client{Transport: &http.Transport{DialContext: pool.DialContext}}
		_ = client
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
		dial := pool.DialThrough((&net.Dialer{LocalAddr: local}).DialContext, 0)
		_ = dial
	}
	{
		var client struct {
			Dial func(ctx context.Context, network, address string) (net.Conn, error)
		}
		client.Dial = pool.LeaseContext
		client.Dial = pool.LeaseDialer(connpool.Addr{Transport: connpool.TLS})
	}
	{
		err := pool.With(ctx, addr, request)
		var e *connpool.Error
		switch {
		case err == nil:
		case errors.As(err, &e):
			log.Printf("not sent: stage %v, kind %v, after %v: %v", e.Stage, e.Kind, e.Waited, err)
		case connpool.KindOf(err) == connpool.KindBroken, connpool.KindOf(err) == connpool.KindEOF:
			log.Printf("may have been sent; repeat it only if that does no harm: %v", err)
		default:
			log.Printf("the request failed: %v", err)
		}
	}
	{
		expvar.Publish("connpool", expvar.Func(func() any { return pool.Stats() }))
		slog.Info(pool.Stats().String())
		for addr, s := range pool.Addrs() {
			if s.BackingOff {
				slog.Warn("server is down", "addr", addr, "err", s.LastErr)
			}
		}
		ctx = connpool.WithTrace(ctx, &connpool.Trace{GotConn: func(i connpool.GotInfo) {
			slog.Info("borrowed", "addr", i.Addr, "conn", i.ID, "reused", i.Reused, "waited", i.Waited)
		}})
		_ = ctx
	}
	{
		limits := pool.Limits()
		limits.MaxPerAddr = 2 // the server asked for fewer
		if err := pool.SetLimits(limits); err != nil {
			log.Print(err)
		}
	}
	return nil
}

var _ = pages

// throughProxy is a dialer through a proxy at an address, which greet asks for the connection.
func throughProxy(proxy string, greet func(context.Context, net.Conn, connpool.Addr) error) connpool.Config {
	return connpool.Config{Dialers: map[connpool.Transport]connpool.DialFunc{
		connpool.TCP: func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			nc, err := (&net.Dialer{Control: addr.QoS.Control}).DialContext(ctx, "tcp", proxy)
			if err != nil {
				return nil, err
			}
			stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
			err = greet(ctx, nc, addr) // asks the proxy for addr
			if !stop() {
				err = ctx.Err()
			}
			if err != nil {
				nc.Close()
				return nil, err
			}
			return nc, nil // the socket itself
		},
	}}
}

var _ = throughProxy
