// Package faultnet is a network that fails on request. [Mem] lives in memory, needs no
// descriptor and works in testing/synctest bubbles; [Server] listens on loopback, for
// tests that need a kernel.
package faultnet

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// ErrUnread is the error of [Conn.Probe] when bytes wait to be read.
var ErrUnread = errors.New("faultnet: bytes wait to be read")

// Mem is a network of named hosts in memory. Its methods, and the methods of its hosts,
// may be called from any goroutine.
type Mem struct {
	// mu guards the fields of Mem and of every Host. Nothing waits under mu. mu and a
	// pair.mu are never held together.
	mu      sync.Mutex
	hosts   map[string]*Host
	shared  bool
	serving int       // goroutines that run a function passed to Serve
	quiet   sync.Cond // serving fell to 0
}

// NewMem makes a network without hosts.
func NewMem() *Mem {
	m := &Mem{hosts: make(map[string]*Host)}
	m.quiet.L = &m.mu
	return m
}

// Host returns the host of that name, and makes it if it does not exist: up, without
// latency and without a Serve function.
func (m *Mem) Host(name string) *Host {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[name]
	if h == nil {
		h = &Host{mem: m, name: name}
		m.hosts[name] = h
	}
	return h
}

// Shared(true) allows several goroutines at once in one direction of a dialed end, as
// package net does, on connections dialed from then on. Without it the race detector
// reports them; see [Conn.Touch].
func (m *Mem) Shared(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shared = on
}

// Dial connects to the host of that name. The connection is a *Conn. A failure
// is an *net.OpError, unless FailNext asked for something else.
func (m *Mem) Dial(ctx context.Context, name string) (net.Conn, error) {
	h := m.Host(name)
	failed := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: memAddr(name), Err: err}
	}
	if err := ctx.Err(); err != nil {
		return failed(err)
	}

	// A dial takes its FailNext error when it starts, and sees the other settings when it
	// arrives. So FailNext follows the order of the calls, while a host can go down under
	// a dial that is on its way.
	m.mu.Lock()
	var scripted error
	if len(h.fail) > 0 {
		scripted, h.fail = h.fail[0], h.fail[1:]
	}
	latency := h.latency
	m.mu.Unlock()

	if latency > 0 {
		arrival := time.NewTimer(latency)
		defer arrival.Stop()
		select {
		case <-arrival.C:
		case <-ctx.Done():
			return failed(ctx.Err())
		}
	}
	if errno, ok := scripted.(syscall.Errno); ok {
		return failed(os.NewSyscallError("connect", errno))
	}
	if scripted != nil {
		return nil, scripted
	}

	m.mu.Lock()
	if h.blackHole {
		m.mu.Unlock()
		<-ctx.Done()
		return failed(ctx.Err())
	}
	defer m.mu.Unlock()
	if h.down {
		return failed(os.NewSyscallError("connect", syscall.ECONNREFUSED))
	}
	return h.acceptLocked(), nil
}

// Close resets every open connection and waits until the functions given to
// Serve have returned.
func (m *Mem) Close() {
	m.mu.Lock()
	var open []*Conn
	for _, h := range m.hosts {
		open = append(open, h.conns...)
	}
	m.mu.Unlock()
	for _, c := range open {
		c.Reset()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.serving > 0 {
		m.quiet.Wait()
	}
}

// Host is one peer to dial.
type Host struct {
	mem  *Mem
	name string

	// The settings, guarded by mem.mu like the other fields.
	down, blackHole bool
	fail            []error
	latency         time.Duration
	pace            pace
	serve           func(*Conn)

	conns         []*Conn // server's ends of open connections, oldest first
	accepts, peak int
}

// pace is how bytes travel: delay late, and if n > 0 in pieces of n bytes, at intervals
// of every.
type pace struct {
	delay time.Duration
	n     int
	every time.Duration
}

// Up ends Down.
func (h *Host) Up() { h.set(func() { h.down = false }) }

// Down refuses dials (ECONNREFUSED). Open connections stay.
func (h *Host) Down() { h.set(func() { h.down = true }) }

// BlackHole(true) makes dials hang until their ctx is done, even if BlackHole(false) is
// called meanwhile. Open connections stay.
func (h *Host) BlackHole(on bool) { h.set(func() { h.blackHole = on }) }

// SetLatency makes dials that start from now on take d.
func (h *Host) SetLatency(d time.Duration) { h.set(func() { h.latency = d }) }

// SetDelay makes bytes, and the end of the stream, arrive d after they were sent, in both
// directions, from now on. A reset always arrives at once.
func (h *Host) SetDelay(d time.Duration) { h.set(func() { h.pace.delay = d }) }

// Drip makes bytes written from now on arrive in pieces of n bytes, each piece at least
// every later than the one before, and one Read returns bytes of one piece only. It holds
// for both directions; n <= 0 ends it.
func (h *Host) Drip(n int, every time.Duration) {
	h.set(func() { h.pace.n, h.pace.every = n, every })
}

// FailNext makes the next dials fail, one dial for each error and in that order, after
// the errors of earlier calls. A syscall.Errno is wrapped as package net would wrap it,
// any other error is returned as it is, and nil lets one dial through.
func (h *Host) FailNext(errs ...error) {
	h.set(func() { h.fail = append(slices.Clip(h.fail), errs...) })
}

// Serve runs fn in its own goroutine for each connection accepted from now on. fn gets
// the server's end, which is closed when fn returns. With nil nobody serves; the test
// finds the ends in Conns.
func (h *Host) Serve(fn func(*Conn)) { h.set(func() { h.serve = fn }) }

func (h *Host) set(change func()) {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	change()
}

// Accepts counts the connections accepted so far.
func (h *Host) Accepts() int {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	return h.accepts
}

// Conns returns the server's ends of the connections that neither side has closed or
// reset, oldest first. (If only the server's side counted, a host without Serve would
// never lose a connection.)
func (h *Host) Conns() []*Conn {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	return slices.Clone(h.conns)
}

// Peak is the largest number of connections that were ever in Conns at once.
func (h *Host) Peak() int {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	return h.peak
}

// acceptLocked makes a connection and returns the dialer's end.
func (h *Host) acceptLocked() *Conn {
	h.accepts++
	p := &pair{}
	p.moved.L = &p.mu
	here, there := memAddr(h.name), clientAddr(h.name, h.accepts)
	server := &Conn{host: h, pair: p, serial: h.accepts, local: here, remote: there}
	client := &Conn{host: h, pair: p, serial: h.accepts, local: there, remote: here, owned: !h.mem.shared}
	client.peer, server.peer = server, client
	client.entry, server.entry = server, server
	h.conns = append(h.conns, server)
	h.peak = max(h.peak, len(h.conns))
	if serve := h.serve; serve != nil {
		h.mem.serving++
		go func() {
			defer h.served()
			defer server.Close()
			serve(server)
		}()
	}
	return client
}

func (h *Host) served() {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	if h.mem.serving--; h.mem.serving == 0 {
		h.mem.quiet.Broadcast()
	}
}

func (h *Host) forget(entry *Conn) {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	if i := slices.Index(h.conns, entry); i >= 0 {
		h.conns = slices.Delete(h.conns, i, i+1)
	}
}

func (h *Host) paceNow() pace {
	h.mem.mu.Lock()
	defer h.mem.mu.Unlock()
	return h.pace
}
