package connpool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// The state-machine test: a program of random bytes drives a whole pool over a
// scripted network, in a bubble where time is the test's. After every step,
// when everything that can happen has happened, the books must be consistent
// and agree with a naive model that knows only what a caller can see.
//
// One interpreter serves the long seeded runs, rapid (which shrinks what it
// finds) and the native fuzzer.

// TestModelHoldsOverLongHistories runs 64 seeds of 10,000 steps, 3 with -short
// (CONNPOOL_STRESS=n: n times as many seeds).
func TestModelHoldsOverLongHistories(t *testing.T) {
	seeds, steps := short.Of(64, 3)*stress(), 10_000
	modelHasClients = stress() > 1
	if raceEnabled {
		seeds = 4 * stress() // a tenth of the speed
	}
	for seed := range seeds {
		program := make([]byte, steps*5)
		rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
		rng.Read(program)
		t.Run(strconv.Itoa(seed), func(t *testing.T) {
			if err := runProgram(t, program, steps); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		})
	}
	if !synctest.Available {
		return // none was played
	}
	// The histories are worth something only if everything happened in them.
	sum := &modelTotals
	t.Logf("%d loans, %d reused, %d waits, %d dials (%d failed), closed %v", sum.Loans, sum.Reused, sum.Waits, sum.Dials, sum.DialErrors, sum.Closed)
	steps *= seeds
	primesHappened(t, steps)
	require.Greater(t, modelHollow, steps/1000, "connections that the peer gave up at once")
	require.Greater(t, sum.Loans, uint64(steps/20))
	require.Greater(t, sum.Reused, uint64(steps/100))
	require.Greater(t, sum.Waits, uint64(steps/50))
	require.Greater(t, sum.Exhausted, uint64(0))
	require.Greater(t, sum.DialErrors, uint64(steps/100))
	require.Greater(t, sum.Detached, uint64(0))
	modelHolds.sufficed(t, steps)
	modelOwn.sufficed(t, steps)
	if modelHasClients {
		modelClients.sufficed(t, steps)
	}
	for r := ClosedEvicted; r < numCloseReasons; r++ {
		switch r {
		case ClosedDirty, ClosedSetupFailed, ClosedResetFailed, ClosedCheckFailed,
			ClosedLowHandles, ClosedMarkedDead, ClosedQuarantined:
			continue // this network has no descriptors, these hooks do not fail
		}
		least := steps / 20_000
		if r == ClosedPushFailed {
			least = steps / 80_000 // most pools have no Push, and most of its failures are those of a dial
		}
		require.Greater(t, sum.Closed[r], uint64(least), "connections closed as %v", r)
	}
}

// modelTotals adds up the Stats of all pools of the long runs.
var modelTotals = Stats{Closed: make(map[CloseReason]uint64)}

// TestModelHoldsForShortPrograms looks for a small program that breaks a rule.
func TestModelHoldsForShortPrograms(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		program := rapid.SliceOfN(rapid.Byte(), 12, 400).Draw(rt, "program")
		if err := runProgram(t, program, len(program)); err != nil {
			rt.Fatal(err)
		}
	})
}

func runProgram(t *testing.T, program []byte, steps int) (err error) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(program)
		for range steps {
			if len(w.program) == 0 {
				break
			}
			if err = w.step(); err != nil {
				err = fmt.Errorf("step %d (%s): %w\nconfig %+v", w.steps, w.op, err, w.cfg)
				break
			}
		}
		if e := w.finish(); err == nil {
			err = e
		}
	})
	return err
}

// borrower is one call of With, as its caller sees it.
type borrower struct {
	order  int // of its call
	addr   Addr
	cancel context.CancelFunc
	orders chan verdict // what fn is told to do

	// Written by the borrower's goroutine under world.mu.
	holds uint64 // ID of its connection, 0 while it waits
	done  bool
	err   error

	visit  *visit // the session it belongs to, if any
	lease  bool   // it holds a Lease
	nested int    // what it does inside the loan before it ends, see nest
	ending bool   // it has been told how its loan ends
	guest  *guest // the client of its connection, if there is one

	waits      []int    // the steps in which it began to wait, or to wait again
	passedOver []uint64 // idle connections that were given back later than the one it got
}

// waitsAgain reports whether b, which waited before this step, was served in it
// and waits again.
func (b *borrower) waitsAgain(step int) bool {
	n := len(b.waits)
	return n > 1 && b.waits[n-1] == step
}

type verdict uint8

const (
	vNil verdict = iota
	vError
	vKeep
	vPanic
	vGoexit
	vClose
	vDetach
	vInFlight
	vHalfClose
	vTimeoutThenNil
	numVerdicts
)

var errFn = errors.New("fn's own")

type world struct {
	program []byte
	cfg     Config
	net     *faultnet.Mem
	hosts   []*faultnet.Host
	addrs   []Addr
	pool    *Pool
	steps   int
	op      string
	calls   int

	mu       sync.Mutex
	live     []*borrower
	detached []net.Conn
	owner    map[uint64]*borrower // who holds a connection
	closed   map[uint64]CloseReason
	now      int            // steps, for who may look at it under mu only
	evicted  []uint64       // in this step
	lastUse  map[uint64]int // the step in which a connection was parked last

	lentSince map[uint64]bool // it was lent since
	wrong     error

	crooked map[string]bool // hosts that accept and keep nothing, by name
	vain    map[string]bool // ... of which Setup has seen one do so in this step
	hollow  int             // connections of which Setup has seen the end
	setups  int             // every eighth makes a state that expires

	visits []*visit          // the sessions that have not ended
	kept   map[uint64]*visit // whose session a connection is
	doomed []uint64          // must be closed when the step is over

	primes
	ownLimitsOf
	clientsOf
}

func (w *world) byte() byte {
	if len(w.program) == 0 {
		return 0
	}
	b := w.program[0]
	w.program = w.program[1:]
	return b
}

func (w *world) pick(n int) int { return int(w.byte()) % n }

func newWorld(program []byte) *world {
	w := &world{
		program: program,
		net:     faultnet.NewMem(),
		owner:   make(map[uint64]*borrower),
		closed:  make(map[uint64]CloseReason),
		lastUse: make(map[uint64]int),

		lentSince: make(map[uint64]bool),
		kept:      make(map[uint64]*visit),
		crooked:   make(map[string]bool),
	}
	for i := range 4 {
		name := "h" + strconv.Itoa(i)
		w.hosts = append(w.hosts, w.net.Host(name))
		w.addrs = append(w.addrs, Addr{Transport: "mem", Host: name})
	}
	w.reopen()
	return w
}

// reopen makes a pool of a random shape.
func (w *world) reopen() {
	of := func(choices ...int) int { return choices[w.pick(len(choices))] }
	cfg := Config{
		MaxOpen:           of(-1, 1, 2, 3, 5, 8),
		MaxPerAddr:        of(0, 1, 2, 4),
		MaxIdle:           of(0, 0, 2, -1),
		MaxIdlePerAddr:    of(0, 0, 1),
		MaxDialing:        of(0, 1, 2, 3),
		MaxDialingPerAddr: of(0, 0, 1),
		MaxWaiters:        of(0, 0, 2),
		MaxUses:           of(0, 0, 3),
		IdleTimeout:       time.Duration(of(0, -1, 1, 90)) * time.Second,
		MaxLifetime:       time.Duration(of(0, 0, 10, 300)) * time.Second,
		DialTimeout:       time.Duration(of(0, 1)) * time.Second,
		WhenFull:          FullPolicy(of(0, 0, 0, 1, 2)),
		Dialers: map[Transport]DialFunc{"mem": func(ctx context.Context, a Addr) (net.Conn, error) {
			nc, err := w.net.Dial(ctx, a.Host)
			if err == nil && a.Host == deafHost {
				nc = &refusing{nc.(*faultnet.Conn)}
			}
			return nc, err
		}},
		Trace: &Trace{Closed: w.onClosed},
	}
	if of(0, 1) == 1 {
		cfg.Check = func(ctx context.Context, c Conn) error { return nil }
	}
	if n := len(w.program); n > 0 { // from the end: a byte of the front would change what every known program does
		last := int(w.program[n-1]) + n
		cfg.WaitTimeout = time.Duration([]int{0, 0, 0, 0, 2, 20}[last%6]) * time.Second
		cfg.MaxBackoff = time.Duration([]int{0, 0, -1, 100, 5000}[last/6%5]) * time.Millisecond
	}
	cfg.Setup = w.setup
	w.watchHolds(&cfg)
	w.spareShape(&cfg, of)
	w.ownShape(&cfg, of)
	w.clientShape(&cfg)
	p, err := New(cfg)
	if err != nil { // the shape makes no sense: the plainest that is near it
		cfg.MaxPerAddr, cfg.MaxIdle, cfg.MaxIdlePerAddr, cfg.MaxDialingPerAddr, cfg.MaxWaiters, cfg.WhenFull, cfg.MinIdlePerAddr = 0, 0, 0, 0, 0, FullWait, 0
		if p, err = New(cfg); err != nil {
			panic(err)
		}
	}
	w.cfg, w.pool = cfg, p
}

// deafHost is the host whose connections refuse deadlines. TRY-06
const deafHost = "h3"

type refusing struct{ *faultnet.Conn }

func (*refusing) SetDeadline(time.Time) error      { return errDeaf }
func (*refusing) SetReadDeadline(time.Time) error  { return errDeaf }
func (*refusing) SetWriteDeadline(time.Time) error { return errDeaf }

func (w *world) onClosed(i CloseInfo) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i.ID == 0 {
		return
	}
	if before, twice := w.closed[i.ID]; twice {
		w.fail("connection %d closed twice: %v, %v", i.ID, before, i.Reason)
	}
	w.closed[i.ID] = i.Reason
	w.closedWhileKept(i)
	w.clientClosed(i)
	if i.Reason == ClosedEvicted {
		w.evicted = append(w.evicted, i.ID)
		if b := w.owner[i.ID]; b != nil {
			w.fail("connection %d was evicted while in use", i.ID)
		}
	}
}

func (w *world) fail(format string, args ...any) {
	if w.wrong == nil {
		w.wrong = fmt.Errorf(format, args...)
	}
}

// snapshot is the idle stack of every address, as IDs, top first.
func (w *world) snapshot() map[Addr][]uint64 {
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	idle := make(map[Addr][]uint64)
	for s := range w.pool.sites.all() {
		for c := s.top; c != nil; c = c.down {
			idle[s.addr] = append(idle[s.addr], c.id)
		}
	}
	return idle
}

// step runs one instruction to its end and looks at everything.
func (w *world) step() error {
	w.steps++
	before := w.snapshot()
	waitingBefore := w.waiting()
	pool, dials, began := w.pool, w.pool.Stats().Dials, time.Now()
	w.mu.Lock()
	w.evicted, w.now = nil, w.steps
	w.vain = make(map[string]bool)
	w.clientsBefore()
	w.mu.Unlock()
	w.primesBefore()
	w.run()
	synctest.Wait()
	if err := w.pool.inconsistency(); err != nil {
		return err
	}
	if err := w.primesAfter(); err != nil {
		return err
	}
	if err := w.ownLimitsAfter(); err != nil {
		return err
	}
	if err := w.clientsAfter(); err != nil {
		return err
	}
	if err := w.stormed(pool, dials, time.Since(began)); err != nil {
		return err
	}
	if err := w.holdsInconsistent(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wrong != nil {
		return w.wrong
	}
	after := w.snapshot()
	// Whoever came out of a queue was older than whoever is still in it: TRY-54.
	// Still in it is not who came out, too, found that what it got had died,
	// and went back to its old place: while it looked, what became free went
	// to the next, as it must, and how much becomes free meanwhile is chance.
	// TestABorrowerThatFoundItsConnectionDeadIsOvertakenDuringItsLookOnly
	// has the rule for those.
	for _, b := range waitingBefore {
		if b.holds == 0 || b.visit != nil || w.vain[b.addr.Host] || w.unsettled[b.addr] || len(b.waits) == 0 { // a session has a queue of its own before that of the pool
			continue
		}
		for _, other := range w.live {
			if other.addr == b.addr && other.visit == nil && other.holds == 0 && !other.done && other.order < b.order && !other.waitsAgain(w.steps) &&
				len(other.waits) > 0 && other.waits[0] <= b.waits[0] { // who looks at a connection is not in the queue
				return fmt.Errorf("call %d was served before the older call %d", b.order, other.order)
			}
		}
	}
	// Whoever got an idle connection got the one given back last of those
	// that were fit; the others are closed by now.
	for _, b := range w.live {
		for _, id := range b.passedOver {
			if !w.isGone(id) && w.owner[id] == nil && !w.pushedNow[id] && !w.unsettled[b.addr] {
				return fmt.Errorf("call %d got connection %d, %d was given back later", b.order, b.holds, id)
			}
		}
		b.passedOver = nil
	}
	// A victim had been used before everything that was idle all along.
	for a, ids := range after {
		for _, id := range ids {
			if !slices.Contains(before[a], id) {
				// One whose client was asked for a borrower who then left was not used.
				if _, known := w.lastUse[id]; !w.pushedBack(id) && (!known || w.lentSince[id]) {
					w.lastUse[id] = w.steps
					delete(w.lentSince, id)
				}
				continue
			}
			if w.pushedNow[id] || w.unsettled[a] {
				continue // nor was it idle all along
			}
			for _, v := range w.evicted {
				// One that went to Push as soon as it was there has none.
				own, used := w.lastUse[id]
				if use, known := w.lastUse[v]; known && used && use > own {
					return fmt.Errorf("connection %d was evicted, %d had not been used for longer", v, id)
				}
			}
		}
	}
	w.live = slices.DeleteFunc(w.live, func(b *borrower) bool { return b.done })
	return nil
}

func (w *world) waiting() (all []*borrower) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.live {
		if b.holds == 0 && !b.done {
			all = append(all, b)
		}
	}
	return all
}

func (w *world) holding() (all []*borrower) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.live {
		if b.holds != 0 && !b.done && !b.ending {
			all = append(all, b)
		}
	}
	return all
}

func (w *world) run() {
	switch op := w.pick(46); {
	case op >= 42:
		w.prime(op - 42)
	case op >= 32:
		w.runHolds(op - 32)
	case op < 11:
		w.borrow(op == 10)
	case op < 19:
		w.end()
	case op < 21:
		w.op = "cancel"
		w.mu.Lock()
		if len(w.live) > 0 {
			w.live[w.pick(len(w.live))].cancel()
		}
		w.mu.Unlock()
	case op < 24:
		w.op = "server hurts a connection"
		ends := w.hosts[w.pick(len(w.hosts))].Conns()
		if len(ends) == 0 {
			return
		}
		end := ends[w.pick(len(ends))]
		switch w.pick(4) {
		case 0:
			end.Close()
		case 1:
			end.Reset()
		case 2:
			end.CloseWrite()
		case 3:
			end.Write([]byte("x"))
		}
	case op < 27:
		w.op = "host changes"
		h := w.hosts[w.pick(len(w.hosts))]
		switch w.pick(16) {
		case 4, 5, 6:
			w.corrupt(w.pick(len(w.hosts)))
		case 0:
			h.Down()
		case 1:
			h.BlackHole(true)
		case 2:
			h.SetLatency(time.Duration(w.pick(4)) * 15 * time.Millisecond)
		case 3:
			h.FailNext(errors.New("scripted"))
		default:
			h.Up()
			h.BlackHole(false)
			w.mend(slices.Index(w.hosts, h))
		}
	case op < 29:
		d := []time.Duration{time.Millisecond, 20 * time.Millisecond, 200 * time.Millisecond, 5 * time.Second, 30 * time.Second, 3 * time.Minute}[w.pick(6)]
		w.op = "time passes: " + d.String()
		time.Sleep(d)
	case op == 29:
		w.op = "retire"
		w.retire(w.addrs[w.pick(len(w.addrs))])
	case op == 30:
		w.op = "evict"
		w.pool.EvictLRU()
	case w.pick(8) > 0:
		w.op = "close idle"
		w.pool.CloseIdle()
	default:
		w.op = "close the pool"
		w.closePool()
		w.reopen()
	}
}

func (w *world) borrow(impatient bool) { w.call(impatient, &borrower{}) }

// call starts a borrower.
func (w *world) call(impatient bool, b *borrower) {
	if len(w.holding())+len(w.waiting()) >= 14 {
		w.end()
		return
	}
	w.op = "borrow"
	w.calls++
	b.order, b.addr, b.orders = w.calls, w.addrs[w.pick(len(w.addrs))], make(chan verdict)
	parent := context.Background()
	if b.visit != nil {
		parent = b.visit.ctx
	}
	ctx, cancel := context.WithCancel(parent)
	if impatient {
		w.op = "borrow with a deadline"
		ctx, cancel = context.WithTimeout(parent, time.Duration(1+w.pick(100))*time.Millisecond)
	}
	b.cancel = cancel
	w.mu.Lock()
	w.live = append(w.live, b)
	w.mu.Unlock()
	pool, top := w.pool, w.snapshot()[b.addr]
	if b.visit != nil {
		top = nil // it may come with a connection, or have its turn later
	}
	ctx = WithTrace(ctx, &Trace{Wait: func(i WaitInfo) {
		w.mu.Lock()
		defer w.mu.Unlock()
		b.waits = append(b.waits, w.now)
	}})
	go func() {
		defer cancel()
		defer func() {
			v := recover()
			w.mu.Lock()
			defer w.mu.Unlock()
			b.done = true
			if pan, ok := v.(*PanicError); ok && errors.Is(pan, errGuest) { // of an alive
				v, b.err = nil, pan
			}
			if v != nil && v != any(errFn) {
				w.fail("With panicked: %v", v)
			}
		}()
		var err error
		if b.lease {
			err = w.useLease(ctx, pool, b, top)
		} else {
			err = pool.With(ctx, b.addr, func(c Conn) error { return w.use(ctx, b, c, top) })
		}
		w.mu.Lock()
		b.err = err
		w.mu.Unlock()
	}()
}

// use is the body of every loan.
func (w *world) use(ctx context.Context, b *borrower, c Conn, top []uint64) error {
	id := w.lentTo(ctx, b, c, top)
	order := w.told(b)
	w.converse(ctx, b, order) // first: it may last for more than this step
	w.nest(ctx, b, c)
	w.mu.Lock()
	delete(w.owner, id)
	w.usedNow(id)
	w.clientBack(b)
	w.mu.Unlock()
	if order == vDetach {
		w.leaves(b)
	}
	return w.obey(ctx, order, b, c)
}

// told waits until b is told how its loan ends.
func (w *world) told(b *borrower) verdict {
	order := <-b.orders
	w.mu.Lock()
	defer w.mu.Unlock()
	b.ending = true
	return order
}

// lentTo checks and books that b has got c.
func (w *world) lentTo(ctx context.Context, b *borrower, c Conn, top []uint64) (id uint64) {
	id = c.Info().ID
	w.mu.Lock()
	defer w.mu.Unlock()
	if other := w.owner[id]; other != nil {
		w.fail("connection %d lent to call %d while call %d has it", id, b.order, other.order)
	}
	if reason, was := w.closed[id]; was {
		w.fail("connection %d was lent after it was closed (%v)", id, reason)
	}
	w.clientLent(ctx, b, id, State[any](c))
	if c.Info().Reused && b.guest == nil {
		if err := c.c.nc.(Prober).Probe(); err != nil && ctx.Err() == nil {
			w.fail("connection %d was lent although %v", id, err)
		}
	}
	if i := slices.Index(top, id); i > 0 {
		b.passedOver = top[:i]
	}
	w.keptBy(b, id)
	w.owner[id] = b
	w.lentSince[id] = true
	b.holds = id
	return id
}

// obey ends a loan as it is told.
func (w *world) obey(ctx context.Context, order verdict, b *borrower, c Conn) error {
	if w.clientObeys(order, b, c, c.c) {
		return nil
	}
	switch order {
	case vError:
		return w.fnError(ctx, b, c)
	case vKeep:
		return Keep(errFn)
	case vPanic:
		panic(errFn)
	case vGoexit:
		runtime.Goexit()
	case vClose:
		if err := c.Close(); err != nil && (b.guest == nil || ctx.Err() == nil && c.c.word.Load()&flagCut == 0) { // a ctx closes the connection of a client
			w.failed("Close: %v", err)
		}
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			w.failed("second Close: %v", err)
		}
	case vDetach:
		nc, err := c.Detach()
		if err != nil && ctx.Err() == nil && c.c.word.Load()&flagCut == 0 { // cut: by the ctx of a use inside
			w.failed("Detach: %v", err)
		}
		if err == nil {
			w.mu.Lock()
			w.detached = append(w.detached, nc)
			w.clientLeaves(b)
			w.mu.Unlock()
		}
	case vInFlight:
		var over atomic.Bool // at once, if the peer has sent or closed
		go func() {
			c.Read(make([]byte, 1))
			over.Store(true)
		}()
		for c.c.word.Load()&inFlight == 0 && !over.Load() {
			runtime.Gosched() // until it is in there
		}
	case vHalfClose:
		c.CloseWrite()
	case vTimeoutThenNil:
		if c.SetReadDeadline(time.Now().Add(-time.Second)) == nil { // else the read would wait
			c.Read(make([]byte, 1))
		}
	}
	return nil
}

func (w *world) failed(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail(format, args...)
}

func (w *world) end() {
	holders := w.holding()
	if len(holders) == 0 {
		w.op = "nothing to end"
		return
	}
	b := holders[w.pick(len(holders))]
	v := vNil
	if n := w.pick(2 * int(numVerdicts)); n < int(numVerdicts) { // half of them in good order
		v = verdict(n)
	}
	w.op = fmt.Sprintf("call %d ends by verdict %d", b.order, v)
	b.orders <- v
}

func (w *world) closePool() {
	waiting := w.waiting()
	if err := w.pool.Close(); err != nil {
		w.failed("Close: %v", err)
	}
	synctest.Wait()
	for _, b := range waiting {
		if (!b.done || b.holds == 0 && b.err == nil) && !w.unsettled[b.addr] {
			w.failed("call %d still waits after Close, or got %v", b.order, b.err)
		}
	}
	w.awaitAsked()
	for _, b := range w.holding() {
		b.orders <- vNil
		synctest.Wait()
	}
	w.closePrimes()
	w.endVisits()
	synctest.Wait() // the last hooks have been told
	w.awaitAsked()
	if err := w.pool.Shutdown(context.Background()); err != nil {
		w.failed("Shutdown: %v", err)
	}
	synctest.Wait()
	st := w.pool.Stats()
	w.addOwnLimits()
	modelHollow += w.hollow
	w.hollow = 0
	modelTotals.Loans += st.Loans
	modelTotals.Reused += st.Reused
	modelTotals.Waits += st.Waits
	modelTotals.Dials += st.Dials
	modelTotals.DialErrors += st.DialErrors
	modelTotals.Exhausted += st.Exhausted
	modelTotals.Detached += st.Detached
	modelTotals.Leaked += st.Leaked
	for r, n := range st.Closed {
		modelTotals.Closed[r] += n
	}
	if st.Open != 0 || st.Waiting != 0 || st.Addrs != 0 {
		w.failed("after Close: %v", st)
	}
	var closes uint64
	for _, n := range st.Closed {
		closes += n
	}
	if made := st.Dials - st.DialErrors; made != closes+st.Detached {
		w.failed("%d connections made, %d closed, %d detached", made, closes, st.Detached)
	}
	for _, nc := range w.detached {
		nc.Close()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.detached = nil
	w.endClients()
	w.live = nil
	clear(w.owner)
	clear(w.closed)
	clear(w.lastUse)
	clear(w.lentSince)
	clear(w.kept)
	w.doomed = nil
	for _, h := range w.hosts {
		if ends := h.Conns(); len(ends) > 0 {
			// The server's ends are closed only by the test; what must be
			// gone is the pool's.
			for _, end := range ends {
				if end.Probe() == nil {
					w.fail("a socket of %v outlived its pool", end.LocalAddr())
				}
				end.Close()
			}
		}
	}
}

func (w *world) finish() error {
	w.op = "finish"
	for _, h := range w.hosts {
		h.Up()
		h.BlackHole(false)
		w.mend(slices.Index(w.hosts, h))
	}
	w.closePool()
	time.Sleep(2 * time.Minute) // foreign code that hangs
	w.net.Close()
	if w.wrong != nil {
		return w.wrong
	}
	return w.pool.inconsistency()
}
