package connpool

import (
	"context"
	"fmt"
)

// coldFields are the fields of a conn that most connections never need: those of
// MinIdlePerAddr, Push, Conn.Context, slow closes, a Close in a hook, and a peer that
// hung up during Setup. They are allocated on first use, so that a plain connection
// stays small.
type coldFields struct {
	checking    bool          // the connection is being probed; Pool.mu
	fromReserve bool          // it was lent from the reserve of its address, so its idle time does not count; only the owner uses it
	unread      bool          // the last loan left bytes for Push; only the owner uses it
	pushback    *pushback     // bytes that a probe read, for the next loan to read first, see pool_push.go; only the owner uses it
	ctx         connCtx       // dmu
	struck      chan struct{} // set when strike closes the socket during a hook's loan; closed when the socket is closed; dmu
	slow        bool          // its close takes long; Pool.mu
	end         error         // how the peer ended the connection, if the probe after Setup found that, see conn.ended; only the owner uses it
}

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

// connCtx is the ctx of a connection's time in the pool. It is made on the first call
// of Conn.Context. conn.dmu guards it.
type connCtx struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	cause error // why the connection has left the pool; nil while it has not
}

// Context returns a ctx that is done when the connection leaves the pool: when it is
// evicted, expires, is found dead, is closed by its borrower or with the pool, or is
// detached. The cause of the ctx says why. The ctx is for what lives as long as the
// connection and longer than a loan: Setup may start a goroutine with it.
//
//	Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
//		a := newActor()
//		go a.run(nc.(connpool.Conn).Context())
//		return a, nil
//	}
//
// The ctx carries no values. After the loan, Context returns a ctx that is already
// done.
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
		switch { // the connection may have left the pool: an operation may outlive its loan
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
		return // nobody has called Context; a later call finds flagShut, flagStolen or flagDetached
	}
	c.dmu.Lock()
	e.ctx.cause = leftPool(reason)
	end := e.ctx.end
	c.dmu.Unlock()
	if end != nil {
		end(leftPool(reason))
	}
}

// leftPool is the error that says why a connection has left the pool. ClosedUnknown
// stands for Detach.
type leftPool CloseReason

func (r leftPool) Error() string {
	if CloseReason(r) == ClosedUnknown {
		return "connpool: the connection was detached"
	}
	return fmt.Sprintf("connpool: the connection was closed: %v", CloseReason(r))
}
