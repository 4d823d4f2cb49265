package connpooltest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpooltest"
)

// A client keeps its readers in a map, where the pool does not see what is left in them. A
// frame that nobody asked for stays in the reader, and the next borrower takes it for the
// reply.
func ExampleHarness_Run() {
	readers := make(map[string]*bufio.Reader)
	harness := connpooltest.Harness{
		Protocol: connpooltest.Lines(func(key string) string { return "value of " + key }),
		Config: connpool.Config{Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			readers[nc.LocalAddr().String()] = bufio.NewReader(nc)
			return nil, nil
		}},
		Client: func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
			return func(ctx context.Context, key string) (value string, err error) {
				err = pool.With(ctx, addr, func(c connpool.Conn) (err error) {
					fmt.Fprintln(c, key)
					value, err = readers[c.LocalAddr().String()].ReadString('\n')
					return err
				})
				return value, err
			}, nil
		},
		Loopback: true, // without it, Run needs the *testing.T of a test
		Patience: time.Minute,
	}
	script, err := connpooltest.ParseScript("extra ok")
	if err != nil {
		fmt.Println(err)
		return
	}
	err = harness.Run(nil, script)
	if failure := new(connpooltest.Failure); errors.As(err, &failure) {
		fmt.Println(failure.Kind)
		fmt.Println(failure.Text)
	}
	// Output:
	// misdelivered
	// a reply reached the wrong borrower: step 1 asked for t001igjk, and got "value of t000cdrd\n", the reply to step 0
}

func ExampleScript() {
	script := connpooltest.Script{
		{Fault: connpooltest.Split, At: -1, Overlap: true},
		{Fault: connpooltest.Late},
		{},
	}
	fmt.Println(script)
	fmt.Println(connpooltest.FromBytes(script.Bytes()))
	// Output:
	// split@-1& late@0 ok
	// split@-1& late@0 ok
}
