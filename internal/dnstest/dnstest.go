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
)

// RCode is the response code of an answer.
type RCode uint16

// The codes of RFC 1035, and what a server does with a question instead of an answer.
const (
	Success  RCode = 0
	ServFail RCode = 2
	NXDomain RCode = 3
	Refused  RCode = 5
	Silent   RCode = 0xfff // it says nothing
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
	answers map[string]func(Question) ([]netip.Addr, RCode)
	asked   map[Question]int
	closers []io.Closer
	wg      sync.WaitGroup
}

// New makes a server in memory. It knows no name, so its answer to all is NXDomain.
func New() *Server {
	return &Server{answers: map[string]func(Question) ([]netip.Addr, RCode){}, asked: map[Question]int{}}
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
	s.Func(name, func(Question) ([]netip.Addr, RCode) { return all, Success })
}

// Fail makes the server answer all questions for name with code.
func (s *Server) Fail(name string, code RCode) {
	s.Func(name, func(Question) ([]netip.Addr, RCode) { return nil, code })
}

// Func makes the answers for name those of f. Of the addresses, those of the family that is asked
// for are sent, in their order. f must not call the server.
func (s *Server) Func(name string, f func(Question) ([]netip.Addr, RCode)) {
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
	q, name, kind, ok := parse(message)
	if !ok {
		return nil
	}
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
	var records []byte
	n := 0
	for _, a := range addrs {
		if kind == typeA && a.Is4() || kind == typeAAAA && a.Is6() {
			n++
			records = append(records, 0xc0, headerLen) // the name: that of the question
			records = binary.BigEndian.AppendUint16(records, kind)
			records = binary.BigEndian.AppendUint16(records, classIN)
			records = binary.BigEndian.AppendUint32(records, 1) // seconds to live
			records = binary.BigEndian.AppendUint16(records, uint16(len(a.AsSlice())))
			records = append(records, a.AsSlice()...)
		}
	}
	flags := uint16(isResponse|wantsRecursion|hasRecursion) | uint16(code)
	if headerLen+len(name)+4+len(records) > most {
		records, n, flags = nil, 0, flags|isTruncated
	}
	b := append([]byte(nil), message[:2]...) // the id
	for _, v := range []uint16{flags, 1, uint16(n), 0, 0} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint16(b, classIN)
	return append(b, records...)
}

// The parts of a message of RFC 1035 that the server needs.
const (
	headerLen = 12
	typeA     = 1
	typeAAAA  = 28
	classIN   = 1

	isResponse     = 1 << 15
	isTruncated    = 1 << 9
	wantsRecursion = 1 << 8
	hasRecursion   = 1 << 7
)

// parse reads the question of a message: what it asks, its name as it is sent, and its type.
func parse(message []byte) (q Question, name []byte, kind uint16, ok bool) {
	if len(message) < headerLen || binary.BigEndian.Uint16(message[4:]) != 1 {
		return q, nil, 0, false
	}
	rest := message[headerLen:]
	var labels []string
	for len(rest) > 0 && rest[0] != 0 {
		n := int(rest[0])
		if n > 63 || len(rest) < 1+n {
			return q, nil, 0, false
		}
		labels = append(labels, string(rest[1:1+n]))
		rest = rest[1+n:]
	}
	if len(rest) < 5 {
		return q, nil, 0, false
	}
	name = message[headerLen : len(message)-len(rest)+1]
	kind = binary.BigEndian.Uint16(rest[1:])
	return Question{strings.Join(labels, "."), kind == typeAAAA}, name, kind, true
}
