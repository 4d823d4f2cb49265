package gateway

import (
	"context"
	"errors"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// batchBytes bounds how many bytes of one client's requests are sent together before
// their replies arrive. A single request may be longer.
const batchBytes = 16 << 10

// serveExchanges serves a client whose protocol has one reply to each request.
func (cl *client) serveExchanges() {
	for {
		first, err := cl.next(cl.g.IdleTimeout)
		if err == nil {
			cl.batch = append(cl.batch[:0], first)
			size := len(first)
			for len(cl.batch) < cl.g.Pipeline && size < batchBytes {
				more, ok, bad := cl.in.take()
				if !ok || bad != nil { // the next read finds the error again
					break
				}
				cl.batch = append(cl.batch, more)
				size += len(more)
			}
			err = cl.exchange(cl.g.ctx, cl.g.to, cl.in.store.b[cl.in.start-size:cl.in.start])
		}
		if err != nil {
			cl.parted(err) // counted before the client can see the end
			cl.bidFarewell(err)
			return
		}
	}
}

// exchange carries out the requests in cl.batch, which lie side by side in wire, and
// writes the replies to the client. An error means that the client must be closed.
func (cl *client) exchange(ctx context.Context, addr connpool.Addr, wire []byte) error {
	unheard := cl.ask(ctx, addr, wire)
	if len(cl.out.b) == 0 && unheard == nil && cl.isGone() { // a write would find that out, but there is nothing to write
		return errLeft
	}
	if err := cl.flush(); err != nil {
		return err
	}
	return unheard
}

// ask appends to cl.out a reply to each request in cl.batch, in their order, or the
// protocol's error reply for a failure. It returns the connection to the pool before it
// returns. An error means that the protocol has no error reply.
func (cl *client) ask(ctx context.Context, addr connpool.Addr, wire []byte) error {
	g := cl.g
	latest := time.Now().Add(g.RequestTimeout) // for the last reply
	var cancel func()
	lent := func() {}               // ends the timeout of the wait
	if g.framing.name == "modbus" { // modbus recognises late replies, so the connection may outlive the request
		waiting, end := context.WithCancelCause(ctx)
		late := time.AfterFunc(g.RequestTimeout, func() { end(context.DeadlineExceeded) })
		ctx, cancel, lent = waiting, func() { end(nil) }, func() { late.Stop() }
		defer late.Stop()
	} else {
		ctx, cancel = context.WithDeadline(ctx, latest)
	}
	defer cancel()
	watch := cl.watchOver(false, cancel)
	defer watch.stop()
	g.count.requests.Add(uint64(len(cl.batch)))
	mark, answered, ran := len(cl.out.b), 0, false
	var demotion []byte // a reply that says the server is demoted
	var unheard error
	refuse := func(err error) {
		if told := cl.failed(cl.out.b, cl.batch[answered], err, ran); told != nil {
			cl.out.b = told
		} else if unheard == nil {
			unheard = errUnheard
		}
		answered++
	}
	try := func(c connpool.Conn) error {
		lent()
		if watch.stop() != nil {
			return connpool.Keep(errLeft)
		}
		u := connpool.State[*replies](c)
		u.listened = false
		believed := latest.Add(-g.RequestTimeout / 4) // leaves time to send the client an error
		if err := g.greet.before(c, u, believed); err != nil {
			return err
		}
		if watch.sendable() != nil {
			return u.kept(errLeft)
		}
		if !time.Now().Before(latest) {
			return u.kept(context.DeadlineExceeded)
		}
		ran = true
		if g.framing.name == "modbus" {
			err := u.modbus(c, cl.batch[0], &cl.out, &answered, latest, &g.Config)
			if err == nil {
				err = u.kept(nil)
			}
			return err
		}
		believable := u.settled || g.greet.wait <= 0 // replies are trusted at once, whatever happens to the connection later
		asked, proof := time.Now(), g.greet.mark(u)
		err := converse(c, wire, proof, g.to.QoS.SendBuffer > 0, func() error {
			for answered < len(cl.batch) {
				at := len(cl.out.b)
				switch err := u.reply(c, &cl.out); {
				case err == nil:
					answered++
					if g.framing.demotes != nil && g.framing.demotes(cl.out.b[at:]) {
						demotion = cl.out.b[at:]
					}
				case errors.Is(err, errNoMemory): // the connection is still in step
					if refuse(err); unheard != nil {
						return unheard
					}
				default:
					return err
				}
			}
			var err error
			if proof == nil {
				err = g.greet.after(c, u, asked, believed)
			} else {
				err = g.greet.marked(c, u, asked, believed)
			}
			believable = believable || err == nil
			return err
		})
		if err != nil && !believable { // any of the replies may have been an unasked one
			cl.out.b, answered = cl.out.b[:mark], 0
		}
		if err == nil {
			err = u.kept(nil)
		}
		if demotion != nil { // before the pool gets this connection back
			g.demoted(demotion)
		}
		return err
	}
	err := g.hopeless()
	if err == nil {
		err = g.pool.With(ctx, addr, try)
	}
	if errors.Is(err, errSilent) {
		err = nil
	}
	if watch.verdict() != nil && !ran {
		err = errLeft
		unheard = errLeft
		g.count.failures[left].Add(uint64(len(cl.batch)))
		g.Logger.Debug("request dropped", "client", cl.raw.RemoteAddr(), "error", err)
		return err
	}
	if err != nil && answered < len(cl.batch) && unheard == nil {
		for refuse(err); answered < len(cl.batch) && unheard == nil; {
			refuse(errBehind)
		}
	}
	g.count.replies.Add(uint64(answered))
	if err == nil {
		g.answered()
	}
	return unheard
}

// kept returns err, marked with connpool.Keep if the connection is in step. The timeout
// of a read that was meant to time out does not count as a failure.
func (u *replies) kept(err error) error {
	if err == nil && u.listened {
		err = errSilent
	}
	return connpool.Keep(err)
}

// errBehind is the error of requests that came after one that failed.
var errBehind = errors.New("the connection was given up with an earlier request")

// failed counts a request that was not answered and appends the protocol's error reply to
// dst; it returns nil if the protocol has none. ran: the request had a connection.
func (cl *client) failed(dst, request []byte, err error, ran bool) []byte {
	g := cl.g
	why := g.failureOf(err, ran)
	g.count.failures[why].Add(1)
	g.unanswered(why, err)
	g.Logger.Debug("request failed", "client", cl.raw.RemoteAddr(), "why", why, "error", err)
	var said *serverSaid
	if errors.As(err, &said) {
		return append(dst, said.line...)
	}
	return g.framing.refuse(&g.Config, dst, request, why)
}

// converse sends wire and then more, and receives. Bytes beyond what the sockets are sure
// to buffer are sent while the reply is read; otherwise a server that answers before it
// has read everything would wait for us while we wait for it. With small set, nothing is
// assumed to be buffered.
func converse(c connpool.Conn, wire, more []byte, small bool, receive func() error) error {
	if len(wire)+len(more) <= batchBytes && !small {
		if len(more) > 0 { // wire lies in the client's buffer, with other bytes behind it
			wire = append(append(make([]byte, 0, len(wire)+len(more)), wire...), more...)
		}
		if _, err := c.Write(wire); err != nil {
			return err
		}
		return receive()
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(wire)
		if err == nil && len(more) > 0 {
			_, err = c.Write(more)
		}
		sent <- err
	}()
	err := receive()
	if err != nil {
		c.Close() // ends the write
		<-sent
		return err
	}
	return <-sent
}
