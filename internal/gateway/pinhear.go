package gateway

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"time"
)

// The server's direction of a pin: replies and messages, and what they reveal about the
// state of the connection.

// hear passes on what the server sends, until the connection is released or fails.
func (p *pin) hear() error {
	for {
		p.frame.empty()
		if err := p.u.next(p.c, &p.frame); err != nil {
			return err // also for errNoMemory: without a reply, those behind it would be out of order
		}
		mark := len(p.ready.b)
		if err := p.ready.append(p.frame.b); err != nil {
			return err
		}
		p.mu.Lock()
		exec := len(p.pending) > 0 && p.pending[0].verb == vExec
		err := p.accountLocked(p.frame.b)
		p.mu.Unlock()
		if isDemotion(p.frame.b) || exec && holdsDemotion(p.frame.b) {
			p.cl.g.demoted(p.frame.b)
		}
		if err != nil {
			p.ready.b = p.ready.b[:mark]
			return err
		}
		if len(p.ready.b) >= keptBuffer {
			if err := p.handOver(); err != nil {
				return err
			}
		}
	}
}

// outboxFull is how many bytes may wait for a client that has no command pending, before
// hear stops reading from the server.
const outboxFull = 1 << 20

// handOver gives deliver the frames that hear has read. A client that waits for replies,
// or is sending, may not read yet for that reason; then handOver takes all frames, within
// -max-memory.
func (p *pin) handOver() error {
	if len(p.ready.b) == 0 {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.unread == nil && len(p.outbox.b) >= outboxFull && !p.sending && len(p.pending) == 0 {
		p.moved.Wait()
	}
	if p.unread != nil {
		return p.unread
	}
	if err := p.outbox.append(p.ready.b); err != nil {
		return err
	}
	p.ready.empty()
	p.moved.Broadcast()
	return nil
}

// deliver writes the outbox to the client, until everything is written or the client is
// gone.
func (p *pin) deliver() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.unread == nil {
		if len(p.outbox.b) == 0 {
			if p.closing {
				return
			}
			p.moved.Wait()
			continue
		}
		p.outbox, p.writes = p.writes, p.outbox
		p.writing = true
		p.mu.Unlock()
		err := p.write(p.writes.b)
		p.writes.empty()
		p.mu.Lock()
		p.writing, p.unread = false, err
		p.moved.Broadcast()
	}
	if p.heard == nil { // hear will end with the same cause
		p.heard = p.unread
	}
	p.rearmLocked(time.Time{})
}

// write writes in parts; the client has WriteTimeout for each part.
func (p *pin) write(b []byte) error {
	cl := p.cl
	for len(b) > 0 {
		cl.conn.SetWriteDeadline(time.Now().Add(cl.g.WriteTimeout))
		n, err := cl.conn.Write(b[:min(len(b), keptBuffer)])
		cl.g.count.bytesOut.Add(uint64(n))
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				cl.g.count.slowClients.Add(1)
			}
			return errGone
		}
		b = b[n:]
	}
	return nil
}

// idle records that the sender waits for the client.
func (p *pin) idle() {
	p.mu.Lock()
	p.sending = false
	p.mu.Unlock()
}

// patient gives a client that is sending more time to read.
func (p *pin) patient() {
	p.mu.Lock()
	writing := p.writing
	p.mu.Unlock()
	if writing {
		p.cl.conn.SetWriteDeadline(time.Now().Add(p.cl.g.WriteTimeout))
	}
}

// pause runs when hear has passed on everything that has come: it hands the frames over
// and, when they are written, releases the connection if it is clean.
func (p *pin) pause(within bool) error {
	if err := p.handOver(); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for !within && p.quietLocked() && p.unread == nil && (p.writing || len(p.outbox.b) > 0) {
		p.moved.Wait()
	}
	if p.unread != nil {
		return p.unread
	}
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

// accountLocked updates the state for a frame from the server.
func (p *pin) accountLocked(frame []byte) error {
	p.active = time.Now()
	frame = bare(frame)
	if p.kept {
		if p.muting && isError(frame) {
			p.kept = false
		}
		p.muting = false
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
	done, keep := *head, false
	switch v := head.verb; {
	case p.multi && string(frame) == "+QUEUED\r\n":
		switch head.class {
		case subscribes: // the reply to EXEC would then not be one frame
			keep = true
		case keeps, identifies, local:
			p.queued = true
		}
	case v == vMulti && frame[0] == '+':
		p.multi = true
	case v == vWatch && !isError(frame):
		p.watching = true
	case v == vExec && p.multi:
		p.multi, p.watching = false, false
		switch {
		case isError(frame):
			keep = !hasPrefix(frame, "-EXECABORT") // the server may have carried it out
		case p.queued:
			keep = !isNull(frame)
		}
		p.queued = false
	case v == vDiscard && p.multi && hasPrefix(frame, "+OK"):
		p.multi, p.watching, p.queued = false, false, false
	case v == vUnwatch && !p.multi && hasPrefix(frame, "+OK"):
		p.watching = false
	case isError(frame): // the command has changed nothing
	case head.class == keeps || head.class == identifies || head.class == local:
		keep = p.leavesLocked(done)
	}
	if done.verb != vAsking && !p.multi { // ASKING counts for one command only
		p.behind &^= bit(vAsking)
	}
	p.popLocked()
	if keep {
		p.keepLocked()
	}
	return nil
}

// leavesLocked records the state that an accepted command has left behind. It reports
// whether no later command can undo that state.
func (p *pin) leavesLocked(done pending) (keep bool) {
	switch v := done.verb; v {
	case vTracking, vNoEvict, vNoTouch, vReadonly, vAsking, vDebug:
		if p.behind |= bit(v); done.undo {
			p.behind &^= bit(v)
		}
	case vReadwrite:
		p.behind &^= bit(vReadonly)
	case vReply:
		return !done.undo
	case vSetinfo: // a name in a list; the next client sets its own
		p.stained = true
	case vReset:
		if p.cl.resp.id != (identity{}) {
			return true // the connection no longer belongs to its identity
		}
		p.multi, p.watching, p.queued, p.behind = false, false, false, 0
		p.total, p.chans, p.shards = 0, 0, 0
	case vHello:
		return !done.undo
	default:
		return true
	}
	return false
}

// isNull reports whether a reply is null, in RESP2 or RESP3.
func isNull(reply []byte) bool {
	return hasPrefix(reply, "*-1") || hasPrefix(reply, "$-1") || hasPrefix(reply, "_")
}

// popLocked removes the oldest command, which was answered.
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

// subscriptions returns the number of subscriptions that an UNSUBSCRIBE without arguments
// ends.
func (p *pin) subscriptions(v verb) int {
	switch v {
	case vUnsubscribe:
		return p.chans
	case vPunsubscribe:
		return p.total - p.chans
	}
	return p.shards
}

// countLocked stores the number of subscriptions that the server reports.
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

// subscription reads the confirmation that a subscription began or ended: its verb, and
// the number of subscriptions after it. For another frame the verb is other.
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
