//go:build unix

package adaptertest

import (
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// wire lies between a pool and a server. The bytes pass both ways, until the test cuts the
// connections or holds the replies back.
type wire struct {
	t  testing.TB
	l  net.Listener
	to string // host and port of the server

	running tasks.Group // all that the wire has started

	mu     sync.Mutex // guards what follows; nothing blocks under it
	closed bool
	pairs  map[*net.TCPConn]*net.TCPConn // the pool's end of each connection, and the server's
	gate   chan struct{}                 // replies wait until it is closed; nil: they do not
	asked  chan struct{}                 // gets a value when a request passes while replies wait
}

func newWire(t testing.TB, to string) *wire {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	w := &wire{t: t, l: l, to: to, pairs: map[*net.TCPConn]*net.TCPConn{}, asked: make(chan struct{}, 1)}
	w.running.Go(w.accept)
	t.Cleanup(w.close)
	return w
}

func (w *wire) accept() {
	for {
		near, err := w.l.Accept()
		if err != nil {
			return
		}
		w.running.Go(func() { w.join(near.(*net.TCPConn)) })
	}
}

// join carries bytes between the pool's end of a connection and the server, until one of them
// ends it.
func (w *wire) join(near *net.TCPConn) {
	defer near.Close()
	far, err := net.Dial("tcp4", w.to)
	if err != nil {
		return
	}
	defer far.Close()
	server := far.(*net.TCPConn)
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return
	}
	w.pairs[near] = server
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.pairs, near)
	}()
	var back tasks.Group
	back.Go(func() {
		carry(near, server, w.heldBack)
		near.Close() // what the server ends has ended for the pool, too
		server.Close()
	})
	carry(server, near, w.request)
	server.CloseWrite() // the server may have something to say to the end of the requests
	back.Wait()
}

// carry copies, and calls before ahead of each piece.
func carry(to, from *net.TCPConn, before func()) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			before()
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (w *wire) heldBack() {
	w.mu.Lock()
	gate := w.gate
	w.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

func (w *wire) request() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gate != nil {
		select {
		case w.asked <- struct{}{}:
		default:
		}
	}
}

// hold holds the replies back from now on, until release is called.
func (w *wire) hold() (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Nil(w.t, w.gate)
	gate := make(chan struct{})
	w.gate = gate
	select {
	case <-w.asked: // of the last time
	default:
	}
	return sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.gate = nil
		close(gate)
	})
}

// cut ends the pool's end of each connection, and returns how many there were.
func (w *wire) cut(how faultnet.Cut) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for near := range w.pairs {
		if how == faultnet.RST {
			near.SetLinger(0)
		}
		near.Close()
	}
	return len(w.pairs)
}

// count is how many connections reach the server.
func (w *wire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.pairs)
}

func (w *wire) close() {
	w.l.Close()
	w.mu.Lock()
	w.closed = true
	for near, server := range w.pairs {
		near.Close()
		server.Close()
	}
	if w.gate != nil {
		close(w.gate)
		w.gate = nil
	}
	w.mu.Unlock()
	w.running.Wait()
}
