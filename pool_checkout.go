package connpool

import (
	"context"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// checkout is a connection in the hands of a borrower, from the borrow to the
// give-back: what With, a Lease, its Do and a use of a session have in common. It
// lives on the stack of one call.
//
//	get     Trace.GetConn
//	borrow  the checkout becomes the owner of a connection
//	start   the loan begins
//	got     Trace.GotConn
//	end     the loan is over; the connection may be gone by the borrower's doing
//	close   the connection is discarded
//	reset, release, put   it is put in order, given back, and Trace.PutConn told
//
// finish is all of the end in one, and rescue, deferred, is the end if foreign code
// did not return.
type checkout struct {
	p      *Pool
	c      *conn
	trace  *Trace
	waited time.Duration
	owned  bool // c is this checkout's to close or give back; until it is closed, given back, detached, or handed on
}

// get tells Trace.GetConn.
func (k *checkout) get(addr *Addr) {
	if k.trace != nil {
		k.tellGet(addr)
	}
}

func (k *checkout) tellGet(addr *Addr) {
	if t := k.trace; t.GetConn != nil {
		k.p.report.named("Trace.GetConn", func() { t.GetConn(*addr) })
	}
}

// borrow makes the checkout the owner of a connection to addr.
func (k *checkout) borrow(ctx context.Context, addr *Addr) (err error) {
	k.c, k.waited, err = k.p.borrow(ctx, addr, k.trace)
	k.owned = err == nil
	return err
}

// hold writes down who has the connection: the caller's caller, skip frames further
// up.
func (k *checkout) record(skip int) {
	k.c.observedBy(k.trace) // a hold that lasts too long is told to the borrower's Trace
	k.c.recordLoan(skip + 1)
}

// start begins the loan.
func (k *checkout) start(ctx context.Context) Conn {
	k.c.uses++
	k.c.uncounted = true
	k.c.observedBy(k.trace)
	return k.c.begin(ctx, 0)
}

// got tells Trace.GotConn, when the loan has begun: what the function does with a
// session's connection is a use inside this one.
func (k *checkout) got() {
	if k.trace != nil {
		k.tellGot()
	}
}

func (k *checkout) tellGot() {
	t, c := k.trace, k.c
	if t.GotConn == nil {
		return
	}
	info := GotInfo{Addr: c.site.addr, ID: c.id, Reused: c.uses > 1, Uses: c.uses, IdleFor: c.idleFor, Waited: k.waited}
	k.p.report.named("Trace.GotConn", func() { t.GotConn(info) })
}

// end ends the loan. It returns the state word as the loan left it, and whether the
// connection is still the checkout's: the borrower may have closed or detached it.
func (k *checkout) end() (word uint64, mine bool) {
	word = k.c.end()
	if word&flagGone != 0 {
		k.owned = false
	}
	return word, k.owned
}

// close discards the connection.
func (k *checkout) close(reason CloseReason, why error) {
	k.owned = false
	k.c.discard(reason, why)
}

// finish is the end of a loan that ended by return: the verdict, and the give-back.
// It returns what fn returned, without the marks of Keep.
func (k *checkout) finish(ctx context.Context, err error) error {
	word, mine := k.end()
	if !mine {
		return unkeep(err)
	}
	c := k.c
	reason, why := c.verdict(ctx, word, err)
	if reason == ClosedUnknown {
		reason, why = c.unclean(word)
	}
	if reason != ClosedUnknown {
		k.close(reason, why)
		return unkeep(err)
	}
	if k.reset(ctx) {
		id, s, lentAt := c.id, c.site, c.since // the connection is somebody else's after release
		if k.release() && k.trace != nil {
			k.put(s.addr, id, lentAt)
		}
	}
	return unkeep(err)
}

// release gives back a connection that is in order, and reports whether the pool has
// kept it.
func (k *checkout) release() (kept bool) {
	k.owned = false
	return k.c.release()
}

// put tells Trace.PutConn of a connection that was lent at that moment and kept.
func (k *checkout) put(addr Addr, id uint64, lentAt clock.Instant) {
	if t := k.trace; t != nil && t.PutConn != nil {
		info := PutInfo{Addr: addr, ID: id, Held: k.p.clock.Exactly().Sub(lentAt)}
		k.p.report.named("Trace.PutConn", func() { t.PutConn(info) })
	}
}

// rescue is deferred by whoever runs foreign code with a checkout: fn, Reset, a Trace
// function. If that did not return, the connection is closed; a panic goes on.
func (k *checkout) rescue() {
	if !k.owned {
		return
	}
	reason, v := ClosedGoexit, recover()
	if v != nil {
		reason = ClosedPanic
	}
	if k.c.abort() {
		k.close(reason, nil)
	}
	if v != nil {
		panic(v)
	}
}

// verdict says why a connection may not be used again after a loan that left
// word and err behind, ClosedUnknown if it may.
func (c *conn) verdict(ctx context.Context, word uint64, err error) (CloseReason, error) {
	forgiven := err != nil && isKept(err)
	switch {
	case word&flagStolen != 0:
		return ClosedQuarantined, errStolen
	case word&flagCut != 0 || ctx.Err() != nil:
		return ClosedCanceled, causeOf(ctx)
	case err != nil && !forgiven:
		return ClosedFnError, err
	case word&inFlight != 0:
		return ClosedInFlight, nil
	case word&flagBroken != 0:
		return ClosedBroken, c.failure()
	case word&flagHalfClosed != 0:
		return ClosedHalfClosed, nil
	case word&flagTimedOut != 0 && !forgiven:
		return ClosedTimeout, c.failure()
	}
	return ClosedUnknown, nil
}

// unclean says why a connection may not be used again after a loan that left word
// behind, although nothing failed in the loan: bytes were left in the state or in
// crypto/tls.
func (c *conn) unclean(word uint64) (CloseReason, error) {
	if c.leftovers(word) {
		return ClosedDirty, c.held().clean("the borrower")
	}
	return ClosedUnknown, nil
}

// reset puts the connection in order for the next borrower, and reports whether it
// could. If it could not, the connection is closed.
func (k *checkout) reset(ctx context.Context) bool {
	p, c := k.p, k.c
	own := false // why is of Reset, which ran for this borrower
	reason, why := c.condemned()
	if reason == ClosedUnknown && c.word.Load()&flagHungUp != 0 {
		if reason, why = c.probe(); p.cfg.isForPush(reason) {
			reason = ClosedUnknown
			c.ensureCold().unread = true
		}
	}
	if reason == ClosedUnknown && p.cfg.Reset != nil {
		if c.sock.isStolen() {
			reason, why = ClosedQuarantined, errStolen
		} else if why = c.runHook(context.WithoutCancel(ctx), "Config.Reset", p.cfg.Reset); why != nil {
			reason, own = ClosedResetFailed, true
		}
	}
	if reason == ClosedUnknown {
		return true
	}
	k.close(reason, why)
	if own {
		passOn(why)
	}
	return false
}
