package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// peer is one server of the demo, its address for the pool, and the record of its faults.
type peer struct {
	*faultnet.Server
	faultLog
	addr    connpool.Addr
	network string // for package net, as target is
	target  string
	tls     *tls.Config // for clients: the pool and those without a pool; nil without TLS
}

// fleet is all the servers.
type fleet struct {
	peers  []*peer
	byAddr map[connpool.Addr]*peer
	calm   atomic.Bool // replies come at once
}

var networks = []connpool.Transport{connpool.TCP, connpool.TLS, connpool.Unix}

func startFleet(o demoOptions) (*fleet, error) {
	f := &fleet{byAddr: make(map[connpool.Addr]*peer, o.addrs)}
	for i := range o.addrs {
		transport := networks[i%len(networks)]
		salt := o.seed + uint64(i)<<40
		chunk := 0
		if i%4 == 3 {
			chunk = 7 // most replies in two pieces
		}
		s, err := faultnet.Start(faultnet.Options{
			Network: string(transport),
			Chunk:   chunk,
			ReplyDelay: func(serial, seq int) time.Duration {
				if f.calm.Load() {
					return 0
				}
				return replyDelay(salt ^ uint64(serial)<<20 ^ uint64(seq))
			},
		})
		if err != nil {
			f.close()
			return nil, fmt.Errorf("server %d (%s) does not start: %w", i+1, transport, err)
		}
		p := &peer{Server: s, network: "tcp", target: net.JoinHostPort(s.Host(), strconv.Itoa(int(s.Port())))}
		p.addr = connpool.Addr{Transport: transport, Host: s.Host(), Port: s.Port()}
		switch transport {
		case connpool.Unix:
			p.network, p.target = "unix", s.Host()
		case connpool.TLS:
			p.tls = s.ClientTLS()
			p.tls.ServerName = s.Host()
			p.tls.ClientSessionCache = tls.NewLRUClientSessionCache(0)
		}
		f.peers = append(f.peers, p)
		f.byAddr[p.addr] = p
	}
	return f, nil
}

// replyDelay is zero for most replies; some come late, and a few so late that the client
// has probably left.
func replyDelay(x uint64) time.Duration {
	x = scatter(x)
	span := time.Duration(x >> 32 % 1000)
	switch n := x % 100; {
	case n < 85:
		return 0
	case n < 97:
		return span * 5 * time.Microsecond
	}
	return 5*time.Millisecond + span*25*time.Microsecond
}

// scatter spreads x over all 64 bits (the finalizer of SplitMix64).
func scatter(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// served is the number of connections open at the servers. A server notices a close a
// little later, so this number may exceed the pool's.
func (f *fleet) served() int {
	n := 0
	for _, p := range f.peers {
		n += p.Open()
	}
	return n
}

func (f *fleet) overlaps() int {
	n := 0
	for _, p := range f.peers {
		n += p.Overlaps()
	}
	return n
}

func (f *fleet) close() {
	for _, p := range f.peers {
		p.Close()
	}
}

// dial opens a connection without a pool.
func (p *peer) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, p.network, p.target)
	if err != nil || p.tls == nil {
		return nc, err
	}
	tc := tls.Client(nc, p.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, err
	}
	return tc, nil
}
