package bench

import (
	"context"
	"net"
	"strconv"

	"github.com/seed-ecb488c9/connpool"
)

// pooled is this pool, with nothing in its Config but the settings.
type pooled struct {
	p     *connpool.Pool
	addrs []connpool.Addr
}

func newConnpool(s *Settings) Rival {
	cfg := connpool.Config{
		MaxPerAddr:    s.Max,
		MaxOpen:       s.MaxOpen,
		SweepInterval: s.Sweep,
		NoProbe:       s.Check == CheckNone,
		NoFDCheck:     s.Check != CheckAll,
		Dialers: map[connpool.Transport]connpool.DialFunc{
			connpool.TCP: func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
				key, _ := strconv.Atoi(addr.Scope)
				return s.connect(ctx, key)
			},
		},
	}
	if s.Fake {
		cfg.MaxOpen = -1 // no handles, so no limit by handles
	}
	transport := connpool.TCP
	if s.TLS {
		transport, cfg.TLS = connpool.TLS, ClientTLS().Clone()
		cfg.TLS.ServerName = "" // the address has it
	}
	if s.OwnTLS {
		cfg.Dialers[connpool.TLS] = func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			key, _ := strconv.Atoi(addr.Scope)
			return s.dial(ctx, key)
		}
	}
	p, err := connpool.New(cfg)
	if err != nil {
		panic(err) // the settings of a workload contradict each other
	}
	r := &pooled{p, make([]connpool.Addr, max(1, s.Addrs))}
	for key := range r.addrs {
		addr := connpool.Addr{Transport: transport}
		if s.Fake {
			addr.Host, addr.Port = fakeHost(key), 80
		} else {
			host, port, _ := net.SplitHostPort(s.Servers[key%len(s.Servers)])
			n, _ := strconv.Atoi(port)
			addr.Host, addr.Port = host, uint16(n)
		}
		if key > 0 && !s.Fake {
			addr.Scope = strconv.Itoa(key)
		}
		r.addrs[key] = addr
	}
	return r
}

func nothing(connpool.Conn) error { return nil }

func (r *pooled) Loan(ctx context.Context, key int) error {
	return r.p.With(ctx, r.addrs[key], nothing)
}

func (r *pooled) Exchange(ctx context.Context, key int, x *Exchange) error {
	return r.p.With(ctx, r.addrs[key], func(c connpool.Conn) error { return exchange(c, x) })
}

func (r *pooled) Hold(ctx context.Context, key int, fn func(net.Conn) error) error {
	return r.p.With(ctx, r.addrs[key], func(c connpool.Conn) error { return fn(c) })
}

func (r *pooled) Close() error { return r.p.Close() }
