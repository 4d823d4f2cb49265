package connpool_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net/textproto"

	"github.com/seed-ecb488c9/connpool"
)

// A transaction over several calls: all of them get the same connection, though
// none of them knows of the others.
func ExamplePool_Session() {
	address, stop := serve(lines(func(line string) string { return "did " + line + "\n" }))
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	do := func(ctx context.Context, what string) error {
		return pool.With(ctx, addr, func(c connpool.Conn) error {
			if _, err := io.WriteString(c, what+"\n"); err != nil {
				return err
			}
			answer, err := bufio.NewReader(c).ReadString('\n')
			fmt.Printf("connection %d: %s", c.Info().ID, answer)
			return err
		})
	}

	ctx, end := pool.Session(context.Background())
	defer end()
	for _, what := range []string{"begin", "insert", "commit"} {
		if err := do(ctx, what); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println("kept by the session:", pool.Stats().InUse)
	end()
	fmt.Println("given back:", pool.Stats().Idle)
	// Output:
	// connection 1: did begin
	// connection 1: did insert
	// connection 1: did commit
	// kept by the session: 1
	// given back: 1
}

// A layer that owns its connection and closes it: on a lease, it gives it back.
func ExamplePool_Lease() {
	address, stop := serve(lines(func(line string) string { return "250 " + line + "\r\n" }))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	for range 2 {
		lease, err := pool.Lease(context.Background(), addr)
		if err != nil {
			log.Fatal(err)
		}
		id := lease.Info().ID
		tp := textproto.NewConn(lease)
		if err := tp.PrintfLine("NOOP"); err != nil {
			log.Fatal(err)
		}
		_, text, err := tp.ReadResponse(250)
		if err != nil {
			log.Fatal(err)
		}
		tp.Close() // returns the lease
		fmt.Printf("%q on connection %d, idle: %d\n", text, id, pool.Stats().Idle)
	}
	// Output:
	// "NOOP" on connection 1, idle: 1
	// "NOOP" on connection 1, idle: 1
}

// I/O on a lease under a ctx, and with what Setup made.
func ExampleLease_Do() {
	address, stop := serve(lines(func(line string) string { return line + "\n" }))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	lease, err := pool.Lease(context.Background(), connpool.MustParseAddr("tcp://"+address))
	if err != nil {
		log.Fatal(err)
	}
	defer lease.Return()

	ctx, cancel := context.WithTimeout(context.Background(), 10e6) // 10 ms
	defer cancel()
	err = lease.Do(ctx, func(c connpool.Conn) error {
		_, err := c.Read(make([]byte, 1)) // nobody asked for anything
		return err
	})
	fmt.Println(connpool.KindOf(err), "- in use:", pool.Stats().InUse) // and the connection is out of step
	// Output:
	// timeout - in use: 0
}
