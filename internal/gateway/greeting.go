package gateway

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// A server that speaks first says something that nobody asked for: a greeting, a
// banner, "max number of clients reached". Where replies are matched by position
// such a word is taken for the reply to the first request, that reply for the
// one to the second request, and so on: each client reads what another one asked.
//
// No look before a request is enough, since a greeting may come later. So the
// gateway counts, and believes a reply once it has seen that there is not one
// too many:
//
//	line, length  The words of these protocols are unknown: only time can tell.
//	              See greetings.
//	resp          A PING with a number is asked last, and its answer has the
//	              number: it proves what was before it. See proveRESP.
//	modbus        Each reply has the number of its request.
//	session       Nothing is shared; the server may speak first.
//
// What does not add up costs the connection, before any of it reaches a client.

// speaksFirst is that the server said something before it was asked.
type speaksFirst struct {
	framing string
	said    []byte // the beginning of it
}

func (e *speaksFirst) Error() string {
	return fmt.Sprintf("the server speaks first: it said %s before it was asked, which the framing %s would take for a reply; use the framing session",
		strconv.Quote(string(e.said)), e.framing)
}

// errSilent is the good outcome of a look that waited in vain. It is given back
// as connpool.Keep(errSilent), since a read that timed out was meant to.
var errSilent = errors.New("nothing came, as it should be")

// errHungUp is that the server ended a connection on which nothing was asked.
var errHungUp = errors.New("the server ended the connection before it was asked anything")

// unasked listens for d to a connection on which no request is under way. nil
// means that it stayed silent. Otherwise the error is *speaksFirst, errHungUp,
// or what else befell the connection (an alert of TLS), which is of no more use.
// A lent connection that stayed silent is given back with connpool.Keep.
func unasked(c net.Conn, framing string, d time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	said := make([]byte, 64)
	n, err := c.Read(said)
	switch {
	case n > 0:
		return &speaksFirst{framing, said[:n]}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return c.SetReadDeadline(time.Time{})
	case err == io.EOF:
		return errHungUp
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// Greeting opens a connection to the server, listens to it for d and says why a
// request over it would not be answered as it should: the server cannot be
// reached, hangs up, refuses us, or speaks first, which is good with the framing
// session alone.
func (g *Gateway) Greeting(d time.Duration) func(connpool.Conn) error {
	return func(c connpool.Conn) error {
		err := unasked(c, g.framing.name, d)
		var first *speaksFirst
		if g.framing.name == "session" && errors.As(err, &first) {
			return nil // unread: the connection is not used again
		}
		if err == nil {
			err = connpool.Keep(errSilent)
		}
		return err
	}
}

var _ sync.Mutex
