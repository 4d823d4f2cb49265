package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/seed-ecb488c9/connpool"
)

// result is the directory's result for an operation that failed.
type result struct {
	code int
	text string
}

func (r *result) Error() string { return fmt.Sprintf("ldap: result %d: %s", r.code, r.text) }

const (
	noSuchObject       = 32
	invalidCredentials = 49
)

// codec is the state of one connection: the id of its last message.
type codec struct {
	*bufio.Reader // its Buffered tells the pool of bytes left unread
	w             io.Writer
	id            int
}

func (c *codec) send(operation []byte) error {
	c.id = c.id&0x3fffffff + 1
	_, err := c.w.Write(element(tagSequence, number(tagInteger, c.id), operation))
	return err
}

// receive reads the next message of the current operation.
func (c *codec) receive() (tag byte, contents *parser, err error) {
	tag, message, err := readElement(c.Reader)
	if err != nil {
		return 0, nil, err
	}
	if tag != tagSequence {
		return 0, nil, errBER
	}
	p := &parser{rest: message}
	id := p.number(tagInteger)
	tag, operation := p.any()
	switch {
	case p.err != nil:
		return 0, nil, p.err
	case id == 0:
		return 0, nil, errors.New("ldap: the directory says that it disconnects")
	case id != c.id:
		return 0, nil, fmt.Errorf("ldap: the answer to message %d came to %d", id, c.id) // out of step: close it
	}
	return tag, &parser{rest: operation}, nil
}

// outcome reads the result that ends an operation.
func outcome(p *parser) error {
	code := p.number(tagEnum)
	p.text() // the name that matched
	text := p.text()
	switch {
	case p.err != nil:
		return p.err
	case code != 0:
		return connpool.Keep(&result{code, text}) // the exchange is complete
	}
	return nil
}

// bind logs in. Any error of bind fails the borrow.
func (c *codec) bind(name, password string) error {
	if name != "" && password == "" {
		// An empty password binds anonymously, and the directory reports success.
		return fmt.Errorf("ldap: no password for %q", name)
	}
	if err := c.send(element(tagBind, number(tagInteger, 3), octets(name), element(tagSimple, []byte(password)))); err != nil {
		return err
	}
	tag, p, err := c.receive()
	if err == nil && tag != tagBound {
		err = errBER
	}
	if err != nil {
		return err
	}
	return outcome(p)
}

// search returns the values of one attribute of the entries below base in which another
// attribute has the given value. Values need no escaping here, because no text is parsed.
func (c *codec) search(base, key, value, attribute string) (values []string, err error) {
	const wholeSubtree = 2
	if err := c.send(element(tagSearch, octets(base), number(tagEnum, wholeSubtree), number(tagEnum, 0),
		number(tagInteger, 1000), number(tagInteger, 10), element(tagBoolean, []byte{0}),
		element(tagEquality, octets(key), octets(value)), element(tagSequence, octets(attribute)))); err != nil {
		return nil, err
	}
	for {
		tag, p, err := c.receive()
		if err != nil {
			return nil, err
		}
		switch tag {
		case tagDone:
			return values, outcome(p)
		case tagReference: // there may be more entries elsewhere
			continue
		case tagEntry:
		default:
			return nil, errBER
		}
		p.text() // the name of the entry
		for attributes := (&parser{rest: p.of(tagSequence), err: p.err}); attributes.more(); {
			one := &parser{rest: attributes.of(tagSequence)}
			one.text()
			for all := (&parser{rest: one.of(tagSet), err: one.err}); all.more(); {
				values = append(values, all.text())
				one.err = all.err
			}
			if p.err = errors.Join(attributes.err, one.err); p.err != nil {
				break
			}
		}
		if p.err != nil {
			return nil, p.err
		}
	}
}

// serveDirectory is a directory of two people.
func serveDirectory(nc net.Conn) {
	people := map[string]string{"alice": "alice@example.org", "bob": "bob@example.org"}
	in := bufio.NewReader(nc)
	bound := false
	for {
		tag, message, err := readElement(in)
		if err != nil || tag != tagSequence {
			return
		}
		p := &parser{rest: message}
		id := p.number(tagInteger)
		tag, operation := p.any()
		o := &parser{rest: operation}
		end := func(tag byte, code int, text string) []byte {
			return element(tagSequence, number(tagInteger, id), element(tag, number(tagEnum, code), octets(""), octets(text)))
		}
		var answer []byte
		switch {
		case p.err != nil:
			return
		case tag == tagBind:
			o.number(tagInteger)
			name, password := o.text(), string(o.of(tagSimple))
			if bound = o.err == nil && (name == "" || password == "secret"); bound {
				answer = end(tagBound, 0, "")
			} else {
				answer = end(tagBound, invalidCredentials, "wrong name or password")
			}
		case tag == tagSearch && bound:
			where := o.text()
			o.number(tagEnum)
			o.number(tagEnum)
			o.number(tagInteger)
			o.number(tagInteger)
			o.of(tagBoolean)
			filter := &parser{rest: o.of(tagEquality)}
			filter.text()
			uid := filter.text()
			switch mail, ok := people[uid]; {
			case o.err != nil || filter.err != nil:
				return
			case where != base:
				answer = end(tagDone, noSuchObject, "no such object: "+where)
			case ok:
				answer = element(tagSequence, number(tagInteger, id), element(tagEntry, octets("uid="+uid+","+base),
					element(tagSequence, element(tagSequence, octets("mail"), element(tagSet, octets(mail))))))
				fallthrough
			default:
				answer = append(answer, end(tagDone, 0, "")...)
			}
		default:
			return
		}
		if _, err := nc.Write(answer); err != nil {
			return
		}
	}
}
