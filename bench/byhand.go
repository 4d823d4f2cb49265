package bench

import (
	"context"
	"net"
	"sync"
)

// Pools as people write them by hand.

// source lends lines; lend turns it into a Rival. The code that repeats in the Loan
// methods of this package is the code that a user of the rival writes.
type source interface {
	get(ctx context.Context, key int) (*line, error)
	put(key int, l *line, err error)
}

func during(s source, ctx context.Context, key int, fn func(net.Conn) error) error {
	l, err := s.get(ctx, key)
	if err != nil {
		return err
	}
	err = fn(l.Conn)
	s.put(key, l, err)
	return err
}

// stack is a mutex and a slice for each address. Waiters wait on a condition, so the
// first goroutine to come after a return takes the connection.
type stack struct {
	s    *Settings
	keys []string

	mu    sync.Mutex // guards sites and their contents; no dial and no close under it
	sites map[string]*stackSite
}

type stackSite struct {
	idle []*line
	open int
	cond sync.Cond
}

func newStack(s *Settings) Rival {
	return &stack{s: s, keys: names(s), sites: make(map[string]*stackSite)}
}

func names(s *Settings) []string {
	keys := make([]string, max(1, s.Addrs))
	for i := range keys {
		keys[i] = s.name(i)
	}
	return keys
}

func (p *stack) get(ctx context.Context, key int) (*line, error) {
	for {
		p.mu.Lock()
		site := p.sites[p.keys[key]]
		if site == nil {
			site = &stackSite{cond: sync.Cond{L: &p.mu}}
			p.sites[p.keys[key]] = site
		}
		for len(site.idle) == 0 && p.s.Max > 0 && site.open >= p.s.Max {
			site.cond.Wait()
		}
		n := len(site.idle)
		if n == 0 {
			site.open++
			p.mu.Unlock()
			l, err := p.s.open(ctx, key)
			if err != nil {
				p.put(key, nil, err)
			}
			return l, err
		}
		l := site.idle[n-1]
		site.idle = site.idle[:n-1]
		p.mu.Unlock()
		if l.alive() {
			return l, nil
		}
		p.put(key, l, errNotQuiet)
	}
}

func (p *stack) put(key int, l *line, err error) {
	if err != nil && l != nil {
		l.Close()
	}
	p.mu.Lock()
	site := p.sites[p.keys[key]]
	if err != nil {
		site.open--
	} else {
		site.idle = append(site.idle, l)
	}
	p.mu.Unlock()
	site.cond.Signal()
}

func (p *stack) Loan(ctx context.Context, key int) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	p.put(key, l, nil)
	return nil
}

func (p *stack) Exchange(ctx context.Context, key int, x *Exchange) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	err = exchange(l.Conn, x)
	p.put(key, l, err)
	return err
}

func (p *stack) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return during(p, ctx, key, fn)
}

func (p *stack) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, site := range p.sites {
		for _, l := range site.idle {
			l.Close()
		}
	}
	return nil
}

// channel is a buffered channel of idle connections and a channel of free slots.
type channel struct {
	s     *Settings
	idle  chan *line
	slots chan struct{}
}

func newChannel(s *Settings) Rival {
	if s.Addrs > 1 {
		return newKeyed(s, newChannel)
	}
	n := s.Max
	if n == 0 {
		n = 1 << 14
	}
	return &channel{s: s, idle: make(chan *line, n), slots: make(chan struct{}, n)}
}

func (p *channel) get(ctx context.Context, key int) (*line, error) {
	for {
		var l *line
		select {
		case l = <-p.idle:
		default:
			select {
			case l = <-p.idle:
			case p.slots <- struct{}{}:
				l, err := p.s.open(ctx, key)
				if err != nil {
					<-p.slots
				}
				return l, err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if l.alive() {
			return l, nil
		}
		p.put(key, l, errNotQuiet)
	}
}

func (p *channel) put(_ int, l *line, err error) {
	if err != nil {
		l.Close()
		<-p.slots
		return
	}
	p.idle <- l
}

func (p *channel) Loan(ctx context.Context, key int) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	p.put(key, l, nil)
	return nil
}

func (p *channel) Exchange(ctx context.Context, key int, x *Exchange) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	err = exchange(l.Conn, x)
	p.put(key, l, err)
	return err
}

func (p *channel) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return during(p, ctx, key, fn)
}

func (p *channel) Close() error {
	for {
		select {
		case l := <-p.idle:
			l.Close()
		default:
			return nil
		}
	}
}

// held is one connection that one goroutine holds and never gives back: the best possible
// result.
type held struct {
	s *Settings
	l *line
}

func newHeld(s *Settings) Rival { return &held{s: s} }

func (p *held) get(ctx context.Context, key int) (_ *line, err error) {
	if p.l == nil {
		p.l, err = p.s.open(ctx, key)
	}
	return p.l, err
}

func (p *held) put(_ int, l *line, err error) {
	if err != nil {
		l.Close()
		p.l = nil
	}
}

func (p *held) Loan(ctx context.Context, key int) error {
	_, err := p.get(ctx, key)
	return err
}

func (p *held) Exchange(ctx context.Context, key int, x *Exchange) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	err = exchange(l.Conn, x)
	p.put(key, l, err)
	return err
}

func (p *held) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return during(p, ctx, key, fn)
}

func (p *held) Close() error {
	if p.l != nil {
		p.l.Close()
	}
	return nil
}

// shared is one connection for all goroutines, under a mutex.
type shared struct {
	mu sync.Mutex // held during a loan: guards held, and serves as the queue
	held
}

func newShared(s *Settings) Rival { return &shared{held: held{s: s}} }

func (p *shared) Loan(ctx context.Context, key int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held.Loan(ctx, key)
}

func (p *shared) Exchange(ctx context.Context, key int, x *Exchange) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held.Exchange(ctx, key, x)
}

func (p *shared) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held.Hold(ctx, key, fn)
}

// dialed opens a connection for each use, and at most Max at once.
type dialed struct {
	s     *Settings
	slots chan struct{} // nil: no limit
}

func newDialed(s *Settings) Rival {
	d := &dialed{s: s}
	if s.Max > 0 {
		d.slots = make(chan struct{}, s.Max)
	}
	return d
}

func (p *dialed) get(ctx context.Context, key int) (*line, error) {
	if p.slots != nil {
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	l, err := p.s.open(ctx, key)
	if err != nil && p.slots != nil {
		<-p.slots
	}
	return l, err
}

func (p *dialed) put(_ int, l *line, _ error) {
	l.Close()
	if p.slots != nil {
		<-p.slots
	}
}

func (p *dialed) Loan(ctx context.Context, key int) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	p.put(key, l, nil)
	return nil
}

func (p *dialed) Exchange(ctx context.Context, key int, x *Exchange) error {
	l, err := p.get(ctx, key)
	if err != nil {
		return err
	}
	err = exchange(l.Conn, x)
	p.put(key, l, err)
	return err
}

func (p *dialed) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return during(p, ctx, key, fn)
}

func (p *dialed) Close() error { return nil }

// keyed is a map of pools, one for each address, for rivals that know one address only.
type keyed struct {
	s     *Settings
	keys  []string
	fresh func(*Settings) Rival

	mu    sync.RWMutex // guards pools
	pools map[string]Rival
}

func newKeyed(s *Settings, fresh func(*Settings) Rival) Rival {
	return &keyed{s: s, keys: names(s), fresh: fresh, pools: make(map[string]Rival)}
}

func (p *keyed) of(key int) Rival {
	k := p.keys[key]
	p.mu.RLock()
	r := p.pools[k]
	p.mu.RUnlock()
	if r != nil {
		return r
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if r = p.pools[k]; r == nil {
		one := &Settings{
			Servers: p.s.Servers, TLS: p.s.TLS, Fake: p.s.Fake, Max: p.s.Max, Check: p.s.Check, Sweep: p.s.Sweep, OnDial: p.s.OnDial,
		}
		r = p.fresh(one)
		p.pools[k] = r
	}
	return r
}

func (p *keyed) Loan(ctx context.Context, key int) error { return p.of(key).Loan(ctx, 0) }

func (p *keyed) Exchange(ctx context.Context, key int, x *Exchange) error {
	return p.of(key).Exchange(ctx, 0, x)
}

func (p *keyed) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return p.of(key).Hold(ctx, 0, fn)
}

func (p *keyed) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.pools {
		r.Close()
	}
	return nil
}
