// LDAP: bind and search. Run it as it is, or with the address of a directory and the name
// to look for. The scope of the address names the user that binds; the password is taken
// from LDAP_PASSWORD:
//
//	go run ./ldap ['tls://ldap.example:636?scope=cn=app,dc=example' alice]
//
// What the pool does for its user:
//
//   - Bind runs once per connection, in Setup, not before each search.
//   - The bound user is part of the address (Scope): a search for one identity
//     never runs on a connection that is bound as another.
//   - A directory that shuts down sends an unrequested message (notice of
//     disconnection). The pool closes an idle connection with unrequested
//     bytes, so they are never taken for the answer to the next search.
//   - "No such object" is an answer: Keep. A bind that is refused fails the
//     borrow, and no half-bound connection stays behind.
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

// mail shows the use of the pool.
func (d *directory) mail(ctx context.Context, addr connpool.Addr, uid string) (mails []string, err error) {
	err = d.pool.With(ctx, addr, func(c connpool.Conn) error {
		mails, err = connpool.State[*codec](c).search(base, "uid", uid, "mail")
		return err
	})
	return mails, err
}

// directory searches as the user that the scope of an address names.
type directory struct{ pool *connpool.Pool }

const base = "ou=people,dc=example"

func newDirectory(password func(who string) string) (*directory, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 4,
		Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			k := &codec{Reader: bufio.NewReader(nc), w: nc}
			return k, k.bind(addr.Scope, password(addr.Scope))
		},
	})
	return &directory{pool}, err
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var addr connpool.Addr
	password, uids := os.Getenv("LDAP_PASSWORD"), []string{"alice", "nobody", "bob"}
	if len(args) > 0 {
		var err error
		if addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
		uids = args[1:]
	} else {
		s, err := loopback.Start(serveDirectory)
		if err != nil {
			return err
		}
		defer s.Close()
		addr, password = s.Addr(), "secret"
		addr.Scope = "cn=app,dc=example"
	}
	d, err := newDirectory(func(string) string { return password })
	if err != nil {
		return err
	}
	defer d.pool.Close()
	for _, uid := range uids {
		mails, err := d.mail(ctx, addr, uid)
		fmt.Fprintf(w, "%s: %v, %v\n", uid, mails, err)
		var result *result
		if err != nil && !errors.As(err, &result) {
			return err
		}
	}
	fmt.Fprintf(w, "binds: %d\n", d.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
