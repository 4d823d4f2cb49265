package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

var errMiss = errors.New("no such key")

const (
	maxKey   = 250     // limit of memcached
	maxValue = 1 << 20 // limit of memcached, unless -I changes it
)

// codec is the state of one connection. It embeds the reader, so that the pool sees what
// the reader has buffered.
type codec struct {
	*bufio.Reader
	w io.Writer
}

// soundKey refuses a key that would end the command it is part of. Nothing has been sent
// then, so the connection is kept.
func soundKey(key string) error {
	if key == "" || len(key) > maxKey || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return connpool.Keep(fmt.Errorf("%q is no key: 1 to %d bytes without spaces", key, maxKey))
	}
	return nil
}

func (c *codec) line() (string, error) {
	line, err := c.ReadSlice('\n')
	return strings.TrimRight(string(line), "\r\n"), err
}

func (c *codec) get(key string) (string, error) {
	if err := soundKey(key); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c.w, "get %s\r\n", key); err != nil {
		return "", err
	}
	head, err := c.line()
	switch {
	case err != nil:
		return "", err
	case head == "END":
		return "", connpool.Keep(fmt.Errorf("%w: %s", errMiss, key)) // the exchange is complete
	}
	if err := refusal(head); err != nil {
		return "", err
	}
	words := strings.Fields(head)
	if len(words) < 4 || words[0] != "VALUE" || words[1] != key {
		return "", fmt.Errorf("memcached answers %q to get %s", head, key) // out of step: close it
	}
	n, err := strconv.Atoi(words[3])
	if err != nil || n < 0 || n > maxValue {
		return "", fmt.Errorf("memcached announces a value of %q bytes", words[3])
	}
	value := make([]byte, n+2)
	if _, err := io.ReadFull(c, value); err != nil {
		return "", err
	}
	end, err := c.line()
	if err == nil {
		err = refusal(end)
	}
	if err == nil && (end != "END" || !bytes.HasSuffix(value, []byte("\r\n"))) {
		err = fmt.Errorf("memcached: a value of %d bytes does not end where it should", n)
	}
	return string(value[:n]), err
}

func (c *codec) set(key, value string) error {
	if err := soundKey(key); err != nil {
		return err
	}
	if len(value) > maxValue {
		return connpool.Keep(fmt.Errorf("a value of %d bytes is too large", len(value)))
	}
	return c.expect("STORED", "set %s 0 0 %d\r\n%s\r\n", key, len(value), value)
}

func (c *codec) ping() error { return c.expect("VERSION ", "version\r\n") }

func (c *codec) expect(prefix, format string, args ...any) error {
	if _, err := fmt.Fprintf(c.w, format, args...); err != nil {
		return err
	}
	line, err := c.line()
	if err == nil {
		err = refusal(line)
	}
	if err == nil && !strings.HasPrefix(line, prefix) {
		err = fmt.Errorf("memcached answers %q", line)
	}
	return err
}

// refusal returns the error in a line if the server says that it cannot do what it
// understood: then the server has read all of the request, and the line is the whole
// answer. After ERROR and CLIENT_ERROR it is unknown how much of the request the server
// still has to read. These are no refusals, and the pool closes the connection.
func refusal(line string) error {
	if !strings.HasPrefix(line, "SERVER_ERROR") {
		return nil
	}
	return connpool.Keep(fmt.Errorf("memcached refuses: %s", line))
}

// store is a server that knows get, set and version.
type store struct {
	mu     sync.Mutex // guards values
	values map[string]string
}

func newStore() *store { return &store{values: make(map[string]string)} }

func (s *store) serve(nc net.Conn) {
	c := &codec{bufio.NewReader(nc), nc}
	for {
		line, err := c.line()
		if err != nil {
			return
		}
		words := strings.Fields(line)
		reply := "ERROR\r\n"
		switch {
		case len(words) == 2 && words[0] == "get":
			s.mu.Lock()
			value, ok := s.values[words[1]]
			s.mu.Unlock()
			reply = "END\r\n"
			if ok {
				reply = fmt.Sprintf("VALUE %s 0 %d\r\n%s\r\nEND\r\n", words[1], len(value), value)
			}
		case len(words) == 5 && words[0] == "set":
			n, err := strconv.Atoi(words[4])
			if err != nil || n < 0 || n > maxValue {
				return
			}
			value := make([]byte, n+2)
			if _, err := io.ReadFull(c, value); err != nil {
				return
			}
			s.mu.Lock()
			s.values[words[1]] = string(value[:n])
			s.mu.Unlock()
			reply = "STORED\r\n"
		case line == "version":
			reply = "VERSION example\r\n"
		}
		if _, err := io.WriteString(nc, reply); err != nil {
			return
		}
	}
}
