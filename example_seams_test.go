package connpool_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// echo is a server that sends back what it gets.
func echo(nc net.Conn) { io.Copy(nc, nc) }

// A client that asks for the type of its connection finds it below the Conn.
func ExampleUnder() {
	addr, stop := listen(echo)
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
		tcp, ok := connpool.Under[*net.TCPConn](c)
		fmt.Println(ok, tcp.RemoteAddr().String() == addr.HostPort())
		return nil
	})
	fmt.Println(err)
	// Output:
	// true true
	// <nil>
}

// A library that dials for each call gets warm connections of one tenant.
func ExamplePool_LeaseDialer() {
	addr, stop := listen(echo)
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	dial := pool.LeaseDialer(connpool.Addr{Transport: connpool.TCP, Scope: "tenant7"})
	for range 2 {
		nc, err := dial(context.Background(), "tcp", addr.HostPort())
		if err != nil {
			log.Fatal(err)
		}
		fmt.Fprint(nc, "ping")
		reply := make([]byte, 4)
		io.ReadFull(nc, reply)
		nc.Close() // gives the connection back
		fmt.Printf("%s; %d dialed\n", reply, pool.Stats().Dials)
	}
	// Output:
	// ping; 1 dialed
	// ping; 1 dialed
}

// A library's own dialer goes through the pool, which counts its connections.
func ExamplePool_DialThrough() {
	addr, stop := listen(echo)
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxOpen: 10})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	own := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	dial := pool.DialThrough(own.DialContext, 0)
	nc, err := dial(context.Background(), "tcp", addr.HostPort())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(nc.LocalAddr().(*net.TCPAddr).IP, pool.Stats().Tracked)
	nc.Close()
	// Output: 127.0.0.1 1
}

// The pool's own dials start from a net.Dialer.
func ExampleConfig_dialer() {
	addr, stop := listen(echo)
	defer stop()
	pool, err := connpool.New(connpool.Config{Dialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
		fmt.Println(c.LocalAddr().(*net.TCPAddr).IP)
		return nil
	})
	fmt.Println(err)
	// Output:
	// 127.0.0.1
	// <nil>
}

// A caller without a ctx does not wait for ever.
func ExampleConfig_waitTimeout() {
	addr, stop := listen(echo)
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, WaitTimeout: 10 * time.Millisecond, MaxBackoff: time.Second})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	lease, err := pool.Lease(context.Background(), addr)
	if err != nil {
		log.Fatal(err)
	}
	err = pool.With(context.Background(), addr, func(connpool.Conn) error { return nil })
	fmt.Println(errors.Is(err, context.DeadlineExceeded))
	var e *connpool.Error
	errors.As(err, &e)
	fmt.Println(e.Stage, e.LimitName)
	lease.Return()
	// Output:
	// true
	// wait MaxPerAddr
}
