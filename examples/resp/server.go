package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// server knows HELLO, CLIENT TRACKING, GET and SET, and tells the readers of a key when
// it has changed.
type server struct {
	mu      sync.Mutex // guards the fields below, and orders writes to tracked connections
	values  map[string]string
	readers map[string]map[net.Conn]bool
}

func newServer() *server {
	return &server{values: make(map[string]string), readers: make(map[string]map[net.Conn]bool)}
}

func (s *server) serve(nc net.Conn) {
	in := &codec{Reader: bufio.NewReader(nc), w: nc}
	defer s.forget(nc)
	for {
		v, err := in.value(maxDepth)
		items, ok := v.([]any)
		if err != nil || !ok {
			return
		}
		words := make([]string, len(items))
		for i, item := range items {
			words[i], _ = item.(string)
		}
		if err := s.answer(nc, words); err != nil {
			return
		}
	}
}

func (s *server) answer(nc net.Conn, words []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	reply := "-ERR unknown command\r\n"
	switch command := strings.ToUpper(strings.Join(words, " ")); {
	case command == "HELLO 3":
		reply = "%2\r\n$6\r\nserver\r\n$7\r\nexample\r\n$5\r\nproto\r\n:3\r\n"
	case command == "CLIENT TRACKING ON":
		reply = "+OK\r\n"
	case len(words) == 2 && strings.EqualFold(words[0], "GET"):
		key := words[1]
		if s.readers[key] == nil {
			s.readers[key] = make(map[net.Conn]bool)
		}
		s.readers[key][nc] = true
		reply = "_\r\n"
		if value, ok := s.values[key]; ok {
			reply = fmt.Sprintf("$%d\r\n%s\r\n", len(value), value)
		}
	case len(words) == 3 && strings.EqualFold(words[0], "SET"):
		key := words[1]
		s.values[key] = words[2]
		for reader := range s.readers[key] {
			fmt.Fprintf(reader, ">2\r\n$10\r\ninvalidate\r\n*1\r\n$%d\r\n%s\r\n", len(key), key)
		}
		delete(s.readers, key)
		reply = "+OK\r\n"
	}
	_, err := io.WriteString(nc, reply)
	return err
}

func (s *server) forget(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, readers := range s.readers {
		delete(readers, nc)
	}
}
