package connpooltest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpooltest"
)

// The code of docs/testing.md.

var errSlow = errors.New("no value in time")

// store is a client of a store of values: a line there, a line back.
type store struct {
	pool *connpool.Pool
	addr connpool.Addr
}

func (s *store) Get(ctx context.Context, key string) (value string, err error) {
	err = s.pool.With(ctx, s.addr, func(c connpool.Conn) error {
		c.SetDeadline(time.Now().Add(500 * time.Millisecond)) // nobody waits longer for a value
		if _, err := fmt.Fprintf(c, "GET %s\n", key); err != nil {
			return err
		}
		value, err = connpool.State[*bufio.Reader](c).ReadString('\n')
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return connpool.Keep(errSlow) // nothing is wrong with the connection
		}
		return err
	})
	return value, err
}

var storeHarness = connpooltest.Harness{
	Protocol: connpooltest.Lines(func(line string) string { return "value of " + strings.TrimPrefix(line, "GET ") }),
	Config: connpool.Config{Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		return bufio.NewReader(nc), nil
	}},
	Client: func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return (&store{pool, addr}).Get, nil
	},
}

// mended is a store whose Get closes the connection after a time-out.
type mended struct{ store }

func (s *mended) Get(ctx context.Context, key string) (value string, err error) {
	err = s.pool.With(ctx, s.addr, func(c connpool.Conn) error {
		c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := fmt.Fprintf(c, "GET %s\n", key); err != nil {
			return err
		}
		value, err = connpool.State[*bufio.Reader](c).ReadString('\n')
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return errSlow // its value is still to come: the pool closes the connection
		}
		return err
	})
	return value, err
}

func mendedHarness() connpooltest.Harness {
	h := storeHarness
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return (&mended{store{pool, addr}}).Get, nil
	}
	return h
}

func FuzzStore(f *testing.F) { connpooltest.Fuzz(f, mendedHarness()) }

func TestTheMendedStorePasses(t *testing.T) {
	h := mendedHarness()
	h.Executions = executions()
	connpooltest.Desync(t, h)
}

// The page shows what a run prints.
func TestThePageShowsWhatARunPrints(t *testing.T) {
	page, err := os.ReadFile("../docs/testing.md")
	require.NoError(t, err)
	f := found(t, storeHarness.Search(t))
	for _, line := range strings.Split(f.Error(), "\n") { // two at one moment may change places
		require.Contains(t, string(page), "\n    "+line+"\n")
	}
}

func TestGetFailsWhenTheDialFails(t *testing.T) {
	server := connpooltest.NewServer(t, storeHarness.Protocol)
	pool := connpooltest.NewPool(t, server, storeHarness.Config)
	client := &mended{store{pool, server.Addr()}}

	value, err := client.Get(t.Context(), "a")
	require.NoError(t, err)
	require.Equal(t, "value of a\n", value)

	server.CutIdle()
	server.FailNextDial(1, nil)
	_, err = client.Get(t.Context(), "a")
	require.Equal(t, connpool.KindRefused, connpool.KindOf(err))

	server.Play(connpooltest.MustParseScript("cut@3 ok"))
	_, err = client.Get(t.Context(), "a")
	require.Equal(t, connpool.KindEOF, connpool.KindOf(err))
	_, err = client.Get(t.Context(), "a")
	require.NoError(t, err)
	connpooltest.AssertReturned(t, pool)
}
