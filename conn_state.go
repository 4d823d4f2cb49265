package connpool

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"reflect"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// held counts the bytes in the state of c. It calls methods of the state on the
// borrower's goroutine and without a bound, like fn; the pool's own goroutines call
// heldSoon. The caller owns c.
func (c *conn) held() (h holdings) {
	if c.state == nil || c.isResident() {
		return h
	}
	if r, ok := c.state.(*bufio.Reader); ok { // the most frequent kind of state
		countReader(r, &h)
		return h
	}
	shape, looked := shapeOf(reflect.TypeOf(c.state)), false
	defer func() {
		if looked {
			return
		}
		v := recover()
		pan := panicOf("Buffered of the state", v)
		if v != nil { // the panic goes on to the borrower, with the name of the method
			panic(pan)
		}
		c.site.env.report.outlived(pan, c.site.addr)
	}()
	h = c.search(shape)
	looked = true
	return h
}

// heldSoon is held with a bound, for goroutines of the pool. If the state does not
// answer in foreignPatience, the error says so, and the connection cannot be lent.
func (c *conn) heldSoon() (h holdings, _ error) {
	if c.state == nil || c.isResident() {
		return h, nil
	}
	shape := shapeOf(reflect.TypeOf(c.state))
	if !shape.asks {
		return c.search(shape), nil // no foreign code runs
	}
	got := make(chan holdings, 1)
	err := briefly("Buffered of the state", foreignPatience, func() error {
		got <- c.search(shape)
		return nil
	})
	if err != nil {
		c.site.env.report.outlived(err, c.site.addr)
		return h, err
	}
	return <-got, nil
}

// askExpiry asks the state of c, which Setup has just returned, or the client of Carry, until when c may be lent, and
// sets maxAge. Of the time that is left, a random part of up to a tenth is subtracted, drawn
// once, so that connections which expire at the same time are not closed and dialled at the
// same time; and a tick, by which the clock of a loan may lag.
func (c *conn) askExpiry() error {
	holder := c.state
	if r := c.resident(); r != nil && holder == nil {
		holder = r.client
	}
	state, ok := holder.(interface{ Expires() time.Time })
	if !ok {
		return nil
	}
	end := state.Expires()
	if end.IsZero() {
		return nil
	}
	left := min(time.Until(end), century)
	if left <= 0 {
		return &brokenContract{fmt.Sprintf("Expires of the state is %v ago: Config.Setup must make a state that lasts", -left)}
	}
	c.expireAfter(left)
	return nil
}

// expireAfter sets maxAge for a connection that may be lent for the time left, less a random part of
// it, see askExpiry.
func (c *conn) expireAfter(left time.Duration) {
	left = min(left, century)
	age := c.site.env.clock.Exactly().Sub(c.born)
	maxAge := age + max(1, left-rand.N(left/10+1)-clock.Tick)
	if c.maxAge == 0 || maxAge < c.maxAge {
		c.maxAge = maxAge
		c.ensureCold().expires = true
	}
}

// search counts the bytes in the state of c, whose type has the given shape.
func (c *conn) search(shape *shape) (h holdings) {
	if shape.paths != nil {
		v := reflect.ValueOf(c.state)
		for _, p := range shape.paths {
			p.look(v, &h)
		}
	}
	if shape.asks {
		// The method's count may include bytes of both kinds, and bytes in buffers that
		// the pool does not see.
		h.unread = max(h.unread, c.state.(interface{ Buffered() int }).Buffered()-h.unflushed)
	}
	return h
}
