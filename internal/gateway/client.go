package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// client is one connection from a client. It belongs to the client's goroutine; other
// goroutines only set the deadline of raw, or close it.
type client struct {
	g    *Gateway
	raw  net.Conn // as accepted
	conn net.Conn // the connection that is read and written: raw, or TLS over raw
	in   frames
	out  store // replies that are not written yet

	batch [][]byte // the requests of one exchange
	vigil vigil
	ahead ahead
	resp  respClient
}

func newClient(g *Gateway, nc net.Conn) *client {
	cl := &client{g: g, raw: nc, conn: nc}
	cl.in = frames{max: g.MaxFrame, store: store{budget: &g.memory}}
	cl.out.budget = &g.memory
	return cl
}

// Reasons why the gateway closes a client, besides errors of its socket.
var (
	errDraining = errors.New("the gateway is ending")
	errIdle     = errors.New("nothing came for longer than -idle-timeout")
	errStalled  = errors.New("half a request came, and the rest did not within -request-timeout")
	errUnheard  = errors.New("the server did not answer, and the protocol has no way to say so")
)

func (cl *client) serve() {
	g := cl.g
	defer func() {
		cl.in.store.release()
		cl.out.release()
	}()
	defer cl.raw.Close()
	if g.listen.tls {
		below := cl.raw
		if g.framing.newRequests != nil { // a session has no frames to cut short, so it accepts an end without close_notify
			below = whole{cl.raw}
		}
		tc := tls.Server(below, g.certs.forClients.Load())
		ctx, cancel := context.WithTimeout(g.ctx, g.RequestTimeout)
		err := tc.HandshakeContext(ctx)
		cancel()
		if err != nil && g.draining.Load() && (errors.Is(err, os.ErrDeadlineExceeded) || g.ctx.Err() != nil) {
			return // the gateway is ending; the client did not time out
		}
		if err != nil {
			g.count.handshakesFailed.Add(1)
			g.notice(slog.LevelWarn, "handshake", "TLS handshakes of clients fail", "client", cl.raw.RemoteAddr(), "error", err)
			g.Logger.Debug("handshake failed", "client", cl.raw.RemoteAddr(), "error", err)
			return
		}
		cl.conn = tc
	}
	cl.in.r = countingReader{cl.conn, &g.count}
	if g.framing.newRequests != nil {
		cl.in.sc = g.framing.newRequests(&g.Config)
	}
	g.framing.serve(cl)
	cl.conn.Close()
}

// countingReader counts the bytes that clients send.
type countingReader struct {
	net.Conn
	count *counters
}

func (r countingReader) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.count.bytesIn.Add(uint64(n))
	return n, err
}

// next waits for a request. Between two requests a client may be silent for patience (not
// positive: for ever), in the middle of a request for RequestTimeout.
func (cl *client) next(patience time.Duration) ([]byte, error) {
	begun := false
	for {
		frame, ok, err := cl.in.take()
		if ok || err != nil {
			return frame, err
		}
		if !begun {
			limit := patience
			if begun = cl.in.partial(); begun {
				limit = cl.g.RequestTimeout
			}
			if err := cl.readWithin(limit); err != nil {
				return nil, err
			}
		}
		switch err := cl.in.fill(); {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, err
		case cl.g.draining.Load():
			return nil, errDraining
		case begun:
			return nil, errStalled
		default:
			return nil, errIdle
		}
	}
}

// readWithin sets the deadline for reading. While the gateway drains, the read does not
// wait.
func (cl *client) readWithin(d time.Duration) error {
	if d > 0 {
		cl.conn.SetReadDeadline(time.Now().Add(d))
	} else {
		cl.conn.SetReadDeadline(time.Time{})
	}
	// drain sets draining before it sets its own deadline. So either drain's deadline
	// overwrites this one, or this check sees draining.
	if cl.g.draining.Load() {
		return errDraining
	}
	return nil
}

// flush writes the replies to the client. The client holds no connection to the server
// meanwhile.
func (cl *client) flush() error {
	if len(cl.out.b) == 0 {
		return nil
	}
	cl.conn.SetWriteDeadline(time.Now().Add(cl.g.WriteTimeout))
	cl.ahead.begin(cl)
	n, err := cl.conn.Write(cl.out.b)
	cl.ahead.end()
	cl.g.count.bytesOut.Add(uint64(n))
	cl.out.empty()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		cl.g.count.slowClients.Add(1)
	}
	return err
}

// parted counts and logs why a client is closed.
func (cl *client) parted(err error) {
	var bad *malformed
	count := &cl.g.count
	switch {
	case errors.Is(err, io.EOF), err == errCutOff, errors.Is(err, errDraining), errors.Is(err, net.ErrClosed), errors.Is(err, errLeft):
		return
	case errors.Is(err, errIdle):
		count.idleClients.Add(1)
	case errors.Is(err, errStalled):
		count.stalledClients.Add(1)
	case errors.As(err, &bad), errors.Is(err, errTooLong), errors.Is(err, errHalf):
		count.badFrames.Add(1)
		cl.g.notice(slog.LevelWarn, "bad-frames", "clients are closed because they break the protocol", "client", cl.raw.RemoteAddr(), "error", err)
	case errors.Is(err, errNoMemory):
		count.failures[noMemory].Add(1)
	}
	cl.g.Logger.Debug("client closed", "client", cl.raw.RemoteAddr(), "error", err)
}

// bidFarewell tells the client what was wrong with its input, if that is why it is closed
// and the protocol can express it, and gives the client time to read that.
func (cl *client) bidFarewell(err error) {
	var bad *malformed
	resp, words := cl.g.framing.name == "resp", ""
	switch {
	case errors.As(err, &bad):
		words = "Protocol error: " + bad.what
	case errors.Is(err, errTooLong):
		words = "Protocol error: the request is longer than the gateway passes on"
	case errors.Is(err, errNoMemory):
		words = "gateway: there is no room for the request"
	case errors.Is(err, errHalf):
		if resp { // Redis servers send nothing in this case either
			return
		}
	default:
		return
	}
	cl.in.broken = err
	cl.in.store.release() // frees the input: nobody needs it while the client reads
	if resp {
		cl.out.b = append(append(append(cl.out.b, "-ERR "...), words...), "\r\n"...)
	} else {
		cl.out.b = append(cl.out.b, cl.g.ErrorReply...)
	}
	if cl.flush() == nil {
		cl.farewell()
	}
}

// lingerSilence is how long a client may stay silent after it was told why it is closed.
const lingerSilence = time.Second

// farewell gives the client time to read what was written to it before the connection is
// closed. Closing a socket that holds unread input would discard the written data too. So
// farewell reads what the client sends to its end, for as long as a request may take to
// arrive.
func (cl *client) farewell() {
	cw, ok := cl.conn.(interface{ CloseWrite() error })
	if !ok || cw.CloseWrite() != nil {
		return
	}
	end := time.Now().Add(cl.g.RequestTimeout)
	scratch := make([]byte, 16<<10)
	for n := 1; n > 0 && time.Now().Before(end); {
		silence := lingerSilence
		if cl.g.draining.Load() {
			silence = 250 * time.Millisecond
			end = earlier(end, time.Now().Add(silence))
		}
		cl.raw.SetReadDeadline(earlier(end, time.Now().Add(silence)))
		n, _ = cl.raw.Read(scratch)
	}
}

// failure is why a request has no reply.
type failure uint8

const (
	lost        failure = iota // the connection ended while the request was in flight
	late                       // no reply within RequestTimeout
	unreachable                // no connection could be opened
	busy                       // all connections were in use for RequestTimeout
	tooLong                    // the reply is longer than MaxFrame
	noMemory                   // the reply does not fit into MaxMemory
	outOfStep                  // what came was no valid reply
	ending                     // the gateway was shutting down
	speaks                     // the server sent something before it was asked
	pinsFull                   // MaxPinned clients already have their own connections
	left                       // the client left before its request was sent
	numFailures
)

var failureNames = [numFailures]string{"lost", "late", "unreachable", "busy", "too-long", "no-memory", "out-of-step", "ending", "speaks-first", "pinned", "left"}

func (f failure) String() string { return failureNames[f] }

// failureOf classifies the error of an exchange. ran: the exchange had a connection.
func (g *Gateway) failureOf(err error, ran bool) failure {
	var bad *malformed
	var first *speaksFirst
	switch {
	case errors.Is(err, errLeft):
		return left
	case g.ctx.Err() != nil:
		return ending
	case !ran && errors.Is(err, connpool.ErrUnread):
		g.greet.surprised(&speaksFirst{framing: g.Framing}) // the pool found it in the moment after Setup's look
		return speaks
	case errors.As(err, &first):
		if ran {
			return outOfStep
		}
		return speaks
	case errors.Is(err, errTooLong):
		return tooLong
	case errors.Is(err, errNoMemory):
		return noMemory
	case errors.As(err, &bad):
		return outOfStep
	case errors.Is(err, errPins):
		return pinsFull
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		var pe *connpool.Error
		switch {
		case ran:
			return late
		case errors.As(err, &pe) && pe.Limit == 0:
			return g.absent() // no limit was in the way; the server is unavailable
		}
		return busy
	case ran:
		return lost
	}
	return g.absent()
}

// absent returns why there is no connection and none could be opened.
func (g *Gateway) absent() failure {
	if g.greet.speaking() {
		return speaks
	}
	return unreachable
}
