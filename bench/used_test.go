package bench

import (
	"bufio"
	"context"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// The workloads as pools are used: under a request's ctx, with the connection handed on as a
// net.Conn. Each rival gets the same ctx and the same hand-over.

// ways are how a ctx comes to a loan. The function that a way returns is called once for each
// loan.
var ways = map[string]func() (next func() (context.Context, context.CancelFunc), end func()){
	"cancelable": func() (func() (context.Context, context.CancelFunc), func()) {
		ctx, cancel := context.WithCancel(context.Background())
		return same(ctx), cancel
	},
	"deadline": func() (func() (context.Context, context.CancelFunc), func()) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		return same(ctx), cancel
	},
	"timeout": func() (func() (context.Context, context.CancelFunc), func()) {
		parent, cancel := context.WithCancel(context.Background())
		return func() (context.Context, context.CancelFunc) { return context.WithTimeout(parent, 30*time.Second) }, cancel
	},
	"deep": func() (func() (context.Context, context.CancelFunc), func()) {
		type key struct{ int }
		ctx, cancel := context.WithCancel(context.Background())
		for i := range 10 {
			ctx = context.WithValue(ctx, key{i}, i)
		}
		return same(ctx), cancel
	},
	"trace": func() (func() (context.Context, context.CancelFunc), func()) {
		ctx, cancel := context.WithCancel(context.Background())
		return same(connpool.WithTrace(ctx, new(connpool.Trace))), cancel
	},
}

func same(ctx context.Context) func() (context.Context, context.CancelFunc) {
	none := func() {}
	return func() (context.Context, context.CancelFunc) { return ctx, none }
}

// BenchmarkUsed is W1 under each ctx. rival=none makes the ctx and lends nothing, for the ways
// that make one for each loan.
func BenchmarkUsed(b *testing.B) {
	for _, way := range []string{"cancelable", "deadline", "timeout", "deep", "trace"} {
		rivals := lenders
		if way == "trace" {
			rivals = rivals[:1] // only this pool has one
		}
		b.Run("way="+way, func(b *testing.B) {
			each(b, rivals, func(b *testing.B, rival string, check Check) {
				r := start(b, rival, &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: 1, Check: check})
				next, end := ways[way]()
				defer end()
				must(b, r.Loan(context.Background(), 0))
				b.ReportAllocs()
				for b.Loop() {
					ctx, cancel := next()
					if err := r.Loan(ctx, 0); err != nil {
						b.Fatal(err)
					}
					cancel()
				}
			})
			b.Run("check=none/rival=none", func(b *testing.B) {
				next, end := ways[way]()
				defer end()
				b.ReportAllocs()
				for b.Loop() {
					_, cancel := next()
					cancel()
				}
			})
		})
	}
}

// BenchmarkUsedCodec is W1 under a ctx that can be cancelled, where the connection goes to a
// codec as a net.Conn.
func BenchmarkUsedCodec(b *testing.B) {
	each(b, lenders, func(b *testing.B, rival string, check Check) {
		r := start(b, rival, &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: 1, Check: check})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		codec := bufio.NewReadWriter(bufio.NewReader(nil), bufio.NewWriter(nil))
		hand := func(nc net.Conn) error {
			codec.Reader.Reset(nc)
			codec.Writer.Reset(nc)
			return nil
		}
		must(b, r.Loan(ctx, 0))
		b.ReportAllocs()
		for b.Loop() {
			if err := r.Hold(ctx, 0, hand); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkUsedW2 is W2 with a ctx of each goroutine's own that can be cancelled.
func BenchmarkUsedW2(b *testing.B) {
	const users = 16
	each(b, lenders, func(b *testing.B, rival string, check Check) {
		r := start(b, rival, &Settings{Servers: []string{server(b, Echo, false).Addr}, Max: users, Check: check})
		must(b, Fill(context.Background(), r, users, Same))
		b.SetParallelism(max(1, users/runtime.GOMAXPROCS(0)))
		b.ReportAllocs()
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			for pb.Next() {
				if err := r.Loan(ctx, 0); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkUsedW4 is W4 under a ctx that can be cancelled, through a net.Conn.
func BenchmarkUsedW4(b *testing.B) { usedEchoes(b, false, false) }

// BenchmarkUsedW5 is the same over TLS.
func BenchmarkUsedW5(b *testing.B) { usedEchoes(b, true, false) }

// BenchmarkUsedW5Own is the same with a dialer that returns its own *tls.Conn. The other rivals
// have no other way.
func BenchmarkUsedW5Own(b *testing.B) { usedEchoes(b, true, true) }

func usedEchoes(b *testing.B, overTLS, ownTLS bool) {
	each(b, slices.Concat(lenders, []string{"held"}), func(b *testing.B, rival string, check Check) {
		s := &Settings{Servers: []string{server(b, ProtocolOf(rival), overTLS).Addr}, TLS: overTLS, OwnTLS: ownTLS, Max: 1, Check: check}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		r, x := start(b, rival, s), NewExchange(1)
		hand := func(nc net.Conn) error { return exchange(nc, x) }
		besideHeld(b, s, ProtocolOf(rival), func() error { return r.Hold(ctx, 0, hand) })
	})
}
