package connpool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What a mark of Keep speaks for: the connection of the fn that returned it.

var errAbsent = errors.New("no such key")

// errKept is a mark for many uses, as a package may declare it.
var errKept = Keep(errAbsent)

// onlyAs is an error of the kind that old packages made of several: it answers
// errors.As, and has no Unwrap.
type onlyAs struct{ err error }

func (e onlyAs) Error() string        { return e.err.Error() }
func (e onlyAs) As(target any) bool   { return errors.As(e.err, target) }
func (e onlyAs) Is(target error) bool { return errors.Is(e.err, target) }
func wrapOnce(err error) error        { return fmt.Errorf("wrapped: %w", err) }
func joined(err error) error          { return errors.Join(io.ErrUnexpectedEOF, err) }
func wrappedTwice(err error) error    { return fmt.Errorf("%w, %w", errBoom, wrapOnce(joined(err))) }
func hidden(err error) error          { return onlyAs{wrapOnce(err)} }
func asItIs(err error) error          { return err }

var wraps = map[string]func(error) error{
	"as it is": asItIs, "wrapped": wrapOnce, "joined": joined, "wrapped twice": wrappedTwice,
	"hidden": hidden, "two of them": func(err error) error { return errors.Join(err, err) },
}

// TRY-01: whoever an inner use belongs to, and however its error is wrapped
// inside and outside, its mark does not speak for the outer connection.
func TestTheMarkOfAnInnerUseNeverKeepsTheOuterConnection(t *testing.T) {
	inner := map[string]func(ctx context.Context, p, q *Pool, fn func(Conn) error) error{
		"With of another pool": func(_ context.Context, _, q *Pool, fn func(Conn) error) error { return q.With(bg, at("b"), fn) },
		"With of the pool":     func(_ context.Context, p, _ *Pool, fn func(Conn) error) error { return p.With(bg, at("b"), fn) },
		"a use of the session": func(ctx context.Context, p, _ *Pool, fn func(Conn) error) error { return p.With(ctx, at("b"), fn) },
		"a session of another pool": func(_ context.Context, _, q *Pool, fn func(Conn) error) error {
			ctx, end := q.Session(bg)
			defer end()
			return q.With(ctx, at("b"), fn)
		},
		"a lease": func(_ context.Context, p, _ *Pool, fn func(Conn) error) error {
			l, err := p.Lease(bg, at("b"))
			if err != nil {
				return err
			}
			defer l.Return()
			return l.Do(bg, fn)
		},
		"a use inside a use": func(_ context.Context, _, q *Pool, fn func(Conn) error) error {
			ctx, end := q.Session(bg)
			defer end()
			return q.With(ctx, at("b"), func(Conn) error { return q.With(ctx, at("b"), fn) })
		},
		"three deep": func(_ context.Context, p, q *Pool, fn func(Conn) error) error {
			return q.With(bg, at("b"), func(Conn) error {
				return wrapOnce(p.With(bg, at("b"), func(Conn) error { return joined(q.With(bg, at("c"), fn)) }))
			})
		},
	}
	outer := map[string]func(ctx context.Context, p *Pool, fn func(Conn) error) error{
		"With":    func(_ context.Context, p *Pool, fn func(Conn) error) error { return p.With(bg, at("a"), fn) },
		"Session": func(ctx context.Context, p *Pool, fn func(Conn) error) error { return p.With(ctx, at("a"), fn) },
		"a use inside a use": func(ctx context.Context, p *Pool, fn func(Conn) error) error {
			var err error
			p.With(ctx, at("a"), func(Conn) error {
				err = p.With(ctx, at("a"), fn)
				return nil
			})
			return err
		},
		"Lease.Do": func(_ context.Context, p *Pool, fn func(Conn) error) error {
			l, err := p.Lease(bg, at("a"))
			if err != nil {
				return err
			}
			defer l.Return()
			return l.Do(bg, fn)
		},
	}
	for outerName, around := range outer {
		for innerName, use := range inner {
			t.Run(innerName+" in "+outerName, func(t *testing.T) {
				for marking, mark := range wraps {
					for passing, pass := range wraps {
						bubble(t, func(t *testing.T) {
							what := marking + ", then " + passing
							n := open(t, Config{})
							m := open(t, Config{})
							ctx, end := n.p.Session(bg)
							var got error
							err := around(ctx, n.p, func(Conn) error {
								got = use(ctx, n.p, m.p, func(Conn) error { return mark(errKept) })
								return pass(got)
							})
							require.ErrorIs(t, got, errAbsent, what)
							require.ErrorIs(t, err, errAbsent, what)
							end()
							synctest.Wait()
							spoiled := 0
							for a, st := range n.p.Addrs() {
								if a == at("a") {
									spoiled = st.Open
								}
							}
							require.Zero(t, spoiled, "%s: the outer connection was kept", what)
							if innerName != "three deep" && innerName != "a use inside a use" {
								st, other := n.p.Stats(), m.p.Stats()
								require.Equal(t, 1, st.Idle+other.Idle, "%s: the inner connection was not", what)
							}
							n.check()
							m.check()
						})
					}
				}
			})
		}
	}
}

// TRY-01: what fn itself says, it says of its own connection, wrapped or not, and
// as often as it likes.
func TestAMarkOfFnsOwnKeepsItsConnection(t *testing.T) {
	for name, wrap := range wraps {
		bubble(t, func(t *testing.T) {
			n := open(t, Config{})
			for range 3 {
				require.Equal(t, "a#1", n.use(at("a")))
				err := n.p.With(bg, at("a"), func(Conn) error { return wrap(errKept) })
				require.ErrorIs(t, err, errAbsent, name)
				require.Equal(t, wrap(errAbsent).Error(), err.Error(), name)
				// Beside what an inner use returned it counts as well.
				err = n.p.With(bg, at("a"), func(Conn) error {
					return errors.Join(n.p.With(bg, at("b"), func(Conn) error { return wrap(errKept) }), Keep(errBoom))
				})
				require.ErrorIs(t, err, errBoom, name)
			}
			n.gauges(0, 2, 0)
			n.check()
		})
	}
}

// TRY-01: a mark that got into an error on another way than from fn's mouth, by
// the cause of a ctx, a hook, a dialer or a panic, speaks for nobody.
func TestAMarkInsideAnErrorOfThePoolsSpeaksForNobody(t *testing.T) {
	for name, err := range map[string]error{
		"a ctx's cause":          &ctxError{context.Canceled, errKept},
		"a panic":                &PanicError{Where: "a hook", Value: errKept},
		"a hook's panic":         &hookPanic{&PanicError{Where: "a hook", Value: errKept}},
		"a borrow that failed":   &Error{Stage: StageSetup, Err: spent(errKept)},
		"a read that was late":   &ioError{kind: KindTimeout, cause: &ctxError{context.Canceled, errKept}, err: io.EOF},
		"what a With has judged": unkeep(wrapOnce(errKept)),
	} {
		require.ErrorIs(t, err, errAbsent)
		for how, wrap := range wraps {
			require.False(t, isKept(wrap(err)), "%s, %s", name, how)
			require.True(t, isKept(wrap(Keep(err))), "%s, %s", name, how)
		}
	}
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex // guards closed and dialed: observers run on goroutines of their own
		var closed, dialed, last error
		n := newTestnet(t)
		fails := true
		n.open(Config{
			Setup: func(_ context.Context, a Addr, _ net.Conn) (any, error) {
				if a == at("setup") {
					return nil, wrapOnce(errKept)
				}
				return nil, nil
			},
			Reset: func(context.Context, Conn) error {
				if fails {
					return hidden(errKept)
				}
				return nil
			},
			Dialers: map[Transport]DialFunc{memory: func(ctx context.Context, a Addr) (net.Conn, error) {
				if a == at("dialer") {
					return nil, joined(errKept)
				}
				return n.dial(ctx, a)
			}},
			Trace: &Trace{
				Closed: func(i CloseInfo) {
					mu.Lock()
					defer mu.Unlock()
					closed = cmp.Or(i.Err, closed)
				},
				DialDone: func(i DialInfo) {
					mu.Lock()
					defer mu.Unlock()
					dialed = cmp.Or(i.Err, dialed)
				},
			},
		})
		sources := map[string]func() error{
			"Setup":  func() error { return n.p.With(bg, at("setup"), nil2) },
			"dialer": func() error { return n.p.With(bg, at("dialer"), nil2) },
			"Warm":   func() error { return n.p.Warm(bg, at("dialer"), 1) },
			"Stats": func() error {
				for a, st := range n.p.Addrs() {
					if a == at("dialer") {
						last = st.LastErr
					}
				}
				return last
			},
			"DialDone": func() error { return dialed },
			"Closed": func() error {
				closed = nil
				n.p.With(bg, at("b"), nil2)
				synctest.Wait()
				return closed
			},
			"a cause": func() error {
				ctx, cancel := context.WithCancelCause(bg)
				cancel(errKept)
				return n.p.With(ctx, at("b"), nil2)
			},
			"Shutdown": func() error {
				q := open(t, Config{})
				b := q.borrow(bg, at("x"))
				b.conn()
				ctx, cancel := context.WithCancelCause(bg)
				cancel(errKept)
				defer b.giveBack()
				return q.p.Shutdown(ctx)
			},
		}
		for _, name := range []string{"dialer", "Warm", "Stats", "Setup", "DialDone", "Closed", "a cause", "Shutdown"} {
			synctest.Wait()
			err := sources[name]()
			require.ErrorIs(t, err, errAbsent, name)
			fails = false
			for how, wrap := range wraps {
				require.ErrorIs(t, n.p.With(bg, at("outer"), func(Conn) error { return wrap(err) }), errAbsent)
				synctest.Wait()
				for a, st := range n.p.Addrs() {
					require.False(t, a == at("outer") && st.Open > 0, "%s, %s: kept", name, how)
				}
			}
			fails = true
		}
	})
}

func nil2(Conn) error { return nil }

// TRY-02: a Check, Reset, Prober or Push that returns what another pool says of a
// panic has not panicked itself. One that has, has.
func TestAnErrorThatTellsOfAPanicIsNoPanic(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := open(t, Config{Setup: func(context.Context, Addr, net.Conn) (any, error) { panic("elsewhere") }})
		var told error // as an observer of the other pool gets it
		r := newTestnet(t)
		r.open(Config{Reset: func(context.Context, Conn) error { panic(errBoom) }, Trace: &Trace{Closed: func(i CloseInfo) { told = i.Err }}})
		require.Panics(t, func() { r.p.With(bg, at("b"), nil2) })
		synctest.Wait()
		require.ErrorIs(t, told, errBoom)

		ask := func(context.Context, Conn) error { return m.p.With(bg, at("b"), nil2) }
		for name, hook := range map[string]func(context.Context, Conn) error{
			"With's error":  ask,
			"wrapped":       func(ctx context.Context, c Conn) error { return wrappedTwice(ask(ctx, c)) },
			"hidden":        func(ctx context.Context, c Conn) error { return hidden(ask(ctx, c)) },
			"CloseInfo.Err": func(context.Context, Conn) error { return told },
			"a PanicError":  func(context.Context, Conn) error { return &PanicError{Where: "?", Value: 1} },
		} {
			for where, cfg := range map[string]Config{"Check": {Check: hook, CheckAfterIdle: -1}, "Reset": {Reset: hook}} {
				n := open(t, cfg)
				for i := range 3 {
					require.NotPanics(t, func() {
						require.NoError(t, n.p.With(bg, at("a"), nil2), "%s, %s, %d", where, name, i)
					}, "%s, %s", where, name)
					ctx, end := n.p.Session(bg)
					require.NotPanics(t, func() {
						require.NoError(t, n.p.With(ctx, at("a"), nil2))
						end()
					}, "%s, %s", where, name)
				}
				n.check()
			}
		}
		for where, cfg := range map[string]func(func(context.Context, Conn) error) Config{
			"Config.Check": func(f func(context.Context, Conn) error) Config { return Config{Check: f, CheckAfterIdle: -1} },
			"Config.Reset": func(f func(context.Context, Conn) error) Config { return Config{Reset: f} },
		} {
			n := open(t, cfg(func(context.Context, Conn) error { panic("here") }))
			var got any
			for range 2 {
				func() {
					defer func() {
						if v := recover(); v != nil {
							got = v
						}
					}()
					n.p.With(bg, at("a"), nil2)
				}()
			}
			require.IsType(t, new(PanicError), got)
			require.Equal(t, where, got.(*PanicError).Where)
		}
	})
}

// TRY-02: what ails another pool, or a server that Setup asks, is for the address
// of this dial a failure like any other; only what the dial itself lacks is none.
func TestTheWantOfAnotherPoolIsAFailureOfTheDial(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := open(t, Config{MaxOpen: 1, WhenFull: FullFail})
		m.borrow(bg, at("tokens")).conn()
		n := open(t, Config{Setup: func(ctx context.Context, _ Addr, _ net.Conn) (any, error) {
			return nil, m.p.With(ctx, at("tokens"), nil2)
		}})
		for range backoffAfter {
			pe := n.fail(bg, at("a"))
			require.Equal(t, StageSetup, pe.Stage)
			require.ErrorIs(t, pe, ErrExhausted)
		}
		synctest.Wait()
		pauses := 0
		for _, st := range n.p.Addrs() {
			if st.BackingOff {
				pauses++
			}
		}
		require.Equal(t, 1, pauses, "it is dialed without a pause")
	})
}
