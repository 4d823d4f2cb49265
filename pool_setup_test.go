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
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// What Setup leaves behind.

// greeter is a server that says something first: "HELLO" and "MOTD", a line each.
// The second comes with the first, in its segment and, under TLS, in its record or
// the next, or when later is closed. Then it answers lines with themselves.
type greeter struct {
	addr    Addr
	cfg     Config
	later   chan struct{} // nil: at once
	records bool          // a record for each line
}

func newGreeter(t *testing.T, transport Transport) *greeter {
	t.Helper()
	nothingLeaks(t)
	g := &greeter{addr: Addr{Transport: transport, Host: "127.0.0.1"}}
	var ln net.Listener
	var err error
	if transport == Unix {
		g.addr.Host = t.TempDir() + "/s"
		ln, err = net.Listen("unix", g.addr.Host)
	} else {
		ln, err = net.Listen("tcp", "127.0.0.1:0")
	}
	require.NoError(t, err)
	var identity *tls.Config
	if transport == TLS {
		ca := faultnet.NewCA()
		identity = &tls.Config{Certificates: []tls.Certificate{ca.Server("127.0.0.1")}}
		g.cfg.TLS = &tls.Config{RootCAs: ca.Pool()}
	}
	if transport != Unix {
		g.addr.Port = uint16(ln.Addr().(*net.TCPAddr).Port)
	}
	var all tasks.Group
	t.Cleanup(func() {
		ln.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { g.serve(nc, identity) })
		}
	})
	return g
}

func (g *greeter) serve(nc net.Conn, identity *tls.Config) {
	defer nc.Close()
	held := &heldBack{Conn: nc}
	nc = held
	if identity != nil {
		tc := tls.Server(held, identity)
		if tc.Handshake() != nil {
			return
		}
		nc = tc
	}
	held.hold(true)
	switch {
	case g.later != nil:
		io.WriteString(nc, "HELLO\n")
		held.hold(false)
		<-g.later
		io.WriteString(nc, "MOTD\n")
	case g.records:
		io.WriteString(nc, "HELLO\n")
		io.WriteString(nc, "MOTD\n")
	default:
		io.WriteString(nc, "HELLO\nMOTD\n")
	}
	held.hold(false)
	io.Copy(nc, nc)
}

// heldBack is a connection whose writes go out together.
type heldBack struct {
	net.Conn
	holds bool
	buf   bytes.Buffer
}

func (h *heldBack) Write(b []byte) (int, error) {
	if h.holds {
		return h.buf.Write(b)
	}
	return h.Conn.Write(b)
}

func (h *heldBack) hold(on bool) {
	if h.holds = on; !on {
		h.buf.WriteTo(h.Conn)
	}
}

// readHello reads the first line and nothing else.
func readHello(nc net.Conn) error {
	b := make([]byte, 6)
	if _, err := io.ReadFull(nc, b); err != nil {
		return err
	}
	if string(b) != "HELLO\n" {
		return fmt.Errorf("a greeting of %q", b)
	}
	return nil
}

// arrived waits until something is in the socket.
func arrived(nc net.Conn) {
	p := &nc.(Conn).c.sock
	for seen := (sock.Seen{}); !seen.Bytes; {
		p.raw.Control(func(fd uintptr) { seen = p.sys.peek(fd) })
	}
}

// TRY-35: what Setup leaves unread, wherever it is, fails the dial, whoever that
// was for; nobody ever takes it for a reply.
func TestWhatSetupLeavesUnreadFailsTheDial(t *testing.T) {
	if !sock.CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	type leaving struct {
		transport Transport
		prepare   func(*greeter)
		setup     func(g *greeter, nc net.Conn) (any, error)
		says      string
	}
	inState := func(g *greeter, nc net.Conn) (any, error) {
		r := bufio.NewReader(nc)
		for r.Buffered() < len("MOTD\n") {
			if _, err := r.Peek(len("HELLO\nMOTD\n")); err != nil {
				return nil, err
			}
		}
		_, err := r.ReadString('\n')
		return r, err
	}
	inKernel := func(g *greeter, nc net.Conn) (any, error) {
		err := readHello(nc)
		if g.later != nil {
			close(g.later)
		}
		arrived(nc)
		return nil, err
	}
	inTLS := func(_ *greeter, nc net.Conn) (any, error) { return nil, readHello(nc) }
	atOnce := func(*greeter) {}
	later := func(g *greeter) { g.later = make(chan struct{}) }
	uses := map[string]func(p *Pool, a Addr) error{
		"With": func(p *Pool, a Addr) error { return p.With(bg, a, nil2) },
		"Warm": func(p *Pool, a Addr) error { return p.Warm(bg, a, 1) },
		"Lease": func(p *Pool, a Addr) error {
			l, err := p.Lease(bg, a)
			if err == nil {
				l.Return()
			}
			return err
		},
		"Session": func(p *Pool, a Addr) error {
			ctx, end := p.Session(bg)
			defer end()
			return p.With(ctx, a, nil2)
		},
	}
	for name, l := range map[string]leaving{
		"in the state":                     {TCP, atOnce, inState, "Config.Setup left 5 bytes unread in its state"},
		"in the state, TLS":                {TLS, atOnce, inState, "Config.Setup left 5 bytes unread in its state"},
		"in the kernel":                    {TCP, atOnce, inKernel, "Config.Setup left 5 bytes unread in the connection"},
		"in the kernel, Unix":              {Unix, atOnce, inKernel, "Config.Setup left 5 bytes unread in the connection"},
		"in the kernel, TLS":               {TLS, later, inKernel, "Config.Setup left 5 bytes unread in the connection"},
		"in crypto/tls":                    {TLS, atOnce, inTLS, "Config.Setup left 5 bytes unread in crypto/tls"},
		"in crypto/tls, in another record": {TLS, func(g *greeter) { g.records = true }, inTLS, "Config.Setup left 5 bytes unread in crypto/tls"},
	} {
		for how, use := range uses {
			t.Run(name+", "+how, func(t *testing.T) {
				g := newGreeter(t, l.transport)
				l.prepare(g)
				g.cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return l.setup(g, nc) }
				p, err := New(g.cfg)
				require.NoError(t, err)
				defer p.Close()
				err = use(p, g.addr)
				var pe *Error
				require.ErrorAs(t, err, &pe)
				require.Equal(t, [...]any{StageSetup, KindInternal}, [...]any{pe.Stage, pe.Kind})
				require.ErrorContains(t, err, l.says)
				require.ErrorIs(t, err, ErrUnread)
				soon(t, "the slot free", func() bool { return p.Stats().Open == 0 })
				require.Equal(t, reasons{ClosedSetupFailed: 1}, p.Stats().Closed)
				p.check(t)
			})
		}
	}
}

// TRY-35: a reserve is no exception.
func TestAReserveIsSetUpAsEverythingElse(t *testing.T) {
	g := newGreeter(t, TCP)
	first := true
	g.cfg.MinIdlePerAddr, g.cfg.SweepInterval = 1, time.Hour
	g.cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
		if err := readHello(nc); err != nil || !first {
			return nil, err
		}
		first = false
		_, err := io.ReadFull(nc, make([]byte, len("MOTD\n")))
		return nil, err
	}
	p, err := New(g.cfg)
	require.NoError(t, err)
	defer p.Close()
	if !sock.CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	require.NoError(t, p.With(bg, g.addr, nil2))
	soon(t, "the reserve refused", func() bool { return p.Stats().Closed[ClosedSetupFailed] == 1 })
	for range 10 {
		require.NoError(t, p.With(bg, g.addr, func(c Conn) error {
			answer, err := askLine(c, "mine")
			require.Equal(t, "mine", answer)
			return err
		}))
	}
}

// TRY-35: with a Push what waits is Push's, before anybody borrows; what Push does
// not want fails the dial.
func TestWhatWaitsAfterSetupIsPushedBeforeTheFirstLoan(t *testing.T) {
	if !sock.CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	for _, transport := range []Transport{TCP, TLS} {
		for name, setup := range map[string]func(nc net.Conn) (any, error){
			"in the state": func(nc net.Conn) (any, error) {
				r := bufio.NewReader(nc)
				if _, err := r.Peek(len("HELLO\nMOTD\n")); err != nil {
					return nil, err
				}
				_, err := r.ReadString('\n')
				return r, err
			},
			"below": func(nc net.Conn) (any, error) { return bufio.NewReader(nc), readHello(nc) },
		} {
			for _, wanted := range []bool{true, false} {
				t.Run(fmt.Sprint(transport, ", ", name, ", wanted ", wanted), func(t *testing.T) {
					g := newGreeter(t, transport)
					got := make(chan string, 9)
					g.cfg.MaxPerAddr = 1
					g.cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) { return setup(nc) }
					g.cfg.Push = func(_ context.Context, c Conn) error {
						line, err := State[*bufio.Reader](c).ReadString('\n')
						if err == nil && !wanted {
							err = errBoom
						}
						got <- line
						return err
					}
					p, err := New(g.cfg)
					require.NoError(t, err)
					defer p.Close()
					err = p.With(bg, g.addr, func(c Conn) error {
						require.Len(t, got, 1, "the message came first")
						_, err := io.WriteString(c, "mine\n")
						require.NoError(t, err)
						line, err := State[*bufio.Reader](c).ReadString('\n')
						require.Equal(t, "mine\n", line)
						return err
					})
					require.Equal(t, "MOTD\n", inTime(t, got))
					st := p.Stats()
					require.EqualValues(t, 1, st.Dials)
					if wanted {
						require.NoError(t, err)
						require.EqualValues(t, 1, st.Pushes)
						require.Empty(t, st.Closed)
						return
					}
					require.ErrorIs(t, err, errBoom)
					var pe *Error
					require.ErrorAs(t, err, &pe)
					require.Equal(t, StageSetup, pe.Stage)
				})
			}
		}
	}
}

// TRY-03: and what Setup wrote must have gone out, with a Push too.
func TestWhatSetupDidNotFlushFailsTheDial(t *testing.T) {
	for _, push := range []func(context.Context, Conn) error{nil, func(context.Context, Conn) error { return nil }} {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{Push: push, Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
				w := bufio.NewWriter(nc)
				_, err := w.WriteString("login\n")
				return w, err
			}})
			pe := n.fail(bg, at("a"))
			require.EqualError(t, errors.Unwrap(pe), "Config.Setup left 6 bytes unflushed in its state: flush them")
			require.Equal(t, KindInternal, pe.Kind)
		})
	}
}

// A Buffered that panics after Setup is named, and costs the connection alone.
func TestABufferedThatPanicsAfterSetupIsNamed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { return explosive{}, nil }})
		pe := n.fail(bg, at("a"))
		var pan *PanicError
		require.ErrorAs(t, pe, &pan)
		require.Equal(t, "Buffered of the state", pan.Where)
	})
}

type explosive struct{}

func (explosive) Buffered() int { panic("boom") }

// TRY-35: the newcomer's mistake. Whatever the server says second is nobody's
// reply, with Warm or without.
func TestNobodyReadsTheSecondLineOfAGreeting(t *testing.T) {
	for _, warm := range []bool{false, true} {
		g := newGreeter(t, TCP)
		g.cfg.Setup = func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
			r := bufio.NewReader(nc)
			_, err := r.ReadString('\n')
			return r, err
		}
		p, err := New(g.cfg)
		require.NoError(t, err)
		if warm {
			p.Warm(bg, g.addr, 2)
		}
		err = p.With(bg, g.addr, func(c Conn) error {
			io.WriteString(c, "mine\n")
			line, err := State[*bufio.Reader](c).ReadString('\n')
			if strings.HasPrefix(line, "MOTD") {
				t.Errorf("got %q for a reply", line)
			}
			return err
		})
		require.Error(t, err)
		require.NoError(t, p.Close())
	}
}
