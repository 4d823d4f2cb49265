package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// target is what package net calls the server.
func (n *sockNet) target() (network, address string) {
	if n.addr.Transport == Unix {
		return "unix", n.addr.Host
	}
	return "tcp", net.JoinHostPort(n.addr.Host, fmt.Sprint(n.addr.Port))
}

// trackedNets are those whose connections DialContext can make.
var trackedNets = []string{"tcp", "tcp6", "unix", "unix-abstract"}

// TDBC-02
func TestDialContextFitsWhereADialFunctionIsExpected(t *testing.T) {
	nothingLeaks(t)
	var accepted, inside, peak atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if now := inside.Add(1); now > peak.Load() {
			peak.Store(now)
		}
		defer inside.Add(-1)
		fmt.Fprint(w, r.URL.Path)
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			accepted.Add(1)
		}
	}
	for _, start := range map[string]func(){"http": srv.Start} {
		start()
		defer srv.Close()
		p, err := New(Config{MaxOpen: 4})
		require.NoError(t, err)
		transport := &http.Transport{DialContext: p.DialContext, MaxConnsPerHost: 4, MaxIdleConnsPerHost: 4}
		client := &http.Client{Transport: transport}
		var all tasks.Group
		for w := range 8 {
			all.Go(func() {
				for i := range 25 {
					path := fmt.Sprintf("/%d/%d", w, i)
					resp, err := client.Get(srv.URL + path)
					if err != nil {
						t.Error(err)
						return
					}
					body, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || string(body) != path {
						t.Errorf("%q, %v", body, err)
					}
					if err := p.inconsistency(); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		soon(t, "the server has accepted each of them", func() bool { return accepted.Load() == int64(p.Stats().Dials) })
		st := p.Stats()
		require.LessOrEqual(t, st.Tracked, 4)
		require.Equal(t, st.InUse, st.Tracked)
		require.Greater(t, st.Tracked, 0, "the transport keeps them")
		require.LessOrEqual(t, peak.Load(), int64(4))
		transport.CloseIdleConnections()
		soon(t, "all slots free", func() bool { return p.Stats().Open == 0 })
		require.EqualValues(t, st.Dials, p.Stats().Closed[ClosedByBorrower])
		p.check(t)
		require.NoError(t, p.Close())
	}
}

// TDBC-02: crypto/tls above it is the library's.
func TestDialContextCarriesTLSOfTheLibrary(t *testing.T) {
	nothingLeaks(t)
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	defer srv.Close()
	p, err := New(Config{})
	require.NoError(t, err)
	defer p.Close()
	client := srv.Client()
	client.Transport.(*http.Transport).DialContext = p.DialContext
	resp, err := client.Post(srv.URL, "text/plain", strings.NewReader("hello"))
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	require.NoError(t, err)
	require.Equal(t, "hello", string(body))
	require.Equal(t, 1, p.Stats().Tracked)
	client.CloseIdleConnections()
	soon(t, "its slot free", func() bool { return p.Stats().Open == 0 })
}

func TestATrackedConnectionHoldsItsSlotUntilItIsClosed(t *testing.T) {
	for _, name := range trackedNets {
		t.Run(name, func(t *testing.T) {
			n := startSock(t, name, faultnet.Options{})
			p := n.pool(t, func(c *Config) {
				c.MaxOpen = 2
				c.Setup = func(context.Context, Addr, net.Conn) (any, error) { return nil, errors.New("not for these") }
			})
			network, address := n.target()
			a, err := p.DialContext(t.Context(), network, address)
			require.NoError(t, err)
			b, err := p.DialContext(t.Context(), network, address)
			require.NoError(t, err)
			p.check(t)
			require.NotEqual(t, nil, a)
			st := p.Stats()
			require.Equal(t, [5]int{2, 2, 2, 0, 0}, [5]int{st.Open, st.InUse, st.Tracked, st.Idle, st.Addrs})
			_, err = ask(a, newToken())
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			_, err = p.DialContext(ctx, network, address)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			var pe *Error
			require.ErrorAs(t, err, &pe)
			require.Equal(t, [3]any{"MaxOpen", 2, 2}, [3]any{pe.LimitName, pe.Limit, pe.InUse})
			third := make(chan net.Conn, 1)
			go func() {
				nc, err := p.DialContext(context.Background(), network, address)
				if err != nil {
					t.Error(err)
				}
				third <- nc
			}()
			queued(t, p, 1)
			p.check(t)
			require.NoError(t, a.Close())
			c := inTime(t, third)
			err = a.Close()
			require.ErrorIs(t, err, net.ErrClosed)
			require.Equal(t, 2, p.Stats().Open)
			p.check(t)
			_, err = a.Write([]byte("x"))
			require.ErrorIs(t, err, net.ErrClosed)
			require.NoError(t, b.Close())
			require.NoError(t, c.Close())
			require.Zero(t, p.Stats().Open)
			require.Zero(t, p.Stats().Tracked)
			soon(t, "closed for the server", func() bool { return n.srv.Open() == 0 })
		})
	}
}

func TestDialContextEvictsWhatIsIdle(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxOpen = 2 })
	loan(t, p, scoped(n.addr, "old"))
	loan(t, p, scoped(n.addr, "new"))
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	require.Equal(t, map[CloseReason]uint64{ClosedEvicted: 1}, p.Stats().Closed)
	for a := range p.Addrs() {
		require.Equal(t, "new", a.Scope)
	}
	// And nobody evicts it.
	held := hold(t, p, n.addr)
	_, ok := p.EvictLRU()
	require.False(t, ok)
	_, err = ask(nc, newToken())
	require.NoError(t, err)
	require.NoError(t, held.end(nil))
	require.NoError(t, nc.Close())
	p.check(t)
}

// One line for all: pooled borrowers and those who dial.
func TestDialContextWaitsInLineWithBorrowers(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxOpen = 1 })
	network, address := n.target()
	first := hold(t, p, n.addr)
	order := make(chan int, 4)
	for i := range 4 {
		go func() {
			if i%2 == 0 {
				nc, err := p.DialContext(context.Background(), network, address)
				if err != nil {
					t.Error(err)
					order <- -1
					return
				}
				order <- i
				nc.Close()
				return
			}
			err := p.With(context.Background(), scoped(n.addr, i), func(Conn) error { order <- i; return nil })
			if err != nil {
				t.Error(err)
			}
		}()
		queued(t, p, i+1)
	}
	require.NoError(t, first.end(nil))
	for i := range 4 {
		require.Equal(t, i, inTime(t, order))
	}
	soon(t, "nothing in use", func() bool { return p.Stats().InUse == 0 })
	p.check(t)
}

// The kernel's fast paths, and what libraries assert.
func TestATrackedConnectionIsWhatItsSocketIs(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	_, ok := nc.(interface {
		io.ReaderFrom
		io.WriterTo
		syscall.Conn
		CloseWrite() error
		CloseRead() error
		SetNoDelay(bool) error
		SetKeepAlive(bool) error
		SetLinger(int) error
		File() (*os.File, error)
	})
	require.True(t, ok, "%T", nc)
	require.NoError(t, nc.Close())

	u := startSock(t, "unix", faultnet.Options{})
	q := u.pool(t, nil)
	network, address = u.target()
	nc, err = q.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	_, ok = nc.(interface {
		syscall.Conn
		CloseWrite() error
		ReadMsgUnix(b, oob []byte) (n, oobn, flags int, addr *net.UnixAddr, err error)
	})
	require.True(t, ok, "%T", nc)
	require.NoError(t, nc.Close())
}

func TestDialContextTakesTheDialerOfTheTransport(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{MaxOpen: 1, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		n.Host("h").Serve(echoLines)
		nc, err := n.p.DialContext(bg, "tcp", "H:80")
		require.NoError(t, err)
		answer, err := askLine(nc, "x")
		require.NoError(t, err)
		require.Equal(t, "1 x", answer)
		_, err = nc.(syscall.Conn).SyscallConn()
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.NoError(t, nc.(interface{ CloseWrite() error }).CloseWrite())
		require.IsType(t, &faultnet.Conn{}, nc.(interface{ NetConn() net.Conn }).NetConn())
		require.Equal(t, 1, n.p.Stats().Unprobed+1)
		n.check()
		require.NoError(t, nc.Close())
		synctest.Wait()
		require.Zero(t, n.p.Stats().Open)
		n.check()
		// It knows no family, and a name has none.
		_, err = n.p.DialContext(bg, "tcp4", "h:80")
		require.ErrorContains(t, err, "use network tcp")
		_, err = n.p.DialContext(bg, "tcp6", "127.0.0.1:80")
		require.ErrorContains(t, err, "use network tcp")
		nc, err = n.p.DialContext(bg, "tcp4", "127.0.0.1:80")
		require.NoError(t, err)
		require.NoError(t, nc.Close())
	})
}

func TestDialContextKnowsFamilies(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	port := fmt.Sprint(n.addr.Port)
	nc, err := p.DialContext(t.Context(), "tcp4", "localhost:"+port)
	require.NoError(t, err)
	require.NotNil(t, nc.RemoteAddr().(*net.TCPAddr).IP.To4())
	require.NoError(t, nc.Close())
	nc, err = p.DialContext(t.Context(), "tcp4", ":"+port)
	require.NoError(t, err)
	require.NoError(t, nc.Close())
	_, err = p.DialContext(t.Context(), "tcp6", "127.0.0.1:"+port)
	require.Equal(t, KindAddress, KindOf(err), err)
	for _, tc := range []struct{ network, address, says string }{
		{"udp", "localhost:1", "the network must be"},
		{"tcp", "localhost", "missing port"},
		{"tcp", "localhost:0", "from 1 to 65535"},
		{"tcp", "localhost:70000", "from 1 to 65535"},
		{"tcp", "localhost:nosuchservice", "nosuchservice"},
		{"tcp", "two words:1", "two words"},
		{"unix", "", "dial unix"},
	} {
		_, err := p.DialContext(t.Context(), tc.network, tc.address)
		require.ErrorContains(t, err, tc.says)
		require.Equal(t, KindUsage, KindOf(err))
	}
	_, err = p.DialContext(nil, "tcp", "localhost:1") //lint:ignore SA1012 that is the mistake
	require.Equal(t, KindUsage, KindOf(err))
	_, err = new(Pool).DialContext(t.Context(), "tcp", "localhost:1")
	require.ErrorIs(t, err, ErrClosed)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = p.DialContext(done, "tcp", "localhost:"+port)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, p.Stats().Open)
}

func TestADialThatItsCallerGaveUpEndsWithIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newTestnet(t)
		n.open(Config{DialTimeout: -1, Dialers: map[Transport]DialFunc{TCP: n.dial}})
		n.Host("h").BlackHole(true)
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		_, err := n.p.DialContext(ctx, "tcp", "h:1")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		synctest.Wait()
		require.Zero(t, n.p.Stats().Open, "no dial goes on that nobody else can use")
		n.check()
		// A dialer that comes back late finds nobody, and what it brings is closed.
		n.Host("h").BlackHole(false)
		n.Host("late").SetLatency(0)
		gate := make(chan struct{})
		slow := map[Transport]DialFunc{TCP: func(_ context.Context, a Addr) (net.Conn, error) {
			<-gate
			return n.dial(bg, a)
		}}
		m := newTestnet(t)
		m.Mem = n.Mem
		m.open(Config{Dialers: slow, DialTimeout: -1})
		ctx, cancel = context.WithTimeout(bg, time.Second)
		defer cancel()
		_, err = m.p.DialContext(ctx, "tcp", "late:1")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 1, m.p.Stats().Dialing)
		m.check()
		close(gate)
		synctest.Wait()
		require.Empty(t, n.Host("late").Conns())
		require.Zero(t, m.p.Stats().Open)
		m.closed(reasons{ClosedCanceled: 1})
		m.check()
	})
}

func TestClosingThePoolLeavesTrackedConnectionsAlone(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxOpen = 1 })
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	waits := make(chan error, 1)
	go func() {
		_, err := p.DialContext(context.Background(), network, address)
		waits <- err
	}()
	queued(t, p, 1)
	require.NoError(t, p.Close())
	require.ErrorIs(t, inTime(t, waits), ErrClosed)
	p.check(t)
	_, err = p.DialContext(t.Context(), network, address)
	require.ErrorIs(t, err, ErrClosed)
	_, err = ask(nc, newToken())
	require.NoError(t, err, "it is the caller's")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err = p.Shutdown(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "1 in use for tcp://"+address)
	over := make(chan error, 1)
	go func() { over <- p.Shutdown(context.Background()) }()
	require.NoError(t, nc.Close())
	require.NoError(t, inTime(t, over))
	p.check(t)
}

// Nobody can close what nobody can reach.
func TestATrackedConnectionThatWasDroppedFreesItsSlot(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	var told atomic.Pointer[CloseInfo]
	p := n.pool(t, func(c *Config) { c.Trace = &Trace{Closed: func(i CloseInfo) { told.Store(&i) }} })
	network, address := n.target()
	func() {
		nc, err := p.DialContext(t.Context(), network, address)
		require.NoError(t, err)
		_, err = ask(nc, newToken())
		require.NoError(t, err)
	}()
	soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
	p.check(t)
	soon(t, "the reason", func() bool { return told.Load() != nil })
	require.ErrorIs(t, told.Load().Err, errLost)
	soon(t, "the server's end closed", func() bool { return n.srv.Open() == 0 })
}

// While somebody reads, it is not dropped.
func TestATrackedConnectionInUseIsNotTakenForDropped(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	network, address := n.target()
	read := make(chan error, 1)
	go func() {
		nc, err := p.DialContext(context.Background(), network, address)
		if err == nil {
			_, err = nc.Read(make([]byte, 1)) // the last that is heard of nc
		}
		read <- err
	}()
	soon(t, "it reads", func() bool { return p.Stats().Tracked == 1 && n.srv.Open() == 1 })
	for range 20 {
		runtime.GC()
		<-time.After(time.Millisecond)
	}
	require.Equal(t, 1, n.srv.PushIdle(-1, []byte("x")))
	require.NoError(t, inTime(t, read))
	soon(t, "the slot free", func() bool { runtime.GC(); return p.Stats().Open == 0 })
}

// MarkDead and the check of identity know these connections, too.
func TestAStolenTrackedConnectionIsNotClosed(t *testing.T) {
	if !sock.CanPeek || runtime.GOOS == "windows" {
		t.Skip("no theft here")
	}
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	other, err := net.Dial(network, address)
	require.NoError(t, err)
	defer other.Close()
	inner := nc.(*trackedTCP).t.c
	inner.word.Or(flagStolen) // as the look before a dial would say
	require.NoError(t, nc.Close())
	require.EqualValues(t, 1, p.Stats().Closed[ClosedQuarantined])
	require.Zero(t, p.Stats().Open)
	p.check(t)
	// The quarantine never closes it; this test does, to leave nothing.
	inner.nc.Close()
}

// Handles run out: what is idle makes room, and the dial is tried again.
func TestDialContextIsRetriedWhenHandlesRunOut(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, nil)
	sys := realSystem
	short := true
	sys.dial = func(ctx context.Context, a Addr) (net.Conn, error) {
		if a.Scope == "" && short && p.Stats().Idle > 0 {
			return nil, syscall.EMFILE
		}
		return dialSocket(ctx, a)
	}
	p.sys = &sys
	loan(t, p, scoped(n.addr, "idle"))
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	require.Equal(t, map[CloseReason]uint64{ClosedEvicted: 1}, p.Stats().Closed)
	require.NoError(t, nc.Close())
}

func TestDialContextIsRefusedWhereNobodyMayWait(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(c *Config) { c.MaxOpen, c.WhenFull = 1, FullFail })
	network, address := n.target()
	nc, err := p.DialContext(t.Context(), network, address)
	require.NoError(t, err)
	_, err = p.DialContext(t.Context(), network, address)
	require.ErrorIs(t, err, ErrExhausted)
	p.check(t)
	require.NoError(t, nc.Close())
	n.srv.Stop()
	_, err = p.DialContext(t.Context(), network, address)
	require.Equal(t, KindRefused, KindOf(err))
	require.Zero(t, p.Stats().Open)
	p.check(t)
	require.Empty(t, p.unpooled)
}
