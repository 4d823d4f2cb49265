package faultnet

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
)

// How test clients ask the servers of this package and read the replies, and handlers for
// the hosts of a Mem.

// Reply is what Tokens answers.
type Reply struct {
	Serial, Seq int // of the connection, and of the reply on it
	Token       string
}

var lastToken atomic.Uint64

// NewToken is one that nobody has sent yet.
func NewToken() string { return fmt.Sprintf("t%d", lastToken.Add(1)) }

// Ask sends a token and reads one reply to its end. What comes back under
// another token is the failure that all this is about.
func Ask(c net.Conn, token string) (Reply, error) {
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return Reply{}, err
	}
	return Hear(c, token)
}

// ErrForeign is the reply to another token than the one that was sent.
var ErrForeign = errors.New("got somebody else's reply")

// Hear reads one reply, which must be to this token.
func Hear(c net.Conn, token string) (r Reply, err error) {
	var buf [256]byte
	n := 0
	for bytes.IndexByte(buf[:n], '\n') < 0 {
		k, err := c.Read(buf[n:])
		if n += k; err != nil && bytes.IndexByte(buf[:n], '\n') < 0 {
			return r, err
		}
	}
	line := string(buf[:n])
	if _, err := fmt.Sscanf(line, "%d %d %s\n", &r.Serial, &r.Seq, &r.Token); err != nil ||
		r.Token != token || strings.IndexByte(line, '\n') != n-1 {
		return r, fmt.Errorf("%w: %q for %q", ErrForeign, line, token)
	}
	return r, nil
}

// EchoLines answers each line with the number of the connection and the line. What
// it has read is in its host's journal.
func EchoLines(c *Conn) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "%d %s", c.Serial(), line); err != nil {
			return
		}
	}
}

// Journal serves as EchoLines does and records the lines of each connection.
type Journal struct {
	mu    sync.Mutex
	lines map[int][]string
}

// Serve is for Host.Serve.
func (j *Journal) Serve(c *Conn) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		j.mu.Lock()
		if j.lines == nil {
			j.lines = make(map[int][]string)
		}
		j.lines[c.Serial()] = append(j.lines[c.Serial()], strings.TrimSuffix(line, "\n"))
		j.mu.Unlock()
		if _, err := fmt.Fprintf(c, "%d %s", c.Serial(), line); err != nil {
			return
		}
	}
}

// Of has the lines of the connection with that number.
func (j *Journal) Of(serial int) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]string(nil), j.lines[serial]...)
}

// AskLine sends a line and reads the answer of EchoLines.
func AskLine(c io.ReadWriter, line string) (string, error) {
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	var answer []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, b); err != nil {
			return string(answer), err
		}
		if b[0] == '\n' {
			return string(answer), nil
		}
		answer = append(answer, b[0])
	}
}
