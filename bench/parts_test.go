package bench

import (
	"context"
	"hash/maphash"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/seed-ecb488c9/connpool"
)

// The parts of a loan, one by one; docs/performance.md says how many of each there are in
// a loan.
func BenchmarkParts(b *testing.B) {
	part := func(name string, run func()) {
		b.Run("part="+name, func(b *testing.B) {
			for b.Loop() {
				run()
			}
		})
	}
	part("clock", func() { _ = time.Now() })

	var mu sync.Mutex
	part("mutex", func() {
		mu.Lock()
		defer mu.Unlock()
	})

	addr := connpool.MustParseAddr("tcp://127.0.0.1:7000")
	seed := maphash.MakeSeed()
	part("hash", func() { _ = maphash.String(seed, addr.Host) ^ uint64(addr.Port)*0x9e3779b97f4a7c15 })
	same := connpool.MustParseAddr("tcp://127.0.0.1:7000")
	part("compare", func() {
		if addr != same {
			panic("equal addresses differ")
		}
	})
	var ticked atomic.Int64
	ticked.Store(1)
	var asked atomic.Bool
	asked.Store(true)
	part("coarse", func() { _ = ticked.Load() != 0 && asked.Load() })
	sites := map[connpool.Addr]*int{addr: new(int)}
	part("map", func() { _ = *sites[addr] })

	lru, err := simplelru.NewLRU[*int, struct{}](math.MaxInt, nil)
	must(b, err)
	first := new(int)
	lru.Add(first, struct{}{})
	part("lru", func() { lru.Get(first) })

	var word atomic.Uint64
	part("atomic", func() { word.Add(1) })

	part("defer", func() {
		done := false
		defer func() {
			if !done {
				_ = recover()
			}
		}()
		done = nothing(connpool.Conn{}) == nil
	})

	ctx := context.Background()
	part("value", func() { _ = ctx.Value(ctx) })
	cancellable, cancel := context.WithCancel(ctx)
	defer cancel()
	part("afterfunc", func() { context.AfterFunc(cancellable, cancel)() })

	sv := server(b, Echo, false)
	nc, err := net.Dial("tcp", sv.Addr)
	must(b, err)
	defer nc.Close()
	part("deadline", func() { nc.SetDeadline(time.Time{}) })
	raw, err := nc.(*net.TCPConn).SyscallConn()
	must(b, err)
	visit := func(name string, look func(uintptr)) {
		part(name, func() {
			if raw.Control(look) != nil {
				panic("no descriptor")
			}
		})
	}
	visit("control", func(uintptr) {})
	visit("control+peek", func(fd uintptr) { _ = quiet(fd) })
	visit("control+cookie", func(fd uintptr) { cookie(fd) })
	visit("control+both", func(fd uintptr) {
		cookie(fd)
		_ = quiet(fd)
	})
}
