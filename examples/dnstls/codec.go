package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/seed-ecb488c9/connpool"
)

var errNoName = errors.New("no such name")

// codec is the state of one connection: the id of its last question.
type codec struct {
	*bufio.Reader // its Buffered tells the pool of bytes left unread
	w             io.Writer
	id            uint16
}

// lookup asks for the IPv4 addresses of a name.
func (c *codec) lookup(name string) ([]netip.Addr, error) {
	if !strings.HasSuffix(name, ".") {
		name += "."
	}
	n, err := dnsmessage.NewName(name)
	if err != nil {
		return nil, connpool.Keep(fmt.Errorf("%q: %w", name, err)) // nothing was sent
	}
	c.id++
	question := dnsmessage.Question{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	if err := send(c.w, dnsmessage.Message{
		Header:    dnsmessage.Header{ID: c.id, RecursionDesired: true},
		Questions: []dnsmessage.Question{question},
	}); err != nil {
		if errors.Is(err, errPack) {
			err = connpool.Keep(err)
		}
		return nil, err
	}
	m, err := receive(c)
	switch {
	case err != nil:
		return nil, err
	case m.ID != c.id || !m.Response || len(m.Questions) != 1 || !same(m.Questions[0], question):
		return nil, fmt.Errorf("the answer to question %d came to %d", m.ID, c.id) // out of step: close it
	case m.RCode == dnsmessage.RCodeNameError:
		return nil, connpool.Keep(fmt.Errorf("%w: %s", errNoName, name))
	case m.RCode != dnsmessage.RCodeSuccess:
		return nil, connpool.Keep(fmt.Errorf("%s: %v", name, m.RCode))
	}
	var addrs []netip.Addr
	for _, r := range m.Answers {
		if a, ok := r.Body.(*dnsmessage.AResource); ok {
			addrs = append(addrs, netip.AddrFrom4(a.A))
		}
	}
	return addrs, nil
}

// same compares names as DNS does.
func same(a, b dnsmessage.Question) bool {
	return a.Type == b.Type && a.Class == b.Class && strings.EqualFold(a.Name.String(), b.Name.String())
}

var errPack = errors.New("not a message")

// send writes a message after its length in two bytes.
func send(w io.Writer, m dnsmessage.Message) error {
	b, err := m.AppendPack(make([]byte, 2, 512))
	if err != nil || len(b)-2 > 1<<16-1 {
		return fmt.Errorf("%w: %v", errPack, err)
	}
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	_, err = w.Write(b)
	return err
}

func receive(r io.Reader) (m dnsmessage.Message, err error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return m, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return m, err
	}
	return m, m.Unpack(b)
}

// serveZone answers for db.example, and for no other name.
func serveZone(nc net.Conn) {
	for {
		m, err := receive(nc)
		if err != nil || len(m.Questions) != 1 {
			return
		}
		m.Response, m.RecursionAvailable = true, true
		m.Additionals = nil
		q := m.Questions[0]
		switch {
		case !strings.EqualFold(q.Name.String(), "db.example."):
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			m.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
				Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 53}},
			}}
		}
		if err := send(nc, m); err != nil {
			return
		}
	}
}
