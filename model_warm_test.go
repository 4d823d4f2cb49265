package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// What takes part in the random histories beside borrowers: Warm, connections
// of DialContext, limits that change, and reserves (MinIdlePerAddr in the shapes of
// world.reopen).

type primes struct {
	warms   []*warmCall
	dials   []*dialCall
	open    int // before the step
	perAddr map[Addr]int

	pushedNow map[uint64]bool // in this step
	sincePush map[uint64]bool // not lent since

	warmed, warmFailed, dialled, refused, changed, pushed int
}

// warmCall is one call of Warm.
type warmCall struct {
	cancel context.CancelFunc
	done   bool
	err    error
}

// dialCall is one call of DialContext, and what came of it.
type dialCall struct {
	cancel context.CancelFunc
	done   bool
	nc     net.Conn
}

// spareShape is the part of a random shape that concerns this file.
func (w *world) spareShape(cfg *Config, of func(...int) int) {
	cfg.MinIdlePerAddr = of(0, 0, 1, 2)
	if of(0, 1) == 1 {
		cfg.Push = w.push
		cfg.Dialers["mem"] = func(ctx context.Context, a Addr) (net.Conn, error) {
			nc, err := w.net.Dial(ctx, a.Host)
			if err != nil {
				return nil, err
			}
			return probesForPush(nc.(*faultnet.Conn)), nil
		}
	}
	cfg.Dialers[TCP] = func(ctx context.Context, a Addr) (net.Conn, error) { return w.net.Dial(ctx, a.Host) }
}

// push is the Push of such a pool. It reads what the server has written, and
// finds fault with half of it.
func (w *world) push(ctx context.Context, c Conn) error {
	id := c.Info().ID
	w.mu.Lock()
	if other := w.owner[id]; other != nil && id != 0 { // 0: it is being dialled, as others may be
		w.fail("connection %d was pushed while call %d has it", id, other.order)
	}
	if reason, was := w.closed[id]; was {
		w.fail("connection %d was pushed after it was closed (%v)", id, reason)
	}
	w.owner[id] = new(borrower)
	w.pushedNow[id], w.sincePush[id] = true, true
	w.pushed++
	bad := w.pushed%2 == 0
	w.mu.Unlock()
	select { // others come meanwhile
	case <-time.After(time.Duration(id%3) * time.Millisecond):
	case <-ctx.Done():
	}
	_, err := c.Read(make([]byte, 1))
	w.mu.Lock()
	delete(w.owner, id)
	w.mu.Unlock()
	if bad {
		return errFn
	}
	return err
}

// usedNow is told that a loan ends, and pushedBack is asked whether a connection
// that is idle again was with Push: that is no use, and changes no order.
func (w *world) usedNow(id uint64) {
	if w.cfg.Push != nil {
		delete(w.sincePush, id)
		w.lastUse[id] = w.steps
	}
}

func (w *world) pushedBack(id uint64) bool { return w.sincePush[id] }

// primesHappened demands that the long histories had everything of this in them.
func primesHappened(t *testing.T, steps int) {
	t.Logf("warmed %d times, %d in vain; %d times dialled, %d in vain; %d times other limits; %d times pushed",
		primed.warmed, primed.warmFailed, primed.dialled, primed.refused, primed.changed, modelTotals.Pushes)
	require.Greater(t, modelTotals.Pushes, uint64(steps/20_000))
	require.Greater(t, primed.warmed, steps/500)
	require.Greater(t, primed.warmFailed, steps/5000)
	require.Greater(t, primed.dialled-primed.refused, steps/500)
	require.Greater(t, primed.refused, steps/5000)
	require.Greater(t, primed.changed, steps/500)
}

// primed adds up what happened in all worlds.
var primed primes

func (w *world) addPrimes() {
	modelTotals.Pushes += w.pool.Stats().Pushes
	primed.warmed += w.warmed
	primed.warmFailed += w.warmFailed
	primed.dialled += w.dialled
	primed.refused += w.refused
	primed.changed += w.changed
	w.warmed, w.warmFailed, w.dialled, w.refused, w.changed = 0, 0, 0, 0, 0
}

// prime runs one instruction.
func (w *world) prime(op int) {
	switch op {
	case 0:
		w.op = "warm"
		n, a, patience := w.pick(5), w.addrs[w.pick(len(w.addrs))], time.Duration(w.pick(4))*5*time.Second
		ctx, cancel := context.WithCancel(context.Background())
		if patience > 0 {
			ctx, cancel = context.WithTimeout(context.Background(), patience)
		}
		call, pool := &warmCall{cancel: cancel}, w.pool
		w.warms = append(slices.DeleteFunc(w.warms, func(c *warmCall) bool { return c.done }), call)
		go func() {
			defer cancel()
			err := pool.Warm(ctx, a, n)
			w.mu.Lock()
			defer w.mu.Unlock()
			call.done, call.err = true, err
			var pe *Error
			switch {
			case err == nil:
				w.warmed++
			case !errors.As(err, &pe) || pe.Addr != a:
				w.fail("Warm: %v", err)
			default:
				w.warmFailed++
			}
		}()
	case 1:
		w.changeLimits()
	case 2:
		w.op = "dial"
		if len(w.dials) >= 4 {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+w.pick(8))*time.Second)
		call, pool, host := &dialCall{cancel: cancel}, w.pool, w.addrs[w.pick(len(w.addrs))].Host
		w.dials = append(w.dials, call)
		go func() {
			nc, err := pool.DialContext(ctx, "tcp", host+":1")
			w.mu.Lock()
			defer w.mu.Unlock()
			call.done, call.nc = true, nc
			if (nc == nil) == (err == nil) {
				w.fail("DialContext: %v, %v", nc, err)
			}
			if w.dialled++; err != nil {
				w.refused++
			}
		}()
	case 3:
		w.op = "end of a dialled connection, or of a wait"
		if k := w.pick(8); k < len(w.dials) {
			w.endDial(w.dials[k])
			w.dials = append(w.dials[:k], w.dials[k+1:]...)
		} else if k -= len(w.dials); k < len(w.warms) {
			w.warms[k].cancel()
		}
	}
}

// endDial closes the connection, or gives up the wait for it.
func (w *world) endDial(d *dialCall) {
	d.cancel()
	synctest.Wait()
	switch {
	case !d.done:
		w.failed("DialContext does not heed its ctx")
	case d.nc == nil:
	default:
		if err := d.nc.Close(); err != nil {
			w.failed("Close of a dialled connection: %v", err)
		}
		if err := d.nc.Close(); !errors.Is(err, net.ErrClosed) {
			w.failed("second Close of a dialled connection: %v", err)
		}
	}
}

func (w *world) changeLimits() {
	w.op = "limits change"
	l := w.pool.Limits()
	up := []int{0, 1, 2, 3, 4, 6, 8, -1}
	for range 1 + w.pick(2) {
		v := up[w.pick(len(up))]
		switch w.pick(7) {
		case 0:
			if v == 0 {
				v = -1 // not the limit of the machine
			}
			l.MaxOpen = v
		case 1:
			l.MaxPerAddr = v
		case 2:
			l.MaxIdle = v
		case 3:
			l.MaxIdlePerAddr = v
		case 4:
			l.MaxDialing = v
		case 5:
			l.MaxWaiters = v
		case 6:
			l.MinIdlePerAddr = v
		}
	}
	before, done := w.pool.Limits(), w.changeOwnLimits()
	err := w.pool.SetLimits(l)
	done(err)
	switch now := w.pool.Limits(); {
	case err != nil && now != before:
		w.failed("SetLimits failed, and changed %+v to %+v", before, now)
	case err == nil && now != l:
		w.failed("SetLimits(%+v) made %+v", l, now)
	case err == nil:
		w.cfg.setLimits(l)
		w.changed++
	}
}

// sizes counts what is open, by address.
func (w *world) sizes() (all int, perAddr map[Addr]int) {
	perAddr = make(map[Addr]int)
	for a, s := range w.pool.Addrs() {
		perAddr[a] = s.Open
	}
	return w.pool.Stats().Open, perAddr
}

// primesBefore and primesAfter frame each step.
func (w *world) primesBefore() {
	w.open, w.perAddr = w.sizes()
	w.ownLimitsBefore()
	w.mu.Lock()
	w.pushedNow = make(map[uint64]bool)
	if w.sincePush == nil {
		w.sincePush = make(map[uint64]bool)
	}
	w.mu.Unlock()
}

func (w *world) primesAfter() error {
	held := 0
	for _, d := range w.dials {
		if d.nc != nil {
			held++
		}
	}
	st, l := w.pool.Stats(), w.pool.Limits()
	if st.Tracked != held {
		return fmt.Errorf("%d connections of DialContext, Stats say %d", held, st.Tracked)
	}
	if w.cfg.WhenFull == FullOverflow {
		return nil
	}
	open, perAddr := w.sizes()
	if l.MaxOpen > 0 && open > max(l.MaxOpen, w.open) {
		return fmt.Errorf("%d open, %d before, %d allowed", open, w.open, l.MaxOpen)
	}
	for a, n := range perAddr {
		if limit := w.mostOpen(a, l.MaxPerAddr); limit > 0 && n > max(limit, w.perAddr[a]) {
			return fmt.Errorf("%d open for %v, %d before, %d allowed", n, a, w.perAddr[a], limit)
		}
	}
	return nil
}

// closePrimes ends what this file began, after the pool was closed.
func (w *world) closePrimes() {
	for _, c := range w.warms {
		if !c.done {
			w.failed("a Warm still waits after Close")
		}
	}
	for _, d := range w.dials {
		if !d.done {
			w.failed("a DialContext still waits after Close")
		}
		w.endDial(d)
	}
	w.warms, w.dials = nil, nil
	w.mu.Lock()
	clear(w.sincePush)
	w.addPrimes()
	w.mu.Unlock()
}
