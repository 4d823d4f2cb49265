package connpool

import (
	"context"
	"testing"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// BenchmarkWarmLoan is one loan and return of a warm TCP connection, with fn
// empty: what the pool costs, and what each of its checks adds.
func BenchmarkWarmLoan(b *testing.B) {
	cancelable, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, way := range []struct {
		name string
		cfg  Config
		ctx  context.Context
	}{
		{"checks=none", Config{NoProbe: true, NoFDCheck: true}, context.Background()},
		{"checks=peek", Config{NoFDCheck: true}, context.Background()},
		{"checks=identity", Config{NoProbe: true}, context.Background()},
		{"checks=all", Config{}, context.Background()},
		{"checks=all,ctx=cancelable", Config{}, cancelable},
	} {
		b.Run(way.name, func(b *testing.B) {
			srv, err := faultnet.Start(faultnet.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer srv.Close()
			p, err := New(way.cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
			fn := func(Conn) error { return nil }
			if err := p.With(way.ctx, addr, fn); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if err := p.With(way.ctx, addr, fn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkEcho is a 64-byte exchange over a connection that is borrowed each
// time, beside one that is held all the time.
func BenchmarkEcho(b *testing.B) {
	for _, network := range []string{"tcp", "tls"} {
		for _, how := range []string{"held", "borrowed"} {
			b.Run(network+"/"+how, func(b *testing.B) {
				srv, err := faultnet.Start(faultnet.Options{Network: network, Handler: func(c *faultnet.Peer) {
					buf := make([]byte, 64)
					for {
						n, err := c.Read(buf)
						if err != nil {
							return
						}
						if _, err := c.Write(buf[:n]); err != nil {
							return
						}
					}
				}})
				if err != nil {
					b.Fatal(err)
				}
				defer srv.Close()
				cfg := Config{}
				if network == "tls" {
					cfg.TLS = srv.ClientTLS()
				}
				p, err := New(cfg)
				if err != nil {
					b.Fatal(err)
				}
				defer p.Close()
				addr := Addr{Transport: Transport(network), Host: srv.Host(), Port: srv.Port()}
				buf := make([]byte, 64)
				exchange := func(c Conn) error {
					if _, err := c.Write(buf); err != nil {
						return err
					}
					_, err := c.Read(buf)
					return err
				}
				ctx := context.Background()
				if how == "held" {
					err = p.With(ctx, addr, func(c Conn) error {
						for b.Loop() {
							if err := exchange(c); err != nil {
								return err
							}
						}
						return nil
					})
				} else {
					for err == nil && b.Loop() {
						err = p.With(ctx, addr, exchange)
					}
				}
				if err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkHook is a loan with a hook that does nothing, beside one that calls the same by hand.
func BenchmarkHook(b *testing.B) {
	reset := func(context.Context, Conn) error { return nil }
	for name, cfg := range map[string]Config{
		"hook=none": {NoProbe: true, NoFDCheck: true}, "hook=reset": {NoProbe: true, NoFDCheck: true, Reset: reset},
	} {
		b.Run(name, func(b *testing.B) {
			srv, err := faultnet.Start(faultnet.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer srv.Close()
			p, err := New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			fn := func(c Conn) error { return reset(ctx, c) }
			b.ReportAllocs()
			for b.Loop() {
				if err := p.With(ctx, addr, fn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLease is Lease and Return, beside With, under a ctx that can be cancelled.
func BenchmarkLease(b *testing.B) {
	srv, err := faultnet.Start(faultnet.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer srv.Close()
	p, err := New(Config{NoProbe: true, NoFDCheck: true})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	addr := Addr{Transport: TCP, Host: srv.Host(), Port: srv.Port()}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	b.Run("how=With", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := p.With(ctx, addr, func(Conn) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("how=Lease", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l, err := p.Lease(ctx, addr)
			if err != nil {
				b.Fatal(err)
			}
			l.Return()
		}
	})
}
