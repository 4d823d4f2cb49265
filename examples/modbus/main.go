// Modbus/TCP. Run it as it is, or with the address of a device whose unit 1 has a holding
// register 0 that may be written:
//
//	go run ./modbus [tcp://192.0.2.7:502?keepalive=30s]
//
// What the pool does for its user:
//
//   - Devices accept few connections, often one. MaxPerAddr is that limit, and
//     callers queue in order instead of being refused by the device.
//   - A reply that comes after its caller gave up is the worst case: the next
//     caller reads the value of another register. The pool closes the
//     connection when the caller gives up; the codec also compares transaction
//     ids.
//   - A device that was switched off leaves a connection that looks open.
//     Keep-alive and user timeout are part of the address, so each device has
//     its own.
//   - An exception reply ("illegal data address") is an answer: Keep.
package main

import (
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

// read shows the use of the pool.
func (d *device) read(ctx context.Context, register, count uint16) (values []uint16, err error) {
	err = d.pool.With(ctx, d.addr, func(c connpool.Conn) error {
		values, err = connpool.State[*codec](c).read(d.unit, register, count)
		return err
	})
	return values, err
}

func (d *device) write(ctx context.Context, register, value uint16) error {
	return d.pool.With(ctx, d.addr, func(c connpool.Conn) error {
		return connpool.State[*codec](c).write(d.unit, register, value)
	})
}

// device is one unit behind an address. Many devices share one pool.
type device struct {
	pool *connpool.Pool
	addr connpool.Addr
	unit byte
}

func newPool() (*connpool.Pool, error) {
	return connpool.New(connpool.Config{
		MaxPerAddr:  1,
		DialTimeout: 3 * time.Second,
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{rw: nc}, nil
		},
	})
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	pool, err := newPool()
	if err != nil {
		return err
	}
	defer pool.Close()
	d := &device{pool: pool, unit: 1}
	if len(args) > 0 {
		if d.addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
	} else {
		s, err := loopback.Start(newPLC(100).serve)
		if err != nil {
			return err
		}
		defer s.Close()
		d.addr = s.Addr()
	}
	if err := d.write(ctx, 0, 4711); err != nil {
		return err
	}
	values, err := d.read(ctx, 0, 2)
	fmt.Fprintf(w, "registers 0 and 1: %v, %v\n", values, err)
	_, err = d.read(ctx, 60000, 1)
	fmt.Fprintf(w, "register 60000: %v\n", err)
	var exception exception
	if err != nil && !errors.As(err, &exception) {
		return err
	}
	fmt.Fprintf(w, "connections opened: %d\n", pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
