package gateway

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"time"
)

// The server's direction of a pin: replies and messages, and what they say about
// the state of the connection.

// hear passes on what the server sends, until the connection is released or
// fails.
func (p *pin) hear() error {
	for {
		p.frame.empty()
		if err := p.u.next(p.c, &p.frame); err != nil {
			if errors.Is(err, errNoMemory) {
				err = errTooLong // a reply that cannot be passed on breaks the order of those behind it
			}
			return err
		}
		p.mu.Lock()
		err := p.accountLocked(p.frame.b)
		p.mu.Unlock()
		if err != nil {
			return err
		}
		if err := p.ready.append(p.frame.b); err != nil {
			return err
		}
		if len(p.ready.b) >= keptBuffer {
			if err := p.deliver(); err != nil {
				return err
			}
		}
	}
}

// deliver writes what was heard to the client.
func (p *pin) deliver() error {
	if len(p.ready.b) == 0 {
		return nil
	}
	cl := p.cl
	cl.conn.SetWriteDeadline(time.Now().Add(cl.g.WriteTimeout))
	n, err := cl.conn.Write(p.ready.b)
	cl.g.count.bytesOut.Add(uint64(n))
	p.ready.empty()
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			cl.g.count.slowClients.Add(1)
		}
		return errGone
	}
	return nil
}

// pause runs when all that has come was passed on: the time to write it, and to
// release the connection if it is clean.
func (p *pin) pause(within bool) error {
	if err := p.deliver(); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.quietLocked() && !within {
		p.released = true
		p.over = true
		p.moved.Broadcast()
		p.rearmLocked(time.Time{})
		return errReleased
	}
	p.rearmLocked(time.Time{})
	return nil
}

// accountLocked follows what a frame from the server means for the state.
func (p *pin) accountLocked(frame []byte) error {
	p.active = time.Now()
	if p.kept {
		return nil
	}
	v, count := subscription(frame)
	var head *pending
	if len(p.pending) > 0 {
		head = &p.pending[0]
	}
	switch {
	case v != other && (frame[0] == '>' || head != nil && head.verb == v):
		answers := head != nil && head.verb == v
		if answers && head.left < 0 {
			head.left = max(1, p.subscriptions(v))
		}
		p.countLocked(v, count)
		if answers {
			if head.left--; head.left == 0 {
				p.popLocked()
			}
		}
		return nil
	case frame[0] == '>':
		return nil // a message
	case frame[0] == '*' && p.total+p.shards > 0 && !p.cl.resp.id.resp3 && isMessage(frame):
		return nil
	case head == nil:
		return &malformed{"a reply to nothing"}
	}
	switch v := head.verb; {
	case v == vMulti && frame[0] == '+':
		p.multi = true
	case v == vWatch && !isError(frame):
		p.watching = true
	case v == vExec && p.multi:
		p.multi, p.watching = false, false
		if isError(frame) && !hasPrefix(frame, "-EXECABORT") {
			p.kept = true // who knows
		}
	case v == vDiscard && p.multi && hasPrefix(frame, "+OK"):
		p.multi, p.watching = false, false
	case v == vUnwatch && !p.multi && hasPrefix(frame, "+OK"):
		p.watching = false
	}
	p.popLocked()
	return nil
}

// popLocked takes the oldest command off: it was answered.
func (p *pin) popLocked() {
	if p.pending[0].class == blocks {
		p.blocking--
	}
	p.pending = p.pending[:copy(p.pending, p.pending[1:])]
	p.cl.g.count.replies.Add(1)
	p.cl.g.answered()
	p.moved.Broadcast()
	p.awaitLocked()
}

// subscriptions are those that an UNSUBSCRIBE without arguments ends.
func (p *pin) subscriptions(v verb) int {
	switch v {
	case vUnsubscribe:
		return p.chans
	case vPunsubscribe:
		return p.total - p.chans
	}
	return p.shards
}

// countLocked takes over the count of subscriptions that the server tells.
func (p *pin) countLocked(v verb, n int) {
	switch v {
	case vSsubscribe, vSunsubscribe:
		p.shards = n
		return
	case vSubscribe, vUnsubscribe:
		p.chans += n - p.total
	}
	p.total = n
}

var subscriptionVerbs = map[string]verb{
	"subscribe": vSubscribe, "psubscribe": vPsubscribe, "ssubscribe": vSsubscribe,
	"unsubscribe": vUnsubscribe, "punsubscribe": vPunsubscribe, "sunsubscribe": vSunsubscribe,
}

// subscription reads the confirmation of a subscription or of its end: the verb,
// the channel or null, and how many there are now. Other frames are other.
func subscription(frame []byte) (verb, int) {
	args := argsOf(frame)
	if args.left != 3 {
		return other, 0
	}
	name, _ := args.next()
	v, ok := subscriptionVerbs[string(name)]
	if !ok {
		return other, 0
	}
	rest := args.rest
	if _, ok := args.next(); ok {
		rest = args.rest
	} else if i := bytes.IndexByte(rest, '\n'); i >= 0 {
		rest = rest[i+1:] // null, in RESP2 or RESP3
	}
	number, ok := bytes.CutPrefix(bytes.TrimSuffix(rest, []byte("\r\n")), []byte(":"))
	n, err := strconv.Atoi(string(number))
	if !ok || err != nil || n < 0 {
		return other, 0
	}
	return v, n
}

// isMessage reports whether a frame of RESP2 is a message to a subscriber.
func isMessage(frame []byte) bool {
	args := argsOf(frame)
	switch name, _ := args.next(); string(name) {
	case "message", "pmessage", "smessage":
		return true
	}
	return false
}
