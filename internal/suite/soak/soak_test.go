package soak

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The soak: a small pool, more borrowers than it has room for, servers on real
// sockets that restart, cut connections, push bytes that nobody asked for and
// answer late, and an operator who retires, evicts and closes, all at random
// and all at once. Whatever goes wrong for a borrower, no reply may be another's,
// the books must agree at every moment, and at the end nothing may be left.
//
// It runs for 2 seconds, 0.7 with -short, or for CONNPOOL_SOAK (a duration). With -v a line is
// printed each 10 seconds.

const soakSeed = 20 // of everything that is random but the scheduler

// soak is one run.
type soak struct {
	pool    *connpool.Pool
	servers []*faultnet.Server
	addrs   []connpool.Addr
	whole   []bool // whether the server of that address sends a reply in one piece

	exchanges, failures, pushed, refused atomic.Int64

	mu     sync.Mutex // guards what follows
	wrong  []string
	closed map[uint64]connpool.CloseReason // the last few thousand, by ID
	order  []uint64
}

// soakState is what Setup makes of a connection: it knows its number on the
// server, and which reply is next.
type soakState struct {
	addr   connpool.Addr
	r      *bufio.Reader
	serial int
	seq    int
	loans  int         // written without synchronisation: the race detector sees two owners
	lent   atomic.Bool // and so does this
}

var (
	errSoakPushed  = errors.New("bytes that nobody asked for")
	errSoakForeign = errors.New("a foreign reply")
	errSoakOwn     = errors.New("fn's own")
)

func (s *soak) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.wrong) < 20 {
		s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
	}
}

func (s *soak) faults() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.wrong...)
}

// exchange sends a token and demands its own reply, on its own connection, in
// its turn. What a server pushed says so by a '!', which no reply contains.
func (s *soak) exchange(w io.Writer, st *soakState, token string) error {
	if _, err := io.WriteString(w, token+"\n"); err != nil {
		return err
	}
	line, err := st.r.ReadString('\n')
	if err != nil {
		return err
	}
	st.seq++
	if strings.Contains(line, "!") {
		s.pushed.Add(1)
		return errSoakPushed
	}
	serial, seq, got := 0, 0, ""
	fmt.Sscanf(line, "%d %d %s", &serial, &seq, &got)
	if st.serial == 0 {
		st.serial = serial
	}
	if got != token || seq != st.seq || serial != st.serial {
		s.fault("foreign reply on %v: got %q, expected %d %d %s", st.addr, line, st.serial, st.seq, token)
		return errSoakForeign
	}
	s.exchanges.Add(1)
	return nil
}

// once borrows a connection and does one of all things that can be done with it.
func (s *soak) once(rng *rand.Rand, name string) {
	i := rng.IntN(len(s.addrs))
	addr := s.addrs[i]
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	switch rng.IntN(8) {
	case 0: // shorter than many a reply takes
		cancel()
		ctx, cancel = context.WithTimeout(context.Background(), time.Duration(1+rng.IntN(12))*time.Millisecond)
	case 1:
		stop := time.AfterFunc(time.Duration(rng.IntN(8000))*time.Microsecond, cancel)
		defer stop.Stop()
	}
	defer cancel()

	deed := rng.IntN(40)
	var leaked connpool.Conn
	var running tasks.Group // what fn leaves running
	ran := false
	err := s.pool.With(ctx, addr, func(c connpool.Conn) error {
		ran, leaked = true, c
		st := connpool.State[*soakState](c)
		if st == nil || st.addr != addr || c.Addr() != addr {
			s.fault("lent for %v: a connection of %v", addr, c.Addr())
			return errSoakForeign
		}
		if !st.lent.CompareAndSwap(false, true) {
			s.fault("connection %d of %v is lent twice", c.Info().ID, addr)
		}
		st.loans++
		defer st.lent.Store(false)
		for n := range 1 + rng.IntN(3) {
			if err := s.exchange(c, st, fmt.Sprintf("%s-%d", name, n)); err != nil {
				return err
			}
		}
		switch deed {
		case 0:
			return errSoakOwn
		case 1:
			return connpool.Keep(errSoakOwn)
		case 2:
			panic(errSoakOwn)
		case 3:
			runtime.Goexit()
		case 4:
			c.Close()
		case 5:
			nc, err := c.Detach()
			if err != nil {
				return err
			}
			defer nc.Close()
			return s.exchange(nc, &soakState{addr: addr, r: bufio.NewReader(nc), serial: st.serial, seq: st.seq}, name+"-detached")
		case 6:
			c.CloseWrite()
		case 7: // an operation in flight
			running.Go(func() { c.Read(make([]byte, 1)) })
		case 8: // what is left of the reply must reach nobody
			if s.whole[i] {
				io.WriteString(c, name+"-left\n")
				c.Read(make([]byte, 1))
			}
		case 9: // nor may a deadline
			c.SetDeadline(time.Unix(1, 0))
		case 10:
			select {
			case <-ctx.Done():
			case <-time.After(15 * time.Millisecond):
			}
		}
		return nil
	})
	running.Wait()
	if ran {
		if _, err := leaked.Read(make([]byte, 1)); !errors.Is(err, connpool.ErrReturned) {
			s.fault("a Conn carried out of fn: Read says %v", err)
		}
	}
	var pe *connpool.Error
	switch {
	case err == nil:
	case errors.As(err, &pe):
		s.refused.Add(1)
		if ran {
			s.fault("an *Error although fn ran: %v", err)
		}
		switch pe.Kind {
		case connpool.KindUnknown, connpool.KindInternal, connpool.KindUsage:
			early := errors.Is(err, connpool.ErrUnread) // pushed right behind the hello; a back-off tells of it again
			if !early && !errors.Is(err, errSoakPushed) {
				s.fault("a borrow failed as %v: %v", pe.Kind, err)
			}
		}
	default:
		s.failures.Add(1)
	}
}

// borrow is a borrower: a goroutine per loan, since some end theirs.
func (s *soak) borrow(stop <-chan struct{}, number int) {
	rng := rand.New(rand.NewPCG(soakSeed, uint64(number)))
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		var one tasks.Group
		one.Add(1)
		go func() {
			defer one.Done()
			defer func() {
				if v := recover(); v != nil && v != errSoakOwn { //nolint:errorlint // the very value
					s.fault("panic: %v", v)
				}
			}()
			s.once(rng, fmt.Sprintf("b%d.%d", number, n))
		}()
		one.Wait()
	}
}

// disturb is the servers' misfortune and the operator's hand.
func (s *soak) disturb(stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(soakSeed, 1<<32))
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(500+rng.IntN(4000)) * time.Microsecond):
		}
		server := s.servers[rng.IntN(len(s.servers))]
		switch n := rng.IntN(64); {
		case n < 12:
			server.CutIdle(1+rng.IntN(3), faultnet.Cut(rng.IntN(3)))
		case n < 18:
			server.CutBusy(1, faultnet.Cut(rng.IntN(3)))
		case n < 24:
			server.PushIdle(1+rng.IntN(2), []byte("!\n"))
		case n == 24:
			server.Stop()
			time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond) // it is down for a while
			if err := server.Restart(); err != nil {
				s.fault("restart: %v", err)
			}
		case n < 27:
			if err := server.Restart(); err != nil {
				s.fault("restart: %v", err)
			}
		case n < 32:
			s.pool.Retire(s.addrs[rng.IntN(len(s.addrs))])
		case n < 40:
			s.pool.EvictLRU()
		case n < 42:
			s.pool.CloseIdle()
		default:
			if err := pooltest.Inconsistency(s.pool); err != nil {
				s.fault("%v", err)
			}
			st := s.pool.Stats()
			if st.Open != st.Dialing+st.Idle+st.InUse+st.Closing || st.Open > st.Limit {
				s.fault("%v, limit %d", st, st.Limit)
			}
		}
	}
}

func (s *soak) onClosed(i connpool.CloseInfo) {
	s.mu.Lock()
	before, twice := s.closed[i.ID]
	if i.ID != 0 { // it has none if Setup failed
		s.closed[i.ID] = i.Reason
		if s.order = append(s.order, i.ID); len(s.order) > 4096 {
			delete(s.closed, s.order[0])
			s.order = s.order[1:]
		}
	}
	s.mu.Unlock()
	if twice {
		s.fault("connection %d was closed twice: %v, %v", i.ID, before, i.Reason)
	}
}

func soakLength(t *testing.T) time.Duration {
	text := os.Getenv("CONNPOOL_SOAK")
	if text == "" {
		return short.Of(2*time.Second, 400*time.Millisecond)
	}
	length, err := time.ParseDuration(text)
	require.NoError(t, err, "CONNPOOL_SOAK")
	return length
}

// BETA-07, BETA-08, BETA-24, BETA-X08, BETA-29, TDBC-01, ORA-75, PLT-12
func TestSoak(t *testing.T) {
	length := soakLength(t)
	t.Logf("%v, seed %d", length, soakSeed)
	if l, err := net.Listen("tcp4", "127.0.0.1:0"); err == nil {
		l.Close() // the runtime opens its own descriptors with the first socket
	}
	goroutines, descriptors := runtime.NumGoroutine(), soakDescriptors()

	s := &soak{closed: make(map[uint64]connpool.CloseReason)}
	late := func(serial, seq int) time.Duration { // one reply in 16 takes up to 16 ms
		if n := uint32(serial*7919+seq*104729) * 2654435761 >> 16; n%16 == 0 {
			return time.Duration(n%17) * time.Millisecond
		}
		return 0
	}
	cfg := connpool.Config{
		MaxOpen: 12, MaxPerAddr: 4, MaxIdle: 9, MaxIdlePerAddr: 3, MaxWaiters: 8, MaxUses: 300,
		IdleTimeout: 150 * time.Millisecond, MaxLifetime: 2 * time.Second, SweepInterval: 40 * time.Millisecond,
		CheckAfterIdle: 60 * time.Millisecond, Trace: &connpool.Trace{Closed: s.onClosed},
		Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			st := &soakState{addr: addr, r: bufio.NewReader(nc)}
			return st, s.exchange(nc, st, "hello")
		},
		Check: func(_ context.Context, c connpool.Conn) error {
			return s.exchange(c, connpool.State[*soakState](c), "ping")
		},
		Reset: func(_ context.Context, c connpool.Conn) error { _, err := io.WriteString(c, "RESET\n"); return err },
	}
	for _, o := range []faultnet.Options{{Network: "tcp"}, {Network: "tcp", Chunk: 3}, {Network: "tls"}, {Network: "unix"}} {
		if runtime.GOOS == "windows" && o.Network == "unix" {
			continue
		}
		o.ReplyDelay = late
		server, err := faultnet.Start(o)
		require.NoError(t, err)
		defer server.Close()
		s.servers = append(s.servers, server)
		addr := connpool.Addr{Transport: connpool.Transport(o.Network), Host: server.Host(), Port: server.Port()}
		if o.Network == "tls" {
			cfg.TLS = server.ClientTLS()
		}
		other := addr
		other.Scope = "other"
		s.addrs = append(s.addrs, addr, other)
		s.whole = append(s.whole, o.Chunk == 0, o.Chunk == 0)
	}
	var err error
	s.pool, err = pooltest.New(cfg)
	require.NoError(t, err)

	stop := make(chan struct{})
	var everybody tasks.Group
	for number := range 24 {
		everybody.Go(func() { s.borrow(stop, number) })
	}
	everybody.Go(func() { s.disturb(stop) })
	began := time.Now()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	end := time.NewTimer(length)
	defer end.Stop()
	for over := false; !over && len(s.faults()) == 0; {
		select {
		case <-end.C:
			over = true
		case <-tick.C:
			t.Logf("%v: %v", time.Since(began).Round(time.Second), s)
		}
	}
	close(stop)
	everybody.Wait()
	require.Empty(t, s.faults())

	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	require.NoError(t, s.pool.Shutdown(ctx))
	t.Logf("at the end: %v", s)
	require.NoError(t, pooltest.Inconsistency(s.pool))
	require.Empty(t, s.faults())
	st := s.pool.Stats()
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	require.Zero(t, st.Open)
	require.Equal(t, st.Dials-st.DialErrors, closed+st.Detached, "every connection left once: %v", st.Closed)
	require.LessOrEqual(t, st.PeakOpen, cfg.MaxOpen)
	require.Zero(t, st.AbandonedCalls)
	require.Zero(t, st.Closed[connpool.ClosedQuarantined])
	for _, server := range s.servers {
		server.Close()
	}
	for patience := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if runtime.NumGoroutine() <= goroutines && soakDescriptors() <= descriptors {
			break
		}
		if time.Now().After(patience) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("left behind: %d goroutines of %d, %d descriptors of %d\n%s", runtime.NumGoroutine(), goroutines,
				soakDescriptors(), descriptors, stacks[:runtime.Stack(stacks, true)])
		}
	}
	// The run is worth something only if much went well and much went wrong;
	// a short one on a busy machine may miss a kind of mishap.
	require.Greater(t, s.exchanges.Load(), int64(length/(50*time.Millisecond)))
	if length < 10*time.Second {
		return
	}
	for _, r := range []connpool.CloseReason{connpool.ClosedEvicted, connpool.ClosedStale, connpool.ClosedDirty, connpool.ClosedFnError, connpool.ClosedCanceled, connpool.ClosedRetired, connpool.ClosedByBorrower} {
		require.NotZero(t, st.Closed[r], "nothing was closed as %v", r)
	}
}

func (s *soak) String() string {
	return fmt.Sprintf("%d exchanges, %d loans failed, %d borrows refused, %d pushed bytes met; %v; closed %v",
		s.exchanges.Load(), s.failures.Load(), s.refused.Load(), s.pushed.Load(), s.pool.Stats(), s.pool.Stats().Closed)
}

// soakDescriptors is 0 where the system does not tell.
func soakDescriptors() int {
	open, _ := os.ReadDir("/proc/self/fd")
	return len(open)
}
