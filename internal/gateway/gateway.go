// Package gateway is the tier between many clients and few connections to a
// server: clients connect to it as they would to the server, and each of their
// requests is carried out over a connection that a connpool.Pool lends for as
// long as the request takes. It is the command "connpool gateway"; docs/gateway.md
// says what its users may rely on.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// Gateway serves one listener and one server. Make it with New, open its
// sockets with Listen, and let it work with Serve.
//
// A client has one goroutine, which reads a request, borrows a connection, gets
// the reply, gives the connection back and only then writes the reply to the
// client: no connection to the server ever waits for a client. (A client with a
// connection of its own, see pin and serveSession, holds up nobody but itself.)
//
//	accepted -> handshake -> waiting <-> in exchange -> closed
//	                            |  ^
//	                            v  |
//	                           pinned
//
// Draining closes who is waiting, and lets the others come back to it.
type Gateway struct {
	*plan
	pool    *connpool.Pool
	certs   certificates
	memory  budget
	known   known
	greet   greetings
	renewal renewal
	redial  redial
	pins    chan struct{} // one for each connection that one client may have to itself
	places  chan struct{} // one for each session
	count   counters

	listener, statusListener net.Listener

	ctx      context.Context // of all that is under way
	cut      context.CancelFunc
	draining atomic.Bool // set before the clients are woken

	mu      sync.Mutex // guards clients; only deadlines are set and sockets closed under it, neither of which blocks
	clients map[*client]struct{}
	serving sync.WaitGroup // a count for each client
	started time.Time
}

// New checks cfg and reads the certificates. It opens nothing. The error lists
// everything that is wrong.
func New(cfg Config) (*Gateway, error) {
	p, err := cfg.plan()
	if err != nil {
		return nil, err
	}
	g := &Gateway{
		plan:    p,
		certs:   certificates{server: p.Server, upstream: p.Upstream},
		memory:  budget{limit: p.MaxMemory},
		pins:    make(chan struct{}, p.MaxPinned),
		places:  make(chan struct{}, p.MaxOpen),
		greet:   greetings{wait: p.GreetingWait, quick: min(p.GreetingWait/3, quickLook), framing: p.Framing, once: p.MaxUses == 1, log: p.Logger},
		clients: make(map[*client]struct{}),
		started: time.Now(),
	}
	if _, err := g.certs.load(); err != nil {
		return nil, err
	}
	upstream := connpool.Config{
		MaxOpen:     p.MaxOpen,
		MaxDialing:  p.MaxOpen,
		MaxUses:     p.MaxUses,
		MaxLifetime: p.MaxLifetime,
		DialTimeout: p.DialTimeout,
		TLSFor:      func(connpool.Addr) (*tls.Config, error) { return g.certs.forServer.Load(), nil },
		Setup:       g.setup,
		Logger:      p.Logger,
		// The only address has all of the slots, and all of the dials.
		MaxDialingPerAddr: p.MaxOpen,
	}
	if p.Framing == "modbus" {
		upstream.Push = g.late
	}
	if g.redial.delay = p.RedialDelay; g.redial.delay > 0 {
		upstream.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: g.redial.dial, connpool.Unix: g.redial.dial}
	}
	g.pool, err = connpool.New(upstream)
	if err != nil {
		return nil, err
	}
	g.ctx, g.cut = context.WithCancel(context.Background())
	return g, nil
}

// Listen opens the listening sockets. If one of them fails, none is left.
func (g *Gateway) Listen() (err error) {
	if g.listener, err = g.listen.listen(g.SocketMode); err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	if g.StatusListen != "" {
		if g.statusListener, err = g.status.listen(g.SocketMode); err != nil {
			g.listener.Close()
			return fmt.Errorf("-status: %w", err)
		}
	}
	return nil
}

// Addr is where clients connect; StatusAddr where the status is, nil if nowhere.
func (g *Gateway) Addr() net.Addr { return g.listener.Addr() }
func (g *Gateway) StatusAddr() net.Addr {
	if g.statusListener == nil {
		return nil
	}
	return g.statusListener.Addr()
}

// Close is for a gateway that is not to serve: it frees what New and Listen
// took.
func (g *Gateway) Close() error {
	g.cut()
	if g.listener != nil {
		g.listener.Close()
	}
	if g.statusListener != nil {
		g.statusListener.Close()
	}
	return g.pool.Close()
}

// Reach opens a connection to the server, or says why it cannot.
func (g *Gateway) Reach(ctx context.Context) error {
	return g.pool.With(ctx, g.to, func(connpool.Conn) error { return nil })
}

// Reload reads the certificates again. If they changed, new connections use
// them and those to the server are replaced as they come back; if one of them
// is bad, all stay as they were.
func (g *Gateway) Reload() error {
	changed, err := g.certs.load()
	if err != nil {
		g.count.reloadsFailed.Add(1)
		g.Logger.Error("certificates not reloaded, the old ones stay in force", "error", err)
		return err
	}
	if changed {
		g.count.reloads.Add(1)
		g.retireAll()
		g.Logger.Info("certificates reloaded")
	}
	return nil
}

// Serve works until ctx is done. Then it stops listening, lets what is under
// way end for as long as Drain, and returns when nothing is left of it: no
// client, no connection, no goroutine, no socket file. A done hurry cuts the
// drain short. The error says how much had to be cut.
func (g *Gateway) Serve(ctx, hurry context.Context) error {
	var rest sync.WaitGroup
	helpers, stop := context.WithCancel(context.Background())
	if g.statusListener != nil {
		rest.Go(func() { g.serveStatus(helpers) })
	}
	if g.ReloadEvery > 0 && (g.listen.tls || g.to.Transport == connpool.TLS) {
		rest.Go(func() {
			tick := time.NewTicker(g.ReloadEvery)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					g.Reload() // which tells
				case <-helpers.Done():
					return
				}
			}
		})
	}
	unlisten := context.AfterFunc(ctx, func() { g.listener.Close() })
	failed := g.accept(ctx)
	unlisten()
	g.listener.Close()

	cut := g.drain(hurry)
	stop()
	rest.Wait()
	last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := g.pool.Shutdown(last)
	if cut > 0 {
		err = errors.Join(fmt.Errorf("%d clients were cut off in the middle of something, after %v of draining", cut, g.Drain), err)
	}
	return errors.Join(failed, err)
}

// accept lets clients in until ctx is done. An error of the listener that may
// pass, such as a lack of file handles, makes it pause.
func (g *Gateway) accept(ctx context.Context) error {
	const shortest, longest = 5 * time.Millisecond, time.Second
	pause := shortest
	for {
		nc, err := g.listener.Accept()
		if err == nil {
			pause = shortest
			g.admit(nc)
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		g.count.acceptErrors.Add(1)
		g.Logger.Error("cannot accept", "error", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longest)
	}
}

// admit gives nc a goroutine, or turns it away.
func (g *Gateway) admit(nc net.Conn) {
	g.mu.Lock()
	full := len(g.clients) >= g.MaxClients
	cl := newClient(g, nc)
	if !full {
		g.clients[cl] = struct{}{}
		g.serving.Add(1)
	}
	g.mu.Unlock()
	if full {
		g.count.turnedAway.Add(1)
		if g.framing.full != "" && !g.listen.tls {
			nc.SetWriteDeadline(time.Now().Add(time.Second)) // its buffer is empty: this does not wait
			io.WriteString(nc, g.framing.full)
		}
		nc.Close()
		return
	}
	g.count.accepted.Add(1)
	go func() {
		defer g.serving.Done()
		defer func() {
			g.mu.Lock()
			delete(g.clients, cl)
			g.mu.Unlock()
		}()
		cl.serve()
	}()
}

// drain waits for the clients, and cuts off those that take too long. It
// returns how many these were.
func (g *Gateway) drain(hurry context.Context) (cut int) {
	g.draining.Store(true)
	g.mu.Lock()
	for cl := range g.clients {
		cl.raw.SetReadDeadline(past)
	}
	if n := len(g.clients); n > 0 {
		g.Logger.Info("draining", "clients", n, "for at most", g.Drain)
	}
	g.mu.Unlock()
	left := make(chan struct{})
	go func() {
		g.serving.Wait()
		close(left)
	}()
	late := time.NewTimer(max(0, g.Drain))
	defer late.Stop()
	select {
	case <-left:
		g.cut()
		return 0
	case <-late.C:
	case <-hurry.Done():
	}
	g.cut()
	g.mu.Lock()
	cut = len(g.clients)
	for cl := range g.clients {
		cl.raw.Close()
	}
	g.mu.Unlock()
	<-left
	return cut
}

var past = time.Unix(1, 0)
