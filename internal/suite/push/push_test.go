package push

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
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
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// BETA-19: 10,000 rounds of a borrow and, at the same time, a message. Every
// reply reaches the borrower that asked, every message is heard, once and in the
// order in which it was sent on its connection: by Push, or, if it came in the
// middle of a loan, by the borrower.
func TestTenThousandMessagesBesideAsManyLoans(t *testing.T) {
	for _, name := range []string{"tcp", "tls13", "unix"} {
		for _, connections := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s over %d", name, connections), func(t *testing.T) {
				rounds := short.Of(10_000, 1_000) / connections
				if race.Enabled || connections == 1 { // which takes its time, as nobody else talks meanwhile
					rounds /= 10
				}
				n := pooltest.StartSock(t, name, faultnet.Options{Handler: chatter})
				o := &listeners{t: t, last: make(map[uint64]int)}
				p := n.Pool(t, func(c *connpool.Config) {
					c.MaxOpen, c.SweepInterval = connections, 3*time.Millisecond
					c.Push = func(_ context.Context, c connpool.Conn) error {
						l, err := line(c)
						if err == nil {
							o.pushed.Add(1)
							o.heard(c.Info().ID, l)
						}
						return err
					}
				})
				var all tasks.Group
				for w := range connections {
					all.Go(func() {
						rng := rand.New(rand.NewPCG(uint64(w), 18))
						for range rounds {
							// What the server says now it says while nobody asks,
							// or while somebody does.
							if err := p.With(context.Background(), n.Addr, o.exchange); err != nil {
								t.Error(err)
								return
							}
							if rng.IntN(4) == 0 {
								<-time.After(time.Duration(rng.IntN(300)) * time.Microsecond)
							}
						}
					})
				}
				all.Wait()
				if t.Failed() {
					return
				}
				want := rounds * connections
				patience.Soon(t, "all messages heard", func() bool { return int(o.pushed.Load()+o.inLoans.Load()) == want })
				patience.Soon(t, "all idle", func() bool { st := p.Stats(); return st.InUse == 0 && st.Closing == 0 })
				pooltest.Check(t, p)
				require.Empty(t, p.Stats().Closed)
				t.Logf("%d messages, %d of them in the middle of a loan; %v", want, o.inLoans.Load(), p.Stats())
				require.Greater(t, int(o.pushed.Load()), want/10)
			})
		}
	}
}

// chatter answers each line, and a moment later says something nobody asked for:
// that moment is different each time, so it falls before, into or behind the
// next exchange.
func chatter(p *faultnet.Peer) {
	var mu sync.Mutex // one writer at a time
	var talking tasks.Group
	defer talking.Wait()
	said := 0
	for i := 0; ; i++ {
		l, err := line(p)
		if err != nil {
			return
		}
		mu.Lock()
		fmt.Fprintf(p, "reply to %s\n", l)
		mu.Unlock()
		talking.Go(func() {
			if i%3 > 0 {
				<-time.After(time.Duration(i*37%200) * time.Microsecond)
			}
			mu.Lock()
			defer mu.Unlock()
			said++
			fmt.Fprintf(p, "push %d\n", said)
		})
	}
}

// listeners are the borrowers and Push.
type listeners struct {
	t               *testing.T
	pushed, inLoans atomic.Int64

	mu   sync.Mutex
	last map[uint64]int // the message heard last, by connection
}

func (o *listeners) heard(id uint64, l string) {
	var k int
	_, err := fmt.Sscanf(l, "push %d", &k)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil || k != o.last[id]+1 {
		o.t.Errorf("connection %d: %q after %d", id, l, o.last[id])
	}
	o.last[id] = k
}

func (o *listeners) exchange(c connpool.Conn) error {
	token := faultnet.NewToken()
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return err
	}
	for {
		l, err := line(c)
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(l, "push "):
			o.inLoans.Add(1)
			o.heard(c.Info().ID, l)
		case l == "reply to "+token:
			return nil
		default:
			return fmt.Errorf("%w: %q for %q", faultnet.ErrForeign, l, token)
		}
	}
}

// BETA-19: the oracle against desynchronisation, with messages: borrowers lose
// patience and leave in the middle of replies while the peer speaks unasked. What
// a borrower left unread comes to Push, which knows that it is no message.
func TestDesyncNobodyGetsAnothersReplyBesideMessages(t *testing.T) {
	total := short.Of(10_000, 2_500) * patience.Stress()
	if race.Enabled {
		total /= 5
	}
	for _, name := range []string{"tcp", "tls13", "unix"} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{ReplyDelay: func(serial, seq int) time.Duration {
				if seq%8 == 3 {
					return time.Duration(100+37*serial%300) * time.Microsecond
				}
				return 0
			}})
			var messages, nonsense atomic.Int64
			p := n.Pool(t, func(c *connpool.Config) {
				c.MaxPerAddr = 4
				c.Push = func(_ context.Context, c connpool.Conn) error {
					l, err := line(c)
					switch {
					case err != nil:
						return err
					case l != "push":
						nonsense.Add(1)
						return errNoPush
					}
					messages.Add(1)
					return nil
				}
			})
			stop := make(chan struct{})
			var talking, workers tasks.Group
			talking.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Microsecond):
						n.Server.PushIdle(1+i%4, []byte("push\n"))
					}
				}
			})
			var foreign atomic.Pointer[error]
			var left atomic.Int64
			left.Store(int64(total / 4))
			// A brief run, or one on a busy machine, goes on until the hazard was there.
			more := func() bool {
				n := left.Add(-1)
				return foreign.Load() == nil && (n >= 0 || n > int64(-20*total) && min(messages.Load(), nonsense.Load()) <= 20)
			}
			for w := range 8 {
				workers.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 19))
					for more() {
						if err := restless(p, n.Addr, rng); err != nil {
							foreign.Store(&err)
						}
						if err := pooltest.Inconsistency(p); err != nil {
							foreign.Store(&err)
						}
					}
				})
			}
			workers.Wait()
			close(stop)
			talking.Wait()
			if err := foreign.Load(); err != nil {
				t.Fatal(*err)
			}
			st := pooltest.Settled(t, p)
			t.Logf("%d messages, %d times something else; %v", messages.Load(), nonsense.Load(), st.Closed)
			require.Greater(t, messages.Load(), int64(20))
			require.Greater(t, nonsense.Load(), int64(20), "the hazard was there")
		})
	}
}

// restless is one exchange of a borrower who may give up at any moment, and says
// nothing about it.
func restless(p *connpool.Pool, addr connpool.Addr, rng *rand.Rand) error {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	moment := time.Duration(rng.IntN(400)) * time.Microsecond
	way := rng.IntN(6)
	if way == 0 {
		ctx, cancel = context.WithTimeout(ctx, moment)
	}
	defer cancel()
	token := faultnet.NewToken()
	err := p.With(ctx, addr, func(c connpool.Conn) error {
		if way == 1 {
			c.SetReadDeadline(time.Now().Add(moment))
		}
		if _, err := io.WriteString(c, token+"\n"); err != nil {
			return nil
		}
		for {
			if way == 2 { // leaves in the middle of what comes
				io.ReadFull(c, make([]byte, 2))
				return nil
			}
			l, err := line(c)
			switch {
			case err != nil:
				return nil
			case l == "push": // it is only now that it came
			case !strings.HasSuffix(l, " "+token):
				return fmt.Errorf("%w: %q for %q", faultnet.ErrForeign, l, token)
			default:
				return nil
			}
		}
	})
	if connpool.KindOf(err) == connpool.KindTimeout {
		return nil
	}
	return err
}

// BETA-18: an actor that Setup starts lives as long as its connection, whichever
// way that ends.
func TestAnActorLivesAsLongAsItsConnection(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, p *connpool.Pool, addr connpool.Addr){
		"evicted": func(t *testing.T, p *connpool.Pool, _ connpool.Addr) {
			_, ok := p.EvictLRU()
			require.True(t, ok)
		},
		"detached": func(t *testing.T, p *connpool.Pool, addr connpool.Addr) {
			require.NoError(t, p.With(context.Background(), addr, func(c connpool.Conn) error {
				nc, err := c.Detach()
				require.NoError(t, err)
				return nc.Close()
			}))
		},
		"closed by its borrower": func(t *testing.T, p *connpool.Pool, addr connpool.Addr) {
			require.NoError(t, p.With(context.Background(), addr, connpool.Conn.Close))
		},
		"closed with the pool": func(t *testing.T, p *connpool.Pool, _ connpool.Addr) { require.NoError(t, p.Close()) },
		"given up": func(t *testing.T, p *connpool.Pool, addr connpool.Addr) {
			p.With(context.Background(), addr, func(connpool.Conn) error { return pooltest.ErrBoom })
		},
		"retired": func(_ *testing.T, p *connpool.Pool, addr connpool.Addr) { p.Retire(addr) },
	} {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, "tcp", faultnet.Options{}) // and its watch over goroutines
			var started, running atomic.Int64
			ended := make(chan error, 10)
			p := n.Pool(t, func(c *connpool.Config) {
				c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
					life := nc.(connpool.Conn).Context()
					a := newActor()
					started.Add(1)
					running.Add(1)
					go func() { // the actor
						<-life.Done()
						running.Add(-1)
						ended <- context.Cause(life)
					}()
					return a, nil
				}
				c.Push = func(ctx context.Context, c connpool.Conn) error { return connpool.State[*actor](c).hear(ctx, c) }
				c.SweepInterval = sweepWhereNothingListens
			})
			var a *actor
			for i := range 50 {
				require.NoError(t, p.With(t.Context(), n.Addr, func(c connpool.Conn) error {
					a = connpool.State[*actor](c)
					_, err := faultnet.Ask(c, faultnet.NewToken())
					return err
				}))
				require.Equal(t, 1, n.Server.PushIdle(-1, fmt.Appendf(nil, "push %d\n", i)))
				require.Equal(t, fmt.Sprintf("push %d", i), patience.InTime(t, a.got), "its messages")
				patience.Soon(t, "idle", func() bool { return p.Stats().Idle == 1 })
			}
			require.EqualValues(t, 1, started.Load(), "once per connection")
			require.EqualValues(t, 1, running.Load())
			canon := n.Addr
			for a := range p.Addrs() {
				canon = a // there is one
			}
			end(t, p, canon)
			require.ErrorContains(t, patience.InTime(t, ended), "connpool: the connection was ")
			require.Zero(t, running.Load())
		})
	}
}

// BETA-18: also if Setup fails after it has started one, and if the connection is
// not the pool's any more when somebody asks.
func TestTheContextOfAConnectionThatIsGoneIsDone(t *testing.T) {
	pooltest.Bubble(t, func(t *testing.T) {
		var life context.Context
		n := pooltest.Open(t, connpool.Config{Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			life = nc.(connpool.Conn).Context()
			require.NoError(t, life.Err())
			return nil, pooltest.ErrBoom
		}})
		require.ErrorIs(t, n.Pool.With(context.Background(), pooltest.At("a"), func(connpool.Conn) error { return nil }), pooltest.ErrBoom)
		synctest.Wait()
		require.Error(t, life.Err())
		require.ErrorContains(t, context.Cause(life), connpool.ClosedSetupFailed.String())
	})
	pooltest.Bubble(t, func(t *testing.T) {
		n := pooltest.Open(t, connpool.Config{})
		var kept connpool.Conn
		var first, second context.Context
		require.NoError(t, n.Pool.With(context.Background(), pooltest.At("a"), func(c connpool.Conn) error { kept, first = c, c.Context(); return nil }))
		require.NoError(t, first.Err(), "it outlives the loan")
		require.ErrorIs(t, context.Cause(kept.Context()), connpool.ErrReturned)
		require.ErrorIs(t, context.Cause(connpool.Conn{}.Context()), connpool.ErrReturned)
		require.NoError(t, n.Pool.With(context.Background(), pooltest.At("a"), func(c connpool.Conn) error { second = c.Context(); return nil }))
		require.Equal(t, first, second, "one for the connection")
		n.Pool.CloseIdle()
		synctest.Wait()
		require.ErrorIs(t, first.Err(), context.Canceled)
		require.Equal(t, fmt.Sprintf("connpool: the connection was closed: %v", connpool.ClosedOnRequest), context.Cause(first).Error())
		require.False(t, errors.Is(context.Cause(first), connpool.ErrReturned))
	})
}

// actor is what lives beside a connection and gets its messages: lines that
// begin with "push".
type actor struct{ got chan string }

// line reads one line from c: of the connection, byte by byte, so that nothing
// is taken from whoever reads next.
func line(c io.Reader) (string, error) {
	var l []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, b); err != nil {
			return string(l), err
		}
		if b[0] == '\n' {
			return string(l), nil
		}
		l = append(l, b[0])
	}
}

var errNoPush = errors.New("this is no message")

func (a *actor) hear(_ context.Context, c connpool.Conn) error {
	l, err := line(c)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(l, "push ") {
		return fmt.Errorf("%w: %q", errNoPush, l)
	}
	a.got <- l
	return nil
}

func newActor() *actor { return &actor{got: make(chan string, 1000)} }

// sweepWhereNothingListens is a SweepInterval that shows whether something was
// heard, or only seen by a sweep.
var sweepWhereNothingListens = map[bool]time.Duration{true: -1, false: 5 * time.Millisecond}[sock.CanWatch]
