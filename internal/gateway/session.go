package gateway

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

const sessionBuffer = 32 << 10

// serveSession is the life of a client whose protocol the gateway does not know:
// it has a connection of its own from its first byte until either side is done,
// and that connection serves nobody else after it.
func (cl *client) serveSession() {
	g := cl.g
	first := make([]byte, clientBuffer) // as long as it has no connection
	n := 0
	if !g.Eager {
		err := cl.readWithin(g.IdleTimeout)
		if err == nil {
			n, err = cl.in.r.Read(first)
		}
		switch {
		case n > 0:
		case g.draining.Load():
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			cl.parted(errIdle)
			return
		default:
			cl.parted(err)
			return
		}
	}
	g.count.requests.Add(1)
	ran := false
	err := cl.inPlace(func(c connpool.Conn) error {
		ran = true
		defer c.Close()
		g.count.pinned.Add(1)
		defer g.count.pinned.Add(-1)
		buf := make([]byte, sessionBuffer)
		cl.relay(c, buf[:copy(buf, first[:n])], buf)
		return nil
	})
	if !ran && err != nil {
		why := g.failureOf(err, false)
		g.count.failures[why].Add(1)
		g.unanswered(why, err)
		g.Logger.Debug("no connection for a session", "client", cl.raw.RemoteAddr(), "why", why, "error", err)
	}
}

// inPlace waits for one of the MaxOpen places of sessions, in the order of
// arrival, and for a connection, and lends that to fn. A client whose direction
// ends while it waits for a place has left; once it has one, the end of its
// direction is a part of what it has to say.
func (cl *client) inPlace(fn func(connpool.Conn) error) error {
	g := cl.g
	ctx, leave := context.WithCancel(g.ctx)
	defer leave()
	if err := cl.takePlace(ctx, leave); err != nil {
		return err
	}
	defer func() { <-g.places }()
	watch := cl.watchOver(false, leave)
	defer watch.stop()
	err := cl.ownUnder(ctx, g.to, func(_ context.Context, c connpool.Conn) error {
		if err := watch.sendable(); err != nil {
			return err
		}
		return fn(c)
	})
	if watch.verdict() != nil {
		return errLeft
	}
	return err
}

// takePlace waits for a place of a session, which whoever has it gives back.
func (cl *client) takePlace(ctx context.Context, leave func()) error {
	g := cl.g
	select {
	case g.places <- struct{}{}:
		return nil
	default:
	}
	g.count.queued.Add(1)
	defer g.count.queued.Add(-1)
	late := time.NewTimer(g.RequestTimeout)
	defer late.Stop()
	watch := cl.watchOver(true, leave)
	defer watch.stop()
	select {
	case g.places <- struct{}{}:
	case <-late.C:
		return context.DeadlineExceeded
	case <-ctx.Done():
		if err := watch.stop(); err != nil {
			return err
		}
		return ctx.Err()
	}
	if err := watch.sendable(); err != nil {
		<-g.places
		return err
	}
	return nil
}

// ownUnder lends the client a connection for as long as fn takes. Waiting for it
// may take RequestTimeout; the ctx of fn has no deadline.
func (cl *client) ownUnder(ctx context.Context, addr connpool.Addr, fn func(context.Context, connpool.Conn) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	late := time.AfterFunc(cl.g.RequestTimeout, func() { cancel(context.DeadlineExceeded) })
	defer late.Stop()
	return cl.g.pool.With(ctx, addr, func(c connpool.Conn) error {
		if !late.Stop() {
			return context.DeadlineExceeded
		}
		return fn(ctx, c)
	})
}

// relay carries bytes both ways until both directions have ended, or one has
// failed. The end of one direction is passed on as such, and a break as a break.
func (cl *client) relay(c connpool.Conn, first, buf []byte) {
	g := cl.g
	var q quiet
	q.begun = time.Now()
	q.moved()

	// carry ends with nil at the end of src.
	carry := func(dst, src net.Conn, buf []byte, pending int, counted bool) error {
		for {
			if pending > 0 {
				dst.SetWriteDeadline(time.Now().Add(g.WriteTimeout))
				n, err := dst.Write(buf[:pending])
				if counted {
					g.count.bytesOut.Add(uint64(n))
					g.answered()
				}
				if err != nil {
					return err
				}
				q.moved()
			}
			var err error
			if pending, err = cl.hear(src, buf, &q); err == io.EOF && pending == 0 {
				return nil
			} else if pending == 0 {
				return err
			}
		}
	}
	var failed atomic.Pointer[error] // why it ended, and not what followed from it
	down := make(chan struct{})
	go func() {
		err := carry(cl.conn, c, make([]byte, sessionBuffer), 0, true)
		if err == nil {
			err = closeWrite(cl.conn)
		}
		if err != nil { // the other direction has nothing to live for
			failed.CompareAndSwap(nil, &err)
			if g.broke(*failed.Load()) {
				resets(cl.raw)
			}
			cl.raw.Close()
		}
		q.serverDone.Store(true)
		cl.raw.SetReadDeadline(past) // so that it is looked at
		close(down)
	}()
	err := carry(c, countingConn{cl.conn, cl.in.r}, buf, len(first), false)
	if err == nil {
		err = closeWrite(c)
	}
	if err != nil {
		failed.CompareAndSwap(nil, &err)
		if why := *failed.Load(); why == errIdle {
			c.Close()
		} else {
			sever(c, g.to.Transport == connpool.TLS, g.broke(why))
		}
	}
	<-down
	if why := failed.Load(); why != nil && g.ctx.Err() == nil {
		cl.parted(*why)
	}
}

// quiet is what both directions know of each other's silence.
type quiet struct {
	begun      time.Time    // by a clock that nobody sets
	last       atomic.Int64 // when bytes went either way, in nanoseconds since begun
	serverDone atomic.Bool  // the server will send no more
}

func (q *quiet) moved() { q.last.Store(int64(time.Since(q.begun))) }

func (q *quiet) since() time.Time { return q.begun.Add(time.Duration(q.last.Load())) }

// hear reads from src. Silence ends a session only if the other direction has
// been silent for as long. A client whose server is done has less patience to
// expect: most servers are gone then, and their slot is wanted.
func (cl *client) hear(src net.Conn, buf []byte, q *quiet) (int, error) {
	for {
		limit, done := cl.g.IdleTimeout, q.serverDone.Load()
		if short := cl.g.RequestTimeout; done && (limit <= 0 || limit > short) {
			limit = short
		}
		end := q.since().Add(limit)
		if limit <= 0 {
			src.SetReadDeadline(time.Time{})
		} else {
			src.SetReadDeadline(end)
		}
		// Whoever sets serverDone sets a deadline after it, which this one may
		// have replaced.
		if q.serverDone.Load() != done {
			continue
		}
		n, err := src.Read(buf)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || cl.g.ctx.Err() != nil {
			return n, err
		}
		// A deadline that the drain set ends no session: that is for the cut.
		if limit > 0 && time.Now().After(end) && time.Since(q.since()) >= limit {
			return 0, errIdle
		}
	}
}

// countingConn is a client's connection whose reads are counted.
type countingConn struct {
	net.Conn
	r io.Reader
}

func (c countingConn) Read(b []byte) (int, error) { return c.r.Read(b) }

func closeWrite(nc net.Conn) error {
	if cw, ok := nc.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}
