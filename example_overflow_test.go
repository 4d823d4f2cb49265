package connpool_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// A client of a made-up protocol, as those of PostgreSQL work: it keeps its connection
// to itself, and cancels what runs on it over a second one.
type queryClient struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	addr string
	nc   net.Conn
}

func (c *queryClient) query(ctx context.Context, text string) (string, error) {
	defer context.AfterFunc(ctx, c.cancel)()
	if _, err := fmt.Fprintf(c.nc, "query %s\n", text); err != nil {
		return "", err
	}
	return bufio.NewReader(c.nc).ReadString('\n')
}

func (c *queryClient) cancel() {
	nc, err := c.dial(context.Background(), "tcp", c.addr)
	if err != nil {
		log.Print(err)
		return
	}
	defer nc.Close()
	io.WriteString(nc, "cancel\n")
	io.Copy(io.Discard, nc)
}

// The pool has one slot, and the client's own connection takes it. With
// pool.DialContext the cancel request would wait for that connection, and the query
// for the cancel request.
func ExamplePool_DialOverflow() {
	cancelled := make(chan struct{})
	address, stop := serve(func(nc net.Conn) {
		r := bufio.NewReader(nc)
		for {
			line, err := r.ReadString('\n')
			switch {
			case err != nil:
				return
			case line == "cancel\n":
				close(cancelled)
				return
			case strings.HasPrefix(line, "query sleep"):
				<-cancelled
				io.WriteString(nc, "cancelled on request\n")
			}
		}
	})
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxOpen: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	client := &queryClient{dial: pool.DialOverflow(1), addr: address}
	if client.nc, err = client.dial(context.Background(), "tcp", address); err != nil {
		log.Fatal(err)
	}
	defer client.nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	answer, err := client.query(ctx, "sleep for ever")
	fmt.Print(answer, err)
	// Output:
	// cancelled on request
	// <nil>
}
