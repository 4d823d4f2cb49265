//go:build unix

package clients

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/gateway"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// forever is longer than anything here takes.
const forever = time.Minute

// through runs a gateway at its defaults in front of a Redis, until the end of
// the test.
func through(t *testing.T) (g *gateway.Gateway, addr string) {
	t.Helper()
	s := realserver.Start(t, realserver.Redis())
	g, err := gateway.New(gateway.Config{
		Listen: "tcp://127.0.0.1:0", To: "tcp://" + s.Addr, Framing: "resp",
		Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	require.NoError(t, g.Listen())
	ctx, end := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(ctx, context.Background()) }()
	t.Cleanup(func() {
		end()
		require.NoError(t, <-ended)
	})
	return g, g.Addr().String()
}

// eventually waits for what follows a close.
func eventually(t *testing.T, what string, yes func() bool) {
	t.Helper()
	require.Eventually(t, yes, forever, time.Millisecond, what)
}

// A go-redis client begins each connection with HELLO, CLIENT SETINFO and
// CLIENT MAINT_NOTIFICATIONS, which a Redis of today refuses. Four clients with
// twenty connections each share the few connections of the gateway all the same.
//
// TRY-26
func TestFourGoRedisClientsAtTheirDefaultsShareTheGateway(t *testing.T) {
	g, addr := through(t)
	ctx, cancel := context.WithTimeout(context.Background(), forever)
	defer cancel()
	var wg sync.WaitGroup
	for k := range 4 {
		c := redis.NewClient(&redis.Options{Addr: addr, PoolSize: 20})
		defer c.Close()
		for i := range 20 {
			wg.Go(func() {
				key := fmt.Sprintf("%d.%d", k, i)
				for n := range 50 {
					if err := c.Set(ctx, key, n, 0).Err(); err != nil {
						t.Errorf("%s: %v", key, err)
						return
					}
					if got, err := c.Get(ctx, key).Int(); err != nil || got != n {
						t.Errorf("%s: got %d, %v; want %d", key, got, err, n)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	st := g.Status()
	for reason, n := range st.Failures {
		require.Zero(t, n, "failures counted as %s", reason)
	}
	require.Zero(t, st.Pinned, "a refused command has pinned somebody")
}

// A rueidis client without its cache has no class of its own either.
//
// TRY-26
func TestARueidisClientWithoutCacheIsNotPinned(t *testing.T) {
	g, addr := through(t)
	ctx, cancel := context.WithTimeout(context.Background(), forever)
	defer cancel()
	for k := range 12 { // more than may be pinned
		c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true, ForceSingleClient: true})
		require.NoError(t, err)
		defer c.Close()
		key := fmt.Sprint("k", k)
		require.NoError(t, c.Do(ctx, c.B().Set().Key(key).Value("v").Build()).Error())
		got, err := c.Do(ctx, c.B().Get().Key(key).Build()).ToString()
		require.NoError(t, err)
		require.Equal(t, "v", got)
	}
	require.Zero(t, g.Status().Pinned)
}

// With its cache it asks for the server's messages, so it gets a connection of
// its own; the client that turns it off again, or leaves, gives it back.
//
// TRY-26
func TestARueidisClientWithItsCacheHoldsAConnectionUntilItLeaves(t *testing.T) {
	g, addr := through(t)
	ctx, cancel := context.WithTimeout(context.Background(), forever)
	defer cancel()
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, ForceSingleClient: true})
	require.NoError(t, err)
	require.NoError(t, c.Do(ctx, c.B().Set().Key("k").Value("v").Build()).Error())
	got, err := c.DoCache(ctx, c.B().Get().Key("k").Cache(), time.Minute).ToString()
	require.NoError(t, err)
	require.Equal(t, "v", got)
	require.NotZero(t, g.Status().Pinned)
	c.Close()
	eventually(t, "the pin ends", func() bool { return g.Status().Pinned == 0 })
}

// What one client writes as a long pipeline before it reads is answered.
//
// TRY-33
func TestAGoRedisPipelineOfManyMegabytesIsAnswered(t *testing.T) {
	_, addr := through(t)
	ctx, cancel := context.WithTimeout(context.Background(), forever)
	defer cancel()
	c := redis.NewClient(&redis.Options{Addr: addr, ReadTimeout: forever, WriteTimeout: forever})
	defer c.Close()
	value := string(make([]byte, 64<<10))
	cmds, err := c.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i := range 512 { // 32 MiB out, 32 MiB back
			p.Set(ctx, fmt.Sprint(i%16), value, 0)
			p.Get(ctx, fmt.Sprint(i%16))
		}
		return nil
	})
	require.NoError(t, err)
	require.Len(t, cmds, 1024)
	require.Len(t, cmds[1023].(*redis.StringCmd).Val(), len(value))
}
