package clients

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// reader is a client that reads its connection all the time and matches replies by an id. Its
// protocol has lines: a request "id text", the reply "id text", and "bye" before a close.
type reader struct {
	nc   net.Conn
	done chan struct{} // closed when the client reads no more

	mu   sync.Mutex // guards what follows, and writes
	last int
	wait map[string]chan string
	said []string // lines that answer no request
	err  error    // why the reading ended
}

func newReader(nc net.Conn) *reader {
	r := &reader{nc: nc, done: make(chan struct{}), wait: map[string]chan string{}}
	go r.read()
	return r
}

func (r *reader) read() {
	defer close(r.done)
	in := bufio.NewScanner(r.nc)
	for in.Scan() {
		id, text, _ := strings.Cut(in.Text(), " ")
		r.mu.Lock()
		if w := r.wait[id]; w != nil {
			delete(r.wait, id)
			w <- text
		} else {
			r.said = append(r.said, in.Text())
		}
		r.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err = in.Err(); r.err == nil {
		r.err = io.EOF
	}
}

// ask sends a request and waits for its reply, or for ctx: then the reply comes later.
func (r *reader) ask(ctx context.Context, text string) (string, error) {
	w := make(chan string, 1)
	r.mu.Lock()
	r.last++
	id := fmt.Sprint(r.last)
	r.wait[id] = w
	_, err := fmt.Fprintf(r.nc, "%s %s\n", id, text)
	r.mu.Unlock()
	if err != nil {
		return "", err
	}
	select {
	case reply := <-w:
		return reply, nil
	case <-r.done:
		return "", r.alive()
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (r *reader) alive() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Close says goodbye, closes the connection, and waits until the client reads no more.
func (r *reader) Close() error {
	fmt.Fprint(r.nc, "bye\n")
	err := r.nc.Close()
	<-r.done
	return err
}

func setupReader(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	r := newReader(nc)
	return connpool.Resident(r, r.alive), nil
}

// host is a server for readers. It answers each request, the text "late" only after a while,
// and keeps the lines that it got.
type host struct {
	mu    sync.Mutex // guards what follows
	byes  int
	lines []string
}

func (h *host) serve(nc net.Conn) {
	in := bufio.NewScanner(nc)
	var late tasks.Group
	defer late.Wait()
	for in.Scan() {
		line := in.Text()
		h.mu.Lock()
		h.lines = append(h.lines, line)
		if line == "bye" {
			h.byes++
		}
		h.mu.Unlock()
		switch {
		case line == "bye":
			return
		case strings.HasSuffix(line, " late"):
			late.Go(func() {
				<-time.After(20 * time.Millisecond)
				fmt.Fprintln(nc, line)
			})
		case strings.HasSuffix(line, " cut"):
			return
		default:
			fmt.Fprintln(nc, line)
		}
	}
}

func (h *host) goodbyes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.byes
}

// closed checks how often connections were closed, when all that goes on has come to rest. Bytes
// and ends need a moment in the network in memory.
func closed(n *pooltest.Net, want map[connpool.CloseReason]uint64) {
	n.T.Helper()
	time.Sleep(time.Millisecond)
	n.Closed(want)
}

// exchange borrows a reader and asks it for an echo of text.
func exchange(ctx context.Context, p *connpool.Pool, addr connpool.Addr, text string) error {
	return p.With(ctx, addr, func(c connpool.Conn) error {
		reply, err := connpool.State[*reader](c).ask(ctx, text)
		if err == nil && reply != text {
			err = fmt.Errorf("a reply reached the wrong borrower: asked for %q, got %q", text, reply)
		}
		return err
	})
}

var bg = context.Background()

// inMemory opens a pool of readers over a network in memory.
func inMemory(t *testing.T, cfg connpool.Config) (*pooltest.Net, *host) {
	if cfg.Setup == nil {
		cfg.Setup = setupReader
	}
	n, h := pooltest.Open(t, cfg), new(host)
	n.Host("a").Serve(func(c *faultnet.Conn) { h.serve(c) })
	return n, h
}

// onSockets runs f with a pool of readers over each kind of socket.
func onSockets(t *testing.T, change func(*connpool.Config), f func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host)) {
	h := new(host)
	pooltest.EachSockNet(t, faultnet.Options{Handler: func(p *faultnet.Peer) { h.serve(p) }}, func(t *testing.T, n *pooltest.SockNet) {
		*h = host{}
		p := n.Pool(t, func(c *connpool.Config) {
			c.Setup = setupReader
			if change != nil {
				change(c)
			}
		})
		f(t, n, p, h)
	})
}

// ADO-01: a client that reads all the time can be lent. Its loan's Conn does no I/O.
func TestAResidentClientReadsAllTheTime(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		for range 20 {
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
		}
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
			one := make([]byte, 1)
			_, err := c.Read(one)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			require.ErrorContains(t, err, "use State")
			_, err = c.Write(one)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			_, err = io.Copy(c, strings.NewReader("x"))
			require.ErrorIs(t, err, errors.ErrUnsupported)
			_, err = io.Copy(io.Discard, c)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			require.ErrorIs(t, c.CloseWrite(), errors.ErrUnsupported)
			require.ErrorIs(t, c.SetDeadline(time.Now()), errors.ErrUnsupported)
			require.NotNil(t, c.RemoteAddr())
			require.NotZero(t, c.Info().ID)
			return nil
		}))
		require.NoError(t, exchange(bg, p, n.Addr, "x"), "and all that has done no harm")
		st := p.Stats()
		require.Equal(t, uint64(1), st.Dials)
		require.Equal(t, 1, st.Residents)
		require.Zero(t, st.Unprobed)
	})
}

// ADO-01: 1,000 exchanges by 16 borrowers on 4 connections, some given up before their reply:
// the late replies reach nobody else, and close nothing.
func TestLateRepliesOfAResidentReachNobodyElse(t *testing.T) {
	onSockets(t, func(c *connpool.Config) { c.MaxOpen = 4 }, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		var all tasks.Group
		for w := range 16 {
			all.Go(func() {
				for i := range 1000 / 16 {
					if i%8 == 7 {
						soon, cancel := context.WithTimeout(bg, time.Millisecond)
						err := p.With(bg, n.Addr, func(c connpool.Conn) error {
							_, err := connpool.State[*reader](c).ask(soon, "late")
							return connpool.Keep(err) // its reply is matched by id, whenever it comes
						})
						cancel()
						if !errors.Is(err, context.DeadlineExceeded) && err != nil {
							t.Error(err)
						}
					} else if err := exchange(bg, p, n.Addr, fmt.Sprintf("%d/%d", w, i)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		st := pooltest.Settled(t, p)
		require.LessOrEqual(t, st.Dials, uint64(4))
		require.Empty(t, st.Closed)
		require.Equal(t, st.Open, st.Residents)
	})
}

// ADO-01: when a server restarts, no borrower meets its end: the clients have heard it.
func TestARestartFailsNobodyWhoBorrowsAnIdleResident(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		for range 5 {
			var held []*connpool.Lease
			for range 4 {
				l, err := p.Lease(bg, n.Addr)
				require.NoError(t, err)
				require.NoError(t, l.Do(bg, func(c connpool.Conn) error { // the server knows a connection that it has answered on
					_, err := connpool.State[*reader](c).ask(bg, "x")
					return err
				}))
				held = append(held, l)
			}
			for _, l := range held {
				require.NoError(t, l.Return())
			}
			before := p.Stats().Closed[connpool.ClosedStale]
			n.Server.CutIdle(-1, faultnet.FIN)
			patience.Soon(t, "all ends are heard", func() bool { return p.Stats().Closed[connpool.ClosedStale] == before+4 })
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
		}
		st := pooltest.Settled(t, p)
		require.Equal(t, 1, st.Residents)
	})
}

// ADO-01: what the pool does when the client's I/O fails, in a loan and between loans.
func TestTheEndOfTheClientsIOIsTheEndOfTheConnection(t *testing.T) {
	pooltest.Bubble(t, func(t *testing.T) {
		n, _ := inMemory(t, connpool.Config{})
		addr := pooltest.At("a")
		require.NoError(t, exchange(bg, n.Pool, addr, "x"))
		n.Host("a").Conns()[0].Close()
		closed(n, map[connpool.CloseReason]uint64{connpool.ClosedStale: 1})
		n.Gauges(0, 0, 0)

		require.ErrorIs(t, exchange(bg, n.Pool, addr, "cut"), io.EOF)
		closed(n, map[connpool.CloseReason]uint64{connpool.ClosedStale: 1, connpool.ClosedFnError: 1})
		require.NoError(t, n.Pool.With(bg, addr, func(c connpool.Conn) error {
			_, err := connpool.State[*reader](c).ask(bg, "cut")
			require.ErrorIs(t, err, io.EOF)
			return nil
		}))
		closed(n, map[connpool.CloseReason]uint64{connpool.ClosedStale: 1, connpool.ClosedFnError: 1, connpool.ClosedBroken: 1})
		require.Zero(t, n.Pool.Stats().Residents)
	})
}

// ADO-01: the client's deadlines are its own. A read that times out is no end.
func TestADeadlineOfTheClientIsItsOwnMatter(t *testing.T) {
	onSockets(t, func(c *connpool.Config) {
		c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return connpool.Resident(nc, nil), nil
		}
	}, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		echo := func(nc net.Conn) {
			_, err := io.WriteString(nc, "1 x\n")
			require.NoError(t, err)
			b := make([]byte, 4)
			_, err = io.ReadFull(nc, b)
			require.NoError(t, err)
			require.Equal(t, "1 x\n", string(b))
		}
		var nc net.Conn
		require.NoError(t, p.With(bg, n.Addr, func(c connpool.Conn) error {
			nc = connpool.State[net.Conn](c)
			echo(nc)
			return nil
		}))
		require.NoError(t, nc.SetReadDeadline(time.Now().Add(-time.Second)))
		_, err := nc.Read(make([]byte, 1))
		require.ErrorContains(t, err, "timeout")
		require.NoError(t, nc.SetReadDeadline(time.Time{}))
		ctx, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		require.NoError(t, p.With(ctx, n.Addr, func(c connpool.Conn) error {
			echo(connpool.State[net.Conn](c))
			return nc.SetReadDeadline(time.Now().Add(-time.Second))
		}))
		_, err = nc.Read(make([]byte, 1))
		require.ErrorContains(t, err, "timeout", "no end of a loan takes back what the client has set")
		require.NoError(t, nc.SetReadDeadline(time.Time{}))
		echo(nc)
		require.Equal(t, uint64(1), p.Stats().Dials)
	})
}

// ADO-01: nobody else's deadline may be set, so a ctx that ends closes the connection.
func TestACtxThatEndsInALoanClosesTheResident(t *testing.T) {
	onSockets(t, nil, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, h *host) {
		for _, under := range []func() (context.Context, context.CancelFunc){
			func() (context.Context, context.CancelFunc) { return context.WithTimeout(bg, 5*time.Millisecond) },
			func() (context.Context, context.CancelFunc) { return context.WithTimeout(bg, 50*time.Millisecond) },
			func() (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(bg)
				time.AfterFunc(30*time.Millisecond, cancel)
				return ctx, cancel
			},
		} {
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
			before := p.Stats().Closed[connpool.ClosedCanceled]
			ctx, cancel := under()
			err := p.With(ctx, n.Addr, func(c connpool.Conn) error {
				r := connpool.State[*reader](c)
				<-r.done // the client's read is over although the client did not close
				require.Same(t, r, connpool.State[*reader](c), "it is still there, and its I/O fails")
				return r.alive()
			})
			cancel()
			require.Error(t, err)
			patience.Soon(t, "it is closed", func() bool { return p.Stats().Closed[connpool.ClosedCanceled] == before+1 })
			require.NoError(t, exchange(bg, p, n.Addr, "x"))
			p.Retire(n.Addr)
			patience.Soon(t, "it is gone", func() bool { return p.Stats().Open == 0 })
			require.Zero(t, p.Stats().Residents)
		}
	})
}

// ADO-01: alive is asked before each loan and in the sweep; whatever it does, a borrower gets a
// connection.
func TestAliveSaysWhetherAResidentIsLent(t *testing.T) {
	for name, alive := range map[string]func() error{
		"error":  func() error { return io.ErrUnexpectedEOF },
		"panic":  func() error { panic("alive") },
		"hang":   func() error { <-time.After(24 * time.Hour); return nil },
		"goexit": nil,
	} {
		t.Run(name, func(t *testing.T) {
			pooltest.Bubble(t, func(t *testing.T) {
				var mu sync.Mutex
				dead := map[*reader]bool{}
				n, _ := inMemory(t, connpool.Config{SweepInterval: time.Hour, IdleTimeout: -1, Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
					r := newReader(nc)
					return connpool.Resident(r, func() error {
						mu.Lock()
						dying := dead[r]
						mu.Unlock()
						switch {
						case !dying:
							return r.alive()
						case alive == nil:
							goexit()
						}
						return alive()
					}), nil
				}})
				addr := pooltest.At("a")
				kill := func() {
					require.NoError(t, n.Pool.With(bg, addr, func(c connpool.Conn) error {
						mu.Lock()
						defer mu.Unlock()
						dead[connpool.State[*reader](c)] = true
						return nil
					}))
				}
				kill()
				if name == "panic" { // it is the borrower's, like that of any hook
					require.Panics(t, func() { exchange(bg, n.Pool, addr, "x") })
				} else {
					require.NoError(t, exchange(bg, n.Pool, addr, "x"), "asked before the loan")
				}
				closed(n, map[connpool.CloseReason]uint64{connpool.ClosedStale: 1})
				kill()
				time.Sleep(time.Hour + time.Second)
				closed(n, map[connpool.CloseReason]uint64{connpool.ClosedStale: 2})
				n.Gauges(0, 0, 0)
				time.Sleep(24 * time.Hour) // until the last call has returned
			})
		})
	}
}

// ADO-01, ADO-05: the read that a client has under way is not the loan's, so KeepErr is asked.
func TestKeepErrIsAskedBesideTheReadsOfAClient(t *testing.T) {
	errNoSuchKey := errors.New("no such key")
	onSockets(t, func(c *connpool.Config) {
		c.KeepErr = func(_ connpool.Addr, err error) bool { return errors.Is(err, errNoSuchKey) }
	}, func(t *testing.T, n *pooltest.SockNet, p *connpool.Pool, _ *host) {
		for range 3 {
			err := p.With(bg, n.Addr, func(c connpool.Conn) error {
				if _, err := connpool.State[*reader](c).ask(bg, "x"); err != nil {
					return err
				}
				return errNoSuchKey
			})
			require.ErrorIs(t, err, errNoSuchKey)
		}
		require.EqualValues(t, 1, p.Stats().Dials)
		require.Error(t, p.With(bg, n.Addr, func(connpool.Conn) error { return io.ErrUnexpectedEOF }))
		require.EqualValues(t, 1, pooltest.Settled(t, p).Closed[connpool.ClosedFnError])
	})
}
