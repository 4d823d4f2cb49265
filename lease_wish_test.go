package connpool

import (
	"context"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The end of a lease, wished for at each moment of a Do.

// errCtx is a ctx whose Err calls a function first.
type errCtx struct {
	context.Context
	asked func()
}

func (c errCtx) Err() error { c.asked(); return c.Context.Err() }

// clocked is a connection that tells when a deadline is set.
type clocked struct {
	*faultnet.Conn
	set *func(time.Time)
}

func (c clocked) SetDeadline(t time.Time) error {
	if f := *c.set; f != nil {
		f(t)
	}
	return c.Conn.SetDeadline(t)
}

// TRY-44
func TestALeaseEndsAsItWasToldAtAnyMomentOfADo(t *testing.T) {
	wishes := map[string]struct {
		of      func(*Lease) error
		discard bool
	}{
		"Discard": {(*Lease).Discard, true},
		"Return":  {(*Lease).Return, false},
		"Close":   {(*Lease).Close, false},
	}
	// Each moment calls wish once.
	for name, moment := range map[string]func(t *testing.T, l *Lease, set *func(time.Time), wish func()) error{
		"before fn's loan begins": func(t *testing.T, l *Lease, set *func(time.Time), wish func()) error {
			*set = func(d time.Time) {
				if !d.IsZero() {
					*set = nil
					wish()
				}
			}
			ctx, cancel := context.WithTimeout(bg, clock.Tick) // so near that the deadline is set at once
			defer cancel()
			return l.Do(ctx, func(Conn) error { return nil })
		},
		"in fn": func(t *testing.T, l *Lease, _ *func(time.Time), wish func()) error {
			return l.Do(bg, func(Conn) error { wish(); return nil })
		},
		"when fn's loan has ended": func(t *testing.T, l *Lease, set *func(time.Time), wish func()) error {
			ctx, cancel := context.WithTimeout(bg, clock.Tick) // so near that the deadline is set at once
			defer cancel()
			return l.Do(ctx, func(Conn) error {
				*set = func(time.Time) { *set = nil; wish() } // that of ctx is cleared
				return nil
			})
		},
		"in the verdict": func(t *testing.T, l *Lease, _ *func(time.Time), wish func()) error {
			armed := false
			return l.Do(errCtx{bg, func() {
				if armed {
					armed = false
					wish()
				}
			}}, func(Conn) error { armed = true; return nil })
		},
	} {
		for which, w := range wishes {
			for _, twice := range []bool{false, true} {
				t.Run(name+" "+which, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						n := newTestnet(t)
						var set func(time.Time)
						n.open(Config{Dialers: n.wrapped(func(c *faultnet.Conn) net.Conn { return clocked{c, &set} })})
						l, err := n.p.Lease(bg, at("a"))
						require.NoError(t, err)
						wished := 0
						err = moment(t, l, &set, func() {
							wished++
							require.NoError(t, w.of(l))
							if twice {
								require.ErrorIs(t, l.Discard(), ErrReturned)
								require.ErrorIs(t, l.Return(), ErrReturned)
							}
						})
						require.Equal(t, 1, wished)
						if w.discard && name == "before fn's loan begins" {
							require.ErrorIs(t, err, ErrReturned, "fn is not run")
						} else {
							require.NoError(t, err)
						}
						require.ErrorIs(t, l.Return(), ErrReturned)
						_, err = l.Write([]byte("x"))
						require.ErrorIs(t, err, ErrReturned)
						synctest.Wait()
						if w.discard {
							n.gauges(0, 0, 0)
							n.closed(reasons{ClosedByBorrower: 1})
						} else {
							n.gauges(0, 1, 0)
							n.closed(reasons{})
						}
						n.check()
					})
				})
			}
		}
	}
}

// TRY-44
func TestOfALeaseThatWasDiscardedBesideADoNothingIsKept(t *testing.T) {
	rounds, until := short.Of(60000, 2000), time.Now().Add(short.Of(20*time.Second, 5*time.Second))
	n := newTestnet(t)
	p, err := New(Config{Dialers: map[Transport]DialFunc{memory: n.dial}})
	require.NoError(t, err)
	t.Cleanup(func() { p.Close(); n.Mem.Close() })
	for i := 0; i < rounds && time.Now().Before(until); i++ {
		l, err := p.Lease(bg, at("a"))
		require.NoError(t, err)
		var other tasks.Group
		in := make(chan struct{})
		var discarded, returned, detached error
		var nc net.Conn
		wish := i % 3
		other.Go(func() {
			<-in
			for range i % 64 {
				runtime.KeepAlive(i)
			}
			switch wish {
			case 0:
				discarded = l.Discard()
			case 1:
				returned = l.Return()
			default:
				if nc, detached = l.Detach(); detached == nil {
					nc.Close()
				}
			}
		})
		l.Do(bg, func(Conn) error { close(in); return nil })
		other.Wait()
		switch wish {
		case 0:
			require.NoError(t, discarded)
			require.Zero(t, p.Stats().Idle, "round %d: discarded, and idle in the pool", i)
		case 1:
			require.NoError(t, returned)
			require.Equal(t, 1, p.Stats().Idle)
		default:
			if detached != nil {
				require.NoError(t, l.Return())
			} else {
				require.ErrorIs(t, l.Return(), ErrReturned)
				require.Zero(t, p.Stats().Idle)
			}
		}
		require.Zero(t, p.Stats().InUse, "round %d", i)
		p.CloseIdle()
	}
	p.check(t)
}
