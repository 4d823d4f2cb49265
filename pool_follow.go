package connpool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Config.FollowDNS: each sweep looks up the names that have open connections, and retires the
// connections whose peer is gone from the answers (dns.go).
//
// The sweep does not wait for look-ups. They run on goroutines of their own, maxLookups at most,
// which end when there is nothing left to look up, or with the pool. A name whose last look-up
// has not ended is left out of a sweep.
//
// Each family is looked up by itself, and only if there are connections of it. An answer to a
// question for both would be incomplete, without an error, if the half for one family failed.

const (
	maxLookups     = 16               // how many look-ups may run at once
	lookupTimeout  = 10 * time.Second // the bound of one look-up
	followedMemory = unrestMemory     // for how many sweeps a name without connections is remembered
	maxForgotten   = 1024             // how many names without connections are remembered at most
)

// followedName is what is looked up: a host, in one family of addresses.
type followedName struct {
	host string
	six  bool // IPv6
}

// networks are the names of the two families in package net; the first is the one of n.
func (n followedName) networks() (own, other string) {
	if n.six {
		return "ip6", "ip4"
	}
	return "ip4", "ip6"
}

// followedConn is an open connection and the address of its peer.
type followedConn struct {
	c  *conn
	ip netip.Addr
}

// followedNames are the open connections that a sweep met, by name.
type followedNames map[followedName][]followedConn

// follower is the part of the pool for Config.FollowDNS.
type follower struct {
	pool  *Pool         // never changes
	bound time.Duration // of one look-up; it never changes

	mu      sync.Mutex // guards what follows; nothing else happens under it
	names   map[followedName]*followed
	queue   []*followed // to be looked up
	workers int         // goroutines that look up
	sweeps  uint64
}

// followed is what the pool knows of a name. While busy is set it belongs to the goroutine that
// looks the name up, but for met.
type followed struct {
	name   followedName
	busy   bool   // it is in the queue, or being looked up; follower.mu
	met    uint64 // the latest sweep that met connections of the name; follower.mu
	conns  []followedConn
	lastID uint64 // the newest connection that earlier look-ups judged
	dnsAnswers
}

// add adds those of the open connections met that are followed. No lock is needed: nc is fixed
// once a connection is open.
func (names *followedNames) add(met []*conn) {
	for _, c := range met {
		name, ip := c.followedTo()
		if !ip.IsValid() {
			continue
		}
		if *names == nil {
			*names = make(followedNames)
		}
		(*names)[name] = append((*names)[name], followedConn{c, ip})
	}
}

// followedTo is the name of c's address and the address of its peer, which is not valid if c is
// not followed. The peer of a connection that another dialer has opened may be a proxy.
func (c *conn) followedTo() (name followedName, ip netip.Addr) {
	s := c.site
	cfg := &s.env.cfg
	switch {
	case s.unpooled(), cfg.Dialers[TCP] != nil:
		return
	case s.addr.Transport != TCP && (s.addr.Transport != TLS || cfg.Dialers[TLS] != nil):
		return
	}
	if _, err := netip.ParseAddr(s.addr.Host); err == nil {
		return
	}
	peer, _ := c.nc.RemoteAddr().(*net.TCPAddr)
	if peer == nil {
		return
	}
	ip = plainIP(peer.AddrPort().Addr())
	return followedName{s.addr.Host, ip.Is6()}, ip
}

// plainIP is ip in the form in which addresses are compared: an IPv4 address as such, and no zone,
// which an answer may lack.
func plainIP(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }

// lookUpAll begins to look up names, those whose last look-up has ended.
func (f *follower) lookUpAll(names followedNames) {
	p, started := f.pool, f.enqueue(names)
	p.mu.Lock()
	defer p.mu.Unlock()
	for range started { // also if the pool is closed: they find that out
		p.examiners++
		go f.lookUpQueued()
	}
}

// enqueue puts names into the queue and forgets those that had no connections for long. It returns
// how many goroutines have to be started.
func (f *follower) enqueue(names followedNames) (start int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.names == nil {
		f.names = make(map[followedName]*followed)
	}
	f.sweeps++
	for name, conns := range names {
		q := f.names[name]
		if q == nil {
			q = &followed{name: name}
			f.names[name] = q
		}
		if q.met = f.sweeps; q.busy {
			continue
		}
		q.busy, q.conns = true, conns
		f.queue = append(f.queue, q)
	}
	unused := len(f.names) - len(names)
	for name, q := range f.names {
		if q.busy || q.met == f.sweeps {
			continue
		}
		if unused > maxForgotten || f.sweeps-q.met >= followedMemory {
			delete(f.names, name)
			unused--
		}
	}
	start = min(len(f.queue), maxLookups-f.workers) // those that run already may hang
	f.workers += start
	return start
}

// next is the next name to be looked up; nil if there is none, and the calling goroutine has to
// end. done is the name that it has looked up before.
func (f *follower) next(done *followed, end bool) *followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	if done != nil {
		done.busy, done.conns = false, nil
	}
	if len(f.queue) == 0 || end {
		f.workers--
		return nil
	}
	q := f.queue[0]
	f.queue = f.queue[1:]
	return q
}

// lookUpQueued looks up what is in the queue.
func (f *follower) lookUpQueued() {
	p := f.pool
	for q := f.next(nil, p.ctx.Err() != nil); q != nil; {
		f.lookUp(q)
		q = f.next(q, p.ctx.Err() != nil)
	}
	p.mu.Lock()
	p.examiners--
	p.noteLeftLocked()
	p.mu.Unlock()
}

// lookUp looks a name up and retires the connections whose peer is gone.
func (f *follower) lookUp(q *followed) {
	p := f.pool
	ctx, cancel := context.WithTimeout(p.ctx, f.bound)
	defer cancel()
	answer, err := f.resolve(ctx, q.name)
	if err != nil {
		if p.ctx.Err() == nil {
			p.report.log(slog.LevelDebug, "a look-up failed and changes nothing", "host", q.name.host, "err", err)
		}
		return
	}
	gone := q.judge(answer)
	if len(gone) == 0 {
		return
	}
	p.report.log(slog.LevelInfo, "a name has other addresses than its connections, which are retired", "host", q.name.host,
		"addresses", answer, "connections", len(gone))
	f.retire(q.name.host, gone)
}

// judge learns an answer and returns the connections whose peer is gone.
func (q *followed) judge(answer []netip.Addr) (gone []followedConn) {
	// A connection that was opened since the last look-up shows what its dial has got. (The loop
	// comes first: what is dialled later belongs to the next answer.)
	newest := q.lastID
	for _, at := range q.conns {
		if at.c.id > q.lastID || !q.knows(at.ip) {
			q.dialled(at.ip)
		}
		newest = max(newest, at.c.id)
	}
	q.lastID = newest
	q.learn(answer)
	for _, at := range q.conns {
		if q.gone(at.ip) {
			gone = append(gone, at)
		}
	}
	return gone
}

// retire retires connections whose peer is gone.
func (f *follower) retire(host string, gone []followedConn) {
	p := f.pool
	why := make(map[netip.Addr]*retirement)
	for _, at := range gone {
		if why[at.ip] == nil {
			why[at.ip] = &retirement{ClosedMoved, fmt.Errorf("%s does not lead to %v any more", host, at.ip)}
		}
	}
	var todo agenda
	p.mu.Lock()
	eachLocked(p, slices.Values(gone), &todo, func(at followedConn) {
		p.retireLocked(at.c, why[at.ip], &todo)
	})
	p.mu.Unlock()
	todo.run(p)
}

// resolve looks a name up. The answer is sorted. It is empty if the name has addresses of the
// other family only. A name without any address is an error.
func (f *follower) resolve(ctx context.Context, name followedName) ([]netip.Addr, error) {
	// A dial takes what it gets. Here a part of an answer would be wrong.
	r := net.Resolver{StrictErrors: true}
	from := net.DefaultResolver
	if base := f.pool.cfg.Dialer; base != nil && base.Resolver != nil {
		from = base.Resolver
	}
	if from != nil {
		r.PreferGo, r.Dial = from.PreferGo, from.Dial
	}
	own, other := name.networks()
	ips, err := r.LookupNetIP(ctx, own, name.host)
	if err != nil || len(ips) == 0 {
		if err != nil && !hasNone(err) {
			return nil, err
		}
		// Is the name there at all?
		if rest, otherErr := r.LookupNetIP(ctx, other, name.host); otherErr != nil || len(rest) == 0 {
			return nil, errors.Join(err, otherErr)
		}
		return nil, nil
	}
	answer := make(map[netip.Addr]struct{}, len(ips))
	for _, ip := range ips {
		answer[plainIP(ip)] = struct{}{}
	}
	return slices.SortedFunc(maps.Keys(answer), netip.Addr.Compare), nil
}

// hasNone reports whether err says that the name has no address of the family that was asked for:
// as an answer of DNS, or because package net has left out the other ones.
func hasNone(err error) bool {
	var dns *net.DNSError
	var addr *net.AddrError
	return errors.As(err, &dns) && dns.IsNotFound || errors.As(err, &addr)
}
