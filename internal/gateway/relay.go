package gateway

import (
	"context"
	"errors"

	"github.com/seed-ecb488c9/connpool"
)

// batchBytes bounds what is sent ahead of replies when several requests of one
// client go together. A single request may be longer.
const batchBytes = 16 << 10

// serveExchanges is the life of a client whose protocol is one reply to each
// request.
func (cl *client) serveExchanges() {
	for {
		first, err := cl.next(cl.g.IdleTimeout)
		if err == nil {
			cl.batch = append(cl.batch[:0], first)
			size := len(first)
			for len(cl.batch) < cl.g.Pipeline && size < batchBytes {
				more, ok, bad := cl.in.take()
				if !ok || bad != nil { // what is bad is found again
					break
				}
				cl.batch = append(cl.batch, more)
				size += len(more)
			}
			err = cl.exchange(cl.g.ctx, cl.g.to, cl.in.store.b[cl.in.start-size:cl.in.start])
		}
		if err != nil {
			cl.parted(err)
			return
		}
	}
}

// exchange carries out the requests in cl.batch, which lie side by side in wire,
// and writes the replies to the client. An error means that the client is done
// for.
func (cl *client) exchange(ctx context.Context, addr connpool.Addr, wire []byte) error {
	unheard := cl.ask(ctx, addr, wire)
	if err := cl.flush(); err != nil {
		return err
	}
	return unheard
}

// ask appends to cl.out a reply to each request in cl.batch, in their order, or
// the protocol's word for a failure. The connection is given back before it
// returns. An error means that the protocol has no such word.
func (cl *client) ask(ctx context.Context, addr connpool.Addr, wire []byte) error {
	g := cl.g
	ctx, cancel := context.WithTimeout(ctx, g.RequestTimeout)
	defer cancel()
	g.count.requests.Add(uint64(len(cl.batch)))
	answered, ran := 0, false
	var unheard error
	refuse := func(err error) {
		if told := cl.failed(cl.out.b, cl.batch[answered], err, ran); told != nil {
			cl.out.b = told
		} else if unheard == nil {
			unheard = errUnheard
		}
		answered++
	}
	err := g.pool.With(ctx, addr, func(c connpool.Conn) error {
		ran = true
		u := connpool.State[*replies](c)
		if g.framing.name == "modbus" {
			return u.modbus(c, cl.batch[0], &cl.out, &answered)
		}
		return converse(c, wire, func() error {
			for answered < len(cl.batch) {
				switch err := u.next(c, &cl.out); {
				case err == nil:
					answered++
				case errors.Is(err, errNoMemory): // and in step all the same
					if refuse(err); unheard != nil {
						return unheard
					}
				default:
					return err
				}
			}
			return nil
		})
	})
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

// errBehind is what became of the requests behind one that failed.
var errBehind = errors.New("the connection was given up with an earlier request")

// failed counts a request that was not answered and appends the protocol's word
// for it, nil if it has none. ran: there was a connection.
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

// converse sends wire and receives. What is longer than the sockets are sure to
// hold is sent while the reply is read, or a server that answers before it has
// read all would wait for us and we for it.
func converse(c connpool.Conn, wire []byte, receive func() error) error {
	if len(wire) <= batchBytes {
		if _, err := c.Write(wire); err != nil {
			return err
		}
		return receive()
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(wire)
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
