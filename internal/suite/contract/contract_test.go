package contract

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/race"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// memPool makes a pool over a network in memory, for a bubble.
func memPool(t *testing.T, mem *faultnet.Mem, cfg connpool.Config) (*connpool.Pool, connpool.Addr) {
	cfg.Dialers = map[connpool.Transport]connpool.DialFunc{"mem": func(ctx context.Context, a connpool.Addr) (net.Conn, error) { return mem.Dial(ctx, a.Host) }}
	p, err := pooltest.New(cfg)
	require.NoError(t, err)
	return p, connpool.Addr{Transport: "mem", Host: "backend"}
}

// exchangeByte is one request and its reply.
func exchangeByte(c connpool.Conn) error {
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// ORA-01: ten thousand users, who think for ten seconds and are served for a
// hundred milliseconds, need about a hundred connections.
func TestTenThousandUsersNeedAHundredConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := faultnet.NewMem()
		defer mem.Close()
		mem.Host("backend").Serve(func(c *faultnet.Conn) {
			b := make([]byte, 1)
			for {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
				c.Write(b)
			}
		})
		p, addr := memPool(t, mem, connpool.Config{})
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		users := short.Of(10_000, 2_000)
		if race.Enabled {
			users = 2000 // the race detector's memory
		}
		var wg tasks.Group
		for u := range users {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(u), 3))
				for {
					select {
					case <-time.After(time.Duration(rng.ExpFloat64() * 10 * float64(time.Second))):
					case <-ctx.Done():
						return
					}
					if err := p.With(context.Background(), addr, exchangeByte); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		st := p.Stats()
		require.Greater(t, st.Loans, uint64(users))
		require.Greater(t, st.PeakOpen, users*8/1000)
		require.Less(t, st.PeakOpen, users*20/1000) // the peak of a small number is farther from its mean
		require.Equal(t, st.PeakOpen, mem.Host("backend").Peak())
		pooltest.Check(t, p)
		require.NoError(t, p.Close())
	})
}

// ORA-03: a server that gets slower the more connections it has is kept where
// it is fast. Without the limit it is not, which is what shows the limit.
func TestOverloadDoesNotSlowTheServerDown(t *testing.T) {
	const limit = 10
	throughput := func(users int, cfg connpool.Config) (loans uint64, peak int) {
		synctest.Test(t, func(t *testing.T) {
			mem := faultnet.NewMem()
			defer mem.Close()
			host := mem.Host("backend")
			host.Serve(func(c *faultnet.Conn) {
				b := make([]byte, 1)
				for {
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					service := 10 * time.Millisecond
					if n := len(host.Conns()); n > limit {
						service = service * time.Duration(n*n*n) / (limit * limit * limit)
					}
					time.Sleep(service)
					c.Write(b)
				}
			})
			p, addr := memPool(t, mem, cfg)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			var wg tasks.Group
			for range users {
				wg.Go(func() {
					for ctx.Err() == nil {
						p.With(context.Background(), addr, exchangeByte)
					}
				})
			}
			wg.Wait()
			pooltest.Check(t, p)
			loans, peak = p.Stats().Loans, host.Peak()
			require.NoError(t, p.Close())
		})
		return loans, peak
	}
	best, _ := throughput(limit, connpool.Config{MaxPerAddr: limit})
	loaded, peak := throughput(10*limit, connpool.Config{MaxPerAddr: limit})
	require.LessOrEqual(t, peak, limit)
	require.GreaterOrEqual(t, loaded, best*9/10)
	unlimited, peak := throughput(10*limit, connpool.Config{})
	require.Equal(t, 10*limit, peak)
	require.Less(t, unlimited, best/2)
}

type credential struct{}

// ORA-21: credentials come with each borrow, in the ctx, and go nowhere else.
func TestSecretsOfABorrowAreShownNowhere(t *testing.T) {
	const secret = "hunter2-" + "correct-horse"
	n := pooltest.StartSock(t, "tls13", faultnet.Options{Record: true})
	var seen bytes.Buffer
	var mu sync.Mutex
	show := func(v any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(&seen, "%v %+v %#v\n", v, v, v)
	}
	p := n.Pool(t, func(c *connpool.Config) {
		c.MaxPerAddr = 1
		c.Logger = slog.New(slog.NewTextHandler(&lockedWriter{mu: &mu, w: &seen}, &slog.HandlerOptions{Level: slog.LevelDebug}))
		c.Trace = &connpool.Trace{
			GetConn:  func(a connpool.Addr) { show(a) },
			Wait:     func(i connpool.WaitInfo) { show(i) },
			GotConn:  func(i connpool.GotInfo) { show(i) },
			DialDone: func(i connpool.DialInfo) { show(i) },
			PutConn:  func(i connpool.PutInfo) { show(i) },
			Closed:   func(i connpool.CloseInfo) { show(i) },
		}
		c.Setup = func(ctx context.Context, a connpool.Addr, nc net.Conn) (any, error) {
			word, _ := ctx.Value(credential{}).(string)
			if word == "" {
				return nil, errors.New("no credentials")
			}
			_, err := faultnet.Ask(nc, "AUTH-"+a.Scope+"-"+word)
			return nil, err
		}
	})
	borrow := func(who, word string) error {
		a := n.Addr
		a.Scope = who
		ctx := context.WithValue(t.Context(), credential{}, word)
		return p.With(ctx, a, func(c connpool.Conn) error {
			show(c)
			_, err := faultnet.Ask(c, faultnet.NewToken())
			return err
		})
	}
	require.NoError(t, borrow("alice", secret+"-a"))
	require.NoError(t, borrow("bob", secret+"-b"))
	require.NoError(t, borrow("alice", secret+"-a"))
	err := borrow("carol", "")
	require.Error(t, err)
	show(err)
	n.Server.CutIdle(-1, faultnet.FIN)
	patience.Soon(t, "idle ones dead", func() bool { return n.Server.Open() == 0 })
	require.NoError(t, borrow("alice", secret+"-a"))
	n.Server.Stop()
	err = borrow("dave", secret+"-d")
	require.Error(t, err)
	show(err)
	show(p.Stats())
	for a, st := range p.Addrs() {
		show(a)
		show(st)
		show(a.String())
	}
	require.NoError(t, p.Close())
	pooltest.Settled(t, p)
	mu.Lock()
	defer mu.Unlock()
	require.NotContains(t, seen.String(), "hunter2")
	require.Contains(t, seen.String(), "alice", "nothing was looked at")
	require.Contains(t, seen.String(), "level=", "nothing was logged")

	// ... but each reached the server, on a connection of its own.
	require.Equal(t, "AUTH-alice-"+secret+"-a", n.Server.Lines(1)[0])
	require.Equal(t, "AUTH-bob-"+secret+"-b", n.Server.Lines(2)[0])
	require.Len(t, n.Server.Lines(1), 3)
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// ORA-25, PLT-12
func TestTenServletsShareOnePool(t *testing.T) {
	const limit = 4
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, func(c *connpool.Config) { c.MaxPerAddr = limit })
	mux := http.NewServeMux()
	for i := range 10 {
		mux.HandleFunc(fmt.Sprintf("/servlet%d", i), func(w http.ResponseWriter, r *http.Request) {
			err := p.With(r.Context(), n.Addr, func(c connpool.Conn) error {
				_, err := faultnet.Ask(c, faultnet.NewToken())
				return err
			})
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
			}
		})
	}
	var wg tasks.Group
	var bad atomic.Int32
	for i := range 200 {
		wg.Go(func() {
			w := httptest.NewRecorder()
			mux.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprintf("/servlet%d", i%10), nil))
			if w.Code != http.StatusOK {
				bad.Add(1)
			}
		})
	}
	wg.Wait()
	require.Zero(t, bad.Load())
	st := pooltest.Settled(t, p)
	require.LessOrEqual(t, st.PeakOpen, limit)
	require.LessOrEqual(t, n.Server.Accepts(), limit)
	require.EqualValues(t, 200, st.Loans)
}

// APR-13: what the pool opens, the pool closes, once.
func TestWhatWasOpenedIsClosedUnderLoadAndFailures(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "unix"} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{})
			var opened, closed, twice, setups, torn atomic.Int64
			transport := n.Addr.Transport
			if n.TLS {
				transport = connpool.TCP
			}
			p := n.Pool(t, func(c *connpool.Config) {
				c.MaxPerAddr, c.MaxIdle, c.MaxUses = 6, 5, 40
				c.Dialers = map[connpool.Transport]connpool.DialFunc{transport: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
					if rand.IntN(10) == 0 {
						return nil, errors.New("no luck")
					}
					nc, err := dial(ctx, a)
					if err != nil {
						return nil, err
					}
					opened.Add(1)
					return &accounted{Conn: nc, closed: &closed, twice: &twice}, nil
				}}
				c.Setup = func(context.Context, connpool.Addr, net.Conn) (any, error) {
					if rand.IntN(10) == 0 {
						return nil, errors.New("access denied")
					}
					setups.Add(1)
					return closer{&torn}, nil
				}
			})
			var wg tasks.Group
			for w := range 16 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 13))
					for range short.Of(60, 20) {
						ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+rng.IntN(20))*time.Millisecond)
						p.With(ctx, pooltest.Scoped(n.Addr, rng.IntN(2)), func(c connpool.Conn) error {
							switch rng.IntN(12) {
							case 0:
								return errors.New("fn failed")
							case 1:
								return c.Close()
							case 2:
								n.Server.CutIdle(1, faultnet.Cut(rng.IntN(3)))
							case 3:
								p.EvictLRU()
							case 4:
								cancel()
							}
							_, err := faultnet.Ask(c, faultnet.NewToken())
							return err
						})
						cancel()
					}
				})
			}
			wg.Wait()
			pooltest.Check(t, p)
			require.NoError(t, p.Close())
			st := pooltest.Settled(t, p)
			require.Zero(t, st.Open)
			require.Positive(t, opened.Load())
			require.Equal(t, opened.Load(), closed.Load())
			if !n.TLS { // crypto/tls closes the socket of a handshake that is interrupted
				require.Zero(t, twice.Load())
			}
			require.Equal(t, setups.Load(), torn.Load(), "what Setup made is closed with the connection")
			unbooked := uint64(opened.Load()) // sockets that never became a connection of the pool's
			for _, k := range st.Closed {
				unbooked -= k
			}
			if !n.TLS { // only a handshake can lose one
				require.Zero(t, unbooked)
			}
			require.LessOrEqual(t, unbooked, st.DialErrors)
			patience.Soon(t, "the server empty", func() bool { return n.Server.Open() == 0 })
		})
	}
}

// accounted counts how often it is closed.
type accounted struct {
	net.Conn
	done          atomic.Bool
	closed, twice *atomic.Int64
}

func (a *accounted) NetConn() net.Conn { return a.Conn }

func (a *accounted) Close() error {
	if a.done.Swap(true) {
		a.twice.Add(1)
	} else {
		a.closed.Add(1)
	}
	return a.Conn.Close()
}

type closer struct{ n *atomic.Int64 }

func (c closer) Close() error {
	c.n.Add(1)
	return nil
}

// dial is what the pool does to an address without QoS.
func dial(ctx context.Context, a connpool.Addr) (net.Conn, error) {
	var d net.Dialer
	if a.Transport == connpool.Unix {
		return d.DialContext(ctx, "unix", a.Host)
	}
	return d.DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
}
