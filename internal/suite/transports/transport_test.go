package transports

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The same behaviour, over every transport. What only a look into the socket
// can bring about is in deadcheck_test.go.

// BETA-09, BETA-03, BETA-06
func TestEveryTransportDialsOnceAndReuses(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		loans := short.Of(1000, 200)
		for i := range loans {
			r := pooltest.Loan(t, p, n.Addr)
			require.Equal(t, faultnet.Reply{Serial: 1, Seq: i + 1, Token: r.Token}, r)
		}
		require.Equal(t, 1, n.Server.Accepts())
		st := p.Stats()
		require.Equal(t, [...]int{1, 1, 0}, [...]int{st.Open, st.Idle, st.InUse})
		require.Equal(t, [...]uint64{uint64(loans), uint64(loans - 1), 1}, [...]uint64{st.Loans, st.Reused, st.Dials})
	})
}

// BETA-09, BETA-04
func TestEveryTransportOpensAsManyAsAreNeeded(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		const k = 6
		for range 3 {
			var out []pooltest.Held
			for range k {
				out = append(out, pooltest.Hold(t, p, n.Addr))
			}
			serials := map[int]bool{}
			for _, h := range out {
				r, err := faultnet.Ask(h, faultnet.NewToken())
				require.NoError(t, err)
				serials[r.Serial] = true
			}
			require.Len(t, serials, k)
			for _, h := range out {
				require.NoError(t, h.End(nil))
			}
			require.Equal(t, k, n.Server.Accepts())
			require.Equal(t, k, p.Stats().Idle)
		}
	})
}

// BETA-09, BETA-22
func TestEveryTransportDiscardsOnError(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		sorry := errors.New("sorry")
		for i, c := range []struct {
			how  func(connpool.Conn) error
			err  error
			why  connpool.CloseReason
			keep bool
		}{
			{func(connpool.Conn) error { return sorry }, sorry, connpool.ClosedFnError, false},
			{func(connpool.Conn) error { return connpool.Keep(sorry) }, sorry, connpool.ClosedUnknown, true},
			{func(c connpool.Conn) error { return c.Close() }, nil, connpool.ClosedByBorrower, false},
			{func(connpool.Conn) error { return fmt.Errorf("wrapped: %w", connpool.Keep(sorry)) }, sorry, connpool.ClosedUnknown, true},
		} {
			before := pooltest.Loan(t, p, n.Addr)
			require.ErrorIs(t, p.With(t.Context(), n.Addr, c.how), c.err)
			require.Equal(t, c.keep, pooltest.Loan(t, p, n.Addr).Serial == before.Serial, i)
			if !c.keep {
				require.EqualValues(t, 1, pooltest.Settled(t, p).Closed[c.why])
			}
		}
		patience.Soon(t, "discarded connections gone at the server", func() bool { return n.Server.Open() == 1 })
	})
}

// BETA-09, BETA-37
func TestEveryTransportClosesEverythingWithThePool(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, func(c *connpool.Config) { c.MaxPerAddr = 5 })
		const idle, busy, waiting = 3, 2, 4
		var out []pooltest.Held
		for range idle + busy {
			out = append(out, pooltest.Hold(t, p, n.Addr))
		}
		for _, h := range out {
			_, err := faultnet.Ask(h, faultnet.NewToken())
			require.NoError(t, err)
		}
		for _, h := range out[busy:] {
			require.NoError(t, h.End(nil))
		}
		// Borrowers of an address that has no room, beside the idle ones.
		refused := make(chan error, waiting)
		for range idle {
			out = append(out, pooltest.Hold(t, p, n.Addr))
		}
		for range waiting {
			go func() {
				refused <- p.With(context.Background(), n.Addr, func(connpool.Conn) error { return errors.New("fn ran") })
			}()
		}
		pooltest.Queued(t, p, waiting)
		other := n.Addr // idle ones cannot stand beside waiters of their own address
		other.Scope = "idle"
		var spare []pooltest.Held
		for range idle {
			spare = append(spare, pooltest.Hold(t, p, other))
		}
		for _, h := range spare {
			require.NoError(t, h.End(nil))
		}
		require.Equal(t, idle, p.Stats().Idle)

		require.NoError(t, p.Close())
		pooltest.Check(t, p)
		for range waiting {
			require.ErrorIs(t, <-refused, connpool.ErrClosed)
		}
		patience.Soon(t, "idle connections at their end", func() bool { return n.Server.Open() == idle+busy })
		require.Equal(t, idle+busy, p.Stats().InUse)
		borrowed := append(out[:busy:busy], out[idle+busy:]...)
		for _, h := range borrowed { // Close takes nothing away from a borrower
			_, err := faultnet.Ask(h, faultnet.NewToken())
			require.NoError(t, err)
			require.NoError(t, h.End(nil))
		}
		patience.Soon(t, "borrowed connections at their end", func() bool { return n.Server.Open() == 0 })
		require.NoError(t, p.Close())
		pooltest.Settled(t, p)
		st := p.Stats()
		require.Zero(t, st.Open)
		require.EqualValues(t, 2*idle+busy, st.Closed[connpool.ClosedWithPool])
		require.ErrorIs(t, p.With(t.Context(), n.Addr, func(connpool.Conn) error { return nil }), connpool.ErrClosed)
	})
}

// BETA-07, BETA-08, TDBC-01
func TestSixtyFourBorrowersGetTheirOwnRepliesOnly(t *testing.T) {
	o := faultnet.Options{Chunk: 3, ReplyDelay: func(serial, seq int) time.Duration {
		if seq%7 == serial%7 {
			return 200 * time.Microsecond
		}
		return 0
	}}
	pooltest.EachSockNet(t, o, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, func(c *connpool.Config) { c.MaxPerAddr = 9 })
		var users sync.Map // of each connection: who is on it
		var wg tasks.Group
		failures := make(chan error, 64)
		for i := range 64 {
			wg.Go(func() {
				for range short.Of(20, 8) {
					err := p.With(context.Background(), n.Addr, func(c connpool.Conn) error {
						if other, taken := users.LoadOrStore(c.Info().ID, i); taken {
							return fmt.Errorf("connection %d is lent to %d and to %v", c.Info().ID, i, other)
						}
						defer users.Delete(c.Info().ID)
						_, err := faultnet.Ask(c, faultnet.NewToken())
						return err
					})
					if err != nil {
						failures <- err
						return
					}
				}
			})
		}
		wg.Wait()
		close(failures)
		require.NoError(t, <-failures)
		pooltest.Check(t, p)
		require.Zero(t, n.Server.Overlaps(), "a request reached a connection before the last reply was out")
		require.LessOrEqual(t, n.Server.Accepts(), 9)
	})
}

// BETA-02, BETA-X10, BETA-X02
func TestEqualAddressesMeetOnOneConnection(t *testing.T) {
	pooltest.EachSockNet(t, faultnet.Options{}, func(t *testing.T, n *pooltest.SockNet) {
		p := n.Pool(t, nil)
		a := n.Addr
		a.Scope = "tenant 7&x=%"
		here := pooltest.Loan(t, p, a)

		var viaJSON struct{ Peers map[string]connpool.Addr }
		text, err := json.Marshal(map[string]any{"Peers": map[string]connpool.Addr{"db": a}})
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(text, &viaJSON))
		parsed, err := connpool.ParseAddr(strings.Clone(a.String()))
		require.NoError(t, err)
		built := connpool.Addr{Scope: "tenant 7" + "&x=%", Port: n.Server.Port(), Host: string([]byte(n.Server.Host())), Transport: a.Transport}

		for _, there := range []connpool.Addr{viaJSON.Peers["db"], parsed, built} {
			require.Equal(t, a, there)
			require.True(t, map[connpool.Addr]bool{a: true}[there])
			require.Equal(t, here.Serial, pooltest.Loan(t, p, there).Serial)
			require.NoError(t, p.With(t.Context(), there, func(c connpool.Conn) error {
				require.Equal(t, a, c.Addr())
				return nil
			}))
		}
		a.Scope = ""
		require.NotEqual(t, here.Serial, pooltest.Loan(t, p, a).Serial, "no scope is a scope of its own")
	})
}

// TDBC-X01
func TestTheOrderOfOptionsDoesNotMatter(t *testing.T) {
	n := pooltest.StartSock(t, "tls13", faultnet.Options{})
	p := n.Pool(t, nil)
	options := []string{"keepalive=30s", "server-name=server.test", "scope=t7", "delay=true"}
	base := fmt.Sprintf("tls://%s:%d?", n.Server.Host(), n.Server.Port())
	for range 24 {
		rand.Shuffle(len(options), func(i, j int) { options[i], options[j] = options[j], options[i] })
		a, err := connpool.ParseAddr(base + strings.Join(options, "&"))
		require.NoError(t, err)
		require.Equal(t, 1, pooltest.Loan(t, p, a).Serial)
	}
	require.Equal(t, 1, p.Stats().Addrs)
}

// BETA-X14
func TestHostsAreFoldedAndPortsAreChecked(t *testing.T) {
	n := pooltest.StartSock(t, "tcp", faultnet.Options{})
	p := n.Pool(t, nil)
	a := n.Addr
	for _, name := range []string{"localhost", "LOCALHOST.", "LocalHost", "localhost."} {
		a.Host = name
		require.Equal(t, 1, pooltest.Loan(t, p, a).Serial, name)
	}
	a.Host = n.Server.Host() // the address is authoritative: it is no alias of the name
	require.Equal(t, 2, pooltest.Loan(t, p, a).Serial)

	a.Port = 0
	err := p.With(t.Context(), a, func(connpool.Conn) error { return nil })
	var pe *connpool.Error
	require.ErrorAs(t, err, &pe)
	require.Equal(t, [...]any{connpool.StageUsage, connpool.KindUsage}, [...]any{pe.Stage, pe.Kind})
	for _, text := range []string{"tcp://example.com:0", "tcp://example.com:65536", "tcp://example.com", "tcp://example.com:-1", "tcp://:80"} {
		_, err := connpool.ParseAddr(text)
		require.Error(t, err, text)
	}
	one, err := connpool.ParseAddr("tcp://EXAMPLE.com.:80")
	require.NoError(t, err)
	require.Equal(t, connpool.MustParseAddr("tcp://example.com:80"), one)
}

// TDBC-20
func TestABareConnFromADialerIsPooledWithoutAProbe(t *testing.T) {
	patience.NothingLeaks(t)
	var server tasks.Group
	cfg := connpool.Config{Dialers: map[connpool.Transport]connpool.DialFunc{"pipe": func(context.Context, connpool.Addr) (net.Conn, error) {
		here, there := net.Pipe()
		server.Go(func() {
			io.Copy(there, there)
			there.Close()
		})
		return here, nil
	}}}
	p, err := pooltest.New(cfg)
	require.NoError(t, err)
	addr := connpool.Addr{Transport: "pipe", Host: "echo"}
	for i := range 100 {
		require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
			require.Equal(t, i+1, c.Info().Uses)
			_, err := c.SyscallConn()
			require.ErrorIs(t, err, errors.ErrUnsupported)
			require.ErrorIs(t, c.CloseWrite(), errors.ErrUnsupported)
			if _, err := io.WriteString(c, "hello"); err != nil {
				return err
			}
			b := make([]byte, 5)
			_, err = io.ReadFull(c, b)
			require.Equal(t, "hello", string(b))
			return err
		}))
		pooltest.Check(t, p)
	}
	st := p.Stats()
	require.Equal(t, [...]int{1, 1}, [...]int{st.Open, st.Unprobed})
	require.EqualValues(t, 1, st.Dials)
	require.NoError(t, p.Close())
	server.Wait()
	require.Zero(t, p.Stats().Unprobed)
}
