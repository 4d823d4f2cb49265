package connpoolhttp_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpoolhttp"
)

// The parts of a request all talk to one peer, each as if it were the only one.
func ExampleMiddleware() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	go serveLines(ln)
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + ln.Addr().String())

	ask := func(ctx context.Context, question string) (answer string, err error) {
		err = pool.With(ctx, addr, func(c connpool.Conn) error {
			if _, err := io.WriteString(c, question+"\n"); err != nil {
				return err
			}
			answer, err = bufio.NewReader(c).ReadString('\n')
			return err
		})
		return answer, err
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, question := range []string{"begin", "work", "commit"} {
			answer, err := ask(r.Context(), question)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			io.WriteString(w, answer)
		}
	})
	srv := httptest.NewServer(connpoolhttp.Middleware(pool)(handler))
	defer srv.Close()

	for range 2 {
		resp, err := http.Get(srv.URL)
		if err != nil {
			log.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s", body)
	}
	http.DefaultClient.CloseIdleConnections()
	fmt.Println(pool.Stats().Dials, "connection")
	// Output:
	// begin: number 1 here
	// work: number 2 here
	// commit: number 3 here
	// begin: number 4 here
	// work: number 5 here
	// commit: number 6 here
	// 1 connection
}

// serveLines answers each line with its number on the connection.
func serveLines(ln net.Listener) {
	for {
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer nc.Close()
			lines := bufio.NewScanner(nc)
			for n := 1; lines.Scan(); n++ {
				fmt.Fprintf(nc, "%s: number %d here\n", lines.Text(), n)
			}
		}()
	}
}

// A server that gives each client's connection a session as long as it lasts.
func ExamplePerConnection() {
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	srv := &http.Server{Addr: "127.0.0.1:8080", Handler: http.DefaultServeMux}
	connpoolhttp.PerConnection(srv, pool)
	// srv.ListenAndServe()
}
