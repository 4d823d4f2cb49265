// Package net/rpc of the standard library, with its gob encoding, over pooled
// connections.
//
// The library's own rpc.Client keeps one connection, from which a goroutine reads all the
// time. A slow reply does not delay the others, but a large reply does. When the
// connection ends, the client ends too (it returns ErrShutdown for ever), and nobody
// dials again. This example speaks the same protocol, one call at a time, over as many
// connections as are needed.
//
// What the pool does for its user:
//
//   - Encoder and decoder live as long as the connection. gob describes each
//     type once per stream: a new encoder on an old connection describes it
//     again ("duplicate type received"), a new decoder misses the descriptions.
//   - The pool dials again after the server was restarted, without an
//     ErrShutdown.
//   - An error of the method is an answer: with Keep the connection stays. If
//     the ctx ends in the middle of a call, the pool closes the connection.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/rpc"
	"os"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// call shows the use of the pool.
func (c *client) call(ctx context.Context, method string, args, reply any) error {
	return c.pool.With(ctx, c.addr, func(conn connpool.Conn) error {
		return connpool.State[*codec](conn).call(method, args, reply)
	})
}

// client calls one server. Any number of goroutines may use it.
type client struct {
	pool *connpool.Pool
	addr connpool.Addr
}

func newClient(addr connpool.Addr) (*client, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 4,
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return newCodec(nc), nil
		},
	})
	return &client{pool, addr}, err
}

// Arith is the service of the example.
type Arith struct{}

// Pair is the argument of its methods.
type Pair struct{ A, B int }

// Divide divides A by B.
func (Arith) Divide(p Pair, quotient *int) error {
	if p.B == 0 {
		return errors.New("division by zero")
	}
	*quotient = p.A / p.B
	return nil
}

func run(w io.Writer) error {
	server := rpc.NewServer()
	if err := server.Register(Arith{}); err != nil {
		return err
	}
	s, err := loopback.Start(func(nc net.Conn) { server.ServeConn(nc) })
	if err != nil {
		return err
	}
	defer s.Close()
	c, err := newClient(s.Addr())
	if err != nil {
		return err
	}
	defer c.pool.Close()

	for _, p := range []Pair{{84, 2}, {1, 0}, {100, 7}} {
		var q int
		err := c.call(context.Background(), "Arith.Divide", p, &q)
		fmt.Fprintf(w, "%d / %d = %d, %v\n", p.A, p.B, q, err)
	}
	fmt.Fprintf(w, "connections opened: %d\n", c.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout); err != nil {
		log.Fatal(err)
	}
}
