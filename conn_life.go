package connpool

import (
	"context"
	"fmt"
)

// extras are the fields that only MinIdlePerAddr, Push, Conn.Context and slow closes need.
// They are allocated on first use, so that a plain connection stays small.
type coldFields struct {
	checking    bool          // it is being looked at; Pool.mu
	fromReserve bool          // it was lent from its address's reserve, however long it had been idle; the owner's
	unread      bool          // the last loan left something for Push; the owner's
	pushback    *pushback     // what a look took out, for the next loan to read; the owner's, see pool_push.go
	ctx         connCtx       // dmu
	struck      chan struct{} // the socket was closed under a hook's loan; closed when that is done; dmu
	slow        bool          // it is being closed, and that takes its time; Pool.mu
	end         error         // the end of the peer that the look after Setup has met; the owner's, see conn.ended
}

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

// life is the ctx of a connection's time in the pool, made when somebody asks
// for it. Guarded by conn.dmu.
type connCtx struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	cause error // why the connection has left, nil while it has not
}

// Context is done when the connection leaves the pool, whichever way: evicted,
// expired, found dead, closed by its borrower or with the pool, or detached; the
// cause says why. It is for what lives as long as the connection, and not only
// for a loan: Setup may start a goroutine with it.
//
//	Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
//		a := newActor()
//		go a.run(nc.(connpool.Conn).Context())
//		return a, nil
//	}
//
// It carries no values. After the loan Context is a ctx that is done.
func (h Conn) Context() context.Context {
	if err := h.c.enter(h.gen); err != nil {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(err)
		return ctx
	}
	defer h.c.leave(0, nil)
	c, e := h.c, h.c.ensureCold()
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if e.ctx.ctx == nil {
		e.ctx.ctx, e.ctx.end = context.WithCancelCause(context.Background())
		switch { // an operation may have outlived its loan
		case e.ctx.cause != nil:
			e.ctx.end(e.ctx.cause)
		case c.word.Load()&(flagShut|flagStolen|flagDetached) != 0:
			e.ctx.end(ErrReturned)
		}
	}
	return e.ctx.ctx
}

// endLife ends the ctx of a connection that has left the pool.
func (c *conn) endLife(reason CloseReason) {
	e := c.cold.Load()
	if e == nil {
		return // nobody asked, and who asks now finds it shut
	}
	c.dmu.Lock()
	e.ctx.cause = leftPool(reason)
	end := e.ctx.end
	c.dmu.Unlock()
	if end != nil {
		end(leftPool(reason))
	}
}

// leftPool is why a connection has left.
type leftPool CloseReason

func (r leftPool) Error() string {
	if CloseReason(r) == ClosedUnknown {
		return "connpool: the connection was detached"
	}
	return fmt.Sprintf("connpool: the connection was closed: %v", CloseReason(r))
}
