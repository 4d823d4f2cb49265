package connpool

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/dnstest"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// nameNet is one port on several addresses of loopback, and a DNS server that leads there.
type nameNet struct {
	*dnstest.Server
	t    *testing.T
	addr Addr // of the name db.test
	cfg  Config
	p    *Pool
}

// here is the n-th address of a nameNet.
func here(n int) string { return fmt.Sprint("127.0.0.", n) }

// listenAll listens on one port of all hosts.
func listenAll(t *testing.T, hosts ...string) (listeners []net.Listener) {
	t.Helper()
	for try := 0; ; try++ {
		port := "0"
		for _, host := range hosts {
			ln, err := net.Listen("tcp", net.JoinHostPort(host, port))
			if err != nil && port == "0" {
				t.Skip("this machine does not listen on ", host, ": ", err)
			}
			if err != nil {
				break
			}
			listeners = append(listeners, ln)
			_, port, _ = net.SplitHostPort(ln.Addr().String())
		}
		if len(listeners) == len(hosts) {
			return listeners
		}
		for _, ln := range listeners {
			ln.Close()
		}
		if listeners = nil; try == 20 {
			t.Skip("no port is free on all of ", hosts)
		}
	}
}

// startNames starts echo servers on hosts. Under TLS they all are db.test.
func startNames(t *testing.T, transport Transport, hosts ...string) *nameNet {
	t.Helper()
	nothingLeaks(t)
	n := &nameNet{t: t, addr: Addr{Transport: transport, Host: "db.test"}}
	dns, err := dnstest.Start()
	require.NoError(t, err)
	n.Server = dns
	t.Cleanup(dns.Close)
	n.cfg = Config{FollowDNS: true, SweepInterval: time.Hour, IdleTimeout: -1, Dialer: &net.Dialer{Resolver: dns.Resolver()}}
	ca := faultnet.NewCA()
	n.cfg.TLS = &tls.Config{RootCAs: ca.Pool()}
	server := &tls.Config{Certificates: []tls.Certificate{ca.Server("db.test")}}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for _, ln := range listenAll(t, hosts...) {
		n.addr.Port = uint16(ln.Addr().(*net.TCPAddr).Port)
		t.Cleanup(func() { ln.Close() })
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				if transport == TLS {
					c = tls.Server(c, server)
				}
				wg.Add(1)
				go func() {
					defer wg.Done()
					defer c.Close()
					io.Copy(c, c)
				}()
			}
		}()
	}
	return n
}

func (n *nameNet) open(change func(*Config)) {
	n.t.Helper()
	if change != nil {
		change(&n.cfg)
	}
	p, err := New(n.cfg)
	require.NoError(n.t, err)
	n.p = p
	n.t.Cleanup(func() {
		p.check(n.t)
		require.NoError(n.t, p.Close())
		p.check(n.t)
	})
}

// idle makes k idle connections of addr, and says where they lead.
func (n *nameNet) idle(addr Addr, k int) (hosts []string) {
	n.t.Helper()
	var all []held
	for range k {
		h := hold(n.t, n.p, addr)
		all = append(all, h)
		hosts = append(hosts, peerOf(h.Conn))
	}
	for _, h := range all {
		require.NoError(n.t, h.end(nil))
	}
	return hosts
}

// use borrows once, and says where the connection leads.
func (n *nameNet) use(addr Addr) (host string) {
	n.t.Helper()
	require.NoError(n.t, n.p.With(bg, addr, func(c Conn) error {
		host = peerOf(c)
		return nil
	}))
	return host
}

func peerOf(c Conn) string {
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	return host
}

// moved is how many connections were closed, all of them because their name leads elsewhere.
func (n *nameNet) moved() uint64 {
	n.t.Helper()
	settled(n.t, n.p)
	closed := n.p.Stats().Closed
	k := closed[ClosedMoved]
	delete(closed, ClosedMoved)
	require.Empty(n.t, closed)
	return k
}

var aRecord, aaaaRecord = dnstest.Question{Name: "db.test"}, dnstest.Question{Name: "db.test", Six: true}

// ADO-12
func TestConnectionsFollowTheirName(t *testing.T) {
	for _, transport := range []Transport{TCP, TLS} {
		t.Run(string(transport), func(t *testing.T) {
			n := startNames(t, transport, here(1), here(2))
			var mu sync.Mutex
			var whys []string
			n.open(func(c *Config) {
				c.Trace = &Trace{Closed: func(i CloseInfo) {
					mu.Lock()
					defer mu.Unlock()
					whys = append(whys, i.Err.Error())
				}}
			})
			n.Set("db.test", here(1))
			other := scoped(n.addr, "another of the same name")
			require.Equal(t, []string{here(1), here(1)}, n.idle(n.addr, 2))
			n.idle(other, 1)
			busy := hold(t, n.p, n.addr)
			asked := n.Asked(aRecord)
			v6 := n.Asked(aaaaRecord)
			sweepAll(n.p)
			require.Equal(t, asked+1, n.Asked(aRecord), "once for a name, whatever has it")
			require.Equal(t, v6, n.Asked(aaaaRecord), "there is no connection of that family")

			n.Set("db.test", here(2))
			sweepAll(n.p)
			require.Zero(t, n.moved(), "one answer is none")
			sweepAll(n.p)
			require.EqualValues(t, 2, n.moved(), "the idle ones")
			require.Equal(t, here(2), n.use(n.addr))
			_, err := io.WriteString(busy, "still mine\n")
			require.NoError(t, err)
			line, err := bufio.NewReader(busy).ReadString('\n')
			require.NoError(t, err)
			require.Equal(t, "still mine\n", line, "no loan is cut")
			sweepAll(n.p)
			require.NoError(t, busy.end(nil))
			require.EqualValues(t, 3, n.moved(), "the busy one when it is given back")
			for range 10 {
				sweepAll(n.p)
			}
			require.EqualValues(t, 3, n.moved())
			require.Equal(t, here(2), n.use(n.addr))
			mu.Lock()
			defer mu.Unlock()
			for _, why := range whys {
				require.Equal(t, "db.test does not lead to 127.0.0.1 any more", why)
			}
		})
	}
}

// ADO-12: a look-up that fails, in whatever way, changes nothing: neither does it retire a
// connection, nor does it break a row of two good answers.
func TestAFailedLookUpChangesNothing(t *testing.T) {
	for name, fail := range map[string]func(*nameNet){
		"SERVFAIL": func(n *nameNet) { n.Fail("db.test", dnstest.ServFail) },
		"NXDOMAIN": func(n *nameNet) { n.Fail("db.test", dnstest.NXDomain) },
		"REFUSED":  func(n *nameNet) { n.Fail("db.test", dnstest.Refused) },
		"no address": func(n *nameNet) {
			n.Set("db.test")
		},
		"no address of the one family, a failure for the other": func(n *nameNet) {
			n.Func("db.test", func(q dnstest.Question) ([]netip.Addr, dnstest.RCode) {
				if q.Six {
					return nil, dnstest.ServFail
				}
				return nil, dnstest.Success
			})
		},
		"a failure for the one family, an address of the other": func(n *nameNet) {
			n.Func("db.test", func(q dnstest.Question) ([]netip.Addr, dnstest.RCode) {
				if q.Six {
					return []netip.Addr{netip.MustParseAddr("::1")}, dnstest.Success
				}
				return nil, dnstest.ServFail
			})
		},
		"nobody there": func(n *nameNet) { n.p.cfg.Dialer.Resolver.Dial = unreachable },
	} {
		t.Run(name, func(t *testing.T) {
			n := startNames(t, TCP, here(1), here(2))
			n.open(nil)
			dial := n.p.cfg.Dialer.Resolver.Dial
			n.Set("db.test", here(1))
			n.idle(n.addr, 2)
			fail(n)
			for range 5 {
				sweepAll(n.p)
			}
			require.Zero(t, n.moved())
			n.p.cfg.Dialer.Resolver.Dial = dial
			n.Set("db.test", here(2))
			sweepAll(n.p)
			fail(n)
			sweepAll(n.p)
			require.Zero(t, n.moved())
			n.p.cfg.Dialer.Resolver.Dial = dial
			n.Set("db.test", here(2))
			sweepAll(n.p)
			require.EqualValues(t, 2, n.moved())
		})
	}
}

func unreachable(context.Context, string, string) (net.Conn, error) { return nil, errBoom }

// ADO-12: a server that answers with 3 of 10 addresses at a time.
func TestRandomSubsetsOfTheAddressesCloseNoConnection(t *testing.T) {
	var all []string
	for i := range 10 {
		all = append(all, here(i+1))
	}
	n := startNames(t, TCP, all...)
	n.open(nil)
	rng := rand.New(rand.NewPCG(4, 12))
	var alive atomic.Int64 // a look-up may still be under way when it changes
	alive.Store(int64(len(all)))
	n.Func("db.test", func(q dnstest.Question) (ips []netip.Addr, _ dnstest.RCode) {
		if !q.Six {
			for _, i := range rng.Perm(int(alive.Load()))[:3] {
				ips = append(ips, netip.MustParseAddr(all[i]))
			}
		}
		return ips, dnstest.Success
	})
	n.idle(n.addr, 30)
	busy := hold(t, n.p, n.addr)
	for range 200 {
		sweepAll(n.p)
		n.use(n.addr)
	}
	require.NoError(t, busy.end(nil))
	require.Zero(t, n.moved())

	// What is really gone goes, later.
	alive.Store(9)
	for range 300 {
		sweepAll(n.p)
	}
	require.NotZero(t, n.moved())
	for _, c := range n.p.every() {
		require.NotEqual(t, here(10), strings.Split(c.nc.RemoteAddr().String(), ":")[0])
	}
	require.GreaterOrEqual(t, n.p.Stats().Idle, 20, "and nothing else")
}

// ADO-12: the order of the addresses says nothing, and a name with several keeps its connections to
// those that remain.
func TestOnlyConnectionsToAddressesThatAreGoneAreRetired(t *testing.T) {
	n := startNames(t, TCP, here(1), here(2), here(3))
	n.open(nil)
	for i := range 3 {
		n.Set("db.test", here(i+1))
		n.idle(n.addr, i+1) // the first ones are lent again
	}
	require.Equal(t, 3, n.p.Stats().Idle)
	n.p.CloseIdle()
	var busy []held
	for i := range 3 {
		n.Set("db.test", here(i+1))
		busy = append(busy, hold(t, n.p, n.addr))
	}
	for _, h := range busy {
		require.NoError(t, h.end(nil))
	}
	before := n.p.Stats().Closed[ClosedOnRequest]
	for i := range 12 {
		n.Set("db.test", here(i%3+1), here((i+1)%3+1), here((i+2)%3+1))
		sweepAll(n.p)
	}
	require.Equal(t, 3, n.p.Stats().Idle)
	n.Set("db.test", here(3), here(1))
	sweepAll(n.p)
	sweepAll(n.p)
	settled(t, n.p)
	require.Equal(t, reasons{ClosedMoved: 1, ClosedOnRequest: before}, n.p.Stats().Closed)
}

// ADO-12: a connection that was opened after an answer is judged by later ones.
func TestAConnectionIsJudgedByAnswersAfterItsDial(t *testing.T) {
	n := startNames(t, TCP, here(1), here(2))
	n.open(nil)
	n.Set("db.test", here(1))
	n.idle(n.addr, 1)
	n.Set("db.test", here(2))
	sweepAll(n.p) // 1 is missing in it
	n.Set("db.test", here(1))
	busy := []held{hold(t, n.p, n.addr), hold(t, n.p, n.addr)} // the second is new
	n.Set("db.test", here(2))
	sweepAll(n.p)
	for _, h := range busy {
		require.Equal(t, here(1), peerOf(h.Conn))
		require.NoError(t, h.end(nil))
	}
	require.Zero(t, n.moved(), "the dial found 1 where the answer had been 2")
	sweepAll(n.p)
	require.EqualValues(t, 2, n.moved())
}

// ADO-12: the families are judged apart, whichever of them won the dial.
func TestEachFamilyIsJudgedByItsOwnAnswers(t *testing.T) {
	n := startNames(t, TCP, here(1), "::1")
	n.open(nil)
	n.Set("db.test", "::1")
	n.idle(n.addr, 1)
	n.Set("db.test", here(1))
	busy := []held{hold(t, n.p, n.addr), hold(t, n.p, n.addr)}
	require.Equal(t, []string{"::1", here(1)}, []string{peerOf(busy[0].Conn), peerOf(busy[1].Conn)})
	for _, h := range busy {
		require.NoError(t, h.end(nil))
	}
	n.Set("db.test", here(1), "::1")
	for range 5 {
		sweepAll(n.p)
	}
	require.Zero(t, n.moved())
	// The answer for one family is none for the other.
	six := []netip.Addr{netip.MustParseAddr("::1")}
	n.Func("db.test", func(q dnstest.Question) ([]netip.Addr, dnstest.RCode) {
		if q.Six {
			return six, dnstest.Success
		}
		return nil, dnstest.ServFail
	})
	for range 5 {
		sweepAll(n.p)
	}
	require.Zero(t, n.moved())
	// The name has left IPv4.
	n.Set("db.test", "::1")
	sweepAll(n.p)
	require.Zero(t, n.moved())
	sweepAll(n.p)
	require.EqualValues(t, 1, n.moved())
	require.Equal(t, "::1", n.use(n.addr))
}

// ADO-12: a server that can answer for one family only.
func TestAFamilyThatIsNeverAnsweredDoesNotCount(t *testing.T) {
	n := startNames(t, TCP, here(1), here(2))
	n.open(nil)
	lead := func(to string) {
		n.Func("db.test", func(q dnstest.Question) ([]netip.Addr, dnstest.RCode) {
			if q.Six {
				return nil, dnstest.ServFail
			}
			return []netip.Addr{netip.MustParseAddr(to)}, dnstest.Success
		})
	}
	lead(here(1))
	n.idle(n.addr, 1)
	sweepAll(n.p)
	lead(here(2))
	sweepAll(n.p)
	sweepAll(n.p)
	require.EqualValues(t, 1, n.moved())
}

// ADO-12
func TestAddressesAreComparedInOneForm(t *testing.T) {
	v4 := netip.MustParseAddr("192.0.2.1")
	for _, text := range []string{"192.0.2.1", "::ffff:192.0.2.1"} {
		require.Equal(t, v4, plainIP(netip.MustParseAddr(text)))
	}
	require.Equal(t, netip.MustParseAddr("fe80::1"), plainIP(netip.MustParseAddr("fe80::1%eth0")))

	// A dual-stack socket names its IPv4 peer in this form.
	p, err := New(Config{FollowDNS: true})
	require.NoError(t, err)
	defer p.Close()
	peer := &net.TCPAddr{IP: net.ParseIP("192.0.2.1").To16(), Port: 1}
	c := &conn{site: p.newSite(Addr{Transport: TCP, Host: "db.test", Port: 1}), nc: peerConn{peer: peer}}
	name, ip := c.followedTo()
	require.Equal(t, followedName{host: "db.test"}, name)
	require.Equal(t, v4, ip)
}

// peerConn is a connection that has nothing but a peer.
type peerConn struct {
	net.Conn
	peer net.Addr
}

func (c peerConn) RemoteAddr() net.Addr { return c.peer }

// ADO-12: what has no name, was dialled by others, or belongs to a library, is looked up for no
// sweep.
func TestOnlyNamesOfThePoolsOwnDialsAreLookedUp(t *testing.T) {
	t.Run("literal addresses and Unix sockets", func(t *testing.T) {
		n := startNames(t, TCP, here(1))
		n.open(nil)
		a := n.addr
		a.Host = here(1)
		n.idle(a, 2)
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.Listen("unix", path)
		if err == nil {
			defer ln.Close()
			n.idle2(Addr{Transport: Unix, Host: path})
		}
		for range 3 {
			sweepAll(n.p)
		}
		require.Empty(t, n.Names())
		require.Empty(t, n.p.follow.names)
		require.Zero(t, n.moved())
	})
	for name, transport := range map[string]Transport{"a dialer of TCP": TCP, "a dialer of TCP under the pool's TLS": TLS} {
		t.Run(name, func(t *testing.T) {
			n := startNames(t, transport, here(1))
			n.open(func(c *Config) { // it leads through a proxy, whatever it looks like
				c.Dialers = map[Transport]DialFunc{TCP: func(ctx context.Context, a Addr) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(here(1), fmt.Sprint(a.Port)))
				}}
			})
			n.Set("db.test", "192.0.2.1")
			n.idle(n.addr, 2)
			for range 5 {
				sweepAll(n.p)
			}
			require.Empty(t, n.Names())
			require.Zero(t, n.moved())
		})
	}
	t.Run("DialContext", func(t *testing.T) {
		n := startNames(t, TCP, here(1))
		n.open(nil)
		n.Set("db.test", here(1))
		n.idle(scoped(n.addr, "so that there is a sweep"), 1)
		nc, err := n.p.DialContext(bg, "tcp", fmt.Sprint("db.test:", n.addr.Port))
		require.NoError(t, err)
		n.Set("db.test", "192.0.2.1")
		sweepAll(n.p)
		sweepAll(n.p)
		require.EqualValues(t, 1, n.moved(), "the pool's own")
		require.NoError(t, nc.Close())
		require.Equal(t, reasons{ClosedMoved: 1, ClosedByBorrower: 1}, n.p.Stats().Closed)
	})
	t.Run("off", func(t *testing.T) {
		n := startNames(t, TCP, here(1))
		n.open(func(c *Config) { c.FollowDNS = false })
		n.Set("db.test", here(1))
		n.idle(n.addr, 1)
		asked := n.Asked(aRecord)
		sweepAll(n.p)
		require.Equal(t, asked, n.Asked(aRecord))
	})
}

// idle2 makes an idle connection that nobody accepts.
func (n *nameNet) idle2(a Addr) { n.p.With(bg, a, func(Conn) error { return nil }) }

// ADO-12: a look-up that hangs holds up neither the sweep nor the end of the pool, and is not begun
// a second time beside itself.
func TestAHangingLookUpHoldsUpNothing(t *testing.T) {
	n := startNames(t, TCP, here(1))
	n.open(nil)
	n.p.follow.bound = time.Hour
	n.Set("db.test", here(1))
	n.Set("other.test", here(1))
	n.idle(n.addr, 1)
	dial := n.p.cfg.Dialer.Resolver.Dial
	var hanging atomic.Int32
	thaw := make(chan struct{})
	defer close(thaw)
	n.p.cfg.Dialer.Resolver.Dial = func(context.Context, string, string) (net.Conn, error) {
		hanging.Add(1)
		<-thaw
		return nil, errBoom
	}
	n.p.sweep()
	soon(t, "a look-up that hangs", func() bool { return hanging.Load() == 1 })
	n.p.cfg.Dialer.Resolver.Dial = dial

	other := n.addr
	other.Host = "other.test"
	n.idle(other, 1)
	n.Set("other.test", "192.0.2.1")
	for i := range 2 { // the other name goes on beside the one that hangs
		n.p.sweep()
		soon(t, "the other look-up", func() bool {
			n.p.follow.mu.Lock()
			defer n.p.follow.mu.Unlock()
			q := n.p.follow.names[followedName{host: "other.test"}]
			return !q.busy && q.n == uint64(i+1)
		})
	}
	require.EqualValues(t, 1, n.moved())
	require.EqualValues(t, 1, hanging.Load(), "it is not begun a second time")
	n.p.follow.mu.Lock()
	require.True(t, n.p.follow.names[followedName{host: "db.test"}].busy)
	n.p.follow.mu.Unlock()
	require.NoError(t, n.p.Close(), "it waits for the goroutine, which ends at once")
}

// ADO-12
func TestALookUpIsBounded(t *testing.T) {
	synctestWarm(t)
	bubble(t, func(t *testing.T) {
		thaw := make(chan struct{})
		defer close(thaw)
		for _, dial := range []func(context.Context, string, string) (net.Conn, error){
			dnstestSilent().Dial,
			func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() },
			func(context.Context, string, string) (net.Conn, error) { <-thaw; return nil, errBoom },
		} {
			p, err := New(Config{FollowDNS: true, Dialer: &net.Dialer{Resolver: &net.Resolver{PreferGo: true, Dial: dial}}})
			require.NoError(t, err)
			q := &followed{name: followedName{host: "db.test"}}
			q.learn(answerOf("A"))
			start := time.Now()
			p.follow.lookUp(q)
			require.LessOrEqual(t, time.Since(start), lookupTimeout)
			require.EqualValues(t, 1, q.n)
			require.NoError(t, p.Close())
		}
	})
}

// dnstestSilent is a resolver whose server takes questions and says nothing.
func dnstestSilent() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe()
		go func() { io.Copy(io.Discard, there); there.Close() }()
		return here, nil
	}}
}

// synctestWarm makes package net read its configuration outside a bubble.
func synctestWarm(t *testing.T) {
	dns := dnstest.New()
	defer dns.Close()
	_, err := dns.Resolver().LookupNetIP(t.Context(), "ip", "nowhere.test")
	require.Error(t, err)
}

// ADO-12
func TestTheLookUpsAtOnceAreBounded(t *testing.T) {
	const names = 3 * maxLookups
	n := startNames(t, TCP, here(1))
	n.open(nil)
	for i := range names {
		host := fmt.Sprintf("n%d.test", i)
		n.Set(host, here(1))
		a := n.addr
		a.Host = host
		n.idle(a, 1)
	}
	var now, peak atomic.Int64
	goOn := make(chan struct{})
	dial := n.p.cfg.Dialer.Resolver.Dial
	n.p.cfg.Dialer.Resolver.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		at := now.Add(1)
		defer now.Add(-1)
		for was := peak.Load(); at > was && !peak.CompareAndSwap(was, at); was = peak.Load() {
		}
		select {
		case <-goOn:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return dial(ctx, network, address)
	}
	n.p.sweep()
	soon(t, "all places taken", func() bool { return now.Load() == maxLookups })
	n.p.sweep() // starts nothing
	n.p.follow.mu.Lock()
	require.Len(t, n.p.follow.queue, names-maxLookups)
	n.p.follow.mu.Unlock()
	close(goOn)
	sweepAll(n.p)
	require.EqualValues(t, maxLookups, peak.Load())
	for i := range names {
		require.NotZero(t, n.Asked(dnstest.Question{Name: fmt.Sprintf("n%d.test", i)}))
	}
	require.Zero(t, n.p.follow.workers)
	require.Empty(t, n.p.follow.queue)
}

// ADO-12: what was learned of a name outlives its connections for a while, so that a name whose
// answers rotate is not learned again and again; and no longer.
func TestNamesAreForgotten(t *testing.T) {
	var f follower
	name := func(i int) followedName { return followedName{host: fmt.Sprint(i)} }
	done := func() {
		for q := f.next(nil, false); q != nil; q = f.next(q, false) {
		}
		f.workers = 0
	}
	f.enqueue(followedNames{name(1): nil, name(2): nil})
	done()
	for range followedMemory - 1 {
		f.enqueue(followedNames{name(2): nil})
		done()
		require.Len(t, f.names, 2)
	}
	f.enqueue(followedNames{name(2): nil})
	done()
	require.Len(t, f.names, 1)
	many := followedNames{}
	for i := range 3 * maxForgotten {
		many[name(i)] = nil
	}
	f.enqueue(many)
	done()
	require.Len(t, f.names, 3*maxForgotten)
	f.enqueue(nil)
	require.Len(t, f.names, maxForgotten)
}

// ADO-12: a pool without FollowDNS pays nothing, and names are looked up in the sweep only.
func TestFollowDNSNeedsASweep(t *testing.T) {
	_, err := New(Config{FollowDNS: true, SweepInterval: -1})
	require.ErrorContains(t, err, "Config.FollowDNS and Config.SweepInterval contradict each other: names are looked up in the sweep")
}

// ADO-12: the log says what was done, and what failed.
func TestTheLogSaysThatANameHasMoved(t *testing.T) {
	n := startNames(t, TCP, here(1))
	var mu sync.Mutex
	var log bytes.Buffer
	n.open(func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(syncedWriter{&mu, &log}, nil))
	})
	n.Set("db.test", here(1))
	n.idle(n.addr, 2)
	n.Set("db.test", "192.0.2.1")
	sweepAll(n.p)
	sweepAll(n.p)
	n.moved()
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, 1, strings.Count(log.String(), "host=db.test addresses=[192.0.2.1] connections=2"), log.String())
}

// ADO-12: names of a session's connections are followed, too: it goes when the session ends.
func TestASessionKeepsItsConnectionThoughTheNameMoves(t *testing.T) {
	n := startNames(t, TCP, here(1), here(2))
	n.open(nil)
	n.Set("db.test", here(1))
	ctx, end := n.p.Session(bg)
	use := func() (host string) {
		require.NoError(t, n.p.With(ctx, n.addr, func(c Conn) error { host = peerOf(c); return nil }))
		return host
	}
	require.Equal(t, here(1), use())
	n.Set("db.test", here(2))
	sweepAll(n.p)
	sweepAll(n.p)
	require.Equal(t, here(1), use())
	end()
	require.EqualValues(t, 1, n.moved())
	require.Equal(t, here(2), n.use(n.addr))
}

// ADO-12: borrowers that wait for a busy connection get a new one, and the reserve is refilled.
func TestWaitersAndTheReserveMove(t *testing.T) {
	n := startNames(t, TCP, here(1), here(2))
	n.open(func(c *Config) { c.MaxPerAddr, c.MinIdlePerAddr, c.MaxDialing = 2, 1, 2 })
	n.Set("db.test", here(1))
	busy := hold(t, n.p, n.addr)
	second := hold(t, n.p, n.addr)
	waits := make(chan string, 1)
	go func() {
		var host string
		n.p.With(bg, n.addr, func(c Conn) error { host = peerOf(c); return nil })
		waits <- host
	}()
	queued(t, n.p, 1)
	n.Set("db.test", here(2))
	sweepAll(n.p)
	sweepAll(n.p)
	require.NoError(t, busy.end(nil))
	require.Equal(t, here(2), inTime(t, waits))
	require.NoError(t, second.end(nil))
	n.Set("db.test", here(1))
	sweepAll(n.p)
	sweepAll(n.p)
	soon(t, "the reserve is back", func() bool { st := n.p.Stats(); return st.Idle == 1 && st.Closed[ClosedMoved] == 3 })
	require.Equal(t, here(1), n.use(n.addr))
}
