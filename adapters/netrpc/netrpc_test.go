//go:build unix

package netrpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/adapters/netrpc"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// Echo is the service.
type Echo struct{}

// Pair is the argument of its methods.
type Pair struct{ N, M int }

// Add adds.
func (Echo) Add(p Pair, sum *int) error {
	if p.M < 0 {
		return errors.New("negative")
	}
	*sum = p.N + p.M
	return nil
}

// The server is this program again: a process that can be killed and started.
func TestMain(m *testing.M) {
	if addr := os.Getenv("NETRPC_SERVE"); addr != "" {
		serve(addr, os.Getenv("NETRPC_CODEC"))
	}
	os.Exit(m.Run())
}

func serve(addr, codec string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	if err := rpc.Register(Echo{}); err != nil {
		panic(err)
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			panic(err)
		}
		if codec == "json" {
			go jsonrpc.ServeConn(nc)
		} else {
			go rpc.ServeConn(nc)
		}
	}
}

// ADO-14: calls of net/rpc, in gob and in JSON, to a server in another process.
func TestCallsOverPooledConnections(t *testing.T) {
	for name, setup := range map[string]func(context.Context, connpool.Addr, net.Conn) (any, error){"gob": netrpc.Setup, "json": netrpc.SetupJSON} {
		t.Run(name, func(t *testing.T) {
			srv := realserver.Start(t, realserver.Itself(t, func(port int) []string {
				return []string{fmt.Sprintf("NETRPC_SERVE=127.0.0.1:%d", port), "NETRPC_CODEC=" + name}
			}))
			adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
				cfg.Setup = setup
				pool, err := connpool.New(cfg)
				require.NoError(t, err)
				addr := connpool.Addr{Transport: connpool.TCP, Host: host, Port: port}
				c := netrpc.New(pool, addr)
				return adaptertest.Client{Pool: pool, Addr: addr, Resident: true,
					Exchange: func(ctx context.Context, n int) error {
						var sum int
						err := c.Call(ctx, "Echo.Add", Pair{n, 7}, &sum)
						if err == nil && sum != n+7 {
							err = fmt.Errorf("asked for %d, got %d", n+7, sum)
						}
						return err
					},
					Refused:   func(ctx context.Context) error { return c.Call(ctx, "Echo.Add", Pair{1, -1}, new(int)) },
					IsRefusal: func(err error) bool { return err == rpc.ServerError("negative") },
				}
			})
		})
	}
}

// ADO-14: a call that the encoding refuses half-way closes the connection, since half of it may
// stand in a buffer; a method that is not there does not.
func TestACallThatCannotBeEncodedReachesNobodyElse(t *testing.T) {
	srv := realserver.Start(t, realserver.Itself(t, func(port int) []string { return []string{fmt.Sprintf("NETRPC_SERVE=127.0.0.1:%d", port)} }))
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, Setup: netrpc.Setup})
	require.NoError(t, err)
	defer pool.Close()
	c := netrpc.New(pool, connpool.MustParseAddr("tcp://"+srv.Addr))
	var sum int
	for n := range 5 {
		require.ErrorContains(t, c.Call(t.Context(), "Echo.Nothing", Pair{}, &sum), "can't find")
		require.NoError(t, c.Call(t.Context(), "Echo.Add", Pair{n, 1}, &sum))
		require.Equal(t, n+1, sum)
		err := c.Call(t.Context(), "Echo.Add", func() {}, &sum)
		require.True(t, err != nil && strings.Contains(err.Error(), "gob"), "%v", err)
		require.NoError(t, c.Call(t.Context(), "Echo.Add", Pair{n, 2}, &sum))
		require.Equal(t, n+2, sum)
	}
	require.EqualValues(t, 6, pool.Stats().Dials)
}
