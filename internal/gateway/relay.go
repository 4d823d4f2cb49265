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

// exchange gets a reply to each request in cl.batch, which lie side by side in
// wire, or the protocol's word for a failure, and writes them to the client in
// the order of the requests. The connection is given back before. An error
// means that the client is done for.
func (cl *client) exchange(ctx context.Context, addr connpool.Addr, wire []byte) error {
	g := cl.g
	ctx, cancel := context.WithTimeout(ctx, g.RequestTimeout)
	defer cancel()
	g.count.requests.Add(uint64(len(cl.batch)))
	answered, ran := 0, false
	var unheard error
	refuse := func(why failure) {
		g.count.failures[why].Add(1)
		if told := g.framing.refuse(&g.Config, cl.out.b, cl.batch[answered], why); told != nil {
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
					if refuse(noMemory); unheard != nil {
						return unheard
					}
				default:
					return err
				}
			}
			return nil
		})
	})
	g.count.replies.Add(uint64(answered))
	if err != nil && answered < len(cl.batch) && unheard == nil {
		why := g.failureOf(err, ran)
		g.Logger.Debug("request failed", "client", cl.raw.RemoteAddr(), "why", why, "error", err)
		for refuse(why); answered < len(cl.batch) && unheard == nil; {
			refuse(lost)
		}
	}
	if err := cl.flush(); err != nil {
		return err
	}
	return unheard
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
