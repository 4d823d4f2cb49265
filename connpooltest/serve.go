package connpooltest

import (
	"bufio"
	"errors"
	"io"
	"os"
	"regexp"
	"slices"
	"time"
)

// turn is one exchange from the server's point of view.
type turn struct {
	step    Step
	number  int             // of the step in its script, from 0
	cancel  func()          // cancels the borrower's ctx; nil without a harness
	givenUp <-chan struct{} // closed when the borrower's call has returned; nil without a harness
}

// serve serves one connection until it ends.
func (s *Server) serve(p *peer) {
	p.in, p.sending, p.busy = bufio.NewReader(p.Conn), make(chan struct{}, 1), len(s.protocol.Greeting) > 0
	s.mu.Lock()
	s.accepts++
	s.peers = append(s.peers, p)
	hangUp := s.hangUps > 0
	if hangUp {
		s.hangUps--
	}
	s.mu.Unlock()
	defer s.leave(p)
	if hangUp || !s.sendLast(p, nil, s.protocol.Greeting) {
		return
	}
	for {
		if _, err := p.in.Peek(1); err != nil {
			return
		}
		s.mu.Lock()
		p.busy = true
		s.mu.Unlock()
		request, err := s.protocol.ReadRequest(p.in)
		if err != nil {
			return
		}
		t := s.turnOf(request)
		s.notef(t, "connection %d: the server reads %q", p.serial, request)
		reply := s.protocol.Reply(request)
		if reply == nil && !s.sendLast(p, t, nil) || reply != nil && !s.answer(p, t, request, reply) {
			return
		}
		s.mu.Lock()
		s.before = reply
		s.mu.Unlock()
	}
}

func (s *Server) leave(p *peer) {
	p.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.peers, p); i >= 0 {
		s.peers = slices.Delete(s.peers, i, i+1)
	}
}

// closePeer closes a connection from the side of the server.
func (s *Server) closePeer(p *peer) {
	s.mu.Lock()
	p.closed = true
	s.mu.Unlock()
	p.Close()
}

// answer sends a reply with the fault of the turn. It returns false if the connection is
// over.
func (s *Server) answer(p *peer, t *turn, request, reply []byte) bool {
	at := t.step.position(len(reply))
	first, rest := reply[:at], reply[at:]
	switch t.step.Fault {
	case Cut:
		s.send(p, t, first)
		s.notef(t, "connection %d: the server closes it", p.serial)
		s.closePeer(p)
		return false
	case Reset:
		s.send(p, t, first)
		s.pause() // what has arrived and was not read is lost with a reset
		s.notef(t, "connection %d: the server resets it", p.serial)
		p.reset()
		return false
	case Late:
		return s.send(p, t, first) && s.awaitGivenUp(p, t) && s.sendLast(p, t, rest)
	case Cancel:
		if !s.send(p, t, first) {
			return false
		}
		s.pause()
		if t.cancel != nil {
			s.notef(t, "the ctx is cancelled")
			t.cancel()
		}
		return s.awaitGivenUp(p, t) && s.sendLast(p, t, rest)
	case Hang:
		s.send(p, t, first)
		s.notef(t, "connection %d: the server hangs", p.serial)
		io.Copy(io.Discard, p.in)
		return false
	case Split:
		if !s.send(p, t, first) {
			return false
		}
		s.pause()
		return s.sendLast(p, t, rest)
	case Drip:
		return s.drip(p, t, reply)
	case Extra:
		return s.sendLast(p, t, slices.Concat(reply, s.protocol.beside(reply)))
	case Ahead:
		return s.sendLast(p, t, slices.Concat(s.protocol.beside(reply), reply))
	case Wrong:
		return s.sendLast(p, t, s.replyToNobody(request))
	}
	return s.sendLast(p, t, reply)
}

// mostPieces bounds the pieces of a Drip, and so the time that it takes.
const mostPieces = 64

func (s *Server) drip(p *peer, t *turn, reply []byte) bool {
	size := max(t.step.At, 1, len(reply)/mostPieces)
	s.notef(t, "connection %d: the server sends %q in pieces of %d bytes", p.serial, reply, size)
	for len(reply) > size {
		if _, err := p.Write(reply[:size]); err != nil {
			return false
		}
		s.pause()
		reply = reply[size:]
	}
	return s.sendLast(p, t, reply)
}

// replyToNobody is the reply to another request than this one.
func (s *Server) replyToNobody(request []byte) []byte {
	if tokenPattern.Match(request) {
		return s.protocol.Reply(tokenPattern.ReplaceAll(request, []byte(nobodysToken)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.before != nil {
		return s.before
	}
	return s.protocol.unasked()
}

// tokenPattern matches the tokens of a Harness. A script has fewer steps than 999.
var tokenPattern = regexp.MustCompile(`t[0-9]{3}[a-z]{4}`)

const nobodysToken = "t999none"

// awaitGivenUp waits until the borrower's call has returned, and then until the client
// sends something more on the connection: that is the worst moment for the rest of a
// reply. It waits for a bounded time each. It returns false if the connection is over.
func (s *Server) awaitGivenUp(p *peer, t *turn) bool {
	if t.givenUp != nil {
		timer := time.NewTimer(2 * s.patience)
		defer timer.Stop()
		select {
		case <-t.givenUp:
		case <-timer.C:
		case <-s.stopped:
			return false
		}
	}
	p.SetReadDeadline(time.Now().Add(s.patience))
	_, err := p.in.Peek(1)
	p.SetReadDeadline(time.Time{})
	return err == nil || errors.Is(err, os.ErrDeadlineExceeded)
}

// pause lets a moment pass, in which a client reads what was sent.
func (s *Server) pause() {
	timer := time.NewTimer(s.moment)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.stopped:
	}
}

// send sends a part of a reply. It returns false if the connection is over.
func (s *Server) send(p *peer, t *turn, b []byte) bool {
	if len(b) == 0 {
		return true
	}
	s.notef(t, "connection %d: the server sends %q", p.serial, b)
	_, err := p.Write(b)
	return err == nil
}

// sendLast sends what ends an exchange: the connection is idle from then on.
func (s *Server) sendLast(p *peer, t *turn, b []byte) bool {
	p.sending <- struct{}{}
	s.mu.Lock()
	p.busy = false // before the client can have read the reply
	s.mu.Unlock()
	ok := s.send(p, t, b)
	<-p.sending
	return ok
}

func (s *Server) notef(t *turn, format string, args ...any) {
	if s.note != nil {
		s.note(t, format, args...)
	}
}
