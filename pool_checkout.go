package connpool

import (
	"context"
	"errors"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// checkout is a connection that a borrower has, from the borrow to the give-back. With,
// Lease, Lease.Do and a use of a session share it. A checkout lives on the stack of one
// call.
//
//	get     calls Trace.GetConn
//	borrow  makes the checkout the owner of a connection
//	start   begins the loan
//	got     calls Trace.GotConn
//	end     ends the loan; the borrower may have closed or detached the connection
//	close   discards the connection
//	reset, release, put   put the connection in order, give it back, call Trace.PutConn
//
// finish does the whole end. rescue, which is deferred, does the end if foreign code did
// not return.
type checkout struct {
	p      *Pool
	c      *conn
	trace  *Trace
	waited time.Duration
	owned  bool // the checkout owns c: until c is closed, given back, detached, or passed to another owner
}

// get calls Trace.GetConn.
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

// record makes the loan record, which says who has the connection: the caller of the
// caller, skip frames further up.
func (k *checkout) record(skip int) {
	k.c.observedBy(k.trace) // the borrower's Trace is called when the loan lasts too long
	k.c.recordLoan(skip + 1)
}

// start begins the loan.
func (k *checkout) start(ctx context.Context) Conn {
	k.c.uses++
	k.c.uncounted = true
	k.c.observedBy(k.trace)
	return k.c.begin(ctx, 0)
}

// got calls Trace.GotConn. The loan has begun then, so that a use of a session's connection
// inside that function counts as a use inside this loan.
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

// end ends the loan. It returns the state word at the end of the loan, and whether the
// checkout still owns the connection: the borrower may have closed or detached it.
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

// finish ends a loan whose fn returned: it finds the verdict and gives the connection back
// or closes it. It returns what fn returned, without the marks of Keep.
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
		id, s, lentAt := c.id, c.site, c.since // after release the connection belongs to another owner
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

// put calls Trace.PutConn for a connection that was lent at lentAt and was kept.
func (k *checkout) put(addr Addr, id uint64, lentAt clock.Instant) {
	if t := k.trace; t != nil && t.PutConn != nil {
		info := PutInfo{Addr: addr, ID: id, Held: k.p.clock.Exactly().Sub(lentAt)}
		k.p.report.named("Trace.PutConn", func() { t.PutConn(info) })
	}
}

// rescue is deferred by every function that runs foreign code with a checkout: fn, Reset, a
// Trace function. If the foreign code did not return, rescue closes the connection; a panic
// goes on.
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

// verdict says why a connection may not be used again after a loan that left word and err
// behind; ClosedUnknown if it may.
func (c *conn) verdict(ctx context.Context, word uint64, err error) (CloseReason, error) {
	forgiven := err != nil && isKept(err)
	switch {
	case word&flagStolen != 0:
		return ClosedQuarantined, errStolen
	case word&flagCut != 0 || ctx.Err() != nil:
		return ClosedCanceled, causeOf(ctx)
	case err != nil && !forgiven && !c.isHarmless(ctx, word, err):
		return ClosedFnError, err
	case operating(word):
		return ClosedInFlight, nil
	case word&flagBroken != 0:
		return ClosedBroken, c.failure()
	case word&flagHalfClosed != 0:
		return ClosedHalfClosed, nil
	case word&flagTimedOut != 0 && !forgiven:
		return ClosedTimeout, c.failure()
	case word&flagResident != 0 && c.clientClosedSocket():
		return ClosedStale, errClientClosed
	}
	return ClosedUnknown, nil
}

// disorder are the flags of a loan after which Config.KeepErr is not asked. Nor is it asked while
// operations of the loan are running.
const disorder = flagStolen | flagCut | flagGone | flagBroken | flagHalfClosed | flagTimedOut

// isHarmless reports whether Config.KeepErr says that err, which fn returned and which has no
// mark of Keep, leaves the connection in step. The caller owns the connection, and word is
// its state word.
func (c *conn) isHarmless(ctx context.Context, word uint64, err error) bool {
	env := c.site.env
	keep, addr := env.cfg.KeepErr, c.site.addr
	if keep == nil || word&disorder != 0 || operating(word) || ctx.Err() != nil {
		return false
	}
	said := make(chan bool, 1)
	failed := briefly("Config.KeepErr", foreignPatience, func() error {
		var other *Error
		said <- !errors.As(err, &other) && keep(addr, err)
		return nil
	})
	if failed != nil {
		env.report.outlived(failed, addr)
		return false
	}
	return <-said
}

// unclean says why a connection may not be used again although nothing failed in the loan,
// which left word behind: bytes were left in the state or in crypto/tls.
func (c *conn) unclean(word uint64) (CloseReason, error) {
	if c.state == nil && c.sock.tls == nil || word&flagResident != 0 {
		return ClosedUnknown, nil // there is nothing that could hold bytes
	}
	if c.leftovers(word) {
		return ClosedDirty, c.held().clean("the borrower")
	}
	return ClosedUnknown, nil
}

// reset puts the connection in order for the next borrower, and reports whether that
// succeeded. If it failed, reset closes the connection.
func (k *checkout) reset(ctx context.Context) bool {
	p, c := k.p, k.c
	own := false // why is an error of Config.Reset, which ran for this borrower
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
		} else if why = c.runHook(ctx, false, "Config.Reset", p.cfg.Reset); why != nil {
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
