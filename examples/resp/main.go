// Redis (RESP3) with pushes: a cache in the client that the server keeps up to date. Run
// it as it is, or with the address of a server of version 6 or later:
//
//	go run ./resp [tcp://127.0.0.1:6379]
//
// Each connection asks the server to track what it reads (CLIENT TRACKING ON). When
// somebody changes one of these keys, the server pushes an invalidation on that
// connection, unasked, and possibly between a request and its reply.
//
// What the pool does for its user:
//
//   - A push that comes while the connection is idle is never taken for the
//     reply to the next request. The pool lends the connection to Config.Push,
//     which reads the push, and to nobody else meanwhile.
//   - When a connection ends, the server forgets what it tracked. The pool
//     closes the state of a connection with the connection, whatever the reason
//     (here: the state drops its part of the cache), so that the cache holds
//     nothing that is no longer tracked.
//   - Without these two, a client reads stale values for ever, or other
//     clients' replies.
//
// On Linux an invalidation is read as soon as it arrives; elsewhere it may come late by
// up to Config.SweepInterval.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// get shows the use of the pool.
func (c *client) get(ctx context.Context, key string) (value string, err error) {
	if value, ok := c.cache.look(key); ok {
		return value, nil
	}
	err = c.pool.With(ctx, c.addr, func(conn connpool.Conn) error {
		value, err = connpool.State[*codec](conn).get(key)
		return err
	})
	return value, err
}

func (c *client) set(ctx context.Context, key, value string) error {
	return c.pool.With(ctx, c.addr, func(conn connpool.Conn) error {
		_, err := connpool.State[*codec](conn).do("SET", key, value)
		return err
	})
}

// client talks to one server. Any number of goroutines may use it.
type client struct {
	pool  *connpool.Pool
	addr  connpool.Addr
	cache *cache
}

func newClient(addr connpool.Addr) (*client, error) {
	shared := newCache()
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr:    4,
		SweepInterval: 50 * time.Millisecond,
		Push: func(_ context.Context, conn connpool.Conn) error {
			return connpool.State[*codec](conn).hear()
		},
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			k := &codec{Reader: bufio.NewReader(nc), w: nc, cache: shared}
			_, err := k.do("HELLO", "3")
			if err == nil {
				_, err = k.do("CLIENT", "TRACKING", "ON")
			}
			return k, err
		},
	})
	return &client{pool, addr, shared}, err
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var addr connpool.Addr
	if len(args) > 0 {
		var err error
		if addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
	} else {
		s, err := loopback.Start(newServer().serve)
		if err != nil {
			return err
		}
		defer s.Close()
		addr = s.Addr()
	}
	mine, err := newClient(addr)
	if err != nil {
		return err
	}
	defer mine.pool.Close()
	theirs, err := newClient(addr)
	if err != nil {
		return err
	}
	defer theirs.pool.Close()

	if err := theirs.set(ctx, "connpool:colour", "blue"); err != nil {
		return err
	}
	for range 1000 {
		if _, err := mine.get(ctx, "connpool:colour"); err != nil {
			return err
		}
	}
	value, err := mine.get(ctx, "connpool:colour")
	fmt.Fprintf(w, "colour: %s, %v; asked the server %d time\n", value, err, mine.pool.Stats().Loans)

	if err := theirs.set(ctx, "connpool:colour", "green"); err != nil {
		return err
	}
	for value == "blue" && ctx.Err() == nil {
		if value, err = mine.get(ctx, "connpool:colour"); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	fmt.Fprintf(w, "colour: %s, after somebody else has changed it\n", value)
	_, err = mine.get(ctx, "connpool:none")
	fmt.Fprintf(w, "none: %v\n", err)
	if !errors.Is(err, errNil) {
		return err
	}
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
