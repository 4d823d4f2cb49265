package connpool

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// phase is the phase in a connection's life. Only books.moveLocked changes it, and only
// as drawn here and in phaseMoves; a test compares the two:
//
//	none     -> dialing   a dial starts
//	dialing  -> borrowed  the dial has worked; releaseLocked decides who gets the connection
//	dialing  -> none      the dial failed before there was a socket to close
//	dialing  -> closing   Setup failed
//	borrowed -> idle      given back, or probed and found fit
//	borrowed -> closing   not to be lent again
//	borrowed -> none      closed without blocking, detached, or quarantined
//	idle     -> borrowed  lent, or taken off for a probe
//	idle     -> closing   evicted, expired, or found dead
//	closing  -> none      the socket is closed, and the slot is free
type phase uint8

const (
	phaseNone     phase = iota
	phaseDialing        // owned by its dial
	phaseIdle           // owned by nobody, on the stack of its site
	phaseBorrowed       // owned by a borrower, by Push, by a sweep that probes it, or by the dial that has just ended
	phaseClosing        // owned by whoever closes it
	numPhases
)

// phaseMoves has for each phase the set of the phases that may follow it.
var phaseMoves = [numPhases]uint8{
	phaseNone:     1 << phaseDialing,
	phaseDialing:  1<<phaseBorrowed | 1<<phaseNone | 1<<phaseClosing,
	phaseIdle:     1<<phaseBorrowed | 1<<phaseClosing,
	phaseBorrowed: 1<<phaseIdle | 1<<phaseClosing | 1<<phaseNone,
	phaseClosing:  1 << phaseNone,
}

func (ph phase) String() string {
	return [numPhases]string{"none", "dialing", "idle", "borrowed", "closing"}[ph]
}

// conn is one connection of the pool. There may be a hundred thousand of them. To keep
// a conn small, the fields that only some loans need are in a loanState, the fields
// that few connections need are in coldFields, and times are instants.
//
// Nothing of one loan is visible in the next one. end clears the deadlines, stops the
// watch on ctx and revokes the handles. If something is left that end cannot clear
// (unread bytes, operations in flight, a socket that failed), checkout.finish discards
// the connection.
type conn struct {
	site *site         // never changes
	word atomic.Uint64 // the state word, drawn below

	// Pool.mu guards these; the owner may also use since.
	up, down       *conn         // neighbours in the idle stack
	younger, older *conn         // neighbours in recency, the order by last use
	since          clock.Instant // when it was given back, or, while it has an owner, when the owner got it; see lendAtLocked
	phase          phase
	round          uint8 // the last walk that visited it, see recency
	uncounted      bool  // the current loan is not in Stats yet; the owner may also use this field

	deadlineSet bool   // the socket has a deadline; dmu guards this during a loan, the owner uses it between loans
	epoch       uint32 // epoch of the site when the dial began

	// Only the owner uses these.
	idleFor time.Duration // how long it had been unused before this loan
	checked clock.Instant // when Config.Check last succeeded
	uses    int           // loans, this one included

	ctx  context.Context           // of the loan, see conn_ctx.go; nil: Background, or no loan. It is left over if the connection is not lent again
	loan atomic.Pointer[loanState] // nil while the loan needs no state
	dmu  sync.Mutex                // orders SetDeadline against the interrupt, and guards the fields that name it; nothing that blocks runs under it but SetDeadline of package net

	// Fixed once the dial has ended.
	nc     net.Conn
	sock   socket
	state  any // what Setup returned
	id     uint64
	born   clock.Instant
	maxAge time.Duration              // MaxLifetime less the jitter, drawn once, or less if the state expires earlier; 0: no limit
	cold   atomic.Pointer[coldFields] // nil for most connections, see coldFields
}

// loanState is the state of a loan that needs more than the state word. Most loans need
// none. The others take a loanState from a pool of used ones (see dropLoanState).
type loanState struct {
	c      *conn
	trace  *Trace      // nil: none
	record *loanRecord // who has the connection, since when; nil if loans are not recorded

	// dmu of c guards these once the loan has begun.
	nested     context.Context // of a use inside the loan, see underCtx; nil: none
	limit      time.Time       // deadline of the loan's ctx, which no deadline that fn sets may exceed; zero: none
	limited    bool            // limit is known, and set on the socket if there is one and the socket takes it
	firstErr   error           // first error of an operation, or of a deadline that could not be set
	foreignErr bool            // the reader or writer that an operation copied from or to has failed, or may have; see noteForeignError

	over    chan struct{} // closed when the loan leaves the operations of a foreign connection behind, see leavable; nil if it never does
	left    bool          // over is closed
	setting chan struct{} // closed when the SetDeadline call in progress is over, see tellDeadline; nil: none is in progress
	mute    bool          // SetDeadline panicked or has not returned, and is not called again

	watching  chan struct{} // closed when unwatch is set; nil: nobody has begun to watch ctx
	unwatch   func() bool   // stops the watch on ctx; nil if ctx could not be watched
	interrupt func()        // c.interrupt, made once: a method value allocates
}

var loanStates sync.Pool // of *loanState

// coldFields are the fields of a conn that most connections never need: those of
// MinIdlePerAddr, Push, Conn.Context, clients with I/O of their own, slow closes, a Close in a
// hook, a goodbye, a state that expires, a retirement of its own, and a peer that hung up during Setup. They are
// allocated on first use, so that a plain connection stays small.
type coldFields struct {
	checking    bool          // the connection is being probed; Pool.mu
	fromReserve bool          // it was lent from the reserve of its address, so its idle time does not count; only the owner uses it
	unread      bool          // the last loan left bytes for Push; only the owner uses it
	resident    *resident     // the client of a connection with flagResident; set before that flag, and fixed then
	goodbye     *goodbye      // the pool closes the connection, and the state may say goodbye; dmu
	pushback    *pushback     // bytes that a probe read, for the next loan to read first, see pushback.go; only the owner uses it
	ctx         connCtx       // dmu
	earlyClose  chan struct{} // set when closeUnderHook closes the socket during a hook's loan; closed when the socket is closed; dmu
	slow        bool          // its close takes long; Pool.mu
	recentLoans []pastLoan    // the latest loans, in debug mode; dmu
	expires     bool          // maxAge follows from the state's Expires, or from a certificate; fixed once the dial has ended
	cert        *clientCert   // what the TLS handshake has presented, with Config.TLSExpiry; likewise
	retired     *retirement   // why it is not lent again although Retire was not called; Pool.mu
	end         error         // how the peer ended the connection, if the probe after Setup found that, see conn.ended; only the owner uses it
}

// goodbye is the part of a close in which the state may use the connection.
type goodbye struct {
	reason CloseReason
	begun  atomic.Bool   // somebody closes the socket, or has closed it
	closed chan struct{} // closed when that has ended
}

// connCtx is the ctx of a connection's time in the pool. It is made on the first call
// of Conn.Context. conn.dmu guards it.
type connCtx struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	cause error // why the connection has left the pool; nil while it has not
}

// pastLoan is one of the latest loans, see recordBorrower.
type pastLoan struct {
	gen   uint64
	stack []byte
}

// Conn is a connection on loan: a net.Conn, by value, that is valid until fn returns.
// After that its methods fail with ErrReturned and touch nothing. As for any net.Conn,
// several goroutines may call its methods at once. If an operation is still running
// when fn returns, the pool closes the connection. The zero Conn behaves like a Conn
// that was returned.
//
// A deadline set on a Conn never exceeds the deadline of With's ctx, and ends with the
// loan. Errors are those of package net. A time-out is also the ctx's error if it was
// the ctx whose time ran out.
type Conn struct {
	c   *conn
	gen uint64
}

// idleRef is a connection that was idle, with the generation it had then.
type idleRef struct {
	c   *conn
	gen uint64
}

// dropLoanState puts the loanState of c back into the pool of used ones. Only the owner
// calls it, after a loan that ended in good order: no operation and no watch is left
// that could still use the loanState.
func (c *conn) dropLoanState() {
	if l := c.loan.Load(); l != nil {
		c.loan.Store(nil)
		if c.isResident() { // an operation that the client began in Setup may still look at l
			return
		}
		*l = loanState{interrupt: l.interrupt}
		loanStates.Put(l)
	}
}

// The state word:
//
//	 63            29 28         17 16           0
//	+----------------+-------------+--------------+
//	|   generation   | operations  |    flags     |
//	|  of the loan   | in flight   |              |
//	+----------------+-------------+--------------+
//
// A handle (a Conn) carries the generation of its loan. An operation of the handle
// begins with a compare-and-swap (enter): flagLent must be set, the generation must be
// equal, and the count of operations goes up. The operation ends with a subtraction
// (leave). The loan ends in one step that clears flagLent (end, abort), so no operation
// can begin after it. Operations that are still counted at that moment make the
// connection unfit to be lent again. Whoever sets flagGone (Conn.Close, Conn.Detach,
// revoke) becomes the owner in the place of the borrower.
//
// The guard is the net.Conn that Config.Setup got: a handle that outlives the loans. It
// has generation 0, and works in whichever loan is under way. Between two loans it
// fails with ErrReturned.
//
// An example: the third loan of a connection. One goroutine closes the connection while
// another is blocked in Read.
//
//	With: begin   generation 3, lent              the loan is under way
//	Read: enter   generation 3, 1 op, lent
//	Close         generation 3, 1 op, lent gone   the caller of Close owns the connection
//	... discard   generation 3, 1 op, lent gone shut
//	Read: leave   generation 3, 0 ops, ...        the operation failed, as the socket is closed
//	With: end     generation 3, gone shut ...     lent is cleared; With finds gone and touches nothing
//
// If a Conn of this loan is used later, it finds flagLent cleared or another
// generation, and returns ErrReturned.
//
// A second example: the ctx of the fourth loan is done while fn is blocked in Read on a
// socket of package net.
//
//	With: begin   generation 4, lent unwatched listed
//	tick          generation 4, lent              the loan is still out: the watch on ctx is set
//	Read: enter   generation 4, 1 op, lent
//	interrupt     generation 4, 1 op, lent cut    the deadline is now in the past
//	Read: leave   generation 4, 0 ops, ... timedOut
//	With: end     generation 4, cut timedOut      the verdict finds cut: the pool closes the connection
//
// A new loan (begin) clears all flags but those of flagsLasting: other goroutines may change
// hungUp, stolen, broken and listed at any moment, and the others count over all loans.
const (
	flagLent       = 1 << iota // a loan is under way
	flagHooked                 // the loan is a hook's: Close of the hook's Conn does not make its caller the owner
	flagGone                   // the borrower has closed or detached the connection, or the pool has closed it after its ctx was done (revoke)
	flagDetached               // set together with flagGone by Detach; the guard keeps working
	flagCut                    // the ctx of the loan, or of a use nested in it, was done
	flagMoved                  // this loan has read or written bytes, or may have
	flagBroken                 // an operation failed
	flagTimedOut               // an operation timed out
	flagHalfClosed             // the sending side was shut down (CloseWrite), or fn expected the end of the stream, see noteContent
	flagHungUp                 // the peer was seen to hang up; the next probe must look
	flagStolen                 // the descriptor is proven to be another socket's
	flagShut                   // the pool closes the socket, or has closed it
	flagWrote                  // a borrower has written, in this loan or an earlier one; see pool_lived.go
	flagRead                   // a borrower has read, likewise
	flagUnwatched              // the loan has a ctx, and nobody watches that ctx yet
	flagListed                 // the connection is on the list of young loans
	flagResident               // a client does the I/O, see conn_resident.go

	oneOp    = 1 << 17
	inFlight = (1<<12 - 1) << 17
	genShift = 29
	lastGen  = 1<<(64-genShift) - 1 // the generation after it is 1
)

// flagsLived are the flags of the state word that say how far a connection has come. They
// last from the dial to the close. Both together mean that the connection has lived, or
// that its end is recorded already.
const flagsLived = flagWrote | flagRead

// flagsLasting are the flags that one loan leaves to the next. The operations of a client with I/O
// of its own (flagResident) last, too, see carriedOver.
const flagsLasting = flagHungUp | flagStolen | flagBroken | flagShut | flagWrote | flagRead | flagListed | flagResident

// carriedOver returns what of the state word one loan leaves to the next.
func carriedOver(word uint64) uint64 {
	if word&flagResident != 0 {
		return word & (flagsLasting | inFlight)
	}
	return word & flagsLasting
}

// operating reports whether operations of the loan, or of the last one, are running. The operations
// of a client with I/O of its own are not the loan's.
func operating(word uint64) bool { return word&inFlight != 0 && word&flagResident == 0 }

// isResident reports whether c has a client with I/O of its own.
func (c *conn) isResident() bool { return c.word.Load()&flagResident != 0 }

// resident returns the client of c; nil if c has none.
func (c *conn) resident() *resident {
	if !c.isResident() {
		return nil
	}
	return c.cold.Load().resident
}

// link puts c on the idle stack of its site: on top, or, if inOrder, at the place that
// fits the time of its last use.
func (c *conn) link(inOrder bool) {
	s := c.site
	above, below := (*conn)(nil), s.top
	for inOrder && below != nil && below.unusedSince() > c.since {
		above, below = below, below.down
	}
	c.up, c.down = above, below
	if above == nil {
		s.top = c
	} else {
		above.down = c
	}
	if below != nil {
		below.up = c
	}
}

// lendAtLocked records that c, which was idle, has an owner from now on. now was read
// before the caller had the lock, so it may be earlier than c.since.
//
// While c has an owner, since is when the owner got c, and idleFor is how long c had
// been unused before. A connection that goes back to the idle stack unused gets its
// earlier since again.
func (c *conn) lendAtLocked(now clock.Instant) {
	now = max(now, c.since)
	c.idleFor, c.since = now.Sub(c.since), now
}

// unusedSince returns since when c has been unused: since it was given back if c is
// idle, else since the give-back before its current owner got it.
func (c *conn) unusedSince() clock.Instant {
	if c.phase == phaseIdle {
		return c.since
	}
	return c.since - clock.Instant(c.idleFor)
}

// linked reports whether c is on the idle stack of its site. An idle connection is. A
// connection that is being probed keeps its place on the stack until a borrower takes
// what lies below it, so that it goes back to the same place after the probe, however
// many others lie on top.
func (c *conn) linked() bool { return c.up != nil || c.site.top == c }

// topLocked returns the idle connection of s that was given back last, nil if s has
// none. It takes the connections that are being probed, and lie on top of that one, off
// the stack.
func (s *site) topLocked() *conn {
	if s.n[phaseIdle] == 0 {
		return nil
	}
	for s.top.phase != phaseIdle {
		s.top.unlink()
	}
	return s.top
}

// unlink takes c off the idle stack.
func (c *conn) unlink() {
	if c.up == nil {
		c.site.top = c.down
	} else {
		c.up.down = c.down
	}
	if c.down != nil {
		c.down.up = c.up
	}
	c.up, c.down = nil, nil
}

// generation returns the generation of the current loan, or of the last one.
func (c *conn) generation() uint64 { return c.word.Load() >> genShift }

// ensureCold returns the cold fields of c, and allocates them if there are none yet.
func (c *conn) ensureCold() *coldFields {
	for {
		if e := c.cold.Load(); e != nil {
			return e
		}
		if e := new(coldFields); c.cold.CompareAndSwap(nil, e) {
			return e
		}
	}
}

// whyTooOld says why c, which has reached its maxAge, is closed.
func (c *conn) whyTooOld() CloseReason {
	if e := c.cold.Load(); e != nil && e.expires {
		return ClosedExpired
	}
	return ClosedLifetime
}

// setFlag sets flag: flagStolen, or flagBroken for a connection whose socket other code uses
// too. It sets nothing if the connection is known to be stolen or is no longer the pool's:
// it is being closed (seal), or its borrower has detached it. Each of these is one step on
// the state word, so there is always a first and a second.
//
// The flag is found by the owner of a loan at its end (verdict), and between loans, through
// condemned, by the function that probes the connection (probe) and by the one that releases
// it (whyUnwantedLocked).
func (c *conn) setFlag(flag uint64) bool {
	for {
		w := c.word.Load()
		if w&(flagStolen|flagShut|flagDetached) != 0 {
			return false
		}
		if c.word.CompareAndSwap(w, w|flag) {
			return true
		}
	}
}

// condemned says why c, which has no loan now, may not be lent again, whatever a probe
// would find: ClosedUnknown, or what setFlag has left. A failed operation sets flagBroken, too,
// but a connection with that flag is not kept at the end of its loan.
func (c *conn) condemned() (CloseReason, error) {
	switch w := c.word.Load(); {
	case w&flagStolen != 0:
		return ClosedQuarantined, errStolen
	case w&flagBroken != 0:
		if r := c.resident(); r != nil && r.ended() != nil {
			return ClosedStale, r.ended()
		}
		return ClosedMarkedDead, nil
	}
	return ClosedUnknown, nil
}
