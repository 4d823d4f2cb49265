package connpool_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/rpc"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// Arith is a service of net/rpc.
type Arith struct{}

func (Arith) Double(n int, twice *int) error {
	*twice = 2 * n
	return nil
}

// listen serves each connection to a new address with serve.
func listen(serve func(net.Conn)) (addr connpool.Addr, stop func()) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(nc)
		}
	}()
	at := ln.Addr().(*net.TCPAddr)
	return connpool.Addr{Transport: connpool.TCP, Host: at.IP.String(), Port: uint16(at.Port)}, func() { ln.Close() }
}

// An rpc.Client reads its connection all the time, and matches replies by a sequence number.
func ExampleResident() {
	srv := rpc.NewServer()
	srv.Register(Arith{})
	addr, stop := listen(func(nc net.Conn) { srv.ServeConn(nc) })
	defer stop()
	pool, err := connpool.New(connpool.Config{
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return connpool.Resident(rpc.NewClient(nc), nil), nil
		},
	})
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	for n := range 3 {
		err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
			var twice int
			err := connpool.State[*rpc.Client](c).Call("Arith.Double", n, &twice)
			fmt.Println(twice)
			return err
		})
		if err != nil {
			panic(err)
		}
	}
	fmt.Println(pool.Stats().Dials, "dial")
	// Output:
	// 0
	// 2
	// 4
	// 1 dial
}

// greeter is a client that dials for itself, and shows no connection.
type greeter struct {
	nc  net.Conn
	in  *bufio.Reader
	err error // what ended it
}

func dialGreeter(ctx context.Context, addr connpool.Addr) (*greeter, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr.Host, fmt.Sprint(addr.Port)))
	if err != nil {
		return nil, err
	}
	return &greeter{nc: nc, in: bufio.NewReader(nc)}, nil
}

func (g *greeter) Greet(name string) (reply string, err error) {
	if _, g.err = fmt.Fprintln(g.nc, name); g.err == nil {
		reply, g.err = g.in.ReadString('\n')
	}
	return reply, g.err
}

func (g *greeter) Err() error   { return g.err }
func (g *greeter) Close() error { return g.nc.Close() }

// A client that dials for itself comes from a dialer of a transport of its own.
func ExampleCarry() {
	addr, stop := listen(func(nc net.Conn) {
		defer nc.Close()
		for in := bufio.NewScanner(nc); in.Scan(); {
			fmt.Fprintln(nc, "hello", in.Text())
		}
	})
	defer stop()
	pool, err := connpool.New(connpool.Config{
		Dialers: map[connpool.Transport]connpool.DialFunc{
			"greeter": func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
				g, err := dialGreeter(ctx, addr)
				if err != nil {
					return nil, err
				}
				return connpool.Carry(g, g.Err, nil), nil
			},
		},
	})
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	addr.Transport = "greeter"
	for _, name := range []string{"Ada", "Grace"} {
		err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
			reply, err := connpool.State[*greeter](c).Greet(name)
			fmt.Print(reply)
			return err
		})
		if err != nil {
			panic(err)
		}
	}
	fmt.Println(pool.Stats().Dials, "dial")
	// Output:
	// hello Ada
	// hello Grace
	// 1 dial
}

// quitter is a client that is not safe for concurrent use, and says goodbye at its end.
type quitter struct{ *greeter }

func (q *quitter) Quit() error {
	fmt.Fprintln(q.nc, "QUIT")
	return q.nc.Close()
}

// quitClient is a quitter for Carry, which gets socket, too.
type quitClient struct {
	*quitter
	socket net.Conn
}

func (k *quitClient) Close() error {
	if err := k.socket.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err // the pool has closed socket first: a borrower may still be in the client
	}
	return k.Quit()
}

var _ = connpool.Carry(&quitClient{}, nil, nil)
