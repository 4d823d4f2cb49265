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

// pin is a Redis client with a connection to itself, because what it said left
// something behind there, or will: a transaction, subscriptions, a blocked
// command. Three goroutines work for it: the client's own sends commands, hear
// receives replies and messages, and deliver writes these to the client. So
// neither the server nor the client ever waits for the other to read.
//
//	        +--> quiet: nothing pending, nothing left behind --> released
//	sending-+                                                       (the connection goes back)
//	        +--> kept: it can never be clean again ----> closed, with the client
//
// What a command leaves behind counts when the server has agreed to it: what was
// refused has changed nothing. What is taken back is over.
//
// Only hear releases, and it does so under mu when no command is pending; the
// sender makes a command pending under mu before it sends it. So a command is
// either sent before the release, which then does not happen, or not sent over
// this connection.
type pin struct {
	cl *client
	c  connpool.Conn
	u  *replies

	frame, ready store // hear's: the frame that is read, and those that go to outbox next
	writes       store // deliver's: what is being written to the client

	// mu guards what follows. Only deadlines are set under it.
	mu       sync.Mutex
	moved    sync.Cond // pending became shorter, or hear has ended
	pending  []pending // commands that were sent and not answered, the oldest first
	blocking int       // of them, those that may take as long as they like
	multi    bool      // between MULTI and EXEC or DISCARD
	watching bool      // after WATCH
	total    int       // subscriptions to channels and patterns, as the server counts them
	chans    int       // ... of them to channels
	shards   int       // subscriptions to shard channels
	behind   uint16    // what commands have left behind that others take back, see bit
	queued   bool      // a command that leaves something behind waits for EXEC
	kept     bool      // the connection is the client's to the end
	muting   bool      // CLIENT REPLY OFF was sent last, with nothing before it: an answer is its refusal
	stained  bool      // it serves nobody else, although the client can go on without it
	active   time.Time // when something was last said
	released bool
	sending  bool  // the sender is about to send, or does
	watched  bool  // a vigil has the deadline for reading from the client
	outbox   store // what deliver is to write next
	writing  bool  // deliver writes
	closing  bool  // nothing more will come into outbox
	unread   error // why deliver has ended
	heard    error // why hear has ended; nil: it has not, or it released
	over     bool  // hear has ended
}

// pending is a command that was sent.
type pending struct {
	meaning
	left int  // replies it will get; -1: as many as there are subscriptions of its kind
	undo bool // it takes back what its like leaves behind
}

// bit is that of pin.behind for what a verb leaves behind.
func bit(v verb) uint16 { return 1 << (v - vTracking) }

var (
	errReleased = errors.New("the connection is not needed any more")
	errGone     = errors.New("the client left")
	errPins     = errors.New("as many clients as -max-pinned allows have connections to themselves")
)

// pinned carries out command over a connection of the client's own, and those
// that follow until the connection is clean again. A nil error means that the
// client goes on without it.
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

// run ends with nil when the connection is released, and is clean.
func (p *pin) run(command []byte, m meaning) error {
	p.moved.L = &p.mu
	for _, s := range []*store{&p.frame, &p.ready, &p.writes, &p.outbox} {
		s.budget = &p.cl.g.memory
		defer s.release()
	}
	p.u.pause = p.pause
	// Before hear begins, or it would find the connection clean.
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
		// What the server did wrong is not to be told as the client's fault.
		return fmt.Errorf("its own connection: %v", err)
	}
	p.tellBefore(err)
	return err
}

// prove finds out, before anybody else gets the connection, that what its client
// was told were the replies to its commands, and that none of them is left. What
// cannot be proven costs the connection, and a word too many the client as well:
// it has read what was no reply. Nobody reads from the client meanwhile: one that
// leaves ends the proof, and nothing that it has sent is carried out any more.
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

// tell gives the commands that were not answered the word for why. The client
// is closed afterwards: what it had left behind is gone.
func (p *pin) tell() {
	cl := p.cl
	if len(p.pending) == 0 || p.heard == errGone || len(p.ready.b) > 0 { // a reply is missing before theirs
		return
	}
	why := p.heard
	if p.total+p.shards > 0 || p.behind != 0 { // what was too long may have been a message
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

// tellBefore puts a word for each command that was not answered before the one
// that the client is closed with because of what it sent (see bidFarewell), which
// would stand in the place of the first one's reply otherwise: a command that is
// blocked is not waited for, and may have been carried out.
func (p *pin) tellBefore(err error) {
	if !errors.As(err, new(*malformed)) && !errors.Is(err, errTooLong) && !errors.Is(err, errNoMemory) || len(p.ready.b) > 0 {
		return
	}
	for range p.pending {
		p.cl.out.b = p.cl.failed(p.cl.out.b, nil, errBehind, true)
	}
}

// send passes on a command that is pending already, and those that follow,
// until the connection is released or something fails.
func (p *pin) send(command []byte) error {
	for {
		p.cl.g.count.requests.Add(1)
		p.c.SetWriteDeadline(time.Now().Add(p.cl.g.RequestTimeout))
		if _, err := p.c.Write(command); err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.heard == nil { // as good as heard
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
				p.lastReplies() // to what was sent before
				return p.cause(err)
			}
			if m.class == nothing {
				continue
			}
			switch err := p.enter(command, m); {
			case err == errReleased:
				p.cl.in.untake(frame) // it is for another connection
				return err
			case err != nil:
				if errors.As(err, new(*malformed)) { // the client's last one
					p.lastReplies()
				}
				return p.cause(err)
			}
			break
		}
	}
}

// cause prefers what hear has ended with: it is why the sender could not go on.
func (p *pin) cause(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heard != nil {
		return p.heard
	}
	return err
}

// fullLocked reports whether as many commands are pending as may be.
func (p *pin) fullLocked() bool {
	return len(p.pending) >= p.cl.g.Pipeline && !p.over && !p.kept && p.heard == nil
}

// waitForRoom waits until there is room for one more command. Nobody reads from
// the client meanwhile, so somebody must look whether it has left: a command that
// is blocked may take for ever.
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
				e.left = 1 // an error
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

// keepLocked gives the connection to the client for good. Nothing is counted any
// more.
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
	var begun time.Time // when a part of it was there
	for {
		frame, ok, err := cl.in.take()
		if err != nil {
			p.lastReplies() // to what was sent before
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
		case errors.Is(err, os.ErrDeadlineExceeded): // whose it was is for rearmLocked to say
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

// rearmLocked sets the deadline for reading from the client to what the state
// asks for, or says why there is nothing to wait for. Both goroutines call it
// when they changed something; the last one is right.
func (p *pin) rearmLocked(begun time.Time) error {
	g := p.cl.g
	end := time.Time{}
	if !begun.IsZero() {
		end = begun.Add(g.RequestTimeout)
	}
	waiting := len(p.pending) == 0 && !p.kept && p.total == 0 && p.shards == 0 && p.behind == 0 // the server for the client
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
	if !p.watched { // a vigil would never end
		p.cl.raw.SetReadDeadline(end)
	}
	return err
}

// lastReplies waits for what is under way when the client has ended its
// direction, unless that may take for ever.
func (p *pin) lastReplies() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.pending) > 0 && p.blocking == 0 && !p.over {
		p.moved.Wait()
	}
}
