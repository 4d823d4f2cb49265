package bench

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"
)

// A figure is worth something only if the rival is used correctly. So each rival must
// keep the rules under which it is measured.

func everyRival(t *testing.T, except []string, test func(t *testing.T, name string, s *Settings, sv *Server)) {
	for _, name := range slices.Sorted(maps.Keys(Rivals)) {
		if slices.Contains(except, name) {
			continue
		}
		for _, check := range checksOf(name) {
			for _, overTLS := range []bool{false, true} {
				title := name + "/check=" + check.String() + "/net=tcp"
				if overTLS {
					title = name + "/check=" + check.String() + "/net=tls"
				}
				t.Run(title, func(t *testing.T) {
					sv := server(t, ProtocolOf(name), overTLS)
					test(t, name, &Settings{Servers: []string{sv.Addr}, TLS: overTLS, Max: 4, Check: check}, sv)
				})
			}
		}
	}
}

// single are the rivals with one connection, which are no pools.
var single = []string{"held", "shared"}

func TestEveryRivalReachesTheLimitAndKeepsIt(t *testing.T) {
	everyRival(t, single, func(t *testing.T, name string, s *Settings, sv *Server) {
		r := start(t, name, s)
		sv.Think.Store(int64(2 * time.Millisecond))
		var group sync.WaitGroup
		for user := range 16 {
			group.Go(func() {
				x := NewExchange(user)
				for range 4 {
					if err := r.Exchange(context.Background(), 0, x); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		if got := sv.MostBusy.Load(); got != int64(s.Max) {
			t.Errorf("%d exchanges at once, want %d", got, s.Max)
		}
		want := int64(s.Max)
		if name == "dial" {
			want = 16 * 4
		}
		if got := s.Opened.Load(); got != want {
			t.Errorf("opened %d connections, want %d", got, want)
		}
	})
}

func TestEveryRivalLendsAConnectionToOneBorrowerAtATime(t *testing.T) {
	everyRival(t, append([]string{"held"}, own...), func(t *testing.T, name string, s *Settings, sv *Server) {
		r := start(t, name, s)
		var mu sync.Mutex
		lent := map[string]bool{}
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				for range 20 {
					err := r.Hold(context.Background(), 0, func(c net.Conn) error {
						id := c.LocalAddr().String()
						mu.Lock()
						twice := lent[id]
						lent[id] = true
						if len(lent) > s.Max {
							t.Errorf("%d connections are lent, more than %d", len(lent), s.Max)
						}
						mu.Unlock()
						if twice {
							t.Errorf("%s is lent twice", id)
						}
						time.Sleep(50 * time.Microsecond)
						mu.Lock()
						delete(lent, id)
						mu.Unlock()
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
	})
}

func TestEveryRivalUsesWhatWasGivenBack(t *testing.T) {
	everyRival(t, []string{"dial"}, func(t *testing.T, name string, s *Settings, sv *Server) {
		r := start(t, name, s)
		x := NewExchange(1)
		for range 50 {
			must(t, r.Exchange(context.Background(), 0, x))
			if err := r.Loan(context.Background(), 0); err != nil && !errors.Is(err, ErrOwnProtocol) {
				t.Fatal(err)
			}
		}
		if got := s.Opened.Load(); got != 1 {
			t.Errorf("opened %d connections for one user", got)
		}
		if got := sv.Accepted.Load(); got != 1 {
			t.Errorf("the server saw %d connections", got)
		}
	})
}

func TestEveryRivalDropsAConnectionThatFailed(t *testing.T) {
	everyRival(t, []string{"dial"}, func(t *testing.T, name string, s *Settings, sv *Server) {
		r := start(t, name, s)
		x := NewExchange(1)
		must(t, r.Exchange(context.Background(), 0, x))
		sv.CutAll()
		var err error
		for range 3 { // one may fail, or two: a write can still seem to succeed
			if err = r.Exchange(context.Background(), 0, x); err == nil {
				break
			}
		}
		must(t, err)
	})
}

func TestEveryRivalThatChecksLendsNoDeadConnection(t *testing.T) {
	for _, name := range lenders {
		for _, overTLS := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				sv := server(t, Echo, overTLS)
				socks := make(chan *net.TCPConn, 8)
				s := &Settings{Servers: []string{sv.Addr}, TLS: overTLS, Max: 1, Check: CheckPeek}
				s.OnDial = func(nc net.Conn) { socks <- nc.(*net.TCPConn) }
				r := start(t, name, s)
				x := NewExchange(1)
				must(t, r.Exchange(context.Background(), 0, x))
				sv.CutAll()
				l := &line{}
				l.raw, _ = (<-socks).SyscallConn()
				l.look = func(fd uintptr) { l.dead = quiet(fd) != nil }
				for tries := 0; l.alive(); tries++ {
					if tries > 1000 {
						t.Skip("the look finds nothing on this system")
					}
					time.Sleep(time.Millisecond)
				}
				must(t, r.Exchange(context.Background(), 0, x))
			})
		}
	}
}

func TestKeyedRivalsKeepAddressesApart(t *testing.T) {
	for _, name := range lenders {
		t.Run(name, func(t *testing.T) {
			a, b := server(t, Echo, false), server(t, Echo, false)
			s := &Settings{Servers: []string{a.Addr, b.Addr}, Addrs: 4, Max: 2}
			if name == "connpool" || name == "stack" {
				r := start(t, name, s)
				for key := range 8 {
					must(t, r.Exchange(context.Background(), key%4, NewExchange(key)))
				}
				if a.Accepted.Load() != 2 || b.Accepted.Load() != 2 {
					t.Errorf("%d and %d connections, want 2 and 2", a.Accepted.Load(), b.Accepted.Load())
				}
				return
			}
			// The others have one pool for each address, with connections
			// to nowhere: see BenchmarkW6.
			s = &Settings{Fake: true, Addrs: 4, Max: 2}
			r := start(t, name, s)
			var conns []net.Conn
			for key := range 8 {
				must(t, r.Hold(context.Background(), key%4, func(c net.Conn) error {
					if !slices.Contains(conns, c) {
						conns = append(conns, c)
					}
					return nil
				}))
			}
			if len(conns) != 4 {
				t.Errorf("%d connections to 4 addresses", len(conns))
			}
		})
	}
}

// Each benchmark runs once, so that none of them breaks unnoticed.
func TestEveryBenchmarkRuns(t *testing.T) {
	if testing.Short() {
		t.Skip("this is what -short is for")
	}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self, "-test.short", "-test.run=^$", "-test.bench=.", "-test.benchtime=1x")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
