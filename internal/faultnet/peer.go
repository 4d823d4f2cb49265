package faultnet

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// Cut is a way to end a connection from the server's side.
type Cut uint8

const (
	// FIN closes the connection, under TLS after close_notify. (If the client sent bytes
	// that the server has not read, TCP turns the close into a reset.)
	FIN Cut = iota
	// RST resets the connection, under TLS without close_notify. Unix sockets have no
	// resets; they are closed.
	RST
	// HalfClose ends the server's direction only, under TLS with
	// close_notify before; the connection stays open.
	HalfClose
)

func (how Cut) String() string {
	switch how {
	case FIN:
		return "FIN"
	case RST:
		return "RST"
	case HalfClose:
		return "HalfClose"
	}
	return fmt.Sprintf("Cut(%d)", uint8(how))
}

// Peer is the server's side of one connection; under TLS, above it.
type Peer struct {
	net.Conn
	raw    net.Conn // below TLS
	server *Server
	serial int
	gone   chan struct{} // closed when the peer leaves Server.peers

	// Guarded by server.mu.
	left       bool // has left Server.peers, because it is or will be closed
	halfClosed bool
	busy       bool // as SetBusy says
	owed       int  // exchanges begun and not finished: the handshake, and lines that Tokens has read
	unanswered int  // lines that Tokens has read, without having begun to send the last piece of the reply
	settling   bool // Tokens is sending the last piece of a reply
	settlings  int  // how often it began to
}

// Serial is the connection's number on its server, from 1.
func (p *Peer) Serial() int { return p.serial }

// Busy reports whether the peer has work: it is in the handshake, or Tokens owes it a
// reply, or SetBusy(true) was called.
func (p *Peer) Busy() bool {
	p.server.mu.Lock()
	defer p.server.mu.Unlock()
	return p.busyLocked()
}

func (p *Peer) busyLocked() bool { return p.busy || p.owed > 0 }

// SetBusy is for an Options.Handler, which calls it when a request begins and when its
// reply is sent. Tokens does not need it.
func (p *Peer) SetBusy(on bool) {
	p.server.mu.Lock()
	defer p.server.mu.Unlock()
	p.busy = on
}

// Close closes the connection, like FIN. Only the first call does anything.
func (p *Peer) Close() error { return p.Cut(FIN) }

// CloseWrite is like HalfClose.
func (p *Peer) CloseWrite() error { return p.Cut(HalfClose) }

// Cut ends the connection, busy or not. If the server has closed the connection already,
// Cut does nothing.
func (p *Peer) Cut(how Cut) error {
	p.server.mu.Lock()
	if p.left {
		p.server.mu.Unlock()
		return nil
	}
	if how == HalfClose {
		p.halfClosed = true
	} else {
		p.leaveLocked()
	}
	p.server.mu.Unlock()
	return p.sever(how)
}

// abandon closes the socket and does nothing else, such as ending TLS.
func (p *Peer) abandon() {
	p.server.mu.Lock()
	if p.left {
		p.server.mu.Unlock()
		return
	}
	p.leaveLocked()
	p.server.mu.Unlock()
	p.raw.Close()
}

// leaveLocked is called before the socket is closed, so that a connection whose client
// has seen the end no longer counts as open. The caller closes the socket.
func (p *Peer) leaveLocked() {
	s := p.server
	p.left = true
	close(p.gone)
	if i := slices.Index(s.peers, p); i >= 0 {
		s.peers = slices.Delete(s.peers, i, i+1)
	}
	p.settling = false
	s.settled.Broadcast()
}

func (p *Peer) sever(how Cut) error {
	switch how {
	case RST:
		if c, ok := p.raw.(*net.TCPConn); ok {
			c.SetLinger(0)
		}
		return p.raw.Close()
	case HalfClose:
		// CloseWrite of tls.Conn sends close_notify and leaves the socket open. Before
		// the handshake it does not even send that.
		if c, ok := p.Conn.(*tls.Conn); ok {
			c.CloseWrite()
		}
		return p.raw.(interface{ CloseWrite() error }).CloseWrite()
	}
	return p.Conn.Close()
}

func (p *Peer) serve() {
	defer p.Close()
	if c, ok := p.Conn.(*tls.Conn); ok {
		if c.Handshake() != nil {
			return
		}
		p.server.mu.Lock()
		p.server.handshakes++
		p.owed--
		p.server.mu.Unlock()
	}
	p.server.o.Handler(p)
}

// maxLine bounds the lines that Tokens reads, with their ends.
const maxLine = 4096

// Tokens answers each line "TOKEN" with "SERIAL SEQ TOKEN": the connection's number on
// this server and the request's number on this connection, both from 1. So a client
// notices a reply that is not its own. The line "RESET" gets no reply and no number. A
// line of more than 4,095 bytes ends the connection.
//
// Tokens reads on while it holds a reply back, so that Server.Overlaps can count lines
// that came before the reply. It answers these lines too, in order.
func Tokens(p *Peer) {
	requests := make(chan string, 16)
	var replies tasks.Group
	replies.Go(func() { p.answer(requests) })
	if p.readLines(requests) != io.EOF {
		p.Close() // else the client ended its direction, and still gets its replies
	}
	close(requests)
	replies.Wait()
}

func (p *Peer) readLines(requests chan<- string) error {
	s := p.server
	r := bufio.NewReaderSize(p, maxLine)
	for {
		if _, err := r.Peek(1); err != nil {
			return err
		}
		s.mu.Lock()
		p.owed++
		if p.unanswered > 0 {
			s.overlaps++
		}
		s.mu.Unlock()
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		token := string(line[:len(line)-1])
		s.mu.Lock()
		if s.o.Record {
			s.lines[p.serial] = append(s.lines[p.serial], token)
		}
		if token == "RESET" {
			p.owed--
			s.mu.Unlock()
			continue
		}
		p.unanswered++
		s.mu.Unlock()
		select {
		case requests <- token:
		case <-p.gone:
			return net.ErrClosed
		}
	}
}

func (p *Peer) answer(requests <-chan string) {
	s := p.server
	seq := 0
	for token := range requests {
		seq++
		if s.o.ReplyDelay != nil && !p.pause(s.o.ReplyDelay(p.serial, seq)) {
			return
		}
		reply := fmt.Appendf(nil, "%d %d %s\n", p.serial, seq, token)
		for s.o.Chunk > 0 && len(reply) > s.o.Chunk {
			if _, err := p.Write(reply[:s.o.Chunk]); err != nil {
				p.Close()
				return
			}
			reply = reply[s.o.Chunk:]
		}

		// The client may receive this piece and send its next line before Write returns
		// here. So unanswered is lowered before the Write: otherwise that next line would
		// count as too early. And settling tells CutIdle meanwhile that owed is about to
		// fall.
		s.mu.Lock()
		p.unanswered--
		p.settlings++
		p.settling = !p.left
		s.mu.Unlock()
		_, err := p.Write(reply)
		s.mu.Lock()
		p.owed--
		p.settling = false
		s.settled.Broadcast()
		s.mu.Unlock()
		if err != nil {
			p.Close()
			return
		}
	}
}

// pause waits for d. It returns false if the connection was closed meanwhile.
func (p *Peer) pause(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-p.gone:
		return false
	}
}
