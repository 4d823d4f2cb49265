package connpool

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The end of a session beside the end of a use: whichever comes first, and
// whatever comes between the parts of either, the connection is given back.

// nothingOut waits until no connection is in use and no session is counted.
func nothingOut(t *testing.T, p *Pool) {
	t.Helper()
	soon(t, "every connection given back", func() bool { return p.Stats().InUse == 0 && p.inSession.Load() == 0 })
	p.check(t)
}

// TRY-41
func TestASessionThatEndsAtAnyMomentOfAUseGivesItsConnectionBack(t *testing.T) {
	nop := func(Conn) error { return nil }
	for name, moment := range map[string]func(end func()) (*Trace, func(Conn) error, any){
		"before the connection is taken": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{GetConn: func(Addr) { end() }}, nop, nil
		},
		"before it is taken, and the use panics": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{GetConn: func(Addr) { end(); panic(errBoom) }}, nop, errBoom
		},
		"when it is had": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{GotConn: func(GotInfo) { end() }}, nop, nil
		},
		"in fn": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{}, func(Conn) error { end(); return nil }, nil
		},
		"when it was put back": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{PutConn: func(PutInfo) { end() }}, nop, nil
		},
		"when it was put back, and the use panics": func(end func()) (*Trace, func(Conn) error, any) {
			return &Trace{PutConn: func(PutInfo) { end(); panic(errBoom) }}, nop, errBoom
		},
	} {
		for _, had := range []bool{false, true} { // a connection from an earlier use
			for _, forgets := range []bool{false, true} { // as the garbage collector ends it
				t.Run(fmt.Sprintf("%s, had %t, forgotten %t", name, had, forgets), func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						n := open(t, Config{MaxPerAddr: 1})
						ctx, end := n.p.Session(bg)
						s := ctx.Value(sessionKey{n.p}).(*session)
						over := func() {
							if forgets {
								s.leakedSession()
							}
							end()
						}
						if had {
							n.useUnder(ctx, at("a"))
						}
						trace, fn, panics := moment(over)
						func() {
							defer func() { require.Equal(t, panics, recover()) }()
							require.NoError(t, n.p.With(WithTrace(ctx, trace), at("a"), fn))
						}()
						synctest.Wait()
						st := n.p.Stats()
						require.Zero(t, st.InUse)
						require.Zero(t, n.p.inSession.Load())
						n.use(at("a")) // its slot is free
						n.check()
					})
				})
			}
		}
	}
}

// A turn is served at the very moment when its ctx ends, and then the session:
// the connection on the seat is nobody's but the one's who frees the seat.
//
// TRY-41
func TestASeatThatIsServedToWhoHasGivenUpLosesNoConnection(t *testing.T) {
	type turn struct {
		st  *sessionConn
		err error
	}
	for name, givenUp := range map[string]bool{"given up": true, "served": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := open(t, Config{MaxPerAddr: 1})
				ctx, end := n.session(bg)
				b := ctx.Value(sessionKey{n.p}).(*session).sessionConns
				first, _, err := b.acquire(bg, at("a"), 1)
				require.NoError(t, err)
				c, _, err := n.p.borrow(bg, addrOf(at("a")), nil)
				require.NoError(t, err)
				waits, cancel := context.WithCancel(bg)
				defer cancel()
				taken := make(chan turn)
				go func() {
					st, _, err := b.acquire(waits, at("a"), 2)
					taken <- turn{st, err}
				}()
				synctest.Wait()

				b.mu.Lock()
				if givenUp {
					cancel() // which wakes it; but it has to wait for mu
				}
				require.Nil(t, b.endUseLocked(first, c), "the next in line has it")
				require.Empty(t, b.endSessionLocked(), "the seat is taken")
				b.mu.Unlock()
				served := <-taken
				if givenUp {
					require.ErrorIs(t, served.err, context.Canceled)
				} else {
					require.NoError(t, served.err)
					require.Equal(t, c, b.endUse(served.st, served.st.c), "the session has no place for it")
					b.releaseAll([]*conn{c})
				}
				synctest.Wait()
				n.gauges(0, 1, 0)
				require.Zero(t, n.p.inSession.Load())
				end()
				n.check()
			})
		})
	}
}

// TRY-41
func TestSixtyThousandSessionsThatEndBesideTheirUsesLeaveNothingOut(t *testing.T) {
	rounds, until := short.Of(60000, 4000), time.Now().Add(short.Of(30*time.Second, 5*time.Second))
	n := newTestnet(t)
	p, err := New(Config{Dialers: map[Transport]DialFunc{memory: n.dial}})
	require.NoError(t, err)
	t.Cleanup(func() { p.Close(); n.Mem.Close() })
	nop := func(Conn) error { return nil }
	// spin is a pause that is shorter than any timer's.
	spin := func(k int) {
		for range k {
			runtime.KeepAlive(k)
		}
	}
	kinds := []func(i int){
		// The request's client goes away, as in net/http.
		func(i int) {
			parent, cancel := context.WithCancel(bg)
			ctx, end := p.Session(parent)
			var wg tasks.Group
			wg.Go(func() { spin(i % 40); cancel() })
			_ = p.With(ctx, at("a"), nop)
			wg.Wait()
			end()
		},
		// A handler returns before a goroutine of its own.
		func(i int) {
			ctx, end := p.Session(bg)
			var wg tasks.Group
			wg.Go(func() {
				for range 3 {
					_ = p.With(ctx, at("a"), nop)
				}
			})
			spin(i % 4000)
			end()
			wg.Wait()
		},
		// One waits for another's turn and gives up.
		func(i int) {
			ctx, end := p.Session(bg)
			inner, cancel := context.WithCancel(ctx)
			defer cancel()
			in, goOn := make(chan struct{}), make(chan struct{})
			var wg tasks.Group
			wg.Go(func() { _ = p.With(ctx, at("a"), func(Conn) error { close(in); <-goOn; return nil }) })
			<-in
			wg.Go(func() { _ = p.With(inner, at("a"), nop) })
			wg.Go(func() { spin(i % 100); cancel() })
			wg.Go(func() { spin(i % 130); end() })
			close(goOn)
			wg.Wait()
		},
		// One use inside another, and the connection is lost on the way.
		func(i int) {
			ctx, end := p.Session(bg)
			var wg tasks.Group
			wg.Go(func() { spin(i % 70); end() })
			_ = p.With(ctx, at("a"), func(Conn) error {
				return p.With(ctx, at("a"), func(c Conn) error {
					if i%50 == 3 {
						return errors.Join(errBoom, c.Close())
					}
					return nil
				})
			})
			wg.Wait()
		},
	}
	done := 0
	for ; done < rounds && time.Now().Before(until); done++ {
		kinds[done%len(kinds)](done)
		if done%5000 == 0 {
			nothingOut(t, p)
		}
	}
	nothingOut(t, p)
	t.Logf("%d sessions, %v", done, p.Stats())
	ctx, cancel := context.WithTimeout(bg, time.Minute)
	defer cancel()
	require.NoError(t, p.Shutdown(ctx))
}

func addrOf(a Addr) *Addr { return &a }
