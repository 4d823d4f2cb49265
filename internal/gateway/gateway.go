// Package gateway stands between many clients and few connections to a server. Clients
// connect to the gateway as they would to the server. The gateway carries out each
// request over a connection that a connpool.Pool lends for as long as the request takes.
// The package is the command "connpool gateway"; docs/gateway.md says what its users may
// rely on.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// Gateway serves one listener and one server. Make it with New, open its sockets with
// Listen, and run it with Serve.
//
// Each client has one goroutine, which reads a request, borrows a connection, gets the
// reply, returns the connection and only then writes the reply to the client: no
// connection to the server ever waits for a client. (A client with a connection of its
// own, see pin and serveSession, delays nobody but itself.)
//
//	accepted -> handshake -> waiting <-> in exchange -> closed
//	                            |  ^
//	                            v  |
//	                           pinned
//
// Draining closes the clients that are waiting, and lets the others finish and wait.
type Gateway struct {
	*plan
	pool    *connpool.Pool
	certs   certificates
	memory  budget
	known   known
	greet   greetings
	renewal renewal
	redial  redial
	pins    chan struct{} // one value for each connection that a client has to itself
	places  chan struct{} // one value for each session
	count   counters

	leaving chan struct{} // one value for each client above MaxClients that is being told so under TLS

	journal *journal
	notices notices

	refusedAt atomic.Int64 // when the server last refused our certificate, in ns since started; 0: never

	down atomic.Bool  // the server could not be reached, and has not answered since
	room atomic.Int64 // how many clients there is room for

	listener, statusListener *socket

	ctx      context.Context // the ctx of everything under way
	cut      context.CancelFunc
	draining atomic.Bool // set before the clients are woken

	mu      sync.Mutex // guards clients; under it only deadlines are set and sockets closed, neither of which blocks
	clients map[*client]struct{}
	serving tasks.Group // a count for each client
	started time.Time
}

// New checks cfg and reads the certificates. It opens no socket. The error lists
// everything that is wrong.
func New(cfg Config) (*Gateway, error) { return NewContext(context.Background(), cfg) }

// NewContext is New, but waits until ctx is done at most for names to be looked up and
// for certificate files to be opened.
func NewContext(ctx context.Context, cfg Config) (*Gateway, error) {
	p, err := cfg.plan()
	if err != nil {
		return nil, err
	}
	if err := p.notItself(ctx, p.listen); err != nil {
		return nil, err
	}
	g := &Gateway{
		plan:    p,
		certs:   certificates{server: p.Server, upstream: p.Upstream, alpn: p.alpn},
		memory:  budget{limit: p.MaxMemory},
		pins:    make(chan struct{}, p.MaxPinned),
		places:  make(chan struct{}, p.MaxOpen),
		greet:   greetings{wait: p.GreetingWait, quick: min(p.GreetingWait/3, quickLook), framing: p.Framing, once: p.MaxUses == 1},
		leaving: make(chan struct{}, leavingClients),
		clients: make(map[*client]struct{}),
		started: time.Now(),
	}
	g.journal = newJournal(p.Logger.Handler())
	g.Logger = slog.New(g.journal)
	g.greet.log = g.Logger
	g.room.Store(int64(p.MaxClients))
	if _, err := g.certs.loadWithin(ctx); err != nil {
		return nil, err
	}
	upstream := connpool.Config{
		MaxOpen:     p.MaxOpen,
		MaxDialing:  p.MaxOpen,
		MaxUses:     p.MaxUses,
		MaxLifetime: p.MaxLifetime,
		DialTimeout: p.DialTimeout,
		TLSFor:      func(connpool.Addr) (*tls.Config, error) { return g.certs.forServer.Load(), nil },
		Setup:       g.setupOfFraming(),
		Logger:      slog.New(ofPool{g.journal, g}),
		// There is one address, so it may use all connections and all dials.
		MaxDialingPerAddr: p.MaxOpen,
	}
	if p.Framing == "modbus" {
		upstream.Push = g.late
	}
	dial := g.redial.dial
	if p.ConnectDelay > 0 && g.framing.newReplies == nil { // otherwise Setup applies the delay, see setup
		dial = func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			nc, err := g.redial.dial(ctx, addr)
			if err == nil {
				if err = pauseFor(ctx, p.ConnectDelay); err != nil {
					nc.Close()
				}
			}
			return nc, err
		}
		upstream.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: dial, connpool.Unix: dial}
	}
	if g.redial.delay = p.RedialDelay; g.redial.delay > 0 {
		upstream.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: dial, connpool.Unix: dial}
	}
	g.pool, err = connpool.New(upstream)
	if err != nil {
		return nil, err
	}
	g.ctx, g.cut = context.WithCancel(context.Background())
	return g, nil
}

// setupOfFraming returns nil for a framing without replies: there the server's first
// bytes are for the client, while a Setup must leave no bytes unread.
func (g *Gateway) setupOfFraming() func(context.Context, connpool.Addr, net.Conn) (any, error) {
	if g.framing.newReplies == nil {
		return nil
	}
	return g.setup
}

// Listen opens the listening sockets. If one of them fails, it closes the others.
func (g *Gateway) Listen() error { return g.ListenContext(context.Background()) }

// ListenContext is Listen, but waits until ctx is done at most for names, and for the
// lock of a socket's directory (5 seconds at most).
func (g *Gateway) ListenContext(ctx context.Context) (err error) {
	waits := func(dir string) {
		g.Logger.Warn("waiting for the lock on a directory that somebody else holds", "directory", dir)
	}
	if g.listener, err = g.listen.listen(ctx, g.SocketMode, waits); err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	at := g.listen
	at.address = g.listener.Addr().String() // with the real port if the port was 0
	if err := g.notItself(ctx, at); err != nil {
		g.listener.Close()
		return err
	}
	if g.StatusListen != "" {
		if g.statusListener, err = g.status.listen(ctx, g.SocketMode, waits); err != nil {
			g.listener.Close()
			return fmt.Errorf("-status: %w", err)
		}
	}
	return nil
}

// Addr is the address clients connect to; StatusAddr the address of the status page, nil
// if there is none.
func (g *Gateway) Addr() net.Addr { return g.listener.Addr() }
func (g *Gateway) StatusAddr() net.Addr {
	if g.statusListener == nil {
		return nil
	}
	return g.statusListener.Addr()
}

// Close is for a gateway that will not serve: it frees what New and Listen opened.
func (g *Gateway) Close() error {
	g.cut()
	g.unlisten()
	err := g.pool.Close()
	g.journal.flush(lastLines)
	return err
}

// unlisten closes both sockets and removes their files, so that a successor can have them
// while this gateway drains. Open connections to the status page stay.
func (g *Gateway) unlisten() {
	var both tasks.Group
	for _, s := range []*socket{g.listener, g.statusListener} {
		if s == nil {
			continue
		}
		both.Go(func() {
			if err := s.Close(); err != nil {
				g.Logger.Warn("the file of a socket is left behind", "path", s.path, "error", err)
			}
		})
	}
	both.Wait()
}

// MaxClientsNow is how many clients may be connected: -max-clients, or fewer if the
// process may not open as many files.
func (g *Gateway) MaxClientsNow() int { return int(g.room.Load()) }

// Descriptors describes how the file descriptors of the process are shared out. lacks
// describes a shortage; "" if there is none.
func (g *Gateway) Descriptors() (shares, lacks string) {
	d := g.share()
	if room := min(d.clients(), g.MaxClientsNow()); g.wantClients > room {
		lacks = fmt.Sprintf("-max-clients is %d, and the process may not open as many files: there is room for %d; raise the limit (ulimit -n) or lower the flag", g.wantClients, room)
	}
	return d.String(), lacks
}

// resize adapts the gateway to a limit of the process that changed while it runs.
func (g *Gateway) resize() {
	room := max(leastClients, min(g.share().clients(), g.askClients))
	if was := g.room.Swap(int64(room)); was != int64(room) {
		g.Logger.Info("the limit of open files has changed", "clients", room, "before", was)
	}
}

// Reload reads the certificates again. If they changed, new connections use them, and
// each connection to the server is replaced when its loan ends. If a file is bad or does
// not open, all certificates stay as they were.
func (g *Gateway) Reload() error {
	g.resize()
	defer g.tellInvalid()
	return g.reload(g.ctx)
}

func (g *Gateway) reload(ctx context.Context) error {
	changed, err := g.certs.loadWithin(ctx)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		g.count.reloadsFailed.Add(1)
		g.notice(slog.LevelError, "reload", "certificates not reloaded, the old ones stay in use", "error", err)
		return err
	}
	if changed {
		g.count.reloads.Add(1)
		g.retireAll()
		g.Logger.Info("certificates reloaded")
	}
	return nil
}

// The bounds of the steps after the drain.
const (
	lastGoodbyes = 5 * time.Second // farewells of TLS to the server
	lastClients  = 5 * time.Second // clients that were cut off
	lastLines    = time.Second     // lines of the log
)

// Serve runs until ctx is done. Then it stops listening, gives requests under way the
// time Drain to end, and returns when no client, connection, goroutine or socket file is
// left. A done hurry ends the drain early. The error says how much had to be cut off.
func (g *Gateway) Serve(ctx, hurry context.Context) error {
	defer g.journal.flush(lastLines)
	var rest tasks.Group
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
					g.reload(helpers) // which logs the outcome
					g.tellInvalid()
				case <-helpers.Done():
					return
				}
			}
		})
	}
	if _, lacks := g.Descriptors(); lacks != "" {
		g.Logger.Warn(lacks)
	}
	g.tellInvalid()
	wake := context.AfterFunc(ctx, g.listener.stop)
	failed := g.accept(ctx)
	wake()
	late := time.NewTimer(max(0, g.Drain))
	defer late.Stop()
	gone := make(chan struct{})
	rest.Go(func() { g.unlisten(); close(gone) })
	select { // unlisten before a client is released, so that no client finds the file of a gateway that no longer listens
	case <-gone:
	case <-hurry.Done():
	case <-time.After(min(lockForEnd, max(0, g.Drain))):
	}
	cut, left := g.drain(hurry, late.C)
	stop()
	rest.Wait()
	last, cancel := context.WithTimeout(context.Background(), lastGoodbyes)
	defer cancel()
	err := g.pool.Shutdown(last)
	if cut > 0 {
		err = errors.Join(fmt.Errorf("%d clients were cut off in the middle of something, after %v of draining", cut, g.Drain), err)
	}
	if left > 0 {
		err = errors.Join(fmt.Errorf("%d clients did not end within %v of being cut off", left, lastClients), err)
	}
	return errors.Join(failed, err)
}

// accept accepts clients until ctx is done. After a temporary error of the listener it
// pauses; if no descriptor is free, it turns clients away with the spare.
func (g *Gateway) accept(ctx context.Context) error {
	const shortest, longest = 5 * time.Millisecond, time.Second
	pause := shortest
	var kept spare
	kept.keep()
	defer kept.release()
	for {
		nc, err := g.listener.Accept()
		if err == nil && ctx.Err() == nil {
			pause = shortest
			g.admit(nc)
			continue
		}
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		g.count.acceptErrors.Add(1)
		g.notice(slog.LevelError, "accept", "cannot accept clients", "error", err)
		if outOfDescriptors(err) && g.turnAway(&kept) {
			continue
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longest)
		kept.keep()
	}
}

// admit starts a goroutine for nc, or turns nc away.
func (g *Gateway) admit(nc net.Conn) {
	g.mu.Lock()
	full := len(g.clients) >= g.MaxClientsNow()
	cl := newClient(g, nc)
	if !full {
		g.clients[cl] = struct{}{}
		g.serving.Add(1)
	}
	g.mu.Unlock()
	if full {
		g.sendAway(nc)
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

// drain waits for the clients, and cuts off those that take too long. It returns how many
// it cut off, and how many of these have still not ended.
func (g *Gateway) drain(hurry context.Context, late <-chan time.Time) (cut, stuck int) {
	g.draining.Store(true)
	g.mu.Lock()
	for cl := range g.clients {
		cl.raw.SetReadDeadline(past)
	}
	n := len(g.clients)
	g.mu.Unlock()
	if n > 0 {
		g.Logger.Info("draining", "clients", n, "for at most", g.Drain)
	}
	left := make(chan struct{})
	go func() {
		g.serving.Wait()
		close(left)
	}()
	select {
	case <-left:
		g.cut()
		return 0, 0
	case <-late:
	case <-hurry.Done():
	}
	g.cut()
	g.mu.Lock()
	cut = len(g.clients)
	for cl := range g.clients {
		if g.framing.name == "session" {
			resets(cl.raw)
		}
		cl.raw.Close()
	}
	g.mu.Unlock()
	never := time.NewTimer(lastClients)
	defer never.Stop()
	select {
	case <-left:
	case <-never.C:
		g.mu.Lock()
		stuck = len(g.clients)
		g.mu.Unlock()
	}
	return cut, stuck
}

var past = time.Unix(1, 0)
