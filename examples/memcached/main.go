// Memcached, text protocol. Run it as it is, or with the address of a server:
//
//	go run ./memcached [tcp://127.0.0.1:11211]
//
// What the pool does for its user:
//
//   - A panic between the request and its answer, or a return in the middle of
//     a value, leaves bytes on the connection that the next caller would take
//     for its own. The pool closes such a connection.
//   - "Not found" is an answer and no failure: with Keep the connection stays.
//   - When the server restarts, connections that died while idle are never lent.
//   - There is one bufio.Reader per connection, not per call: the bytes read
//     ahead belong to the connection, and the pool asks the reader whether any
//     are left.
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

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// get shows the use of the pool.
func (m *cache) get(ctx context.Context, key string) (value string, err error) {
	err = m.pool.With(ctx, m.addr, func(c connpool.Conn) error {
		value, err = connpool.State[*codec](c).get(key)
		return err
	})
	return value, err
}

func (m *cache) set(ctx context.Context, key, value string) error {
	return m.pool.With(ctx, m.addr, func(c connpool.Conn) error {
		return connpool.State[*codec](c).set(key, value)
	})
}

// cache is a client of one server. Any number of goroutines may use it.
type cache struct {
	pool *connpool.Pool
	addr connpool.Addr
}

func newCache(addr connpool.Addr) (*cache, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 8,
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{bufio.NewReader(nc), nc}, nil
		},
		Check: func(_ context.Context, c connpool.Conn) error {
			return connpool.State[*codec](c).ping()
		},
	})
	return &cache{pool, addr}, err
}

func run(w io.Writer, args []string) error {
	ctx := context.Background()
	addr := connpool.Addr{}
	if len(args) > 0 {
		var err error
		if addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
	} else {
		s, err := loopback.Start(newStore().serve)
		if err != nil {
			return err
		}
		defer s.Close()
		addr = s.Addr()
	}
	m, err := newCache(addr)
	if err != nil {
		return err
	}
	defer m.pool.Close()

	if err := m.set(ctx, "colour", "blue"); err != nil {
		return err
	}
	value, err := m.get(ctx, "colour")
	fmt.Fprintf(w, "colour: %q, %v\n", value, err)
	_, err = m.get(ctx, "shape of water")
	fmt.Fprintf(w, "shape of water: %v\n", err)
	_, err = m.get(ctx, "no-such-key")
	fmt.Fprintf(w, "no-such-key: %v\n", err)
	if !errors.Is(err, errMiss) {
		return err
	}
	fmt.Fprintf(w, "connections opened: %d\n", m.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
