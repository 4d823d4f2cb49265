package connpool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// EvictLRU closes the least recently used idle connection of all addresses and
// returns its address. It returns when the socket is closed (or, if the close
// hangs, after 5 seconds). It returns false if no connection is idle; it never
// touches a connection in use.
func (p *Pool) EvictLRU() (Addr, bool) {
	if p.stop == nil {
		return Addr{}, false
	}
	return p.evictFor(context.Background(), closeTimeout+hookGrace)
}

// Retire makes the connections of addr that were opened, or are being opened,
// before the call unfit to be lent again: idle ones are closed now, borrowed ones
// when they are given back. The pool also forgets the TLS sessions of addr, those of
// dials under way included. Use Retire after a change of certificates or
// credentials. Other addresses are not affected. An addr that the pool does not
// know, or that is invalid, is no error.
func (p *Pool) Retire(addr Addr) {
	if p.stop == nil {
		return
	}
	addr, err := addr.canonical()
	if err != nil {
		return
	}
	p.retire([]Addr{addr})
}

// RetireFunc does what [Pool.Retire] does, for each address that the pool knows and for
// which match returns true; match may be nil, which means every address. It returns how
// many connections have to go: those that were idle, in use, or being opened. A connection
// that is in use counts again in each call until it is given back.
//
// match is called once for each address, without a lock, before anything is retired; it may
// use the pool. If match panics, the panic is the caller's, and nothing was retired. An
// address that the pool gets to know during the call may be left out.
func (p *Pool) RetireFunc(match func(Addr) bool) int {
	if p.stop == nil {
		return 0
	}
	p.mu.Lock()
	portions := p.addrsLocked(func(*site) bool { return true })
	p.mu.Unlock()
	// TLS sessions outlive the books of their address.
	left := p.sessions.addrs()
	for _, addrs := range portions {
		for _, addr := range addrs {
			delete(left, addr)
		}
	}
	portions = append(portions, slices.Collect(maps.Keys(left)))
	for i, addrs := range portions {
		portions[i] = slices.DeleteFunc(addrs, func(a Addr) bool { return match != nil && !match(a) })
	}
	n := 0
	for _, addrs := range portions {
		n += p.retire(addrs)
	}
	return n
}

// retire retires the connections of addrs, a portion, and returns how many these are. The TLS
// sessions go first: a dial that begins later resumes none of them, and one that began before
// makes a connection that is retired.
func (p *Pool) retire(addrs []Addr) (n int) {
	p.sessions.drop(addrs...)
	var todo agenda
	visited := 0
	p.mu.Lock()
	for _, addr := range addrs {
		if s := p.sites.find(addr); s != nil {
			n += s.n.kept()
			visited += int(s.n[phaseIdle])
			s.epoch++
			p.dropIdleLocked(s, ClosedRetired, &todo)
		}
		if visited >= atOnce {
			visited = 0
			p.yieldLocked(&todo)
		}
	}
	p.mu.Unlock()
	todo.run(p)
	return n
}

// CloseIdle closes all connections that are idle when it is called. Borrowed connections and
// the pool are not affected. A connection that the pool is examining, or that Config.Push
// has, is not idle. CloseIdle may be called at any time by many goroutines, also on a closed
// pool.
func (p *Pool) CloseIdle() {
	if p.stop == nil {
		return
	}
	var todo agenda
	now := p.clock.Exactly()
	p.mu.Lock()
	p.evictAllLocked(ClosedOnRequest, &todo, func(c *conn) bool { return c.since <= now }) // not what comes back meanwhile
	p.mu.Unlock()
	todo.run(p)
}

// closeGrace is how long Close waits for closes, dials and goroutines of the pool to end.
const closeGrace = time.Second

// Close closes the pool at once: idle connections are closed, waiters and later
// borrowers get ErrClosed, dials are canceled. Borrowed connections stay usable
// and are closed when they are given back; Close does not wait for them, see
// [Pool.Shutdown]. Close does wait, for a second at most, until idle sockets are
// closed and dials have ended. If some have not, its error says how many. A second
// Close does nothing and returns nil.
func (p *Pool) Close() error {
	if !p.shut() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeGrace)
	defer cancel()
	if p.awaitLeft(ctx, func() bool {
		return p.n[phaseClosing]+p.n[phaseDialing] == 0 && !p.sweeping && p.examiners == 0 && p.watching.running == 0
	}) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("connpool: closed, but %d closes and %d dials have not ended after %v", p.n[phaseClosing], p.n[phaseDialing], closeGrace)
}

// Shutdown closes the pool as Close does, and waits until every borrowed
// connection has been given back. If ctx is done first, Shutdown returns an error
// that wraps the error of ctx and names the borrowers that still have connections;
// their connections stay usable. Shutdown may be called after Close, and more than
// once.
func (p *Pool) Shutdown(ctx context.Context) error {
	if ctx == nil {
		return usage(Addr{}, errors.New("ctx is nil: pass context.Background()"))
	}
	p.shut()
	if p.awaitLeft(ctx, func() bool { return p.n.open() == 0 && !p.sweeping && p.examiners == 0 }) {
		return nil
	}
	return &cutShort{causeOf(ctx), p.stillOut()}
}

// shut marks the pool closed and reports whether it was open.
func (p *Pool) shut() bool {
	var todo agenda
	p.mu.Lock()
	if p.closed || p.stop == nil {
		p.mu.Unlock()
		return false
	}
	p.closed = true
	watcher := p.watching.watcher
	if p.sweeper != nil {
		p.sweeper.Stop()
	}
	if p.watching.retry != nil {
		p.watching.retry.Stop()
	}
	for s := range p.sites.all() {
		p.shutSiteLocked(s, &todo)
	}
	for s := range p.unpooled {
		p.shutSiteLocked(s, &todo)
	}
	p.mu.Unlock()
	p.stop()
	watcher.Close()
	todo.run(p)
	return true
}

// awaitLeft waits until done, which it calls with mu held, returns true. It
// reports false if ctx was done first.
func (p *Pool) awaitLeft(ctx context.Context, done func() bool) bool {
	for {
		p.mu.Lock()
		ok, left := done(), p.left
		p.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-left:
		case <-ctx.Done():
			return false
		}
	}
}

// cutShort is the error of a Shutdown whose ctx ended.
type cutShort struct {
	ctx  error
	what string // the connections still in use
}

func (e *cutShort) Error() string { return "connpool: shutdown: " + e.ctx.Error() + "; " + e.what }
func (e *cutShort) Unwrap() error { return spent(e.ctx) }

// borrowedBy names the places where the connections of an address that are in use were
// borrowed, as far as the pool knows them, up to ten.
func (l *loanLog) borrowedBy(a Addr, now clock.Instant) string {
	known, more := l.at(a, 10)
	var b strings.Builder
	for i := range known {
		h := &known[i]
		b.WriteString([]string{" borrowed", ", and"}[min(i, 1)])
		fmt.Fprintf(&b, " %v ago by %s", now.Sub(h.since).Round(time.Millisecond), h.stack().place())
	}
	if more > 0 {
		fmt.Fprintf(&b, ", and %d more", more)
	}
	return b.String()
}

// stillOut lists the connections that are in use, by address.
func (p *Pool) stillOut() string {
	now := p.clock.Exactly()
	type out struct {
		n    int
		held time.Duration
	}
	var order []Addr
	byAddr := make(map[Addr]out)
	p.mu.Lock()
	for _, c := range p.recency.all() {
		if c.phase != phaseBorrowed {
			continue
		}
		o, known := byAddr[c.site.addr]
		if !known {
			order = append(order, c.site.addr)
		}
		o.n++
		o.held = max(o.held, now.Sub(c.since))
		byAddr[c.site.addr] = o
	}
	dials, closes := p.n[phaseDialing], p.n[phaseClosing]
	p.mu.Unlock()
	var b strings.Builder
	for _, a := range order {
		o := byAddr[a]
		fmt.Fprintf(&b, "%d in use for %s (for %v)%s, ", o.n, a, o.held.Round(time.Millisecond), p.loanLog.borrowedBy(a, now))
	}
	fmt.Fprintf(&b, "%d dials and %d closes have not ended", dials, closes)
	return b.String()
}
