// Package netrpc makes calls of package net/rpc over pooled connections.
//
//	pool, err := connpool.New(connpool.Config{MaxPerAddr: 8, Setup: netrpc.Setup})
//	client := netrpc.New(pool, connpool.MustParseAddr("tcp://127.0.0.1:7000"))
//	err = client.Call(ctx, "Arith.Multiply", args, &product)
//
// An rpc.Client of the library has one connection for all calls, knows no ctx, and fails for ever
// when the connection has ended. It reads its connection all the time and matches replies by
// their number, so it is a resident of its connection, see connpool.Resident.
package netrpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"

	"github.com/seed-ecb488c9/connpool"
)

// Setup is for Config.Setup of the pool. The connections speak gob, as rpc.Dial has it.
func Setup(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	return connpool.Resident(rpc.NewClient(nc), nil), nil
}

// SetupJSON is like Setup. The connections speak JSON, as jsonrpc.Dial has it.
func SetupJSON(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	return connpool.Resident(jsonrpc.NewClient(nc), nil), nil
}

// Client calls one server. Its methods may be called by many goroutines at once.
type Client struct {
	pool *connpool.Pool
	addr connpool.Addr
}

// New makes a client over a pool whose Config.Setup is Setup or SetupJSON, or calls one of these
// for addr.
func New(pool *connpool.Pool, addr connpool.Addr) *Client { return &Client{pool, addr} }

// Call calls the method and waits for its reply. When ctx is done, the connection is closed, and
// Call returns; the server may have carried out the call all the same. An rpc.ServerError is the
// method's own error and leaves the connection open. After an *connpool.Error nothing was sent.
func (c *Client) Call(ctx context.Context, method string, args, reply any) error {
	return c.pool.With(ctx, c.addr, func(nc connpool.Conn) error {
		err := connpool.State[*rpc.Client](nc).Call(method, args, reply)
		var answer rpc.ServerError
		switch {
		case errors.As(err, &answer):
			return connpool.Keep(err)
		case err != nil && ctx.Err() != nil:
			return fmt.Errorf("%w: %w", context.Cause(ctx), err) // net/rpc says "connection is shut down"
		}
		return err
	})
}
