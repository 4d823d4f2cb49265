// Package dnstest is a DNS server for tests: on loopback over UDP and TCP, or in memory, where it
// works in testing/synctest bubbles.
package dnstest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// What a server does with a question instead of an answer.
const (
	NXDomain = dnsmessage.RCodeNameError
	ServFail = dnsmessage.RCodeServerFailure
	Silent   = dnsmessage.RCode(0xfff) // it says nothing
)

// Question is what a resolver asks for: the addresses of one family.
type Question struct {
	Name string // without the final dot
	Six  bool   // AAAA, not A
}

// Server answers questions. Its methods may be called from any goroutine.
type Server struct {
	addr string // of its sockets; "": it is in memory

	mu      sync.Mutex // guards what follows; answer functions run under it
	answers map[string]func(Question) ([]netip.Addr, dnsmessage.RCode)
	asked   map[Question]int
	closers []io.Closer
	wg      sync.WaitGroup
}

// New makes a server in memory. It knows no name, so its answer to all is NXDomain.
func New() *Server {
	return &Server{answers: map[string]func(Question) ([]netip.Addr, dnsmessage.RCode){}, asked: map[Question]int{}}
}

// Start makes a server that listens on loopback.
func Start() (*Server, error) {
	s := New()
	for range 20 { // the port of one protocol may be taken in the other
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		pc, err := net.ListenPacket("udp", ln.Addr().String())
		if err != nil {
			ln.Close()
			continue
		}
		s.addr = ln.Addr().String()
		s.closers = append(s.closers, ln, pc)
		s.wg.Add(2)
		go s.serveUDP(pc)
		go s.serveTCP(ln)
		return s, nil
	}
	return nil, errors.New("dnstest: no port is free for both UDP and TCP")
}

// Close ends the server and waits for its goroutines.
func (s *Server) Close() {
	s.mu.Lock()
	closers := s.closers
	s.closers = nil
	s.mu.Unlock()
	for _, c := range closers {
		c.Close()
	}
	s.wg.Wait()
}

// Set makes name have these addresses, and no others. Without any, the name is there all the
// same.
func (s *Server) Set(name string, addrs ...string) {
	var all []netip.Addr
	for _, a := range addrs {
		all = append(all, netip.MustParseAddr(a))
	}
	s.Func(name, func(Question) ([]netip.Addr, dnsmessage.RCode) { return all, dnsmessage.RCodeSuccess })
}

// Fail makes the server answer all questions for name with code.
func (s *Server) Fail(name string, code dnsmessage.RCode) {
	s.Func(name, func(Question) ([]netip.Addr, dnsmessage.RCode) { return nil, code })
}

// Func makes the answers for name those of f. Of the addresses, those of the family that is asked
// for are sent, in their order. f must not call the server.
func (s *Server) Func(name string, f func(Question) ([]netip.Addr, dnsmessage.RCode)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[name] = f
}

// Asked is how often a question was asked.
func (s *Server) Asked(q Question) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[q]
}

// Names are the names that were asked for.
func (s *Server) Names() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := map[string]bool{}
	for q := range s.asked {
		names[q.Name] = true
	}
	return names
}

// Resolver asks the server.
func (s *Server) Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if s.addr != "" {
			return new(net.Dialer).DialContext(ctx, network, s.addr)
		}
		here, there := net.Pipe() // no PacketConn, so the resolver speaks as over TCP
		s.wg.Add(1)
		go s.serveConn(there)
		return here, nil
	}}
}

func (s *Server) serveUDP(pc net.PacketConn) {
	defer s.wg.Done()
	b := make([]byte, 4096)
	for {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		if reply := s.reply(b[:n], 1232); reply != nil {
			pc.WriteTo(reply, from)
		}
	}
}

func (s *Server) serveTCP(ln net.Listener) {
	defer s.wg.Done()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.closers = append(s.closers, c)
		s.mu.Unlock()
		s.wg.Add(1)
		go s.serveConn(c)
	}
}

// serveConn answers on a stream, in which each message follows its length.
func (s *Server) serveConn(c net.Conn) {
	defer s.wg.Done()
	defer c.Close()
	for {
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		b := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		if reply := s.reply(b, 1<<16-1); reply != nil {
			c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...))
		}
	}
}

// reply is the reply to a message, truncated if it is longer than most; nil if there is none.
func (s *Server) reply(message []byte, most int) []byte {
	var p dnsmessage.Parser
	head, err := p.Start(message)
	if err != nil {
		return nil
	}
	question, err := p.Question()
	if err != nil {
		return nil
	}
	q := Question{strings.TrimSuffix(question.Name.String(), "."), question.Type == dnsmessage.TypeAAAA}
	s.mu.Lock()
	s.asked[q]++
	var addrs []netip.Addr
	code := NXDomain
	if f := s.answers[q.Name]; f != nil {
		addrs, code = f(q)
	}
	s.mu.Unlock()
	if code == Silent {
		return nil
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: head.ID, Response: true, RecursionDesired: true, RecursionAvailable: true, RCode: code},
		Questions: []dnsmessage.Question{question},
	}
	for _, a := range addrs {
		r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: question.Name, Class: question.Class, TTL: 1}}
		switch {
		case a.Is4() && question.Type == dnsmessage.TypeA:
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case a.Is6() && question.Type == dnsmessage.TypeAAAA:
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, r)
	}
	b, err := m.Pack()
	if err == nil && len(b) > most {
		m.Answers, m.Truncated = nil, true
		b, err = m.Pack()
	}
	if err != nil {
		return nil
	}
	return b
}
