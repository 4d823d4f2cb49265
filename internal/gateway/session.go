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

// serveSession serves a client whose protocol the gateway does not know. The client has a
// connection of its own from its first byte until either side is done; the connection is
// closed after it.
func (cl *client) serveSession() {
	g := cl.g
	first := make([]byte, clientBuffer) // enough until the client has a connection
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

// inPlace waits for one of the MaxOpen places for sessions, in order of arrival, and for
// a connection, and lends that connection to fn. A client that ends its direction while
// it waits for a place has left; once the client has a place, the end of its direction is
// part of its data.
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

// takePlace waits for a place for a session. The caller returns the place.
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

// ownUnder lends the client a connection for as long as fn takes. Waiting for the
// connection may take RequestTimeout; the ctx of fn has no deadline.
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

// relay carries bytes both ways until both directions have ended, or one has failed. It
// passes on an end as an end (half-close), and a failure as a reset.
func (cl *client) relay(c connpool.Conn, first, buf []byte) {
	g := cl.g
	var q quiet
	q.begun = time.Now()
	q.moved()

	// carry returns nil at the end of src.
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
	var failed atomic.Pointer[error] // the first error, not those that follow from it
	down := make(chan struct{})
	go func() {
		err := carry(cl.conn, c, make([]byte, sessionBuffer), 0, true)
		if why := failed.Load(); why != nil { // what looks like the end of the server may be the end that sever made
			err = *why
		} else if err == nil {
			err = closeWrite(cl.conn)
		}
		if err != nil { // the other direction cannot go on alone
			failed.CompareAndSwap(nil, &err)
			if g.broke(*failed.Load()) {
				resets(cl.raw)
			}
			cl.raw.Close()
		}
		q.serverDone.Store(true)
		cl.raw.SetReadDeadline(past) // so that hear checks serverDone
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

// quiet tells both directions how long no byte has passed.
type quiet struct {
	begun      time.Time    // monotonic time
	last       atomic.Int64 // when bytes last went either way, in nanoseconds since begun
	serverDone atomic.Bool  // the server will send no more
}

func (q *quiet) moved() { q.last.Store(int64(time.Since(q.begun))) }

func (q *quiet) since() time.Time { return q.begun.Add(time.Duration(q.last.Load())) }

// hear reads from src. Silence ends a session only if the other direction has been silent
// for as long. After the server has ended its direction, the limit drops to
// RequestTimeout: most servers are gone then, and the slot is needed.
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
		// relay sets serverDone and then a deadline, which the deadline set above may
		// have replaced.
		if q.serverDone.Load() != done {
			continue
		}
		n, err := src.Read(buf)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || cl.g.ctx.Err() != nil {
			return n, err
		}
		// A deadline set by the drain does not end a session; the drain cuts sessions off
		// itself.
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
