package connpool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Clients with I/O of their own in the random histories: some pools have a Setup that returns
// Resident clients, some a dialer that returns Carry, some both, beside plain connections. Half of
// all pools have a KeepErr. The shape of a pool is drawn from the end of the program, so that
// the programs that are known do in plain pools what they did before.
//
// What other changes of the world close connections has its instructions in world.run beside
// "retire" (a change of the addresses of a name is not there yet), and its reason in the list at the
// end of TestModelHoldsOverLongHistories and in clientCounts.sufficed.
//
// What a client does is decided by its number, so that a program that is played again has the
// same clients.

// clientsOf is what a world knows of its clients and of KeepErr. world.mu guards it, and the
// fields of each guest that are not its connection.
type clientsOf struct {
	residents, carries bool // the shape of the pool
	guests             []*guest
	made               int
	keeps              bool            // the pool has a KeepErr
	thinking           int             // calls of KeepErr that hang
	keepAsked          int             // how often it was asked
	harmless           map[uint64]bool // connections whose loan in this step ended with an error that KeepErr knows
	unsettled          map[Addr]bool   // in this step, a client of the address took its time to say how it is
	asleep             map[Addr]int    // clients that do so now

	clientCounts
}

// clientCounts is what happened.
type clientCounts struct {
	clients, carried, asks, late, gaveUp, peerEnds, selfEnds, ctxEnds, saidNo, panics, hung, goodbyes, rude, detachedClients, expired, keptErrs, keepFailed int

	closedAs map[CloseReason]int // of connections with a client
}

// modelClients adds up what happened in all worlds.
var modelClients clientCounts

func (n *clientCounts) add(o *clientCounts) {
	from, to := o.list(), n.list()
	for i := range from {
		*to[i].n += *from[i].n
		*from[i].n = 0
	}
	if n.closedAs == nil {
		n.closedAs = make(map[CloseReason]int)
	}
	for r, k := range o.closedAs {
		n.closedAs[r] += k
	}
	clear(o.closedAs)
}

type clientCount struct {
	what  string
	n     *int
	share int // that must have happened once in so many steps
}

func (n *clientCounts) list() []clientCount {
	return []clientCount{
		{"clients", &n.clients, 200},
		{"clients that dial for themselves", &n.carried, 500},
		{"requests of clients", &n.asks, 100},
		{"replies that came when the borrower had gone", &n.late, 1000},
		{"requests given up", &n.gaveUp, 500},
		{"clients that the peer ended", &n.peerEnds, 1000},
		{"clients that closed their connection", &n.selfEnds, 2000},
		{"loans of a client whose ctx ended", &n.ctxEnds, 2000},
		{"clients whose alive said no", &n.saidNo, 2000},
		{"panics of alive", &n.panics, 10_000},
		{"clients whose alive hung", &n.hung, 20_000},
		{"goodbyes", &n.goodbyes, 500},
		{"closes without a goodbye", &n.rude, 500},
		{"clients detached", &n.detachedClients, 5000},
		{"clients that expired", &n.expired, 10_000},
		{"errors that KeepErr found harmless", &n.keptErrs, 1000},
		{"panics and hangs of KeepErr", &n.keepFailed, 10_000},
	}
}

func (n *clientCounts) sufficed(t *testing.T, steps int) {
	t.Helper()
	t.Logf("clients closed %v", n.closedAs)
	few := steps < 100_000 // what is rare may be missing
	for _, c := range n.list() {
		t.Logf("%d %s", *c.n, c.what)
		if few && c.share >= 5000 {
			continue
		}
		require.Greater(t, *c.n, steps/c.share/4, c.what)
	}
	for _, r := range []CloseReason{
		ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus, ClosedStale, ClosedFnError, ClosedCanceled,
		ClosedPanic, ClosedGoexit, ClosedByBorrower, ClosedRetired, ClosedOnRequest, ClosedWithPool, ClosedExpired, ClosedMoved, ClosedLeaked,
	} {
		if few {
			break
		}
		require.Greater(t, n.closedAs[r], steps/200_000, "clients closed as %v", r)
	}
}

// modelHasClients is set in the stress run. What histories with clients meet is rare, and takes long to
// tell from a mistake of the model.
var modelHasClients bool

// clientShape is the part of a random shape that concerns this file. It comes last: it wraps what
// the other parts have made.
func (w *world) clientShape(cfg *Config) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.residents, w.carries, w.keeps = false, false, false
	w.harmless, w.unsettled = make(map[uint64]bool), make(map[Addr]bool)
	if w.closedAs == nil {
		w.closedAs, w.asleep = make(map[CloseReason]int), make(map[Addr]int) // a client may outlast its pool
	}
	n := len(w.program)
	if n == 0 {
		return
	}
	shape := (int(w.program[n-1]) + n) / 7
	if w.keeps = shape%2 == 0; w.keeps {
		cfg.KeepErr = w.keepErr
	}
	if !modelHasClients {
		shape = 0
	}
	switch shape / 2 % 8 {
	case 1, 2:
		w.residents = true
	case 3:
		w.carries = true
	case 4:
		w.residents, w.carries = true, true
	}
	for i := range w.hosts {
		w.serve(i)
	}
	if !w.residents && !w.carries {
		return
	}
	cfg.Setup = w.setupClient
	below := cfg.Dialers["mem"]
	cfg.Dialers["mem"] = func(ctx context.Context, a Addr) (net.Conn, error) {
		nc, err := below(ctx, a)
		if err != nil {
			return nil, err
		}
		w.mu.Lock()
		w.made++
		no, carry := w.made, w.carries && (!w.residents || w.made%2 == 0)
		w.mu.Unlock()
		if !carry || no%8 == 0 {
			return nc, nil
		}
		g := w.newGuest(a, no, nc)
		g.shows = no%3 > 0
		socket := nc
		if !g.shows {
			socket = nil
		}
		return Carry(g, g.aliveFunc(), socket), nil
	}
}

// serve gives host i the server that the pool's clients talk to, or none.
func (w *world) serve(i int) {
	if w.residents || w.carries {
		w.hosts[i].Serve(replies)
		return
	}
	w.hosts[i].Serve(nil)
}

// replies answers each line with itself; one that begins with "late" after a while.
func replies(c *faultnet.Conn) {
	in := bufio.NewScanner(c)
	for in.Scan() {
		line := in.Text()
		switch {
		case line == goodbye0:
		case strings.HasPrefix(line, "late"):
			time.AfterFunc(5*time.Millisecond, func() { fmt.Fprintln(c, line) })
		default:
			fmt.Fprintln(c, line)
		}
	}
}

const goodbye0 = "bye"

// guest is a client that reads its connection all the time and matches replies by an id.
type guest struct {
	w     *world
	addr  Addr
	no    int
	nc    net.Conn       // what it reads and writes
	mem   *faultnet.Conn // the pool's end of the connection
	done  chan struct{}  // closed when it reads no more
	shows bool           // a resident, or a client of Carry that shows its socket
	until time.Time      // after which it must not be lent; zero: ever
	alive bool           // the pool may ask how it is

	// Under world.mu.
	id       uint64    // of its connection, once the books have it
	user     *borrower // who has it
	closes   int       // calls of Close
	working  bool      // its connection worked when Close was called
	left     bool      // detached: no longer the pool's
	ended    int       // the step in which its reading ended, or in which it closed its connection
	asked    int       // calls of alive
	asking   bool      // one is running
	noMore   bool      // an alive has said no, panicked or hung
	selfCut  bool
	awaited  map[string]chan struct{}
	requests int
}

func (w *world) newGuest(a Addr, no int, nc net.Conn) *guest {
	g := &guest{w: w, addr: a, no: no, nc: nc, mem: memOf(nc), done: make(chan struct{}), shows: true, awaited: make(map[string]chan struct{})}
	if no%4 == 1 {
		g.until = time.Now().Add(20 * time.Second)
	}
	w.mu.Lock()
	w.guests = append(w.guests, g)
	w.clients++
	if _, resident := nc.(Conn); !resident {
		w.carried++
	}
	w.mu.Unlock()
	go g.read()
	return g
}

// memOf is the end of the network in memory below nc.
func memOf(nc net.Conn) *faultnet.Conn {
	for {
		switch c := nc.(type) {
		case *faultnet.Conn:
			return c
		case Conn:
			nc = c.c.nc
		case *refusing:
			nc = c.Conn
		case *strange:
			nc = c.Conn
		case *carrier:
			nc = c.socket
		default:
			return nil
		}
	}
}

// setupClient is the Setup of such a pool.
func (w *world) setupClient(ctx context.Context, a Addr, nc net.Conn) (any, error) {
	g, carried := State[*guest](nc.(Conn)), true
	if g == nil {
		w.mu.Lock()
		w.made++
		no := w.made
		w.mu.Unlock()
		if !w.residents || no%8 == 0 {
			return w.setup(ctx, a, nc)
		}
		g, carried = w.newGuest(a, no, nc), false
	}
	if w.lives(g) != nil {
		if !carried { // the pool never gets it
			w.mu.Lock()
			w.guests = slices.DeleteFunc(w.guests, func(o *guest) bool { return o == g })
			w.mu.Unlock()
		}
		return nil, errGuestGone
	}
	switch {
	case carried && g.no%5 == 0:
		return second{g}, nil // another state beside it
	case carried && g.no%5 == 1:
		return g, nil
	case carried:
		return nil, nil
	}
	return Resident(g, g.aliveFunc()), nil
}

// lives gives a crooked peer the time to show it.
func (w *world) lives(g *guest) error {
	w.mu.Lock()
	crooked := w.crooked[g.addr.Host]
	w.mu.Unlock()
	if !crooked {
		return nil
	}
	time.Sleep(time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	if g.ended == 0 {
		return nil
	}
	w.hollow++
	w.vain[g.addr.Host] = true
	return errGuestGone
}

// second is a state of Setup beside a client that Carry has brought.
type second struct{ g *guest }

func (s second) Expires() time.Time { return s.g.until }

// guestOf is the client of a state, nil if there is none.
func guestOf(state any) *guest {
	switch s := state.(type) {
	case *guest:
		return s
	case second:
		return s.g
	}
	return nil
}

var (
	errGuestGone = errors.New("the client has ended")
	errGuest     = errors.New("the client has had enough")
	errHarmless  = errors.New("no such key")
)

func (g *guest) Expires() time.Time { return g.until }

// read ends when the connection does. A deadline that the client has set ends one read only.
func (g *guest) read() {
	defer close(g.done)
	in := bufio.NewReader(g.nc)
	part := ""
	for {
		line, err := in.ReadString('\n')
		part += line
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			if g.nc.SetReadDeadline(time.Time{}) == nil {
				continue
			}
		}
		if err != nil {
			break
		}
		id := strings.TrimLeft(strings.TrimSuffix(part, "\n"), "x") // servers say x unasked
		part = ""
		g.w.mu.Lock()
		if got := g.awaited[id]; got != nil {
			delete(g.awaited, id)
			close(got)
		} else {
			g.w.late++
		}
		g.w.mu.Unlock()
	}
	g.w.mu.Lock()
	defer g.w.mu.Unlock()
	if g.ended == 0 {
		g.ended = g.w.now
		if !g.selfCut && g.closes == 0 {
			g.w.peerEnds++
		}
	}
}

// ask sends a request and waits for its reply, for a moment.
func (g *guest) ask(ctx context.Context, kind string) {
	g.w.mu.Lock()
	g.w.asks++
	g.requests++
	id := fmt.Sprint(kind, g.no, ".", g.requests)
	got := make(chan struct{})
	if kind != "late" {
		g.awaited[id] = got
	}
	g.w.mu.Unlock()
	if _, err := fmt.Fprintln(g.nc, id); err != nil {
		return
	}
	if kind == "late" {
		return
	}
	select {
	case <-got:
		return
	case <-g.done:
	case <-ctx.Done():
	case <-time.After(time.Millisecond):
	}
	g.w.mu.Lock()
	defer g.w.mu.Unlock()
	delete(g.awaited, id)
	g.w.gaveUp++
}

// aliveFunc is the alive of g; some have none.
func (g *guest) aliveFunc() func() error {
	g.alive = g.no%6 > 0
	if !g.alive {
		return nil
	}
	return g.answer
}

func (g *guest) answer() error {
	w := g.w
	w.mu.Lock()
	g.asked++
	switch {
	case g.asking:
		w.fail("the client of connection %d was asked twice at once", g.id)
	case g.user != nil:
		w.fail("the client of connection %d was asked while call %d has it", g.id, g.user.order)
	case g.noMore:
		w.fail("the client of connection %d was asked again, though it had ended", g.id)
	}
	g.asking = true
	how := 100*(g.no%10) + g.asked
	w.mu.Unlock()
	asleep := func(d time.Duration) {
		w.mu.Lock()
		w.unsettled[g.addr] = true
		w.asleep[g.addr]++
		w.mu.Unlock()
		time.Sleep(d)
		w.mu.Lock()
		w.asleep[g.addr]--
		w.unsettled[g.addr] = true
		w.mu.Unlock()
	}
	refuses := func(n *int) {
		w.mu.Lock()
		g.noMore = true
		*n++
		w.mu.Unlock()
	}
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		g.asking = false
	}()
	switch {
	case how == 302, how == 501:
		refuses(&w.saidNo)
		return errGuest
	case how == 102:
		refuses(&w.panics)
		panic(errGuest)
	case how == 701:
		refuses(&w.hung)
		asleep(time.Minute)
	case how/100 == 9 && how%3 == 2:
		asleep(100 * time.Millisecond)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if g.ended > 0 {
		return errGuestGone
	}
	return nil
}

// Close says goodbye and closes the connection; a client in three leaves that to the pool, and one
// in nine takes longer than it may.
func (g *guest) Close() error {
	w := g.w
	w.mu.Lock()
	g.closes++
	if g.closes > 1 {
		w.fail("the client of connection %d was closed twice", g.id)
	}
	if g.left && isGuard(g.nc) {
		w.fail("the client of connection %d was closed after Detach", g.id)
	}
	g.working = !g.mem.Closed()
	w.mu.Unlock()
	if _, err := fmt.Fprintln(g.nc, goodbye0); err != nil && g.working {
		w.mu.Lock()
		g.working = g.peerGone()
		w.mu.Unlock()
	}
	if g.no%9 == 8 {
		time.Sleep(300 * time.Millisecond)
	}
	if g.no%3 > 0 || !g.shows {
		g.nc.Close()
	}
	return nil
}

// peerGone reports whether the failure of a write is the peer's doing. It needs world.mu.
func (g *guest) peerGone() bool {
	return !errors.Is(g.mem.Probe(), net.ErrClosed) && g.mem.Probe() != nil
}

// stop ends the client's connection as the client itself would.
func (g *guest) stop() {
	g.w.mu.Lock()
	g.selfCut = true
	if g.ended == 0 {
		g.ended = g.w.now
	}
	g.w.selfEnds++
	g.w.mu.Unlock()
	g.nc.Close()
}

// clientLent checks what is lent to b: the connection id with the state. It needs world.mu.
func (w *world) clientLent(ctx context.Context, b *borrower, id uint64, state any) {
	if e, ok := state.(interface{ Expires() time.Time }); ok && w.kept[id] == nil && (b.visit == nil || !b.visit.ended) { // a session keeps what it has
		if end := e.Expires(); !end.IsZero() && time.Now().After(end) {
			w.fail("connection %d was lent %v after its state had expired", id, time.Since(end))
		}
	}
	g := guestOf(state)
	if g == nil {
		return
	}
	switch {
	case g.user != nil:
		w.fail("the client of connection %d lent to call %d while call %d has it", id, b.order, g.user.order)
	case g.id != 0 && g.id != id:
		w.fail("connections %d and %d have the same client", id, g.id)
	case g.closes > 0 && ctx.Err() == nil: // else the end of the ctx has closed it meanwhile
		w.fail("the client of connection %d was lent after its Close", id)
	case g.noMore:
		w.fail("the client of connection %d was lent after its alive had refused", id)
	case g.ended > 0 && g.ended < w.now && ctx.Err() == nil && (g.alive || isGuard(g.nc)):
		w.fail("the client of connection %d was lent, and had ended in step %d", id, g.ended)
	}
	g.user, g.id, b.guest = b, id, g
}

// clientBack says that b is about to give its connection back. It needs world.mu.
func (w *world) clientBack(b *borrower) {
	if b.guest != nil {
		b.guest.user = nil
	}
}

// converse is what a borrower of a client does before its loan ends as it is told: it asks
// something, and gives up a reply that does not come.
func (w *world) converse(ctx context.Context, b *borrower, order verdict) {
	g := b.guest
	if g == nil {
		return
	}
	switch order {
	case vInFlight:
		g.ask(ctx, "late")
	case vTimeoutThenNil:
		g.nc.SetReadDeadline(time.Now().Add(-time.Second))
		g.ask(ctx, "")
	default:
		g.ask(ctx, "")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if ctx.Err() != nil {
		w.ctxEnds++
		w.doomed = append(w.doomed, b.holds)
	}
}

// clientObeys ends a loan of a client as it is told, where that is another thing than for a plain
// connection.
func (w *world) clientObeys(order verdict, b *borrower, h interface {
	Read([]byte) (int, error)
	SetReadDeadline(time.Time) error
}, c *conn) (done bool) {
	g := b.guest
	if g == nil {
		return false
	}
	switch order {
	case vInFlight, vTimeoutThenNil:
		_, err := h.Read(make([]byte, 1))
		if !errors.Is(err, errors.ErrUnsupported) && c.word.Load()&flagCut == 0 {
			w.failed("Read of a loan with a client: %v", err)
		}
		if err := h.SetReadDeadline(time.Now()); !errors.Is(err, errors.ErrUnsupported) && c.word.Load()&flagCut == 0 {
			w.failed("SetReadDeadline of a loan with a client: %v", err)
		}
		return true
	case vHalfClose:
		g.stop()
		if isGuard(g.nc) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.doomed = append(w.doomed, b.holds)
		}
		return true
	}
	return false
}

// fnError is the error of a loan that ends by vError, and says what must come of it.
func (w *world) fnError(ctx context.Context, b *borrower, c Conn) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case b.order%2 == 0:
		return errFn
	case !w.keeps:
		w.doomed = append(w.doomed, b.holds)
	case c.c.word.Load()&disorder == 0 && ctx.Err() == nil && !slices.Contains(w.doomed, b.holds):
		w.harmless[b.holds] = true
	}
	return errHarmless
}

// isGone reports whether the connection id was closed, or is being closed: a client may take its
// time. It needs world.mu.
func (w *world) isGone(id uint64) bool {
	if _, gone := w.closed[id]; gone {
		return true
	}
	return slices.ContainsFunc(w.guests, func(g *guest) bool { return g.id == id && g.closes > 0 })
}

// clientLeaves says that the connection of b was detached. It needs world.mu.
func (w *world) clientLeaves(b *borrower) {
	if b.guest != nil {
		b.guest.left = true
	}
}

// keepErr is the KeepErr of such a pool. It fails now and then.
func (w *world) keepErr(_ Addr, err error) bool {
	w.mu.Lock()
	w.keepAsked++
	n := w.keepAsked
	known := errors.Is(err, errHarmless)
	switch {
	case n%23 == 7, n%23 == 19:
		w.keepFailed++
		clear(w.harmless)
	case known:
		w.keptErrs++
	}
	w.mu.Unlock()
	switch n % 23 {
	case 7:
		panic(errFn)
	case 19:
		if w.cfg.Push != nil {
			break // a loan that ends later than it says would confuse the order of uses
		}
		w.mu.Lock()
		w.thinking++
		w.mu.Unlock()
		time.Sleep(time.Minute)
		w.mu.Lock()
		w.thinking--
		w.mu.Unlock()
	}
	return known
}

// clientClosed checks the end of a connection. It needs world.mu.
func (w *world) clientClosed(i CloseInfo) {
	if i.Reason == ClosedFnError && w.harmless[i.ID] {
		w.fail("connection %d was closed for an error that KeepErr finds harmless", i.ID)
	}
	at := slices.IndexFunc(w.guests, func(g *guest) bool { return g.id == i.ID })
	if at < 0 {
		return // it was gone before anybody saw it
	}
	g := w.guests[at]
	w.closedAs[i.Reason]++
	inStep := false
	switch i.Reason {
	case ClosedEvicted, ClosedIdleTimeout, ClosedLifetime, ClosedMaxUses, ClosedSurplus, ClosedRetired, ClosedOnRequest, ClosedWithPool, ClosedExpired, ClosedMoved:
		inStep = true
	}
	if i.Reason == ClosedExpired {
		w.expired++
	}
	switch {
	case g.closes != 1:
		w.fail("the client of connection %d was closed %d times when its slot was free (%v)", i.ID, g.closes, i.Reason)
	case !g.mem.Closed():
		w.fail("the socket of connection %d is open, and its slot is free (%v)", i.ID, i.Reason)
	case g.selfCut || !g.shows: // who closed it, and when, is the client's doing
	case inStep && !g.working:
		w.fail("the client of connection %d could say no goodbye (%v)", i.ID, i.Reason)
	case !inStep && g.working:
		w.fail("the client of connection %d could say goodbye (%v)", i.ID, i.Reason)
	case inStep:
		w.goodbyes++
	default:
		w.rude++
	}
}

// clientsBefore and clientsAfter frame each step.
func (w *world) clientsBefore() {
	clear(w.harmless)
	w.unsettled = make(map[Addr]bool)
	for a, n := range w.asleep {
		w.unsettled[a] = n > 0
	}
}

// clientsAfter compares the clients with the books.
func (w *world) clientsAfter() error {
	if !w.residents && !w.carries {
		return nil
	}
	residents := w.pool.Stats().Residents
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	there := 0
	for _, c := range w.pool.recency.all() {
		g := guestOf(c.state)
		if r := c.resident(); r != nil && g == nil {
			g = guestOf(r.client)
		}
		if g == nil {
			continue
		}
		there++
		switch {
		case g.id != 0 && g.id != c.id:
			return fmt.Errorf("connections %d and %d have the same client", g.id, c.id)
		case g.left:
			return fmt.Errorf("connection %d was detached, and is in the books", c.id)
		case g.ended > 0 && c.phase == phaseIdle && c.word.Load()&flagLent == 0 && isGuard(g.nc) && !g.asking:
			return fmt.Errorf("the client of connection %d ended in step %d, and the connection is idle", c.id, g.ended)
		case c.phase == phaseIdle && g.closes > 0:
			return fmt.Errorf("connection %d is idle, and its client closed", c.id)
		}
		g.id = c.id
	}
	open := 0
	for _, g := range w.guests {
		if _, gone := w.closed[g.id]; g.id != 0 && !gone && !g.left {
			open++
		}
	}
	if residents != there || there != open {
		return fmt.Errorf("Stats count %d clients, the books have %d, %d were made and have not ended", residents, there, open)
	}
	return nil
}

func isGuard(nc net.Conn) bool { _, yes := nc.(Conn); return yes }

// endClients checks, after the pool was closed, that each client was closed once. It needs world.mu.
func (w *world) endClients() {
	for _, g := range w.guests {
		want := 1
		if g.left && isGuard(g.nc) {
			want = 0
			w.detachedClients++
		} else if g.left {
			w.detachedClients++
		}
		if g.closes != want {
			w.fail("the client %d of connection %d was closed %d times, not %d", g.no, g.id, g.closes, want)
		}
	}
	w.guests = nil
	modelClients.add(&w.clientCounts)
}

// awaitAsked waits until the borrowers whose connections were being asked have got them, or others,
// and until the loans that were told to end have ended: the connection of a client may be closed, and
// its slot free, before.
func (w *world) awaitAsked() {
	w.mu.Lock()
	busy := w.thinking > 0 || slices.ContainsFunc(w.live, func(b *borrower) bool { return b.ending && !b.done })
	for _, k := range w.asleep {
		busy = busy || k > 0
	}
	w.mu.Unlock()
	if busy {
		time.Sleep(4 * foreignPatience)
		synctest.Wait()
	}
}
