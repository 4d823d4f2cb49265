// Package pooltest is what the tests of the pool from outside stand on: a network in
// memory and borrowers that are told what to do (Net, Borrower), servers on real
// sockets (SockNet). It knows no more of the pool than any program: the books are
// audited by the pool itself, in debug mode, in which New makes each pool.
//
// Only tests import it. Those of package connpool itself cannot, and have a harness
// of their own (testnet_test.go, testsock_test.go).
package pooltest

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/seed-ecb488c9/connpool"
)

var audited sync.Map // the pools that New made

// New makes a pool in debug mode.
func New(cfg connpool.Config) (*connpool.Pool, error) {
	cfg.Debug = true
	p, err := connpool.New(cfg)
	if err == nil {
		audited.Store(p, nil)
	}
	return p, err
}

// Check fails the test if the books of a pool, which New must have made,
// contradict themselves. It may run at any moment.
func Check(t testing.TB, p *connpool.Pool) {
	t.Helper()
	if err := Inconsistency(p); err != nil {
		t.Fatal(err)
	}
}

// Inconsistency says in what they do.
func Inconsistency(p *connpool.Pool) (err error) {
	if _, ok := audited.Load(p); !ok {
		return fmt.Errorf("nobody audits this pool: make it with pooltest.New")
	}
	defer func() {
		if r := recover(); r != nil {
			says := fmt.Sprint(r)
			if !strings.HasPrefix(says, "connpool: the books contradict themselves") {
				panic(r)
			}
			err = fmt.Errorf("%s", says)
		}
	}()
	p.Stats()
	return nil
}
