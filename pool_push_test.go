package connpool

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// pushNets are those whose idle connections can be seen to have something.
var pushNets = []string{"tcp", "tcp6", "tls12", "tls13", "unix"}

func eachPushNet(t *testing.T, f func(t *testing.T, n *sockNet)) {
	for _, name := range pushNets {
		t.Run(name, func(t *testing.T) { f(t, startSock(t, name, faultnet.Options{})) })
	}
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

func (a *actor) hear(_ context.Context, c Conn) error {
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

// BETA-19
func TestAMessageToAnIdleConnectionReachesPush(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push = a.hear; c.SweepInterval = sweepWhereNothingListens })
		before := loan(t, p, n.addr)
		for i := range 20 {
			require.Equal(t, 1, n.srv.PushIdle(-1, fmt.Appendf(nil, "push %d\n", i)))
			require.Equal(t, fmt.Sprintf("push %d", i), inTime(t, a.got))
		}
		soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
		p.check(t)
		require.EqualValues(t, 20, p.Stats().Pushes)
		after := loan(t, p, n.addr)
		require.Equal(t, before.serial, after.serial, "the same connection")
		require.Equal(t, 1, n.srv.Accepts())
		// Several at once, and a record or segment for all of them.
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push a\npush b\npush c\n")))
		for _, want := range []string{"push a", "push b", "push c"} {
			require.Equal(t, want, inTime(t, a.got))
		}
		soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
		loan(t, p, n.addr)
		require.Empty(t, p.Stats().Closed)
	})
}

// sweepWhereNothingListens is a SweepInterval that shows whether something was
// heard, or only seen by a sweep.
var sweepWhereNothingListens = map[bool]time.Duration{true: -1, false: 5 * time.Millisecond}[sock.CanWatch]

// BETA-19: with nothing that listens, the look before a loan finds it.
func TestAMessageIsPushedBeforeTheConnectionIsLent(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push, c.SweepInterval, c.MaxPerAddr = a.hear, -1, 1 })
		p.watching.off = true // no watcher
		first := loan(t, p, n.addr)
		for i := range 20 {
			require.Equal(t, 1, n.srv.PushIdle(-1, fmt.Appendf(nil, "push %d\n", i)))
			stirs(t, p, n.addr)
			require.Empty(t, a.got)
			r := loan(t, p, n.addr)
			require.Equal(t, first.serial, r.serial)
			require.Equal(t, fmt.Sprintf("push %d", i), inTime(t, a.got))
		}
		require.Empty(t, p.Stats().Closed)
		require.EqualValues(t, 20, p.Stats().Pushes)
	})
}

// BETA-19: and so does a sweep.
func TestASweepPushesWhatItFinds(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push, c.SweepInterval = a.hear, time.Hour })
		p.watching.off = true
		loan(t, p, n.addr)
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push x\n")))
		stirs(t, p, n.addr)
		sweepAll(p)
		require.Equal(t, "push x", inTime(t, a.got))
		soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
		p.check(t)
	})
}

func TestAnErrorOfPushClosesTheConnection(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push = a.hear; c.SweepInterval = sweepWhereNothingListens })
		loan(t, p, n.addr)
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("nonsense\n")))
		soon(t, "closed", func() bool { return p.Stats().Closed[ClosedPushFailed] == 1 })
		soon(t, "gone", func() bool { return p.Stats().Open == 0 && n.srv.Open() == 0 })
		p.check(t)
		loan(t, p, n.addr)
	})
}

func TestAPushThatReadsNothingOrHangsOrPanicsCostsTheConnection(t *testing.T) {
	for name, push := range map[string]func(context.Context, Conn) error{
		"reads nothing": func(context.Context, Conn) error { return nil },
		"only writes": func(_ context.Context, c Conn) error {
			_, err := c.Write([]byte("x\n"))
			return err
		},
		"hangs": func(_ context.Context, c Conn) error {
			_, err := io.ReadFull(c, make([]byte, 1000))
			return err
		},
		"ignores its ctx": func(context.Context, Conn) error { time.Sleep(300 * time.Millisecond); return nil },
		"panics":          func(context.Context, Conn) error { panic("push") },
		"exits":           func(context.Context, Conn) error { runtime.Goexit(); return nil },
		"closes": func(_ context.Context, c Conn) error {
			c.Read(make([]byte, 100))
			return c.Close()
		},
		"leaves a reader": func(_ context.Context, c Conn) error {
			c.Read(make([]byte, 100))
			go c.Read(make([]byte, 1))
			for c.c.word.Load()&inFlight == 0 {
				runtime.Gosched()
			}
			return nil
		},
		"detaches": func(_ context.Context, c Conn) error {
			c.Read(make([]byte, 100))
			nc, err := c.Detach()
			if err == nil {
				nc.Close()
				return nil
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, "tcp", faultnet.Options{})
			p := n.pool(t, func(c *Config) {
				c.Push, c.SweepInterval, c.HookTimeout = push, sweepWhereNothingListens, 50*time.Millisecond
			})
			loan(t, p, n.addr)
			require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push\n")))
			soon(t, "closed", func() bool { return p.Stats().Closed[ClosedPushFailed] == 1 })
			soon(t, "gone", func() bool { return p.Stats().Open == 0 })
			require.EqualValues(t, 1, p.Stats().Pushes, "one failure is enough; a machine that is busy would end a run of them by its time-out")
			p.check(t)
			loan(t, p, n.addr)
		})
	}
}

// While Push has a connection, nobody else does, and the pool works on.
func TestPushHasTheConnectionAlone(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	entered, leave := make(chan uint64, 1), make(chan struct{})
	p := n.pool(t, func(c *Config) {
		c.SweepInterval, c.MaxPerAddr = sweepWhereNothingListens, 1
		c.Push = func(_ context.Context, c Conn) error {
			entered <- c.Info().ID
			<-leave
			_, err := line(c)
			return err
		}
	})
	loan(t, p, n.addr)
	require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push\n")))
	require.EqualValues(t, 1, inTime(t, entered))
	require.Equal(t, 1, p.Stats().InUse)
	_, ok := p.EvictLRU()
	require.False(t, ok)
	sweepAll(p)
	served := make(chan error, 1)
	go func() {
		served <- p.With(context.Background(), n.addr, func(c Conn) error {
			_, err := ask(c, newToken())
			return err
		})
	}()
	queued(t, p, 1)
	p.check(t)
	close(leave)
	require.NoError(t, inTime(t, served), "it is handed to who waits")
	require.EqualValues(t, 1, p.Stats().Dials)
}

// BETA-19: session tickets are nothing to read.
func TestTicketsAloneAreNotPushed(t *testing.T) {
	n := startSock(t, "tls13", faultnet.Options{})
	p := n.pool(t, func(c *Config) {
		c.SweepInterval = time.Millisecond
		c.Push = func(_ context.Context, c Conn) error {
			t.Error("called for nothing")
			return errNoPush
		}
	})
	for range 20 {
		require.NoError(t, p.With(t.Context(), n.addr, func(Conn) error { return nil }), "nothing was read: the tickets are still there")
		<-time.After(2 * time.Millisecond)
		loan(t, p, n.addr)
		p.CloseIdle()
	}
	require.Zero(t, p.Stats().Pushes)
}

// A TLS record that comes in pieces is waited for, and one that holds tickets is
// not mistaken for a message.
func TestARecordThatComesInPiecesIsPushedWhole(t *testing.T) {
	nothingLeaks(t)
	srv := newPieces(t)
	a := newActor()
	p, err := New(Config{TLS: srv.client, Push: a.hear, SweepInterval: time.Millisecond, MaxPerAddr: 1})
	require.NoError(t, err)
	defer p.Close()
	require.NoError(t, p.With(t.Context(), srv.addr, func(c Conn) error { _, err := line(c); return err })) // a greeting
	for i := range 5 {
		srv.hold()
		go srv.write(fmt.Sprintf("push %d\n", i))
		srv.release(t, 3) // bytes, then a pause
		<-time.After(10 * time.Millisecond)
		require.Empty(t, a.got)
		p.check(t)
		srv.release(t, 0)
		require.Equal(t, fmt.Sprintf("push %d", i), inTime(t, a.got))
	}
	soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
	require.Empty(t, p.Stats().Closed)
}

// pieces is a TLS server with one connection whose bytes pass when they are told.
type pieces struct {
	addr     Addr
	client   *tls.Config
	mu       sync.Mutex
	held     bool
	queue    []byte
	raw      net.Conn
	conn     *tls.Conn
	greeting string
}

func (s *pieces) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held {
		s.queue = append(s.queue, b...)
		return len(b), nil
	}
	return s.raw.Write(b)
}

func (s *pieces) hold() { s.mu.Lock(); s.held = true; s.mu.Unlock() }
func (s *pieces) write(text string) {
	s.conn.Write([]byte(text))
}

// release lets k bytes pass of what is being written; k <= 0: all but -k, and
// nothing is held any more once k is 0.
func (s *pieces) release(t *testing.T, k int) {
	soon(t, "something is written", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.queue) == 0 {
			return false
		}
		if s.held = k != 0; k <= 0 {
			k += len(s.queue)
		}
		s.raw.Write(s.queue[:k])
		s.queue = s.queue[k:]
		return true
	})
}

// lastRecord is how long the last TLS record is that is being held.
func (s *pieces) lastRecord() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for q := s.queue; len(q) >= 5; q = q[min(n, len(q)):] {
		n = 5 + int(q[3])<<8 + int(q[4])
	}
	return n
}

// slowly is a net.Conn whose writes go through s.
type slowly struct {
	net.Conn
	s *pieces
}

func (c slowly) Write(b []byte) (int, error) { return c.s.Write(b) }

func newPieces(t *testing.T) *pieces {
	t.Helper()
	ca := faultnet.NewCA()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	s := &pieces{greeting: "hello\n", client: &tls.Config{RootCAs: ca.Pool()}}
	s.addr = Addr{Transport: TLS, Host: "127.0.0.1", Port: uint16(ln.Addr().(*net.TCPAddr).Port)}
	cfg := &tls.Config{Certificates: []tls.Certificate{ca.Server("127.0.0.1")}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.raw = raw
		s.mu.Unlock()
		s.conn = tls.Server(slowly{raw, s}, cfg)
		s.conn.Write([]byte(s.greeting))
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
		if s.raw != nil {
			s.raw.Close()
		}
	})
	return s
}

// What a codec has read ahead with a reply is a message too, and so is what
// crypto/tls has in hand of the record that the reply came in.
func TestAMessageRightBehindAReplyIsPushed(t *testing.T) {
	for _, buffered := range []bool{false, true} {
		for _, reset := range []bool{false, true} {
			for _, network := range []string{"tcp", "tls13", "unix"} {
				t.Run(fmt.Sprintf("%s buffered=%t reset=%t", network, buffered, reset), func(t *testing.T) {
					n := startSock(t, network, faultnet.Options{Handler: func(p *faultnet.Peer) {
						for in := bufio.NewScanner(p); in.Scan(); {
							fmt.Fprintf(p, "reply to %s\npush %s\npush again\n", in.Text(), in.Text())
						}
					}})
					got := make(chan string, 10)
					read := func(c Conn) (string, error) {
						if r := State[*bufio.Reader](c); r != nil {
							l, err := r.ReadString('\n')
							return strings.TrimSuffix(l, "\n"), err
						}
						return line(c)
					}
					p := n.pool(t, func(c *Config) {
						c.SweepInterval = sweepWhereNothingListens
						if buffered {
							c.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return bufio.NewReader(nc), nil }
						}
						if reset {
							c.Reset = func(context.Context, Conn) error { return nil }
						}
						c.Push = func(_ context.Context, c Conn) error {
							l, err := read(c)
							got <- l
							return err
						}
					})
					for i := range 10 {
						require.NoError(t, p.With(t.Context(), n.addr, func(c Conn) error {
							if _, err := fmt.Fprintf(c, "%d\n", i); err != nil {
								return err
							}
							l, err := read(c)
							require.Equal(t, fmt.Sprintf("reply to %d", i), l)
							return err
						}))
						require.Equal(t, fmt.Sprintf("push %d", i), inTime(t, got))
						require.Equal(t, "push again", inTime(t, got))
						soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
						p.check(t)
					}
					require.EqualValues(t, 1, p.Stats().Dials)
					require.Empty(t, p.Stats().Closed)
				})
			}
		}
	}
}

// Push may take what was put back by any means that a borrower has.
func TestWhatALookTookOutIsReadByAnyMeans(t *testing.T) {
	for name, read := range map[string]func(c Conn) (string, error){
		"Read": func(c Conn) (string, error) {
			b := make([]byte, 100)
			n, err := c.Read(b)
			return string(b[:n]), err
		},
		"WriteTo": func(c Conn) (string, error) {
			var b bytes.Buffer
			c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			_, err := c.WriteTo(&b)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				err = Keep(nil)
			}
			return b.String(), errors.Join(err, errNoPush) // a time-out costs the connection
		},
	} {
		for _, network := range []string{"tls12", "tls13", "tcp"} {
			t.Run(name+" "+network, func(t *testing.T) {
				n := startSock(t, network, faultnet.Options{})
				got := make(chan string, 1)
				p := n.pool(t, func(c *Config) {
					c.SweepInterval = sweepWhereNothingListens
					c.Push = func(_ context.Context, c Conn) error {
						s, err := read(c)
						got <- s
						return err
					}
				})
				loan(t, p, n.addr)
				require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push and some more text\n")))
				require.Equal(t, "push and some more text\n", inTime(t, got), "in one piece")
			})
		}
	}
}

// An end behind a message is seen when the message has been read.
func TestAMessageBeforeAnEndIsPushed(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push = a.hear; c.SweepInterval = sweepWhereNothingListens })
		loan(t, p, n.addr)
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push farewell\n")))
		require.Equal(t, 1, n.srv.CutIdle(-1, faultnet.FIN))
		require.Equal(t, "push farewell", inTime(t, a.got))
		soon(t, "gone", func() bool { return p.Stats().Open == 0 })
		closedSoon(t, p, map[CloseReason]uint64{ClosedStale: 1})
		p.check(t)
	})
}

// No goroutine for each connection, no descriptor, and one watcher for all.
func TestPushNeedsNoGoroutineForAnIdleConnection(t *testing.T) {
	if !sock.CanWatch {
		t.Skip("elsewhere nothing listens")
	}
	addr, stop := pushableListener(t)
	defer stop()
	var heard atomic.Int64
	p, err := New(Config{MaxOpen: -1, SweepInterval: -1, Push: func(_ context.Context, c Conn) error {
		heard.Add(1)
		_, err := line(c)
		return err
	}})
	require.NoError(t, err)
	defer p.Close()
	goroutines := runtime.NumGoroutine()
	for i := range 300 {
		require.NoError(t, p.With(bg, scoped(addr.addr, i), func(Conn) error { return nil }))
	}
	soon(t, "one goroutine more", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	soon(t, "accepted", func() bool { return addr.count() == 300 })
	addr.say("push\n")
	soon(t, "all heard", func() bool { return heard.Load() == 300 && p.Stats().Idle == 300 })
	soon(t, "one goroutine more", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	p.check(t)
}

type pushable struct {
	addr Addr
	mu   sync.Mutex
	ends []net.Conn
}

func (s *pushable) count() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.ends) }
func (s *pushable) say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, nc := range s.ends {
		io.WriteString(nc, text)
	}
}

// pushableListener accepts without a goroutine for each connection.
func pushableListener(t *testing.T) (*pushable, func()) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	s := &pushable{addr: Addr{Transport: TCP, Host: "127.0.0.1", Port: uint16(ln.Addr().(*net.TCPAddr).Port)}}
	var running tasks.Group
	running.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.ends = append(s.ends, nc)
			s.mu.Unlock()
		}
	})
	return s, func() {
		ln.Close()
		running.Wait()
		for _, nc := range s.ends {
			nc.Close()
		}
	}
}

// A Push under way ends with the pool.
func TestClosingThePoolEndsPush(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	entered := make(chan context.Context, 1)
	p := n.pool(t, func(c *Config) {
		c.SweepInterval, c.HookTimeout = sweepWhereNothingListens, -1
		c.Push = func(ctx context.Context, c Conn) error {
			entered <- ctx
			_, err := io.ReadFull(c, make([]byte, 1000))
			return err
		}
	})
	loan(t, p, n.addr)
	require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push\n")))
	ctx := inTime(t, entered)
	require.NoError(t, p.Close())
	require.NoError(t, p.Shutdown(t.Context()))
	require.ErrorIs(t, context.Cause(ctx), ErrClosed)
	require.Equal(t, map[CloseReason]uint64{ClosedWithPool: 1}, p.Stats().Closed)
}

func TestPushWithoutALookIsRefused(t *testing.T) {
	_, err := New(Config{NoProbe: true, Push: newActor().hear})
	require.ErrorContains(t, err, "Config.Push")
	require.ErrorContains(t, err, "Config.NoProbe")
}

// A connection without a descriptor is asked in each sweep and before each loan.
func TestAProberMaySendItsMessagesToPush(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := newActor()
		n := newTestnet(t)
		n.open(Config{Push: a.hear, Dialers: n.wrapped(probesForPush)})
		n.Host("a").Serve(nil)
		n.use(at("a"))
		for _, c := range n.Host("a").Conns() {
			c.Write([]byte("push 1\npush 2\n"))
		}
		time.Sleep(defaultSweepInterval)
		synctest.Wait()
		require.Equal(t, "push 1", <-a.got)
		require.Equal(t, "push 2", <-a.got)
		n.gauges(0, 1, 0)
		n.check()
		for _, c := range n.Host("a").Conns() {
			c.Write([]byte("push 3\n"))
		}
		b := n.borrow(bg, at("a"))
		b.conn()
		require.Equal(t, "push 3", <-a.got)
		require.NoError(t, b.giveBack())
		synctest.Wait()
		n.closed(reasons{})
		n.check()
	})
}

// probesForPush answers a Probe as Prober says.
func probesForPush(c *faultnet.Conn) net.Conn {
	return &strange{Conn: c, probe: func() error {
		err := c.Probe()
		if errors.Is(err, faultnet.ErrUnread) {
			return fmt.Errorf("%w, %w", ErrUnread, err)
		}
		return err
	}}
}

// A ticket that comes in pieces is no message, even while it is only half there.
func TestATicketThatComesInPiecesIsNotPushed(t *testing.T) {
	nothingLeaks(t)
	srv := newPieces(t)
	srv.greeting = "" // it says nothing but its part of the handshake, with a ticket at its end
	srv.hold()
	p, err := New(Config{TLS: srv.client, SweepInterval: time.Millisecond, Push: func(context.Context, Conn) error {
		t.Error("pushed a ticket")
		return errNoPush
	}})
	require.NoError(t, err)
	defer p.Close()
	lent := make(chan error, 1)
	go func() { lent <- p.With(context.Background(), srv.addr, func(Conn) error { return nil }) }()
	soon(t, "the handshake is written", func() bool { return srv.lastRecord() > 0 })
	srv.release(t, -srv.lastRecord())
	require.NoError(t, inTime(t, lent))
	srv.release(t, 7)
	soon(t, "it is being looked at", func() bool { return p.Stats().InUse == 1 })
	<-time.After(5 * time.Millisecond)
	p.check(t)
	srv.release(t, 0)
	soon(t, "idle", func() bool { return p.Stats().Idle == 1 && p.Stats().InUse == 0 })
	require.NoError(t, p.With(t.Context(), srv.addr, func(c Conn) error {
		require.True(t, c.Info().Reused)
		srv.write("behind its tickets\n")
		l, err := line(c)
		require.Equal(t, "behind its tickets", l)
		return err
	}))
	require.Zero(t, p.Stats().Pushes)
	require.Empty(t, p.Stats().Closed)
}

// Between two uses of a session its connection is no less idle.
func TestAMessageBetweenTwoUsesOfASessionIsPushed(t *testing.T) {
	eachPushNet(t, func(t *testing.T, n *sockNet) {
		a := newActor()
		p := n.pool(t, func(c *Config) { c.Push, c.SweepInterval = a.hear, -1 })
		ctx, end := p.Session(t.Context())
		defer end()
		exchange := func() (r reply) {
			require.NoError(t, p.With(ctx, n.addr, func(c Conn) (err error) {
				r, err = ask(c, newToken())
				return err
			}))
			return r
		}
		first := exchange()
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("push 1\npush 2\n")))
		<-time.After(5 * time.Millisecond) // it is on its way, or the next use hears it
		second := exchange()
		require.Equal(t, first.serial, second.serial)
		require.Equal(t, "push 1", inTime(t, a.got))
		require.Equal(t, "push 2", inTime(t, a.got))
		end()
		soon(t, "back to idle", func() bool { return p.Stats().Idle == 1 })
		require.Empty(t, p.Stats().Closed)
		p.check(t)
	})
}
