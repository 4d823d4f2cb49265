package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// The tags of the elements that are needed.
const (
	tagInteger   = 0x02
	tagOctets    = 0x04
	tagBoolean   = 0x01
	tagEnum      = 0x0a
	tagSequence  = 0x30
	tagSet       = 0x31
	tagBind      = 0x60 // [APPLICATION 0]
	tagBound     = 0x61
	tagSearch    = 0x63
	tagEntry     = 0x64
	tagDone      = 0x65
	tagReference = 0x73
	tagSimple    = 0x80 // of the choice of a password
	tagEquality  = 0xa3 // of the choice of a filter
)

// maxElement bounds what is read for one message.
const maxElement = 1 << 20

var errBER = errors.New("ldap: this is not LDAP")

// element is a tag and its contents, by BER.
func element(tag byte, contents ...[]byte) []byte {
	n := 0
	for _, c := range contents {
		n += len(c)
	}
	b := []byte{tag}
	switch {
	case n < 0x80:
		b = append(b, byte(n))
	case n < 0x100:
		b = append(b, 0x81, byte(n))
	default:
		b = append(b, 0x84, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	for _, c := range contents {
		b = append(b, c...)
	}
	return b
}

func octets(s string) []byte { return element(tagOctets, []byte(s)) }

func number(tag byte, n int) []byte {
	b := []byte{byte(n)}
	for n > 0x7f {
		n >>= 8
		b = append([]byte{byte(n)}, b...)
	}
	return element(tag, b)
}

// readElement reads one element from a connection.
func readElement(r *bufio.Reader) (tag byte, contents []byte, err error) {
	if tag, err = r.ReadByte(); err != nil {
		return 0, nil, err
	}
	n, err := readLength(r.ReadByte)
	if err != nil {
		return 0, nil, err
	}
	contents = make([]byte, n)
	_, err = io.ReadFull(r, contents)
	return tag, contents, err
}

func readLength(next func() (byte, error)) (int, error) {
	b, err := next()
	if err != nil || b < 0x80 {
		return int(b), err
	}
	if b == 0x80 || b > 0x84 {
		return 0, errBER
	}
	n := uint32(0) // an int would be negative on a 32-bit system
	for range b & 0x7f {
		if b, err = next(); err != nil {
			return 0, err
		}
		n = n<<8 | uint32(b)
	}
	if n > maxElement {
		return 0, fmt.Errorf("%w: an element of %d bytes", errBER, n)
	}
	return int(n), nil
}

// parser takes elements off the contents of another. Its first error stays.
type parser struct {
	rest []byte
	err  error
}

func (p *parser) any() (tag byte, contents []byte) {
	if p.err != nil {
		return 0, nil
	}
	take := func() (byte, error) {
		if len(p.rest) == 0 {
			return 0, errBER
		}
		b := p.rest[0]
		p.rest = p.rest[1:]
		return b, nil
	}
	if tag, p.err = take(); p.err != nil {
		return 0, nil
	}
	var n int
	if n, p.err = readLength(take); p.err == nil && n > len(p.rest) {
		p.err = errBER
	}
	if p.err != nil {
		return 0, nil
	}
	contents, p.rest = p.rest[:n], p.rest[n:]
	return tag, contents
}

func (p *parser) of(want byte) []byte {
	tag, contents := p.any()
	if p.err == nil && tag != want {
		p.err = fmt.Errorf("%w: element %#x where %#x is due", errBER, tag, want)
	}
	return contents
}

func (p *parser) text() string { return string(p.of(tagOctets)) }

func (p *parser) number(tag byte) (n int) {
	b := p.of(tag)
	if p.err == nil && (len(b) == 0 || len(b) > 4) {
		p.err = errBER
	}
	for _, c := range b {
		n = n<<8 | int(c)
	}
	return n
}

func (p *parser) more() bool { return p.err == nil && len(p.rest) > 0 }
