package connpool_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/seed-ecb488c9/connpool"
)

// legacy speaks the protocol of an old stock-keeping system: a frame is one
// byte that says what it is, the length of its text in two bytes, and the text.
// The first frame of a connection is a login.
type legacy struct {
	*bufio.Reader // its Buffered tells the pool about bytes that were left unread
	io.Writer
}

func (l legacy) send(kind byte, text string) error {
	frame := binary.BigEndian.AppendUint16([]byte{kind}, uint16(len(text)))
	_, err := l.Write(append(frame, text...))
	return err
}

func (l legacy) receive() (kind byte, text string, err error) {
	var head [3]byte
	if _, err := io.ReadFull(l, head[:]); err != nil {
		return 0, "", err
	}
	body := make([]byte, binary.BigEndian.Uint16(head[1:]))
	_, err = io.ReadFull(l, body)
	return head[0], string(body), err
}

var errNoSuchPart = errors.New("no such part")

func (l legacy) stock(part string) (string, error) {
	if err := l.send('Q', part); err != nil {
		return "", err
	}
	switch kind, text, err := l.receive(); {
	case err != nil:
		return "", err // the connection is out of step, and will be closed
	case kind == 'E':
		return "", connpool.Keep(fmt.Errorf("%w: %s", errNoSuchPart, text)) // it is fine
	default:
		return text, nil
	}
}

// serveLegacy is the old system.
func serveLegacy(nc net.Conn) {
	defer nc.Close()
	l := legacy{bufio.NewReader(nc), nc}
	for {
		kind, text, err := l.receive()
		switch {
		case err != nil:
			return
		case kind == 'L':
			fmt.Println("login of", text)
			l.send('A', "")
		case text == "bolt M8":
			l.send('A', "412")
		default:
			l.send('E', text)
		}
	}
}

// ORA-72: a legacy system with a protocol of its own.
func ExampleConfig_setup() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go serveLegacy(nc)
		}
	}()

	pool, err := connpool.New(connpool.Config{
		MaxPerAddr: 4,
		Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			l := legacy{bufio.NewReader(nc), nc}
			if err := l.send('L', addr.Scope); err != nil {
				return nil, err
			}
			_, _, err := l.receive()
			return l, err
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + ln.Addr().String() + "?scope=warehouse")
	for _, part := range []string{"bolt M8", "nut M9", "bolt M8"} {
		var n string
		err := pool.With(context.Background(), addr, func(c connpool.Conn) (err error) {
			n, err = connpool.State[legacy](c).stock(part)
			return err
		})
		fmt.Println(part, n, err)
	}
	fmt.Println("connections opened:", pool.Stats().Dials)

	// Output:
	// login of warehouse
	// bolt M8 412 <nil>
	// nut M9  no such part: nut M9
	// bolt M8 412 <nil>
	// connections opened: 1
}
