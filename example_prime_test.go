package connpool_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

func ExamplePool_Warm() {
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := pool.Warm(ctx, addr, 5); err != nil {
		log.Fatal(err) // the server is down, and we know before the first request
	}
	fmt.Println(pool.Stats().Idle, "idle before the first borrow")
	// Output: 5 idle before the first borrow
}

// The second of two borrowers at the same time finds a connection that was
// opened while the first got its own.
func ExampleConfig_minSpare() {
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	pool, err := connpool.New(connpool.Config{MinIdlePerAddr: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	err = pool.With(context.Background(), addr, func(connpool.Conn) error {
		for pool.Stats().Idle == 0 { // it is being opened
			time.Sleep(time.Millisecond)
		}
		return pool.With(context.Background(), addr, func(connpool.Conn) error {
			fmt.Println(pool.Stats().Waits, "borrower had to wait")
			return nil
		})
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: 1 borrower had to wait
}

func ExamplePool_SetLimits() {
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 8})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)
	if err := pool.Warm(context.Background(), addr, 6); err != nil {
		log.Fatal(err)
	}

	limits := pool.Limits()
	limits.MaxPerAddr = 2 // the server asked for fewer
	if err := pool.SetLimits(limits); err != nil {
		log.Fatal(err)
	}
	fmt.Println(pool.Stats().Idle, "idle")

	limits.MaxIdlePerAddr = 3
	fmt.Println(pool.SetLimits(limits))
	// Output:
	// 2 idle
	// connpool: usage: Limits.MaxIdlePerAddr and Limits.MaxPerAddr contradict each other: 3 can never be reached under 2
}

// A server that sends prices when they change, and answers questions in
// between. Each connection has one feed, which ends with it.
//
// BETA-18, BETA-19
func ExampleConfig_push() {
	var mu sync.Mutex
	var clients []net.Conn
	address, stop := serve(func(nc net.Conn) {
		mu.Lock()
		clients = append(clients, nc)
		mu.Unlock()
		lines(func(s string) string { return "answer to " + s + "\n" })(nc)
	})
	defer stop()

	feed := make(chan string)
	pool, err := connpool.New(connpool.Config{
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			context.AfterFunc(nc.(connpool.Conn).Context(), func() { close(feed) })
			return bufio.NewReader(nc), nil
		},
		Push: func(_ context.Context, c connpool.Conn) error {
			line, err := connpool.State[*bufio.Reader](c).ReadString('\n')
			if err != nil || !strings.HasPrefix(line, "price ") {
				return fmt.Errorf("no price: %q, %v", line, err)
			}
			feed <- strings.TrimSpace(line)
			return nil
		},
		SweepInterval: 20 * time.Millisecond, // how soon, where nothing tells the pool at once
	})
	if err != nil {
		log.Fatal(err)
	}
	addr := connpool.MustParseAddr("tcp://" + address)
	question := func(c connpool.Conn) error {
		if _, err := io.WriteString(c, "life\n"); err != nil {
			return err
		}
		line, err := connpool.State[*bufio.Reader](c).ReadString('\n')
		fmt.Print(line)
		return err
	}
	if err := pool.With(context.Background(), addr, question); err != nil {
		log.Fatal(err)
	}
	io.WriteString(clients[0], "price 42\nprice 43\n")
	fmt.Println(<-feed)
	fmt.Println(<-feed)
	pool.Close()
	_, open := <-feed
	fmt.Println("feed open:", open)
	// Output:
	// answer to life
	// price 42
	// price 43
	// feed open: false
}

// An http.Transport keeps its connections itself. With the pool as its dialer
// they count, and share the budget of file handles with all the others.
//
// TDBC-02
func ExamplePool_DialContext() {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "you asked for %s", r.URL.Path)
	}))
	defer server.Close()
	pool, err := connpool.New(connpool.Config{MaxOpen: 100})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	client := http.Client{Transport: &http.Transport{DialContext: pool.DialContext}}
	for range 3 {
		resp, err := client.Get(server.URL + "/x")
		if err != nil {
			log.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s; %d connection\n", body, pool.Stats().Tracked)
	}
	client.CloseIdleConnections() // Shutdown of the pool would wait for them
	// Output:
	// you asked for /x; 1 connection
	// you asked for /x; 1 connection
	// you asked for /x; 1 connection
}

// A library that dials for each call, and closes, works over warm connections.
func ExamplePool_LeaseContext() {
	addr, stop := listen(func(nc net.Conn) { io.Copy(nc, nc) })
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	type client struct { // of the library
		Dial func(ctx context.Context, network, address string) (net.Conn, error)
	}
	call := func(k client, request string) {
		nc, err := k.Dial(context.Background(), "tcp", addr.HostPort())
		if err != nil {
			log.Fatal(err)
		}
		defer nc.Close()
		fmt.Fprint(nc, request)
		reply := make([]byte, len(request))
		io.ReadFull(nc, reply)
		fmt.Printf("%s; %d dialed\n", reply, pool.Stats().Dials)
	}
	k := client{Dial: pool.LeaseContext}
	call(k, "one")
	call(k, "two")
	// Output:
	// one; 1 dialed
	// two; 1 dialed
}

var _ func(context.Context, string, string) (net.Conn, error) = new(connpool.Pool).DialContext
