// Package loopback is the server side of the examples. Each example starts its own
// server, so that it runs without arguments and without anything installed.
package loopback

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// Server serves connections to a free port of the loopback.
type Server struct {
	l         net.Listener
	transport connpool.Transport
	running   sync.WaitGroup

	mu       sync.Mutex // guards the fields below; nothing blocks under it
	open     map[net.Conn]struct{}
	accepted int
	closed   bool
}

// Start runs handle in a goroutine of its own for each connection. The connection is
// closed when handle returns.
func Start(handle func(net.Conn)) (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return serve(l, connpool.TCP, handle), nil
}

// StartTLS is Start under TLS, as 127.0.0.1. roots trusts the server's certificate, which
// StartTLS makes.
func StartTLS(handle func(net.Conn)) (s *Server, roots *x509.CertPool, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "example"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}},
	})
	if err != nil {
		return nil, nil, err
	}
	return serve(l, connpool.TLS, handle), roots, nil
}

func serve(l net.Listener, transport connpool.Transport, handle func(net.Conn)) *Server {
	s := &Server{l: l, transport: transport, open: make(map[net.Conn]struct{})}
	s.running.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			if !s.admit(nc) {
				nc.Close()
				return
			}
			s.running.Go(func() {
				handle(nc)
				nc.Close()
				s.mu.Lock()
				delete(s.open, nc)
				s.mu.Unlock()
			})
		}
	})
	return s
}

func (s *Server) admit(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.open[nc] = struct{}{}
	s.accepted++
	return true
}

// Addr is the server's address, for a pool.
func (s *Server) Addr() connpool.Addr {
	return connpool.MustParseAddr(fmt.Sprintf("%s://%s", s.transport, s.l.Addr()))
}

// Accepted is how many connections the server has accepted.
func (s *Server) Accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted
}

// Close ends all connections and waits until their handlers have returned.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for nc := range s.open {
		nc.Close()
	}
	s.mu.Unlock()
	s.l.Close()
	s.running.Wait()
}
