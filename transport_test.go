package connpool

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

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// The same behaviour, over every transport. What only a look into the socket
// can bring about is in deadcheck_test.go.

// BETA-09, BETA-03, BETA-06
func TestEveryTransportDialsOnceAndReuses(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		loans := short.Of(1000, 200)
		for i := range loans {
			r := loan(t, p, n.addr)
			require.Equal(t, reply{1, i + 1, r.token}, r)
		}
		require.Equal(t, 1, n.srv.Accepts())
		st := p.Stats()
		require.Equal(t, [...]int{1, 1, 0}, [...]int{st.Open, st.Idle, st.InUse})
		require.Equal(t, [...]uint64{uint64(loans), uint64(loans - 1), 1}, [...]uint64{st.Loans, st.Reused, st.Dials})
	})
}

// BETA-09, BETA-04
func TestEveryTransportOpensAsManyAsAreNeeded(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		const k = 6
		for range 3 {
			var out []held
			for range k {
				out = append(out, hold(t, p, n.addr))
			}
			serials := map[int]bool{}
			for _, h := range out {
				r, err := ask(h, newToken())
				require.NoError(t, err)
				serials[r.serial] = true
			}
			require.Len(t, serials, k)
			for _, h := range out {
				require.NoError(t, h.end(nil))
			}
			require.Equal(t, k, n.srv.Accepts())
			require.Equal(t, k, p.Stats().Idle)
		}
	})
}

// BETA-09, BETA-22
func TestEveryTransportDiscardsOnError(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		sorry := errors.New("sorry")
		for i, c := range []struct {
			how  func(Conn) error
			err  error
			why  CloseReason
			keep bool
		}{
			{func(Conn) error { return sorry }, sorry, ClosedFnError, false},
			{func(Conn) error { return Keep(sorry) }, sorry, ClosedUnknown, true},
			{func(c Conn) error { return c.Close() }, nil, ClosedByBorrower, false},
			{func(Conn) error { return fmt.Errorf("wrapped: %w", Keep(sorry)) }, sorry, ClosedUnknown, true},
		} {
			before := loan(t, p, n.addr)
			require.ErrorIs(t, p.With(t.Context(), n.addr, c.how), c.err)
			require.Equal(t, c.keep, loan(t, p, n.addr).serial == before.serial, i)
			if !c.keep {
				require.EqualValues(t, 1, settled(t, p).Closed[c.why])
			}
		}
		soon(t, "discarded connections gone at the server", func() bool { return n.srv.Open() == 1 })
	})
}

// BETA-09, BETA-37
func TestEveryTransportClosesEverythingWithThePool(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxPerAddr = 5 })
		const idle, busy, waiting = 3, 2, 4
		var out []held
		for range idle + busy {
			out = append(out, hold(t, p, n.addr))
		}
		for _, h := range out {
			_, err := ask(h, newToken())
			require.NoError(t, err)
		}
		for _, h := range out[busy:] {
			require.NoError(t, h.end(nil))
		}
		// Borrowers of an address that has no room, beside the idle ones.
		refused := make(chan error, waiting)
		for range idle {
			out = append(out, hold(t, p, n.addr))
		}
		for range waiting {
			go func() {
				refused <- p.With(context.Background(), n.addr, func(Conn) error { return errors.New("fn ran") })
			}()
		}
		queued(t, p, waiting)
		other := n.addr // idle ones cannot stand beside waiters of their own address
		other.Scope = "idle"
		var spare []held
		for range idle {
			spare = append(spare, hold(t, p, other))
		}
		for _, h := range spare {
			require.NoError(t, h.end(nil))
		}
		require.Equal(t, idle, p.Stats().Idle)

		require.NoError(t, p.Close())
		p.check(t)
		for range waiting {
			require.ErrorIs(t, <-refused, ErrClosed)
		}
		soon(t, "idle connections at their end", func() bool { return n.srv.Open() == idle+busy })
		require.Equal(t, idle+busy, p.Stats().InUse)
		borrowed := append(out[:busy:busy], out[idle+busy:]...)
		for _, h := range borrowed { // Close takes nothing away from a borrower
			_, err := ask(h, newToken())
			require.NoError(t, err)
			require.NoError(t, h.end(nil))
		}
		soon(t, "borrowed connections at their end", func() bool { return n.srv.Open() == 0 })
		require.NoError(t, p.Close())
		settled(t, p)
		st := p.Stats()
		require.Zero(t, st.Open)
		require.EqualValues(t, 2*idle+busy, st.Closed[ClosedWithPool])
		require.ErrorIs(t, p.With(t.Context(), n.addr, func(Conn) error { return nil }), ErrClosed)
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
	eachSockNet(t, o, func(t *testing.T, n *sockNet) {
		p := n.pool(t, func(c *Config) { c.MaxPerAddr = 9 })
		var users sync.Map // of each connection: who is on it
		var wg sync.WaitGroup
		failures := make(chan error, 64)
		for i := range 64 {
			wg.Go(func() {
				for range short.Of(20, 8) {
					err := p.With(context.Background(), n.addr, func(c Conn) error {
						if other, taken := users.LoadOrStore(c.Info().ID, i); taken {
							return fmt.Errorf("connection %d is lent to %d and to %v", c.Info().ID, i, other)
						}
						defer users.Delete(c.Info().ID)
						_, err := ask(c, newToken())
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
		p.check(t)
		require.Zero(t, n.srv.Overlaps(), "a request reached a connection before the last reply was out")
		require.LessOrEqual(t, n.srv.Accepts(), 9)
	})
}

// BETA-02, BETA-X10, BETA-X02
func TestEqualAddressesMeetOnOneConnection(t *testing.T) {
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		p := n.pool(t, nil)
		a := n.addr
		a.Scope = "tenant 7&x=%"
		here := loan(t, p, a)

		var viaJSON struct{ Peers map[string]Addr }
		text, err := json.Marshal(map[string]any{"Peers": map[string]Addr{"db": a}})
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(text, &viaJSON))
		parsed, err := ParseAddr(strings.Clone(a.String()))
		require.NoError(t, err)
		built := Addr{Scope: "tenant 7" + "&x=%", Port: n.srv.Port(), Host: string([]byte(n.srv.Host())), Transport: a.Transport}

		for _, there := range []Addr{viaJSON.Peers["db"], parsed, built} {
			require.Equal(t, a, there)
			require.True(t, map[Addr]bool{a: true}[there])
			require.Equal(t, here.serial, loan(t, p, there).serial)
			require.NoError(t, p.With(t.Context(), there, func(c Conn) error {
				require.Equal(t, a, c.Addr())
				return nil
			}))
		}
		a.Scope = ""
		require.NotEqual(t, here.serial, loan(t, p, a).serial, "no scope is a scope of its own")
	})
}

// BETA-X02
func TestRandomAddressesSurviveTheirText(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	word := func(alphabet string, n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = alphabet[rng.IntN(len(alphabet))]
		}
		return string(b)
	}
	raw := make([]byte, 256)
	for i := range raw {
		raw[i] = byte(i)
	}
	seen := map[Addr]string{}
	texts := map[string]Addr{}
	for range 5000 {
		a := Addr{Scope: word(string(raw), rng.IntN(6))}
		switch rng.IntN(4) {
		case 0, 1:
			a.Transport = []Transport{TCP, TLS}[rng.IntN(2)]
			a.Host = []string{word("abcABC-_", 3) + "x", "10.0.0." + fmt.Sprint(rng.IntN(256)), "fe80::1%" + word("eth0/%?&", 1+rng.IntN(3)), "2001:DB8::" + word("0123456789abcdef", 2)}[rng.IntN(4)]
			a.Port = uint16(1 + rng.IntN(65535))
			if a.Transport == TLS && rng.IntN(2) == 0 {
				a.ServerName = word("abC.", 1) + "b.test"
			}
			a.QoS = QoS{DSCP: uint8(rng.IntN(64)), Delay: rng.IntN(2) == 0, KeepAlive: time.Duration(rng.IntN(5)-1) * time.Second, UserTimeout: time.Duration(rng.IntN(3)) * time.Millisecond}
		case 2:
			a.Transport, a.Host = Unix, "/"+word("ab/ ?&%#:é@", 1+rng.IntN(9))
			a.QoS = QoS{SendBuffer: rng.IntN(2) * 8192, RecvBuffer: rng.IntN(2) * 9000}
		case 3:
			a.Transport, a.Host, a.Port = "x25+b", word(string(raw), 1+rng.IntN(5)), uint16(rng.IntN(3))
		}
		canon, err := a.canonical()
		if err != nil {
			continue // it may have come out as no address at all
		}
		text := canon.String()
		back, err := ParseAddr(text)
		require.NoError(t, err, "%#v: %s", canon, text)
		require.Equal(t, canon, back)
		require.Equal(t, text, back.String())
		js, err := json.Marshal(canon)
		require.NoError(t, err)
		var fromJSON Addr
		require.NoError(t, json.Unmarshal(js, &fromJSON), "%s", js)
		require.Equal(t, canon, fromJSON)
		if other, twice := texts[text]; twice {
			require.Equal(t, other, canon, "two addresses, one text")
		}
		seen[canon], texts[text] = text, canon
	}
	require.Greater(t, len(seen), 2500)
	require.Len(t, texts, len(seen))
}

// TDBC-X01
func TestTheOrderOfOptionsDoesNotMatter(t *testing.T) {
	n := startSock(t, "tls13", faultnet.Options{})
	p := n.pool(t, nil)
	options := []string{"keepalive=30s", "server-name=server.test", "scope=t7", "delay=true"}
	base := fmt.Sprintf("tls://%s:%d?", n.srv.Host(), n.srv.Port())
	for range 24 {
		rand.Shuffle(len(options), func(i, j int) { options[i], options[j] = options[j], options[i] })
		a, err := ParseAddr(base + strings.Join(options, "&"))
		require.NoError(t, err)
		require.Equal(t, 1, loan(t, p, a).serial)
	}
	require.Equal(t, 1, p.Stats().Addrs)
}

// BETA-X14
func TestHostsAreFoldedAndPortsAreChecked(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	a := n.addr
	for _, name := range []string{"localhost", "LOCALHOST.", "LocalHost", "localhost."} {
		a.Host = name
		require.Equal(t, 1, loan(t, p, a).serial, name)
	}
	a.Host = n.srv.Host() // the address is authoritative: it is no alias of the name
	require.Equal(t, 2, loan(t, p, a).serial)

	a.Port = 0
	err := p.With(t.Context(), a, func(Conn) error { return nil })
	var pe *Error
	require.ErrorAs(t, err, &pe)
	require.Equal(t, [...]any{StageUsage, KindUsage}, [...]any{pe.Stage, pe.Kind})
	for _, text := range []string{"tcp://example.com:0", "tcp://example.com:65536", "tcp://example.com", "tcp://example.com:-1", "tcp://:80"} {
		_, err := ParseAddr(text)
		require.Error(t, err, text)
	}
	one, err := ParseAddr("tcp://EXAMPLE.com.:80")
	require.NoError(t, err)
	require.Equal(t, MustParseAddr("tcp://example.com:80"), one)
}

// TDBC-20
func TestABareConnFromADialerIsPooledWithoutAProbe(t *testing.T) {
	nothingLeaks(t)
	var server sync.WaitGroup
	cfg := Config{Dialers: map[Transport]DialFunc{"pipe": func(context.Context, Addr) (net.Conn, error) {
		here, there := net.Pipe()
		server.Go(func() {
			io.Copy(there, there)
			there.Close()
		})
		return here, nil
	}}}
	p, err := New(cfg)
	require.NoError(t, err)
	addr := Addr{Transport: "pipe", Host: "echo"}
	for i := range 100 {
		require.NoError(t, p.With(t.Context(), addr, func(c Conn) error {
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
		p.check(t)
	}
	st := p.Stats()
	require.Equal(t, [...]int{1, 1}, [...]int{st.Open, st.Unprobed})
	require.EqualValues(t, 1, st.Dials)
	require.NoError(t, p.Close())
	server.Wait()
	require.Zero(t, p.Stats().Unprobed)
}
