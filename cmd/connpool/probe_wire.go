package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// wire is a probe's connection, with the bytes read ahead and the beginning of what the
// server sent last. A server that hangs up has often said why, and "EOF" explains
// nothing.
type wire struct {
	*bufio.Reader
	nc *listener
}

func newWire(nc net.Conn) *wire {
	l := &listener{Conn: nc}
	return &wire{bufio.NewReader(l), l}
}

// listener remembers the beginning of the bytes read since its last reset.
type listener struct {
	net.Conn
	said [80]byte
	n    int
}

func (l *listener) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if l.n < len(l.said) {
		l.n += copy(l.said[l.n:], b[:n])
	}
	return n, err
}

func (w *wire) forget()       { w.nc.n = 0 }
func (w *wire) heard() []byte { return w.nc.said[:w.nc.n] }

// unasked returns an error if bytes were read that nobody has asked for.
func (w *wire) unasked() error {
	if w.Buffered() == 0 {
		return nil
	}
	early, _ := w.Peek(w.Buffered())
	return unexpected("the server said %q without being asked", shortened(early))
}

// ask begins an exchange.
func (w *wire) ask(request []byte) error {
	w.forget()
	if err := w.send(request); err != nil {
		w.Peek(1)
		return w.lastWords(err)
	}
	return nil
}

// send writes a message. If the write fails because the server hung up, the server's last
// bytes can still be read for a moment.
func (w *wire) send(message []byte) error {
	_, err := w.nc.Write(message)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		w.nc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	}
	return err
}

// lastWords adds to err the received part of an incomplete reply.
func (w *wire) lastWords(err error) error {
	if len(w.heard()) == 0 {
		return err
	}
	return fmt.Errorf("the server said %q, and then: %w", w.heard(), err)
}
