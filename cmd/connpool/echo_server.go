package main

import (
	"bufio"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// noWork is for servers that answer at once.
func noWork() {}

// workersOf reads "10x20ms": a number of workers, each of which takes 20 ms for a
// request. Requests queue for a worker.
func workersOf(text string) (work func(), err error) {
	count, each, _ := strings.Cut(text, "x")
	n, err1 := strconv.Atoi(count)
	d, err2 := time.ParseDuration(each)
	if err1 != nil || err2 != nil || n < 1 || n > 10_000 || d <= 0 {
		return nil, fmt.Errorf("%q is not a number of workers (up to 10000) and a time for each request, such as 10x20ms", text)
	}
	free := make(chan struct{}, n)
	return func() {
		free <- struct{}{}
		time.Sleep(d)
		<-free
	}, nil
}

// echoServer answers each line with the same line, for users without a server to measure.
type echoServer struct {
	l       net.Listener
	work    func() // done for each line
	running tasks.Group

	mu     sync.Mutex // guards open and closed; nothing blocks under it
	open   map[net.Conn]struct{}
	closed bool
}

func startEchoServer(work func()) (*echoServer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &echoServer{l: l, work: work, open: make(map[net.Conn]struct{})}
	s.running.Go(s.accept)
	return s, nil
}

func (s *echoServer) addr() string { return s.l.Addr().String() }

func (s *echoServer) accept() {
	for {
		nc, err := s.l.Accept()
		if err != nil {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if closed {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of file handles: clients will free some
			continue
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			nc.Close()
			return
		}
		s.open[nc] = struct{}{}
		s.mu.Unlock()
		s.running.Go(func() {
			echo(nc, s.work)
			nc.Close()
			s.mu.Lock()
			delete(s.open, nc)
			s.mu.Unlock()
		})
	}
}

func echo(nc net.Conn, work func()) {
	in := bufio.NewReader(nc)
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return
		}
		work()
		if _, err := nc.Write(line); err != nil {
			return
		}
	}
}

// close ends all connections and waits for their goroutines.
func (s *echoServer) close() {
	s.mu.Lock()
	s.closed = true
	for nc := range s.open {
		nc.Close()
	}
	s.mu.Unlock()
	s.l.Close()
	s.running.Wait()
}
