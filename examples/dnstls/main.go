// DNS over TLS (RFC 7858). Run it as it is, or with the address of a resolver and names:
//
//	go run ./dnstls [tls://9.9.9.9:853 example.org]
//
// What the pool does for its user:
//
//   - It saves a TLS handshake for each question; the handshake is what makes
//     DNS over TLS slow.
//   - Resolvers close idle connections after seconds. Over TLS a close looks
//     like unread data, and so do session tickets; the pool tells them apart
//     before it lends a connection.
//   - The identity is part of the address (server-name). A resolver known by
//     one name never answers for another, and sessions are not resumed across
//     names.
//   - "No such name" is an answer: Keep.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// lookup shows the use of the pool.
func (r *resolver) lookup(ctx context.Context, name string) (addrs []netip.Addr, err error) {
	err = r.pool.With(ctx, r.addr, func(c connpool.Conn) error {
		addrs, err = connpool.State[*codec](c).lookup(name)
		return err
	})
	return addrs, err
}

// resolver asks one server. Any number of goroutines may use it.
type resolver struct {
	pool *connpool.Pool
	addr connpool.Addr
}

// newResolver trusts roots, or the system's roots if roots is nil.
func newResolver(addr connpool.Addr, roots *x509.CertPool) (*resolver, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr:  4,
		IdleTimeout: 10 * time.Second,
		TLS:         &tls.Config{RootCAs: roots, NextProtos: []string{"dot"}},
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{Reader: bufio.NewReader(nc), w: nc}, nil
		},
	})
	return &resolver{pool, addr}, err
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var (
		addr  connpool.Addr
		roots *x509.CertPool
		names = []string{"db.example", "nowhere.example", "db.example"}
		err   error
	)
	if len(args) > 0 {
		if addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
		names = args[1:]
	} else {
		var s *loopback.Server
		s, roots, err = loopback.StartTLS(serveZone)
		if err != nil {
			return err
		}
		defer s.Close()
		addr = s.Addr()
	}
	r, err := newResolver(addr, roots)
	if err != nil {
		return err
	}
	defer r.pool.Close()
	for _, name := range names {
		addrs, err := r.lookup(ctx, name)
		fmt.Fprintf(w, "%s: %v, %v\n", name, addrs, err)
		if err != nil && !errors.Is(err, errNoName) {
			return err
		}
	}
	fmt.Fprintf(w, "handshakes: %d\n", r.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
