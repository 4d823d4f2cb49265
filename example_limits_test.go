package connpool_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// Two devices in one pool: one takes a single connection, the other four.
func ExampleConfig_limitsFor() {
	one, stop := serve(lines(strings.ToUpper))
	defer stop()
	other, stop := serve(lines(strings.ToUpper))
	defer stop()
	small, large := connpool.MustParseAddr("tcp://"+one), connpool.MustParseAddr("tcp://"+other)

	takes := map[connpool.Addr]int{small: 1, large: 4}
	limitsFor := func(a connpool.Addr) (connpool.AddrLimits, error) {
		return connpool.AddrLimits{MaxOpen: takes[a]}, nil // 0, for all others, means MaxPerAddr
	}
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 2, LimitsFor: limitsFor})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	ctx := context.Background()
	fmt.Println(pool.Warm(ctx, large, 4))
	err = pool.Warm(ctx, small, 2)
	_, why, _ := strings.Cut(err.Error(), one+": ")
	fmt.Println(why)
	// Output:
	// <nil>
	// 2 connections can never be kept: the MaxOpen that Config.LimitsFor gives allows 1 (warm fewer, or raise it)
}

// The password of a user has changed: connections that logged in with the old one go, at all
// servers.
func ExamplePool_RetireFunc() {
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + address)
	for _, user := range []string{"alice", "bob"} {
		addr.Scope = user
		if err := pool.Warm(context.Background(), addr, 2); err != nil {
			log.Fatal(err)
		}
	}
	n := pool.RetireFunc(func(a connpool.Addr) bool { return a.Scope == "alice" })
	fmt.Println(n, "had to go,", pool.Stats().Idle, "are left")
	// Output: 2 had to go, 2 are left
}

// loggedIn is the state of a connection that logged in with a token.
type loggedIn struct{ until time.Time }

// Expires tells the pool until when the connection may be lent.
func (s *loggedIn) Expires() time.Time { return s.until }

// A connection that logged in with a token is not lent after the token has ended.
func ExampleConfig_expires() {
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	pool, err := connpool.New(connpool.Config{
		SweepInterval: -1, // it is found when it is about to be lent
		Setup: func(context.Context, connpool.Addr, net.Conn) (any, error) {
			return &loggedIn{until: time.Now().Add(100 * time.Millisecond)}, nil
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + address)
	use := func() {
		err := pool.With(context.Background(), addr, func(c connpool.Conn) error { return nil })
		if err != nil {
			log.Fatal(err)
		}
	}
	use()
	time.Sleep(100 * time.Millisecond)
	use()
	fmt.Println(pool.Stats().Closed[connpool.ClosedExpired], "expired")
	// Output: 1 expired
}
