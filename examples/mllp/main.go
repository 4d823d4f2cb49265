// MLLP, the transport of HL7 version 2 messages between the systems of a
// hospital. Run it as it is, or with the address of a receiver:
//
//	go run ./mllp [tcp://192.0.2.7:2575]
//
// What the pool spares its author:
//
//   - An acknowledgement that comes late confirms somebody else's message, and
//     a result counts as delivered that never was. A connection on which a wait
//     ended early is closed; the control id is compared besides.
//   - Receivers close after minutes of silence, often without a word from the
//     firewall between. Dead connections are found before they are lent.
//   - A refusal (AE, AR) is an answer, to be told to the sender: Keep.
//   - Whoever wants a message delivered at least once repeats it with the same
//     control id. That decision needs the message, so the pool never makes it:
//     fn runs once.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

// deliver is the lines that matter.
func (s *sender) deliver(ctx context.Context, m message) error {
	return s.pool.With(ctx, s.addr, func(c connpool.Conn) error {
		return connpool.State[*codec](c).deliver(m)
	})
}

// sender delivers to one receiver. Any number of goroutines may use it.
type sender struct {
	pool *connpool.Pool
	addr connpool.Addr
}

func newSender(addr connpool.Addr) (*sender, error) {
	pool, err := connpool.New(connpool.Config{
		MaxPerAddr:  2,
		IdleTimeout: time.Minute, // below that of the receiver
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{bufio.NewReader(nc), nc}, nil
		},
	})
	return &sender{pool, addr}, err
}

func run(w io.Writer, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var addr connpool.Addr
	if len(args) > 0 {
		var err error
		if addr, err = connpool.ParseAddr(args[0]); err != nil {
			return err
		}
	} else {
		server, err := loopback.Start(new(ward).serve)
		if err != nil {
			return err
		}
		defer server.Close()
		addr = server.Addr()
	}
	s, err := newSender(addr)
	if err != nil {
		return err
	}
	defer s.pool.Close()
	for i, patient := range []string{"PATID1234", "", "PATID5678"} {
		m := admission(fmt.Sprintf("MSG%05d", i+1), patient)
		err := s.deliver(ctx, m)
		fmt.Fprintf(w, "%s: %v\n", m.control(), err)
		var no *refusal
		if err != nil && !errors.As(err, &no) {
			return err
		}
	}
	fmt.Fprintf(w, "connections opened: %d\n", s.pool.Stats().Dials)
	return nil
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}
