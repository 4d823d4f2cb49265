package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

// A message begins with a vertical tab and ends with a file separator and a carriage
// return.
const (
	begins     = 0x0b
	ends       = 0x1c
	maxMessage = 1 << 20
)

// message is an HL7 message: segments of fields; each segment ends with a carriage
// return.
type message string

// field returns field n, in HL7's numbering, of the first segment of that name.
func (m message) field(segment string, n int) string {
	if segment == "MSH" {
		n-- // MSH-1 is the separator itself
	}
	for s := range strings.SplitSeq(string(m), "\r") {
		if fields := strings.Split(s, "|"); fields[0] == segment && n < len(fields) {
			return fields[n]
		}
	}
	return ""
}

func (m message) control() string { return m.field("MSH", 10) }

// admission is a message of type ADT^A01.
func admission(control, patient string) message {
	return message("MSH|^~\\&|EXAMPLE|HERE|WARD|THERE|20260102030405||ADT^A01|" + control + "|P|2.5\rPID|1||" + patient + "\r")
}

// refusal is a negative acknowledgement.
type refusal struct{ code, text string }

func (r *refusal) Error() string { return fmt.Sprintf("refused (%s): %s", r.code, r.text) }

// codec is the state of one connection.
type codec struct {
	*bufio.Reader // its Buffered tells the pool of bytes left unread
	w             io.Writer
}

func (c *codec) send(m message) error {
	_, err := fmt.Fprintf(c.w, "%c%s%c\r", begins, m, ends)
	return err
}

func (c *codec) receive() (message, error) {
	switch b, err := c.ReadByte(); {
	case err != nil:
		return "", err
	case b != begins:
		return "", fmt.Errorf("mllp: %#x where a message should begin", b)
	}
	var m []byte
	for {
		b, err := c.ReadByte()
		switch {
		case err != nil:
			return "", err
		case b == ends:
			if b, err = c.ReadByte(); err == nil && b != '\r' {
				err = fmt.Errorf("mllp: %#x where a message should end", b)
			}
			return message(m), err
		case len(m) == maxMessage:
			return "", fmt.Errorf("mllp: a message of more than %d bytes", maxMessage)
		}
		m = append(m, b)
	}
}

// deliver sends a message and waits for its acknowledgement.
func (c *codec) deliver(m message) error {
	if strings.ContainsRune(string(m), ends) || m.control() == "" {
		return connpool.Keep(errors.New("mllp: no HL7 message: it must have a control id, and no byte 0x1c"))
	}
	if err := c.send(m); err != nil {
		return err
	}
	ack, err := c.receive()
	if err != nil {
		return err
	}
	if of := ack.field("MSA", 2); of != m.control() {
		return fmt.Errorf("mllp: the acknowledgement of %q came to %q", of, m.control()) // out of step: close it
	}
	if code := ack.field("MSA", 1); code != "AA" && code != "CA" {
		return connpool.Keep(&refusal{code, ack.field("MSA", 3)})
	}
	return nil
}

// ward is a receiver that demands a patient in each message.
type ward struct {
	mu       sync.Mutex // guards received
	received []string   // control ids
	before   func(message)
}

func (w *ward) serve(nc net.Conn) {
	c := &codec{bufio.NewReader(nc), nc}
	for {
		m, err := c.receive()
		if err != nil {
			return
		}
		if w.before != nil {
			w.before(m)
		}
		verdict := "AA|" + m.control()
		if m.field("PID", 3) == "" {
			verdict = "AE|" + m.control() + "|no patient"
		} else {
			w.mu.Lock()
			w.received = append(w.received, m.control())
			w.mu.Unlock()
		}
		if err := c.send(message("MSH|^~\\&|WARD|THERE|EXAMPLE|HERE|20260102030405||ACK|A" + m.control() + "|P|2.5\rMSA|" + verdict + "\r")); err != nil {
			return
		}
	}
}
