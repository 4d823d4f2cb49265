package connpooltest

import (
	"bufio"
	"bytes"
	"strings"
)

// Protocol is the server's side of a protocol: as little of the server as its clients
// need in a test. The functions are called from one goroutine for each connection, so
// several calls may run at once.
type Protocol struct {
	// ReadRequest reads one request, up to its last byte and no further, and returns what
	// Reply needs. An error closes the connection.
	ReadRequest func(r *bufio.Reader) (request []byte, err error)

	// Reply returns the reply to a request, with its framing. nil: the request gets no
	// reply. In a Harness the reply must contain the token that the request contains.
	Reply func(request []byte) []byte

	// Greeting is what the server sends on each new connection before it reads. Empty:
	// nothing.
	Greeting []byte

	// Unasked is a frame that the server may send without a request, such as a notice. The
	// faults Extra, Ahead and Unasked send it. Empty: Extra and Ahead send the reply a
	// second time instead, and Unasked sends one line, "unasked".
	Unasked []byte
}

// Lines is a protocol of lines, which end with "\n" or "\r\n". reply gets a line without
// its end, and returns the reply without its end; the server adds "\n". An empty reply is
// an empty line.
func Lines(reply func(line string) string) Protocol {
	return Protocol{
		ReadRequest: func(r *bufio.Reader) ([]byte, error) {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return nil, err
			}
			return bytes.TrimSuffix(line[:len(line)-1], []byte("\r")), nil
		},
		Reply: func(line []byte) []byte {
			return []byte(strings.TrimSuffix(reply(string(line)), "\n") + "\n")
		},
	}
}

// unasked is the frame for an idle connection.
func (p *Protocol) unasked() []byte {
	if len(p.Unasked) > 0 {
		return p.Unasked
	}
	return []byte("unasked\n")
}

// beside is the frame that is sent together with reply.
func (p *Protocol) beside(reply []byte) []byte {
	if len(p.Unasked) > 0 {
		return p.Unasked
	}
	return reply
}
