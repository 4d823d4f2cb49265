// Apache Thrift: framed transport, binary protocol. The code that the Thrift compiler
// generates calls its server through a thrift.TClient. The type client below is a
// thrift.TClient over the pool, so generated clients work unchanged, and any number of
// goroutines may share them:
//
//	calculator.NewCalculatorClient(&client{pool, addr}).Add(ctx, 1, 2)
//
// (This example uses no generated code: it writes out the two structures of one call.)
//
// What the pool does for its user:
//
//   - A generated client has one transport and is for one goroutine at a time.
//     If goroutines share it, their answers get mixed up.
//   - IsOpen of the library's socket returns true after the server has gone.
//   - The library's transports read ahead into a buffer that nobody can
//     inspect. The frames here are read from a buffer that the pool can ask.
//   - An exception of the method is an answer. If the ctx ends in the middle of
//     a call, the pool closes the connection, and nobody gets the late answer.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"

	"github.com/apache/thrift/lib/go/thrift"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// Call shows the use of the pool.
func (c *client) Call(ctx context.Context, method string, args, result thrift.TStruct) (meta thrift.ResponseMeta, err error) {
	err = c.pool.With(ctx, c.addr, func(conn connpool.Conn) error {
		meta, err = connpool.State[*codec](conn).call(ctx, method, args, result)
		return err
	})
	return meta, err
}

// client is a thrift.TClient for one server.
type client struct {
	pool *connpool.Pool
	addr connpool.Addr
}

var _ thrift.TClient = (*client)(nil)

func newClient(addr connpool.Addr) (*client, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 4,
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return newCodec(nc), nil
		},
	})
	return &client{pool, addr}, err
}

// divide is what the compiler would generate for
//
//	service Calculator { i32 divide(1: i32 a, 2: i32 b) }
func divide(ctx context.Context, c thrift.TClient, a, b int32) (int32, error) {
	var result numbers
	_, err := c.Call(ctx, "divide", &numbers{1: a, 2: b}, &result)
	if err != nil {
		return 0, err
	}
	return result[0], nil
}

func run(w io.Writer) error {
	ctx := context.Background()
	s, err := loopback.Start(serveCalculator)
	if err != nil {
		return err
	}
	defer s.Close()
	c, err := newClient(s.Addr())
	if err != nil {
		return err
	}
	defer c.pool.Close()
	for _, p := range [][2]int32{{84, 2}, {1, 0}, {100, 7}} {
		q, err := divide(ctx, c, p[0], p[1])
		fmt.Fprintf(w, "%d / %d = %d, %v\n", p[0], p[1], q, err)
	}
	fmt.Fprintf(w, "connections opened: %d\n", c.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout); err != nil {
		log.Fatal(err)
	}
}
