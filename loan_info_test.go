package connpool

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What a loan tells is in internal/suite/transports/conform_test.go, for every kind of socket.

func TestInfoAllocatesNothingOnTheSocketsOfThePool(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	eachSockNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet) {
		if n.name == "custom" {
			return // a dialer's own type, which is asked on another goroutine
		}
		p := n.pool(t, nil)
		var info ConnInfo
		require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
			require.Zero(t, patience.Allocs(100, func() { info = c.Info() }))
			return nil
		}))
		require.EqualValues(t, 1, info.ID)
		l, err := p.Lease(t.Context(), n.addr)
		require.NoError(t, err)
		require.Zero(t, patience.Allocs(100, func() { info = l.Info() }))
		require.Equal(t, 2, info.Uses)
		require.NoError(t, l.Return())
	})
}

func TestALeaseTellsWhatItsLoanTells(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		n.use(at("a"))
		time.Sleep(time.Second)
		l := n.lease(at("a"))
		time.Sleep(time.Minute)
		want := ConnInfo{
			Addr: at("a"), ID: 1, Uses: 2, Reused: true, Age: time.Minute + time.Second, IdleFor: time.Second,
			LocalAddr: l.c.nc.LocalAddr(), RemoteAddr: l.c.nc.RemoteAddr(),
		}
		require.Equal(t, want, l.Info())
		require.NoError(t, l.Do(bg, func(c Conn) error {
			require.Equal(t, want, c.Info(), "it is the same loan")
			require.Equal(t, ConnInfo{Addr: at("a")}, l.Info(), "the connection is Do's")
			return nil
		}))
		require.Equal(t, want, l.Info())
		require.ErrorIs(t, l.Do(bg, func(Conn) error { return errBoom }), errBoom)
		require.Equal(t, ConnInfo{Addr: at("a")}, l.Info(), "it is lost")
		require.NoError(t, l.Return())
		require.Equal(t, ConnInfo{Addr: at("a")}, l.Info())
	})
}

func TestTheConnOfSetupTellsWhateverLoanStands(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var kept Conn
		var inSetup ConnInfo
		n := open(t, Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			time.Sleep(time.Second)
			kept = nc.(Conn)
			inSetup = kept.Info()
			return nil, nil
		}})
		for i := range 2 {
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				require.EqualValues(t, 1, c.Info().ID)
				require.Equal(t, i+1, c.Info().Uses)
				require.Equal(t, c.Info(), kept.Info())
				return nil
			}))
			require.Equal(t, ConnInfo{Addr: at("a")}, kept.Info(), "it is idle")
		}
		require.Equal(t, ConnInfo{Addr: at("a"), Age: time.Second, LocalAddr: inSetup.LocalAddr, RemoteAddr: inSetup.RemoteAddr}, inSetup)
		require.NotNil(t, inSetup.RemoteAddr)
	})
}

func TestNothingIsToldOfAConnectionThatIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		for name, leave := range map[string]func(Conn) error{
			"closed": Conn.Close,
			"detached": func(c Conn) error {
				nc, err := c.Detach()
				require.NoError(t, err)
				return nc.Close()
			},
		} {
			require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
				require.NotZero(t, c.Info().ID)
				require.NoError(t, leave(c))
				require.Equal(t, ConnInfo{Addr: at("a")}, c.Info(), name)
				return nil
			}))
		}
		require.Equal(t, ConnInfo{}, Conn{}.Info())
	})
}

// wrappedTLS is the TLS of a dialer's own making.
type wrappedTLS struct{ net.Conn }

func (w wrappedTLS) ConnectionState() tls.ConnectionState {
	return w.Conn.(*tls.Conn).ConnectionState()
}

func TestInfoTellsTheVersionOfADialersTLSAndBeginsNoHandshake(t *testing.T) {
	for name, wrap := range map[string]func(*tls.Conn) net.Conn{
		"crypto/tls": func(tc *tls.Conn) net.Conn { return tc },
		"its own":    func(tc *tls.Conn) net.Conn { return wrappedTLS{tc} },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				client, dial := tlsPipes(t, func(nc net.Conn) net.Conn { return nc }, func(tc *tls.Conn) { io.Copy(tc, tc) })
				client.ServerName = "localhost"
				p, err := New(Config{NoProbe: true, Dialers: map[Transport]DialFunc{TLS: func(ctx context.Context, a Addr) (net.Conn, error) {
					nc, err := dial(ctx, a)
					return wrap(tls.Client(nc, client)), err
				}}})
				require.NoError(t, err)
				defer p.Close()
				ctx, cancel := context.WithTimeout(bg, time.Minute)
				defer cancel()
				require.NoError(t, p.With(ctx, MustParseAddr("tls://localhost:1"), func(c Conn) error {
					require.EqualValues(t, 1, c.Info().ID)
					require.Zero(t, c.Info().TLSVersion)
					require.NoError(t, echo(c, "the handshake comes with the first bytes"))
					require.EqualValues(t, tls.VersionTLS13, c.Info().TLSVersion)
					return nil
				}))
			})
		})
	}
}

// TRY-07: what hangs is the connection's part of the answer; the pool's comes all the
// same, when the ctx ends, and without it if the ctx has ended before.
func TestInfoOfAConnectionThatDoesNotAnswerEndsWithCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		thaw := make(chan struct{})
		defer close(thaw)
		n := newTestnet(t)
		n.open(Config{MaxPerAddr: 1, Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return &speechless{c, thaw} })})
		for name, c := range map[string]struct {
			wait   time.Duration // before the question
			atMost time.Duration // from the end of ctx, or from the question if that is later
		}{
			"when ctx ends": {wait: 0, atMost: time.Second},
			"after its end": {wait: 2 * time.Minute, atMost: foreignPatience},
		} {
			ctx, cancel := context.WithTimeout(bg, time.Minute)
			require.NoError(t, n.p.With(ctx, at("a"), func(h Conn) error {
				time.Sleep(c.wait)
				start := time.Now()
				info := h.Info()
				require.LessOrEqual(t, time.Since(start), max(time.Minute-c.wait, 0)+c.atMost, name)
				require.NotZero(t, info.ID)
				require.Equal(t, ConnInfo{Addr: at("a"), ID: info.ID, Uses: 1, Age: c.wait}, info, name)
				return nil
			}))
			cancel()
			synctest.Wait()
			require.Zero(t, n.p.Stats().InUse)
		}
		require.NotZero(t, n.p.Stats().AbandonedCalls)
	})
}
