package desync

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/race"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The oracle against desynchronisation, the mistake that hands one user's data
// to another. The server tags each reply with its connection and the token of
// the request; borrowers lose patience, are canceled and stop reading at every
// byte, and say nothing about it: fn returns nil. A pool that keeps one such
// connection delivers the rest of its reply, or all of it, to the next
// borrower, who sees a token that is not its own.
//
// What no pool can see is left out: a borrower that sends a request and
// returns nil without having asked for the reply, which is yet to come.
//
// clients_test.go has the same for clients that match replies by an id.

// A desyncer counts what happened to the borrowers of one server.
type desyncer struct {
	n *pooltest.SockNet
	p *connpool.Pool

	exchanges, complete       atomic.Int64 // of complete ones the reply was read to its end
	late, canceled, cut, none atomic.Int64 // time-outs and cancels inside fn, replies cut short; fn never ran
	unflushed                 atomic.Int64 // requests that never went out
	refused, greeted          atomic.Int64 // the peer hung up, or spoke, when it should not have
	foreign                   atomic.Pointer[string]

	rude bool // the peer hangs up, and speaks unasked
}

// history is the state of a connection: what a borrower may expect of it, and the
// writer through which some send, so that what one leaves in it would go out with
// the request of the next.
type history struct {
	serial, seq int
	out         *bufio.Writer
}

// TestDesyncNobodyEverReadsAReplyThatIsNotTheirs makes 50,000 exchanges, a
// million with CONNPOOL_STRESS set, and a tenth with -short. The lines that it proves: BETA-07, BETA-X08,
// ORA-26, ORA-75, G-04.
func TestDesyncNobodyEverReadsAReplyThatIsNotTheirs(t *testing.T) {
	total := short.Of(50_000, 3_000)
	switch {
	case patience.Stress() > 1:
		total = 1_000_000
	case race.Enabled:
		total = short.Of(10_000, 3_000)
	}
	const workers = 8
	names := []string{"tcp", "tls13", "tls12", "unix"}
	share := map[string]int{"tcp": 4, "tls13": 1, "tls12": 1, "unix": 4} // of ten; a handshake costs a hundred exchanges
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			n := pooltest.StartSock(t, name, faultnet.Options{ReplyDelay: func(serial, seq int) time.Duration {
				switch seq % 8 {
				case 3: // too late for the impatient
					return time.Duration(300+37*serial%400) * time.Microsecond
				case 6: // a photo finish
					return time.Duration(20+13*serial%100) * time.Microsecond
				}
				return 0
			}})
			d := &desyncer{n: n}
			d.p = n.Pool(t, func(c *connpool.Config) {
				c.MaxPerAddr = workers / 2 // so that connections also go from hand to hand
				c.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
					return &history{out: bufio.NewWriter(nc)}, nil
				}
			})
			var wg tasks.Group
			for w := range workers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), uint64(total)))
					for d.exchanges.Add(1) <= int64(total*share[name]/10) && d.foreign.Load() == nil {
						d.exchange(rng)
						if err := pooltest.Inconsistency(d.p); err != nil {
							d.accuse("%v", err)
						}
					}
				})
			}
			wg.Wait()
			if what := d.foreign.Load(); what != nil {
				t.Fatal(*what)
			}
			st := pooltest.Settled(t, d.p)
			t.Logf("%d exchanges, %d complete, %d timed out, %d canceled, %d cut short, %d never ran; %v",
				d.exchanges.Load(), d.complete.Load(), d.late.Load(), d.canceled.Load(), d.cut.Load(), d.none.Load(), st.Closed)

			// Was the hazard there? The pool must have had to give up
			// connections on each of these grounds, and to reuse many.
			for _, reason := range []connpool.CloseReason{connpool.ClosedTimeout, connpool.ClosedCanceled, connpool.ClosedDirty, connpool.ClosedFnError} {
				require.Greater(t, st.Closed[reason], uint64(total/2500), reason)
			}
			require.Greater(t, st.Reused, uint64(total/50))
			require.Greater(t, d.unflushed.Load(), int64(total/2500))
			require.Zero(t, st.InUse+st.Waiting)
			closed := uint64(0)
			for _, k := range st.Closed {
				closed += k
			}
			require.Equal(t, st.Dials-st.DialErrors, closed+uint64(st.Open))
			patience.Soon(t, "the server with no more connections than the pool", func() bool { return n.Server.Open() == st.Open })
		})
	}
}

// TestDesyncNorIfThePeerGreetsHangsUpOrIsDeaf is the same over peers that greet, greet
// twice or late, and hang up when they have accepted; and over a transport that takes
// deadlines and does not keep them, so that a borrower can only be let go. ORA-75, TRY-06, TRY-35
func TestDesyncNorIfThePeerGreetsHangsUpOrIsDeaf(t *testing.T) {
	total := short.Of(4_000, 400)
	if patience.Stress() > 1 {
		total = 100_000
	}
	for _, c := range []struct {
		name, network string
		greets, deaf  bool
	}{
		{"greets, tcp", "tcp", true, false}, {"greets, tls13", "tls13", true, false}, {"greets, unix", "unix", true, false},
		{"deaf, tcp", "tcp", false, true}, {"greets and is deaf", "tcp", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			total := total
			if c.deaf { // whoever is let go waits for a quarter of a second
				total /= 8
			}
			options := faultnet.Options{ReplyDelay: func(serial, seq int) time.Duration {
				if seq%8 == 3 {
					return time.Duration(300+37*serial%400) * time.Microsecond
				}
				return 0
			}}
			if c.greets {
				options.Handler = greetsThenTokens
			}
			n := pooltest.StartSock(t, c.network, options)
			d := &desyncer{n: n, rude: c.greets}
			d.p = n.Pool(t, func(cfg *connpool.Config) {
				cfg.MaxPerAddr = 4
				cfg.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
					if c.greets {
						if err := readGreeting(nc); err != nil {
							return nil, err
						}
					}
					return &history{out: bufio.NewWriter(nc)}, nil
				}
				if c.deaf {
					cfg.Dialers = map[connpool.Transport]connpool.DialFunc{connpool.TCP: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
						nc, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port)))
						if err != nil {
							return nil, err
						}
						return deafSock{nc}, nil
					}}
				}
			})
			more := func() bool { // a brief run goes on until somebody was let go
				k := d.exchanges.Add(1)
				return k <= int64(total) || k <= int64(100*total) && d.p.Stats().Closed[connpool.ClosedCanceled] == 0
			}
			var wg tasks.Group
			for w := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), uint64(total)))
					for more() && d.foreign.Load() == nil {
						d.exchange(rng)
						if err := pooltest.Inconsistency(d.p); err != nil {
							d.accuse("%v", err)
						}
					}
				})
			}
			wg.Wait()
			if what := d.foreign.Load(); what != nil {
				t.Fatal(*what)
			}
			st := pooltest.Settled(t, d.p)
			t.Logf("%d exchanges, %d complete, %d refused, %d greeted, %d never ran; %v", d.exchanges.Load(), d.complete.Load(),
				d.refused.Load(), d.greeted.Load(), d.none.Load(), st.Closed)
			require.Greater(t, d.complete.Load(), int64(total/8))
			require.Greater(t, st.Reused, uint64(total/50))
			require.NotZero(t, st.Closed[connpool.ClosedCanceled])
			if c.greets {
				require.NotZero(t, st.Closed[connpool.ClosedSetupFailed], "of those that hung up, or greeted twice")
			}
			require.Zero(t, st.InUse+st.Waiting)
		})
	}
}

const greeting = "* hello\n"

// greetsThenTokens hangs up on one peer in seven, and greets of the others some
// twice, at once or a moment later.
func greetsThenTokens(p *faultnet.Peer) {
	if p.Serial()%7 == 3 {
		return
	}
	switch p.Serial() % 5 {
	case 2:
		io.WriteString(p, greeting+greeting)
	case 4:
		io.WriteString(p, greeting)
		time.Sleep(time.Duration(p.Serial()%400) * time.Microsecond)
		io.WriteString(p, greeting)
	default:
		io.WriteString(p, greeting)
	}
	faultnet.Tokens(p)
}

// readGreeting reads one greeting and no byte more.
func readGreeting(nc net.Conn) error {
	b := make([]byte, len(greeting))
	if _, err := io.ReadFull(nc, b); err != nil {
		return err
	}
	if string(b) != greeting {
		return fmt.Errorf("%q is no greeting", b)
	}
	return nil
}

// deafSock is a socket of somebody else's type, whose deadlines have no effect.
type deafSock struct{ net.Conn }

func (deafSock) SetDeadline(time.Time) error      { return nil }
func (deafSock) SetReadDeadline(time.Time) error  { return nil }
func (deafSock) SetWriteDeadline(time.Time) error { return nil }

func (s deafSock) SyscallConn() (syscall.RawConn, error) {
	return s.Conn.(syscall.Conn).SyscallConn()
}

// excused reports whether err is what a rude peer does to its borrowers.
func (d *desyncer) excused(err error) bool {
	var pe *connpool.Error
	switch {
	case !d.rude || err == nil:
	case strings.Contains(err.Error(), "* h") || errors.Is(err, errGreeted):
		d.greeted.Add(1)
		return true
	case errors.As(err, &pe) && (pe.Stage == connpool.StageSetup || pe.Stage == connpool.StageBackoff || pe.Stage == connpool.StageDial):
		d.refused.Add(1)
		if pe.Stage == connpool.StageBackoff { // does not count, and comes at once
			d.exchanges.Add(-1)
			time.Sleep(time.Millisecond)
		}
		return true
	}
	return false
}

var errGreeted = errors.New("greeted in the place of a reply")

// exchange is one use of the pool, in one of the ways in which people use one.
func (d *desyncer) exchange(rng *rand.Rand) {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	var patience time.Duration
	var inside func() // what somebody else does while fn runs
	readAll := true
	moment := time.Duration(rng.IntN(400)) * time.Microsecond
	switch rng.IntN(14) {
	case 12: // writes, forgets to flush, and sees nothing wrong (TRY-03)
		d.forget(rng)
		return
	case 13: // sends a request, and goes away because something else failed (TRY-01)
		d.abandon(rng)
		return
	case 0, 1: // a deadline of its own
		patience = moment
	case 2: // the ctx's deadline
		ctx, cancel = context.WithTimeout(ctx, moment)
	case 3: // canceled by somebody else, while it waits or later
		ctx, cancel = context.WithCancel(ctx)
		defer time.AfterFunc(moment, cancel).Stop()
	case 4: // ... or only once it has the connection
		ctx, cancel = context.WithCancel(ctx)
		inside = cancel
	case 5: // leaves in the middle of the reply
		readAll = false
	case 6: // a ctx that could end, but does not
		ctx, cancel = context.WithCancel(ctx)
	}
	defer cancel()
	swallow := rng.IntN(2) == 0

	token := faultnet.NewToken()
	ran := false
	err := d.p.With(ctx, d.n.Addr, func(c connpool.Conn) error {
		ran = true
		if patience > 0 {
			c.SetReadDeadline(time.Now().Add(patience))
		}
		if inside != nil {
			defer time.AfterFunc(moment, inside).Stop()
		}
		err := d.talk(c, token, readAll, rng)
		if d.excused(err) {
			return err // not in step: it can only be given up
		}
		switch connpool.KindOf(err) {
		case connpool.KindTimeout, connpool.KindTimeoutInTransfer:
			d.late.Add(1)
		case connpool.KindCanceled:
			d.canceled.Add(1)
		default:
			if err != nil {
				return err
			}
		}
		if swallow {
			return nil // as if all was well
		}
		return err
	})
	switch connpool.KindOf(err) {
	case connpool.KindTimeout, connpool.KindTimeoutInTransfer, connpool.KindCanceled:
		err = nil
	}
	if err != nil && !d.excused(err) {
		d.accuse("%v", err) // nothing else may happen to anybody
	}
	if !ran {
		d.none.Add(1)
	}
}

// forget leaves a request in the writer of a connection.
func (d *desyncer) forget(rng *rand.Rand) {
	lend := d.p.With
	if rng.IntN(2) == 0 {
		lend = func(_ context.Context, addr connpool.Addr, fn func(connpool.Conn) error) error {
			l, err := d.p.Lease(context.Background(), addr)
			if err != nil {
				return err
			}
			defer l.Return()
			return l.Do(context.Background(), fn)
		}
	}
	if err := lend(context.Background(), d.n.Addr, func(c connpool.Conn) error {
		d.unflushed.Add(1)
		_, err := io.WriteString(connpool.State[*history](c).out, faultnet.NewToken()+"\n")
		return err
	}); err != nil && !d.excused(err) {
		d.accuse("%v", err)
	}
}

// abandon sends a request and does not read the reply, because a use inside it, of
// the same pool and another address, said no, with a word for its own connection
// alone. The no comes out through a few more uses, wrapped at each.
func (d *desyncer) abandon(rng *rand.Rand) {
	ways := []func(error) error{asItIs, wrapOnce, joined, wrappedTwice, hidden}
	wrap := func(err error) error { return ways[rng.IntN(len(ways))](err) }
	ctx, end := context.Background(), func() {}
	if rng.IntN(2) == 0 {
		ctx, end = d.p.Session(context.Background())
	}
	defer end()
	depth := 1 + rng.IntN(3)
	var within func(left int) error
	within = func(left int) error {
		addr := pooltest.Scoped(d.n.Addr, left)
		return d.p.With(ctx, addr, func(c connpool.Conn) error {
			if left == 0 {
				if err := d.talk(c, faultnet.NewToken(), true, rng); err != nil {
					return err
				}
				return wrap(errKept)
			}
			if _, err := io.WriteString(c, faultnet.NewToken()+"\n"); err != nil {
				return err
			}
			return wrap(within(left - 1))
		})
	}
	err := d.p.With(ctx, d.n.Addr, func(c connpool.Conn) error {
		if _, err := io.WriteString(c, faultnet.NewToken()+"\n"); err != nil {
			return err
		}
		return wrap(within(depth))
	})
	if !errors.Is(err, errAbsent) && !d.excused(err) {
		d.accuse("%v", err)
	}
}

func (d *desyncer) accuse(format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	d.foreign.CompareAndSwap(nil, &what)
}

func (d *desyncer) talk(c connpool.Conn, token string, readAll bool, rng *rand.Rand) error {
	h := connpool.State[*history](c)
	h.seq++
	if want := fmt.Sprintf("%d %d %s\n", h.serial, h.seq, token); !readAll && h.serial != 0 {
		if _, err := io.WriteString(h.out, token+"\n"); err != nil {
			return err
		}
		if err := h.out.Flush(); err != nil {
			return err
		}
		b := make([]byte, 1+rng.IntN(len(want)-1))
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
		if d.rude && b[0] == greeting[0] {
			return errGreeted
		}
		if d.cut.Add(1); !strings.HasPrefix(want, string(b)) {
			d.accuse("%q is not how the reply begins that was to be %q", b, want)
		}
		return nil
	}
	r, err := faultnet.Ask(flushed{c, h.out}, token)
	if err != nil {
		return err
	}
	d.complete.Add(1)
	if h.serial == 0 {
		h.serial = r.Serial
	}
	if r.Serial != h.serial || r.Seq != h.seq {
		d.accuse("request %d on connection %d was answered as %d on %d", h.seq, h.serial, r.Seq, r.Serial)
	}
	return nil
}

// flushed writes through a buffer, and leaves nothing in it.
type flushed struct {
	connpool.Conn
	out *bufio.Writer
}

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.out.Write(b)
	if err == nil {
		err = f.out.Flush()
	}
	return n, err
}

var (
	errAbsent = errors.New("no such key")
	errKept   = connpool.Keep(errAbsent)
)

// onlyAs is an error of the kind that old packages made of several: it answers
// errors.As, and has no Unwrap.
type onlyAs struct{ err error }

func (e onlyAs) Error() string        { return e.err.Error() }
func (e onlyAs) As(target any) bool   { return errors.As(e.err, target) }
func (e onlyAs) Is(target error) bool { return errors.Is(e.err, target) }

// How the marks of the borrowers here are wrapped.
func asItIs(err error) error   { return err }
func wrapOnce(err error) error { return fmt.Errorf("wrapped: %w", err) }
func joined(err error) error   { return errors.Join(io.ErrUnexpectedEOF, err) }
func wrappedTwice(err error) error {
	return fmt.Errorf("%w, %w", pooltest.ErrBoom, wrapOnce(joined(err)))
}
func hidden(err error) error { return onlyAs{wrapOnce(err)} }
