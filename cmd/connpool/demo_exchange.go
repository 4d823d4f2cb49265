package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// stageUse is the stage of an error inside fn, on the borrowed connection.
const stageUse = "use"

// note is the state that the demo's Setup returns for a connection. Only the borrower
// touches it, without a lock: the race detector thus finds two borrowers of one
// connection.
type note struct {
	born     time.Time // when the connection had been opened
	returned time.Time // when its last borrower had finished
	serial   int       // the server's number for it; 0: not known yet
	seq      int       // of the last reply
}

// Errors of an exchange that the received bytes cause.
var (
	errForeign = errors.New("the reply is somebody else's")
	errNoise   = errors.New("what came is no reply")
)

// exchange is one request and its reply, with the facts needed to judge an error
// afterwards.
type exchange struct {
	token     string
	sent      func() // called between the request and the reply
	impatient bool   // its ctx is meant to be done before the reply arrives

	asked   time.Time // With was called
	got     time.Time // fn began
	ran     bool
	reused  bool
	checked time.Time // the pool has checked the connection after this time
	heard   bool      // a part of the reply was read
}

// with makes the exchange over a connection that the pool lends for addr.
func (x *exchange) with(ctx context.Context, pool *connpool.Pool, addr connpool.Addr) error {
	x.asked = time.Now()
	return pool.With(ctx, addr, func(c connpool.Conn) error {
		x.got = time.Now()
		n := connpool.State[*note](c)
		x.lent(n, c.Info().Reused)
		err := x.talk(c, n)
		n.returned = time.Now()
		return err
	})
}

// lent records since when the pool must have checked the connection. For this loan the
// pool cannot have checked before the borrower came, nor before the previous borrower
// finished. A connection that nobody has used yet needs no check, so a fault since its
// dial may have gone unnoticed.
func (x *exchange) lent(n *note, reused bool) {
	x.ran, x.reused = true, reused
	x.checked = x.asked
	switch {
	case !reused:
		x.checked = n.born.Add(-dialTimeout)
	case n.returned.After(x.asked):
		x.checked = n.returned
	}
}

// talk sends the token and reads one line, which must be the reply to the token on this
// connection.
func (x *exchange) talk(rw io.ReadWriter, n *note) error {
	if _, err := io.WriteString(rw, x.token+"\n"); err != nil {
		return err
	}
	if x.sent != nil {
		x.sent()
	}
	var space [256]byte
	line := space[:0]
	for {
		k, err := rw.Read(line[len(line):cap(line)])
		line = line[:len(line)+k]
		if end := bytes.IndexByte(line, '\n'); end >= 0 {
			return x.verify(line[:end], line[end+1:], n)
		}
		x.heard = x.heard || len(line) > 0 && !bytes.HasPrefix(line, noiseMark)
		switch {
		case err != nil:
			return err
		case len(line) == cap(line):
			return fmt.Errorf("%w: %d bytes and no end of line", errNoise, len(line))
		}
	}
}

// verify parses the reply. Bytes that the demo itself sent unasked are noise, also
// between two pieces of a reply. A reply to another token, or for another connection or
// another turn on this one, belongs to somebody else.
func (x *exchange) verify(line, rest []byte, n *note) error {
	if bytes.Contains(line, noiseMark) {
		return errNoise
	}
	x.heard = true
	words := bytes.Fields(line)
	if len(words) != 3 || string(words[2]) != x.token {
		return fmt.Errorf("%w: asked %q, read %q", errForeign, x.token, line)
	}
	serial, err1 := strconv.Atoi(string(words[0]))
	seq, err2 := strconv.Atoi(string(words[1]))
	switch {
	case err1 != nil || err2 != nil || serial < 1:
		return fmt.Errorf("%w: read %q", errForeign, line)
	case n.serial != 0 && n.serial != serial:
		return fmt.Errorf("%w: it came from connection %d on connection %d", errForeign, serial, n.serial)
	case seq != n.seq+1:
		return fmt.Errorf("%w: it is number %d where %d is due on connection %d", errForeign, seq, n.seq+1, serial)
	}
	n.serial, n.seq = serial, seq
	if len(rest) > 0 {
		return fmt.Errorf("%w: %q came after the reply", errNoise, rest)
	}
	return nil
}

// outcome classifies the end of the exchange, given the faults of its server.
func (x *exchange) outcome(err error, log *faultLog) outcome {
	o := outcome{class: answered, stage: stageUse}
	if err == nil {
		if !x.ran {
			o.class = unexplained
		}
		return o
	}
	o.kind = connpool.KindOf(err)
	var pe *connpool.Error
	refused := errors.As(err, &pe)
	if refused {
		o.stage = pe.Stage.String()
	}
	switch {
	case refused == x.ran:
		// Either fn ran and With says it did not, or the other way round.
		o.class = unexplained
	case errors.Is(err, errForeign):
		o.class, o.kind = foreign, connpool.KindBadMessage
	case x.impatient && ofTheCtx(o.kind):
		o.class = gaveUp
	case refused:
		o.class = unexplained
		switch pe.Stage {
		case connpool.StageSetup:
			// Unrequested bytes came right after the hello.
			if errors.Is(err, connpool.ErrUnread) && log.since(x.asked, unasked) {
				o.class = diedInUse
			}
		case connpool.StageBackoff:
			if errors.Is(err, connpool.ErrUnread) && log.since(x.asked.Add(-longestBackoff), unasked) {
				o.class = diedInUse
			}
			// The pool refuses because an earlier dial failed.
			if log.since(x.asked.Add(-longestBackoff), down, cutIdle, cutBusy) {
				o.class = serverDown
			}
		case connpool.StageDial, connpool.StageHandshake:
			if log.since(x.asked, down, cutIdle, cutBusy) {
				o.class = serverDown
			}
		}
	default:
		if errors.Is(err, errNoise) {
			o.kind = connpool.KindBadMessage
		}
		switch hurt := []fault{cutIdle, cutBusy, unasked, stopping}; {
		case log.since(x.checked, hurt...):
			o.class = diedInUse
		case x.reused && !x.heard && log.since(time.Time{}, hurt...):
			o.class = avoidable
		default:
			o.class = unexplained
		}
	}
	return o
}

// ofTheCtx reports whether a ctx can cause an error of this kind.
func ofTheCtx(k connpool.Kind) bool {
	return k == connpool.KindCanceled || k == connpool.KindTimeout || k == connpool.KindTimeoutInTransfer
}
