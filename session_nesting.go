package connpool

import (
	"context"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
)

// A use nested in a use of the same session and address must not wait for the outer
// use. A use on another goroutine must wait. fn gets no ctx that could tell the two
// apart; only the goroutine differs. The runtime gives the number of a goroutine only
// in the text of its stack, and reading that text takes longer than everything else in
// a loan. But the runtime quickly gives the return addresses on a goroutine's stack. So
// each use has a number, and its fn runs below a chain of calls that spells this
// number, one call for each hexadecimal digit:
//
//	useNumbered, digitsBegin, nextDigit, digit5, nextDigit, digit12, nextDigit, use, fn, ...
//
// If a use finds that another use has the session connection, it looks for that use's
// number on its own stack. A use that finds the session connection free does not look.
//
// No two uses under way have the same number, in the whole process, and most numbers
// have one digit. A number is free again when its use has returned. A use that ends by
// a panic, or by runtime.Goexit, never gives its number back: deferred calls further up
// run on top of a stack that still spells the number.

var (
	numbers = sync.Pool{New: func() any {
		num := lastNumber.Add(1)
		return &num
	}}
	lastNumber atomic.Uint64
)

// newUse returns a number that no other use under way has.
func newUse() *uint64 { return numbers.Get().(*uint64) }

// freeUse takes the number back when its use has returned.
func freeUse(num *uint64) { numbers.Put(num) }

// numberedUse is a use that is about to run, while its number is put on the stack.
type numberedUse struct {
	b    *sessionConns
	st   *sessionConn
	num  uint64
	left int // digits of num that are not on the stack yet

	learn func() // called instead of the use; see learnFrames
}

// useNumbered is use, below calls that spell its number num.
func (b *sessionConns) useNumbered(ctx context.Context, st *sessionConn, fn func(Conn) error, num uint64) error {
	left := digits(num)
	st.frames = 3 + 2*left // two for each digit, and useNumbered, digitsBegin and the first nextDigit
	return digitsBegin(ctx, &numberedUse{b: b, st: st, num: num, left: left}, fn)
}

// digits returns the number of hexadecimal digits of num.
func digits(num uint64) (n int) {
	for ; num > 0; num >>= 4 {
		n++
	}
	return n
}

// Each of digitsBegin and digit0 to digit15 contains one call, so that each has one return
// address.

//go:noinline
func digitsBegin(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func nextDigit(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	if m.left == 0 {
		if m.learn != nil {
			m.learn()
			return nil
		}
		return m.b.use(ctx, m.st, fn)
	}
	m.left--
	switch m.num >> (4 * m.left) & 15 {
	case 0:
		return digit0(ctx, m, fn)
	case 1:
		return digit1(ctx, m, fn)
	case 2:
		return digit2(ctx, m, fn)
	case 3:
		return digit3(ctx, m, fn)
	case 4:
		return digit4(ctx, m, fn)
	case 5:
		return digit5(ctx, m, fn)
	case 6:
		return digit6(ctx, m, fn)
	case 7:
		return digit7(ctx, m, fn)
	case 8:
		return digit8(ctx, m, fn)
	case 9:
		return digit9(ctx, m, fn)
	case 10:
		return digit10(ctx, m, fn)
	case 11:
		return digit11(ctx, m, fn)
	case 12:
		return digit12(ctx, m, fn)
	case 13:
		return digit13(ctx, m, fn)
	case 14:
		return digit14(ctx, m, fn)
	default:
		return digit15(ctx, m, fn)
	}
}

//go:noinline
func digit0(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit1(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit2(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit3(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit4(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit5(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit6(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit7(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit8(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit9(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit10(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit11(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit12(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit13(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit14(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

//go:noinline
func digit15(ctx context.Context, m *numberedUse, fn func(Conn) error) error {
	return nextDigit(ctx, m, fn)
}

// frameTable holds the return addresses in digitsBegin and in digit0 to digit15.
type frameTable struct {
	at          [17]uintptr // of the digits 0 to 15, then of digitsBegin
	first, last uintptr
}

// learnFrames finds the addresses: it runs each of the functions once and reads the
// stack from inside.
var learnFrames = sync.OnceValue(func() *frameTable {
	entries := [17]any{digit0, digit1, digit2, digit3, digit4, digit5, digit6, digit7, digit8, digit9, digit10, digit11, digit12, digit13, digit14, digit15, digitsBegin}
	l := new(frameTable)
	for d := range 16 {
		m := &numberedUse{num: uint64(d), left: 1}
		m.learn = func() {
			var pcs [16]uintptr
			for _, pc := range pcs[:runtime.Callers(1, pcs[:])] {
				for _, i := range [2]int{d, 16} {
					entry := runtime.FuncForPC(reflect.ValueOf(entries[i]).Pointer()).Entry()
					if f := runtime.FuncForPC(pc - 1); f != nil && f.Entry() == entry {
						l.at[i] = pc
					}
				}
			}
		}
		digitsBegin(context.Background(), m, nil)
	}
	l.first, l.last = slices.Min(l.at[:]), slices.Max(l.at[:])
	if l.first == 0 {
		panic("connpool: the runtime does not tell any more by which calls a goroutine has come")
	}
	return l
})

// underway reports whether the caller runs inside the use with the number num.
func underway(num uint64) bool {
	var few [12]uintptr // enough as a rule: fn seldom goes deep before it borrows again
	pcs := few[:]
	for {
		n := runtime.Callers(2, pcs)
		if inside := learnFrames().spell(pcs[:n], num); inside || n < len(pcs) {
			return inside
		}
		pcs = make([]uintptr, 8*len(pcs)) // read again, with more frames
	}
}

// spell reports whether pcs spell the number num. The innermost call comes first in
// pcs, so the last digit of a number comes before the others, and digitsBegin ends the
// number.
func (l *frameTable) spell(pcs []uintptr, num uint64) bool {
	var read uint64
	var shift uint
	for _, pc := range pcs {
		if pc < l.first || pc > l.last {
			continue
		}
		switch d := slices.Index(l.at[:], pc); {
		case d < 0:
		case d < 16:
			read |= uint64(d) << shift
			shift += 4
		case read == num:
			return true
		default:
			read, shift = 0, 0
		}
	}
	return false
}
