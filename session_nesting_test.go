package connpool

import (
	"context"
	"errors"
	"iter"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// below calls f below the marks of a use of that number.
func below(num uint64, f func()) {
	m := &numberedUse{num: num, left: digits(num), learn: f}
	if err := digitsBegin(context.Background(), m, nil); err != nil {
		panic(err)
	}
}

// deeply calls f below depth frames more.
//
//go:noinline
func deeply(depth int, f func()) {
	if depth == 0 {
		f()
		return
	}
	deeply(depth-1, f)
	runtime.KeepAlive(f)
}

// TRY-52: a goroutine is inside the uses that are on its stack, and in no other,
// however many numbers share their digits and however deep it is.
func TestAUseIsUnderwayBelowItsOwnNumber(t *testing.T) {
	nums := []uint64{1, 0x10, 0x11, 0xf, 0xff, 0x123456789abcdef, 0xfedcba987654321, 1<<64 - 1, 1 << 63, 0x100000}
	for _, outer := range nums {
		for _, inner := range nums {
			for _, depth := range []int{0, 1, 40, 63, 64, 65, 600} {
				below(outer, func() {
					deeply(depth, func() {
						below(inner, func() {
							for _, num := range nums {
								require.Equal(t, num == outer || num == inner, underway(num), "%#x below %#x and %#x", num, outer, inner)
							}
							require.False(t, underway(outer<<4|inner&15) && outer<<4|inner&15 != inner && outer<<4|inner&15 != outer)
						})
						require.True(t, underway(outer))
						require.Equal(t, inner == outer, underway(inner), "it is over")
					})
				})
			}
		}
	}
	require.False(t, underway(1))
	// Another goroutine, and another stack, is elsewhere.
	below(7, func() {
		var wg tasks.Group
		wg.Go(func() { require.False(t, underway(7)) })
		wg.Wait()
		next, stop := iter.Pull(func(yield func(bool) bool) { yield(underway(7)) })
		defer stop()
		inside, _ := next()
		require.False(t, inside, "a coroutine's stack is its own")
	})
	// A panic on its way up has not left it.
	below(9, func() {
		defer func() {
			require.Equal(t, errBoom, recover())
		}()
		defer func() { require.True(t, underway(9)) }()
		panic(errBoom)
	})
}

// TRY-52: no two uses under way have the same number, and one that did not return keeps
// its own: what is deferred further up still runs below it.
func TestNumbersOfUsesAreTheirOwn(t *testing.T) {
	var mu sync.Mutex
	out := make(map[uint64]bool)
	var wg tasks.Group
	for range 8 {
		wg.Go(func() {
			var mine []*uint64
			for i := range 10_000 {
				if i%5 < 3 {
					num := newUse()
					mu.Lock()
					if *num == 0 || out[*num] {
						t.Errorf("%d again", *num)
					}
					out[*num] = true
					mu.Unlock()
					mine = append(mine, num)
					continue
				}
				num := mine[0]
				mine = mine[1:]
				mu.Lock()
				delete(out, *num)
				mu.Unlock()
				freeUse(num)
			}
		})
	}
	wg.Wait()

	n := open(t, Config{})
	ctx, end := n.p.Session(bg)
	defer end()
	number := func() (num uint64) {
		s := ctx.Value(sessionKey{n.p}).(*session)
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.byAddr[at("a")].owner
	}
	var panicked uint64
	func() {
		defer func() { require.Equal(t, errBoom, recover()) }()
		defer func() {
			require.True(t, underway(panicked), "it is on the stack")
			for range 100 {
				require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error {
					require.NotEqual(t, panicked, number())
					return nil
				}))
			}
		}()
		n.p.With(ctx, at("a"), func(Conn) error { panicked = number(); panic(errBoom) })
	}()
	require.NotZero(t, panicked)
}

// TRY-52: a use in a session costs what its books cost, and does not read its stack: how
// deep the caller is makes no difference, and nothing is allocated for it.
func TestAUseInASessionDoesNotReadTheStack(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates on its own account")
	}
	n := open(t, Config{})
	ctx, end := n.p.Session(bg)
	defer end()
	fn := func(Conn) error { return nil }
	use := func() {
		if n.p.With(ctx, at("a"), fn) != nil {
			panic("With failed")
		}
	}
	use()
	require.LessOrEqual(t, patience.Allocs(1000, use), 1.0)
	nested := func(Conn) error { return n.p.With(ctx, at("a"), fn) }
	require.NoError(t, n.p.With(ctx, at("a"), nested))
	require.LessOrEqual(t, patience.Allocs(1000, func() {
		if n.p.With(ctx, at("a"), nested) != nil {
			panic("With failed")
		}
	}), 2.0)
}

func BenchmarkUseInASession(b *testing.B) {
	for _, name := range []string{"no session", "one after another", "inside another"} {
		b.Run(name, func(b *testing.B) {
			n := open(b, Config{})
			ctx, end := n.p.Session(bg)
			defer end()
			if name == "no session" {
				ctx = bg
			}
			fn := func(Conn) error { return nil }
			run := func() {
				for range b.N {
					if n.p.With(ctx, at("a"), fn) != nil {
						b.Error("With failed")
					}
				}
			}
			b.ReportAllocs()
			if name != "inside another" {
				run()
				return
			}
			if err := n.p.With(ctx, at("a"), func(Conn) error { run(); return nil }); err != nil && !errors.Is(err, errBoom) {
				b.Error(err)
			}
		})
	}
}
