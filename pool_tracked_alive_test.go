package connpool

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// TRY-19: what DialContext returned is not dropped as long as anything of it is used, in
// all the ways in which a connection of package net is not.

// collect lets the garbage collector find what it can, several times over.
func collect() {
	for range 5 {
		runtime.GC()
		<-time.After(time.Millisecond)
	}
}

// droppedBut is what a test has of a connection that it drops as soon as it has that.
func droppedBut[T any](t *testing.T, p *Pool, n *sockNet, of func(nc net.Conn) T) T {
	t.Helper()
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	return of(nc)
}

// netsOfOurOwn are the kinds of what DialContext returns: copies of what package net
// made, and wrappers of what a dialer of the user's made.
var netsOfOurOwn = []struct {
	name, net string
	change    func(*Config)
}{
	{"tcp", "tcp", nil},
	{"unix", "unix", nil},
	{"a dialer of one's own", "tcp", func(c *Config) {
		c.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
			nc, err := dialSocket(ctx, a)
			if err != nil {
				return nil, err
			}
			return &ownConn{nc.(*net.TCPConn)}, nil
		}}
	}},
}

// ownConn is a net.Conn that is no *net.TCPConn.
type ownConn struct{ *net.TCPConn }

func eachOwnNet(t *testing.T, o faultnet.Options, f func(t *testing.T, n *sockNet, p *Pool)) {
	for _, c := range netsOfOurOwn {
		t.Run(c.name, func(t *testing.T) {
			n := startSock(t, c.net, o)
			f(t, n, n.pool(t, c.change))
		})
	}
}

// TRY-19
func TestTheRawConnOfATrackedConnectionKeepsIt(t *testing.T) {
	eachOwnNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet, p *Pool) {
		raw := droppedBut(t, p, n, func(nc net.Conn) syscall.RawConn {
			raw, err := nc.(syscall.Conn).SyscallConn()
			require.NoError(t, err)
			return raw
		})
		collect()
		require.NoError(t, raw.Control(func(uintptr) {}))
		read := make(chan error, 1)
		waits := make(chan struct{})
		go func(raw syscall.RawConn) { // nobody else has it
			tries := 0
			read <- raw.Read(func(uintptr) bool {
				if tries++; tries == 1 {
					close(waits)
				}
				return tries > 1
			})
		}(raw)
		raw = nil
		<-waits
		collect()
		require.Equal(t, 1, n.srv.PushIdle(-1, []byte("x")))
		require.NoError(t, inTime(t, read))
		soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
		p.check(t)
	})
}

// TRY-19: whoever took out what is inside has the connection.
func TestTheInnerConnectionKeepsATrackedConnection(t *testing.T) {
	eachOwnNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet, p *Pool) {
		inner := droppedBut(t, p, n, func(nc net.Conn) net.Conn {
			switch nc := nc.(type) {
			case *trackedTCP:
				return nc.TCPConn
			case *trackedUnix:
				return nc.UnixConn
			default:
				return nc.(interface{ NetConn() net.Conn }).NetConn()
			}
		})
		collect()
		_, err := ask(inner, newToken())
		require.NoError(t, err)
		require.Equal(t, 1, p.Stats().Tracked)
		if own, ok := inner.(*ownConn); ok { // the pool cannot find out that it was dropped
			require.NoError(t, own.Close())
			for _, c := range p.every() { // there is no handle on it any more
				c.untrack(nil)
			}
			return
		}
		inner = nil
		soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
	})
}

// TRY-19: a file is a descriptor of its own, and outlives the connection.
func TestTheFileOfATrackedConnectionIsItsOwn(t *testing.T) {
	for _, name := range []string{"tcp", "unix"} {
		n := startSock(t, name, faultnet.Options{})
		p := n.pool(t, nil)
		f := droppedBut(t, p, n, func(nc net.Conn) *os.File {
			f, err := nc.(interface{ File() (*os.File, error) }).File()
			require.NoError(t, err)
			return f
		})
		soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
		nc, err := net.FileConn(f)
		require.NoError(t, err)
		_, err = ask(nc, newToken())
		require.NoError(t, err)
		require.NoError(t, nc.Close())
		require.NoError(t, f.Close())
	}
}

// TRY-19: an operation that waits for bytes is use, whichever it is.
func TestATrackedConnectionIsKeptByEachReadInFlight(t *testing.T) {
	b := func() []byte { return make([]byte, 1) }
	for name, read := range map[string]func(nc net.Conn) error{
		"Read":    func(nc net.Conn) error { _, err := nc.Read(b()); return err },
		"WriteTo": func(nc net.Conn) error { return writeOneTo(nc.(io.WriterTo)) },
		"ReadFrom": func(nc net.Conn) error {
			_, _, err := nc.(net.PacketConn).ReadFrom(b())
			return err
		},
		"ReadFromUnix": func(nc net.Conn) error {
			_, _, err := nc.(interface {
				ReadFromUnix([]byte) (int, *net.UnixAddr, error)
			}).ReadFromUnix(b())
			return err
		},
		"ReadMsgUnix": func(nc net.Conn) error {
			_, _, _, _, err := nc.(interface {
				ReadMsgUnix(b, oob []byte) (n, oobn, flags int, addr *net.UnixAddr, err error)
			}).ReadMsgUnix(b(), nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachOwnNet(t, faultnet.Options{}, func(t *testing.T, n *sockNet, p *Pool) {
				probe := droppedBut(t, p, n, func(nc net.Conn) net.Conn { return nc })
				_, unix := probe.(*trackedUnix)
				_, tcp := probe.(*trackedTCP)
				require.NoError(t, probe.Close())
				if name == "WriteTo" && !tcp || name != "Read" && name != "WriteTo" && !unix {
					return // it has no such method
				}
				over := make(chan error, 1)
				go func() {
					network, address := n.target()
					nc, err := p.DialContext(context.Background(), network, address)
					if err == nil {
						err = read(nc) // the last that is heard of nc
					}
					over <- err
				}()
				soon(t, "it reads", func() bool { return p.Stats().Tracked == 1 && n.srv.Open() == 1 })
				collect()
				require.Equal(t, 1, n.srv.PushIdle(-1, []byte("x")))
				require.NoError(t, inTime(t, over))
				soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
			})
		})
	}
}

// writeOneTo is WriteTo a writer that has enough after its first byte.
func writeOneTo(src io.WriterTo) error {
	_, err := src.WriteTo(enough{})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

type enough struct{}

var errEnough = errors.New("enough")

func (enough) Write(b []byte) (int, error) { return 0, errEnough }

// TRY-19: and so is one that waits for room, also net.Buffers, which end in a method
// that package net does not export.
func TestATrackedConnectionIsKeptByEachWriteInFlight(t *testing.T) {
	const much = 32 << 20
	big := make([]byte, much)
	for name, write := range map[string]func(nc net.Conn) (int64, error){
		"Write": func(nc net.Conn) (int64, error) { n, err := nc.Write(big); return int64(n), err },
		"net.Buffers": func(nc net.Conn) (int64, error) {
			bufs := net.Buffers{big[:much/2], big[much/2:]}
			return bufs.WriteTo(nc)
		},
		"ReadFrom": func(nc net.Conn) (int64, error) {
			if rf, ok := nc.(io.ReaderFrom); ok {
				return rf.ReadFrom(&io.LimitedReader{R: zeros{}, N: much})
			}
			return io.Copy(nc, &io.LimitedReader{R: zeros{}, N: much})
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range netsOfOurOwn {
				t.Run(c.name, func(t *testing.T) {
					read := make(chan struct{})
					got := make(chan int64, 1)
					n := startSock(t, c.net, faultnet.Options{Handler: func(peer *faultnet.Peer) {
						<-read
						k, _ := io.Copy(io.Discard, peer)
						got <- k
					}})
					p := n.pool(t, c.change)
					type outcome struct {
						n   int64
						err error
					}
					over := make(chan outcome, 1)
					go func() {
						network, address := n.target()
						nc, err := p.DialContext(context.Background(), network, address)
						if err != nil {
							over <- outcome{0, err}
							return
						}
						k, err := write(nc) // the last that is heard of nc
						over <- outcome{k, err}
					}()
					soon(t, "it writes", func() bool { return p.Stats().Tracked == 1 && n.srv.Open() == 1 })
					collect()
					close(read)
					require.Equal(t, outcome{much, nil}, inTime(t, over))
					soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
					require.Equal(t, int64(much), inTime(t, got))
				})
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// A connection of the user's need not know where it is.
func TestASecondCloseOfATrackedConnectionIsAnErrorWhateverItIs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{Dialers: map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
			nc, err := n.dial(ctx, a)
			if err != nil {
				return nil, err
			}
			return nowhere{nc}, nil
		}}})
		nc, err := n.p.DialContext(bg, "tcp", "h:80")
		require.NoError(t, err)
		require.NoError(t, nc.Close())
		require.ErrorIs(t, nc.Close(), net.ErrClosed)
	})
}

type nowhere struct{ net.Conn }

func (nowhere) LocalAddr() net.Addr  { return nil }
func (nowhere) RemoteAddr() net.Addr { return nil }

// TRY-24: to the resolver a final dot says that the name is complete, and to the pool's
// books it says nothing.
func TestDialContextDialsTheNameAsGiven(t *testing.T) {
	for address, want := range map[string]string{
		"db.example.com.:80": "db.example.com.",
		"db.example.com:80":  "db.example.com",
		"DB.:80":             "db.",
		"localhost.:80":      "localhost.",
		":80":                "localhost",
		"127.0.0.1:80":       "127.0.0.1",
		"[::1]:80":           "::1",
	} {
		for _, own := range []bool{true, false} {
			asked := make(chan Addr, 1)
			dial := func(_ context.Context, a Addr) (net.Conn, error) { asked <- a; return nil, errBoom }
			cfg := Config{}
			if own {
				cfg.Dialers = map[Transport]DialFunc{TCP: dial}
			}
			p, err := New(cfg)
			require.NoError(t, err)
			sys := realSystem
			sys.dial = dial
			p.sys = &sys
			_, err = p.DialContext(bg, "tcp", address)
			var pe *Error
			require.ErrorAs(t, err, &pe)
			require.Equal(t, want, (<-asked).Host)
			canon, err := pe.Addr.canonical()
			require.NoError(t, err)
			require.Equal(t, canon, pe.Addr, "the books have one form of an address")
			require.NoError(t, p.Close())
		}
	}
	// Those that ask for a family dial by themselves.
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	s := &site{env: &p.env, addr: n.addr, family: family4, absolute: true}
	s.addr.Host = "no-such-host.invalid"
	_, err := (&attempt{c: &conn{site: s}}).connectOnce(t.Context())
	require.ErrorContains(t, err, "no-such-host.invalid.")
	require.False(t, absolute("unix", "/tmp/x.:1."))
}

// TRY-18: a library whose own connections fill the pool gets one more, for as long as it
// needs that to give up another.
func TestADialOverflowIsNotStalledByThePoolItFills(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 3, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		dial := n.p.DialOverflow(2)
		var kept []net.Conn
		for range 3 {
			nc, err := dial(bg, "tcp", "h:80")
			require.NoError(t, err)
			kept = append(kept, nc)
		}
		// Four queries are cancelled at once, each over a connection of its own.
		over := make(chan time.Duration, 4)
		for range 4 {
			go func() {
				start := time.Now()
				nc, err := dial(bg, "tcp", "h:80")
				if err != nil {
					t.Error(err)
					return
				}
				n.p.check(t)
				if st := n.p.Stats(); st.Open > 5 {
					t.Errorf("%d open of 3 and 2", st.Open)
				}
				time.Sleep(time.Second)
				nc.Close()
				over <- time.Since(start)
			}()
			synctest.Wait()
		}
		require.Equal(t, 3, n.p.Stats().Open, "at first it waits, as others do")
		for i, want := range []time.Duration{time.Second, time.Second, 2 * time.Second, 2 * time.Second} {
			require.Equal(t, ownPatience+want, <-over, i)
		}
		// Nobody else has anything of it.
		ctx, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		_, err := n.p.DialContext(ctx, "tcp", "h:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, n.fail(ctx, at("a")), context.DeadlineExceeded)
		_, err = n.p.DialOverflow(0)(ctx, "tcp", "h:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		// What was opened beyond the limit is taken off it again.
		ctx, cancel = context.WithTimeout(bg, time.Second)
		defer cancel()
		extra, err := dial(ctx, "tcp", "h:80")
		require.NoError(t, err)
		waits := n.borrow(bg, at("a"))
		synctest.Wait()
		require.NoError(t, extra.Close())
		synctest.Wait()
		require.True(t, waits.waits())
		require.NoError(t, kept[0].Close())
		waits.conn()
		require.NoError(t, waits.giveBack())
		for _, nc := range kept[1:] {
			require.NoError(t, nc.Close())
		}
		n.check()
	})
}

// TRY-18: where nobody may wait, the overflow is there at once.
func TestADialOverflowUnderFailWaitsForNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 1, WhenFull: FullFail, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		dial := n.p.DialOverflow(1)
		first, err := dial(bg, "tcp", "h:80")
		require.NoError(t, err)
		_, err = n.p.DialContext(bg, "tcp", "h:80")
		require.ErrorIs(t, err, ErrExhausted)
		start := time.Now()
		second, err := dial(bg, "tcp", "h:80")
		require.NoError(t, err)
		require.Zero(t, time.Since(start))
		_, err = dial(bg, "tcp", "h:80")
		require.ErrorIs(t, err, ErrExhausted)
		n.check()
		require.NoError(t, first.Close())
		require.NoError(t, second.Close())
	})
}

// TRY-18: a call that ends in whichever way leaves no overflow behind that somebody
// could look for.
func TestACallOfADialOverflowLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 1, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		dial := n.p.DialOverflow(1)
		held := n.borrow(bg, at("a"))
		held.conn()
		ctx, cancel := context.WithTimeout(bg, ownPatience/2)
		defer cancel()
		_, err := dial(ctx, "tcp", "h:80")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		n.Host("h").Down()
		_, err = dial(bg, "tcp", "h:80")
		require.Error(t, err)
		n.Host("h").Up()
		nc, err := dial(bg, "tcp", "h:80")
		require.NoError(t, err)
		require.NoError(t, nc.Close())
		n.p.mu.Lock()
		require.Zero(t, n.p.overflows)
		require.Empty(t, n.p.readyOwn)
		n.p.mu.Unlock()
		require.NoError(t, held.giveBack())
		n.check()
	})
}
