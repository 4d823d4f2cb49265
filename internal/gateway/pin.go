package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// pin is a Redis client that has a connection to itself, because its commands left state
// there, or will: a transaction, subscriptions, a blocking command. Three goroutines work
// for it: the client's own goroutine sends commands, hear receives replies and messages,
// and deliver writes these to the client. So neither the server nor the client ever waits
// for the other to read.
//
//	        +--> quiet: nothing pending, nothing left behind --> released
//	sending-+                                                       (the connection goes back)
//	        +--> kept: it can never be clean again ----> closed, with the client
//
// State that a command leaves behind counts once the server has accepted the command: a
// refused command has changed nothing. State that a later command undoes no longer
// counts.
//
// Only hear releases the connection, and it does so under mu when no command is pending;
// the sender makes a command pending under mu before sending it. So a command is either
// sent before a release, which then does not happen, or it is not sent over this
// connection.
type pin struct {
	cl *client
	c  connpool.Conn
	u  *replies

	frame, ready store // hear's: the frame being read, and the frames that go to outbox next
	writes       store // deliver's: what is being written to the client

	// mu guards the fields below. Only deadlines are set under it.
	mu       sync.Mutex
	moved    sync.Cond // pending became shorter, or hear has ended
	pending  []pending // commands sent and not answered yet, the oldest first
	blocking int       // how many of them may take any time
	multi    bool      // between MULTI and EXEC or DISCARD
	watching bool      // after WATCH
	total    int       // subscriptions to channels and patterns, as the server counts them
	chans    int       // how many of them to channels
	shards   int       // subscriptions to shard channels
	behind   uint16    // state left behind that other commands can undo, see bit
	queued   bool      // a command that leaves state behind waits for EXEC
	kept     bool      // the connection belongs to the client to the end
	muting   bool      // CLIENT REPLY OFF was sent last, with nothing before it: a reply to it means that the server refused it
	stained  bool      // no other client may use the connection, although this client can go on without it
	active   time.Time // when either side last sent something
	released bool
	sending  bool  // the sender is sending, or about to
	watched  bool  // a vigil uses the client's read deadline
	outbox   store // what deliver is to write next
	writing  bool  // deliver is writing
	closing  bool  // nothing more will come into outbox
	unread   error // why deliver has ended
	heard    error // why hear has ended; nil: it has not, or it released the connection
	over     bool  // hear has ended
}

// pending is a command that was sent.
type pending struct {
	meaning
	left int  // replies still to come; -1: as many as there are subscriptions of its kind
	undo bool // it undoes the state that commands of its kind leave behind
}

// bit returns the bit of pin.behind for the state that a verb leaves behind.
func bit(v verb) uint16 { return 1 << (v - vTracking) }

var (
	errReleased = errors.New("the connection is not needed any more")
	errGone     = errors.New("the client left")
	errPins     = errors.New("as many clients as -max-pinned allows have connections to themselves")
)

// pinned carries out command, and the commands after it, over a connection of the
// client's own, until the connection is clean again. A nil error means that the client
// goes on without the connection.
func (cl *client) pinned(command []byte, m meaning) error {
	g := cl.g
	ctx, leave := context.WithCancel(cl.resp.ctx)
	defer leave()
	watch := cl.watchOver(m.class == blocks, leave)
	defer watch.stop()
	late := time.NewTimer(g.RequestTimeout)
	defer late.Stop()
	var err error
	ran := false
	select {
	case g.pins <- struct{}{}:
		defer func() { <-g.pins }()
		err = cl.ownUnder(ctx, cl.resp.addr, func(_ context.Context, c connpool.Conn) error {
			if err := watch.sendable(); err != nil {
				return connpool.Keep(err)
			}
			ran = true
			g.count.pinned.Add(1)
			defer g.count.pinned.Add(-1)
			p := &pin{cl: cl, c: c, u: connpool.State[*replies](c)}
			p.u.listened = false
			return p.run(command, m)
		})
		if errors.Is(err, errSilent) {
			err = nil
		}
		if ran {
			return err
		}
	case <-late.C:
		err = errPins
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	g.count.requests.Add(1)
	if watch.verdict() != nil {
		g.count.failures[left].Add(1)
		return errLeft
	}
	g.count.replies.Add(1)
	cl.out.b = cl.failed(cl.out.b, command, err, false)
	return cl.flush()
}

// run returns nil when the connection is released and clean.
func (p *pin) run(command []byte, m meaning) error {
	p.moved.L = &p.mu
	for _, s := range []*store{&p.frame, &p.ready, &p.writes, &p.outbox} {
		s.budget = &p.cl.g.memory
		defer s.release()
	}
	p.u.pause = p.pause
	// enter comes before hear begins, or hear would find the connection clean.
	if err := p.enter(command, m); err != nil {
		return err
	}
	heard, delivered := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(delivered)
		p.deliver()
	}()
	go func() {
		defer close(heard)
		err := p.hear()
		if err != errReleased {
			p.handOver() // what came before the end
		}
		p.mu.Lock()
		p.over, p.closing = true, true
		if err != errReleased && p.heard == nil {
			p.heard = err
		}
		p.moved.Broadcast()
		p.rearmLocked(time.Time{})
		p.mu.Unlock()
		if err != errReleased {
			p.c.Close() // the sender may be in a write that nobody reads
		}
	}()
	err := p.send(command)
	if err != errReleased {
		p.c.Close() // ends hear
	}
	<-heard
	<-delivered
	p.u.pause = nil
	switch {
	case err == errReleased:
		if p.stained {
			p.c.Close()
			return nil
		}
		return p.prove()
	case err == p.heard:
		p.tell()
		// An error of the server must not be reported as the client's fault.
		return fmt.Errorf("its own connection: %v", err)
	}
	p.tellBefore(err)
	return err
}

// prove finds out, before another client gets the connection, that this client got the
// replies to its own commands, and that no reply is left. If prove fails, the connection
// is closed. If there was a reply too many, the client is closed as well, because it has
// read bytes that were no reply of its own. The gateway does not read from the client
// meanwhile; if the client leaves, prove ends, and the commands it has sent are not
// carried out.
func (p *pin) prove() error {
	g, u := p.cl.g, p.u
	watch := p.cl.watchOver(false, func() { p.c.Close() })
	defer watch.stop()
	now := time.Now()
	latest := now.Add(g.RequestTimeout)
	var err error
	if proof := g.greet.mark(u); proof == nil {
		err = g.greet.after(p.c, u, now, latest)
	} else {
		p.c.SetDeadline(latest)
		if _, err = p.c.Write(proof); err == nil {
			err = g.greet.marked(p.c, u, now, latest)
		}
	}
	if watch.sendable() != nil {
		if err != nil {
			p.c.Close()
		}
		return u.kept(errLeft)
	}
	if err == nil {
		return u.kept(nil)
	}
	p.c.Close()
	var bad *malformed
	var first *speaksFirst
	if errors.As(err, &first) || errors.As(err, &bad) {
		g.count.failures[outOfStep].Add(1)
		g.unanswered(outOfStep, err)
		return fmt.Errorf("its own connection: %v", err)
	}
	return nil
}

// tell sends the client an error reply for each command that was not answered. The client
// is closed afterwards, because the state it left on the connection is lost.
func (p *pin) tell() {
	cl := p.cl
	if len(p.pending) == 0 || p.heard == errGone || len(p.ready.b) > 0 { // a reply before theirs is missing
		return
	}
	why := p.heard
	if p.total+p.shards > 0 || p.behind != 0 { // the frame that was too long may have been a message
		if errors.Is(why, errTooLong) || errors.Is(why, errNoMemory) {
			why = errBehind
		}
	}
	for range p.pending {
		cl.out.b = cl.failed(cl.out.b, nil, why, true)
		why = errBehind
	}
	if cl.flush() == nil {
		cl.farewell()
	}
}

// tellBefore writes an error reply for each unanswered command before the error with
// which the client is closed (see bidFarewell); otherwise the client would take that
// error for the reply to its first unanswered command. A blocking command is not waited
// for, and the server may have carried it out.
func (p *pin) tellBefore(err error) {
	if !errors.As(err, new(*malformed)) && !errors.Is(err, errTooLong) && !errors.Is(err, errNoMemory) || len(p.ready.b) > 0 {
		return
	}
	for range p.pending {
		p.cl.out.b = p.cl.failed(p.cl.out.b, nil, errBehind, true)
	}
}

// send sends a command that is pending already, and those after it, until the connection
// is released or an error occurs.
func (p *pin) send(command []byte) error {
	for {
		p.cl.g.count.requests.Add(1)
		p.c.SetWriteDeadline(time.Now().Add(p.cl.g.RequestTimeout))
		if _, err := p.c.Write(command); err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.heard == nil { // hear will end with the same cause
				p.heard = err
			}
			return p.heard
		}
		for {
			frame, err := p.next()
			if err != nil {
				return p.cause(err)
			}
			var m meaning
			if command, m, err = p.cl.read(frame); err != nil {
				p.lastReplies() // waits for replies to earlier commands
				return p.cause(err)
			}
			if m.class == nothing {
				continue
			}
			switch err := p.enter(command, m); {
			case err == errReleased:
				p.cl.in.untake(frame) // the frame goes over another connection
				return err
			case err != nil:
				if errors.As(err, new(*malformed)) { // the client's last command
					p.lastReplies()
				}
				return p.cause(err)
			}
			break
		}
	}
}

// cause returns the error of hear if there is one, since that is why the sender could not
// go on; otherwise err.
func (p *pin) cause(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heard != nil {
		return p.heard
	}
	return err
}

// fullLocked reports whether the maximum number of commands is pending.
func (p *pin) fullLocked() bool {
	return len(p.pending) >= p.cl.g.Pipeline && !p.over && !p.kept && p.heard == nil
}

// waitForRoom waits until one more command may be pending. Nobody reads from the client
// meanwhile, so a vigil watches whether the client has left: a blocking command may take
// for ever.
func (p *pin) waitForRoom() {
	p.mu.Lock()
	full, fin := p.fullLocked(), p.blocking > 0
	p.watched = full
	p.mu.Unlock()
	if !full {
		return
	}
	watch := p.cl.watchOver(fin, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.heard == nil {
			p.heard = errGone
		}
		p.moved.Broadcast()
	})
	p.mu.Lock()
	for p.fullLocked() {
		p.moved.Wait()
	}
	p.mu.Unlock()
	watch.stop()
	p.mu.Lock()
	p.watched = false
	p.mu.Unlock()
}

// enter makes a command pending, once there is room for it.
func (p *pin) enter(command []byte, m meaning) error {
	p.waitForRoom()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.heard != nil:
		return p.heard
	case p.released:
		return errReleased
	case m.verb == vHTTP:
		return &malformed{"this is no web server"}
	case m.class == refused:
		return &malformed{"replication does not pass through the gateway"}
	}
	p.active = time.Now()
	p.sending = true
	p.moved.Broadcast()
	switch {
	case p.kept:
		p.muting = false
		return nil
	case silences(m.verb, command):
		p.muting = len(p.pending) == 0
		p.keepLocked()
		return nil
	}
	e := pending{meaning: m, left: 1, undo: takesBack(m.verb, command)}
	switch m.verb {
	case vSubscribe, vPsubscribe, vSsubscribe, vUnsubscribe, vPunsubscribe, vSunsubscribe:
		if e.left = argsOf(command).left - 1; e.left == 0 {
			if e.left = -1; m.verb == vSubscribe || m.verb == vPsubscribe || m.verb == vSsubscribe {
				e.left = 1 // the server answers with one error
			}
		}
	}
	if m.class == blocks {
		p.blocking++
	}
	p.pending = append(p.pending, e)
	p.awaitLocked()
	return nil
}

// keepLocked gives the connection to the client for good. Replies are no longer counted.
func (p *pin) keepLocked() {
	p.kept = true
	p.pending, p.blocking = nil, 0
	p.c.SetReadDeadline(time.Time{})
	p.moved.Broadcast()
}

// awaitLocked bounds how long the server may take for the oldest command.
func (p *pin) awaitLocked() {
	switch {
	case p.kept:
	case len(p.pending) == 0 || p.blocking > 0:
		p.c.SetReadDeadline(time.Time{})
	default:
		p.c.SetReadDeadline(time.Now().Add(p.cl.g.RequestTimeout))
	}
}

// quietLocked reports whether the connection is as clean as when it was lent.
func (p *pin) quietLocked() bool {
	return len(p.pending) == 0 && !p.kept && !p.multi && !p.watching && p.total == 0 && p.shards == 0 && p.behind == 0
}

// next waits for a command.
func (p *pin) next() ([]byte, error) {
	cl := p.cl
	var begun time.Time // when a part of the command had arrived
	for {
		frame, ok, err := cl.in.take()
		if err != nil {
			p.lastReplies() // waits for replies to earlier commands
			return nil, err
		}
		if ok {
			return frame, nil
		}
		p.idle()
		if begun.IsZero() && cl.in.partial() {
			begun = time.Now()
		}
		p.mu.Lock()
		err = p.rearmLocked(begun)
		p.mu.Unlock()
		if err != nil {
			return nil, err
		}
		switch err := cl.in.fill(); {
		case err == nil:
			p.patient()
		case errors.Is(err, os.ErrDeadlineExceeded): // rearmLocked finds out whose deadline it was
		case err == io.EOF, err == errCutOff, err == errHalf, err == errNoMemory:
			p.lastReplies()
			if err == io.EOF || err == errCutOff {
				err = errGone
			}
			return nil, err
		default:
			return nil, err
		}
	}
}

// rearmLocked sets the read deadline of the client according to the state, or returns why
// there is nothing to wait for. Both goroutines call it after a change; the last call
// sees the latest state.
func (p *pin) rearmLocked(begun time.Time) error {
	g := p.cl.g
	end := time.Time{}
	if !begun.IsZero() {
		end = begun.Add(g.RequestTimeout)
	}
	waiting := len(p.pending) == 0 && !p.kept && p.total == 0 && p.shards == 0 && p.behind == 0 // the server waits for the client
	if held := p.active.Add(g.HoldTimeout); waiting && (end.IsZero() || held.Before(end)) {
		end = held
	}
	var err error
	switch {
	case p.released:
		err = errReleased
	case p.heard != nil:
		err = p.heard
	case g.ctx.Err() != nil:
		err = errDraining
	case g.draining.Load() && len(p.pending) == 0 && !p.multi && !p.watching: // a message may come, but nothing is under way
		err = errDraining
	case !end.IsZero() && !time.Now().Before(end):
		if err = errIdle; !begun.IsZero() {
			err = errStalled
		}
	}
	if err != nil {
		end = past
	}
	if !p.watched { // a new deadline would keep a vigil from ending
		p.cl.raw.SetReadDeadline(end)
	}
	return err
}

// lastReplies waits for pending replies when the client has ended its direction, unless
// they may take for ever.
func (p *pin) lastReplies() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.pending) > 0 && p.blocking == 0 && !p.over {
		p.moved.Wait()
	}
}
