// MLLP, the transport of HL7 version 2 messages between the systems of a hospital. Run it
// as it is, or with the address of a receiver:
//
//	go run ./mllp [tcp://192.0.2.7:2575]
//
// What the pool does for its user:
//
//   - An acknowledgement that comes late would confirm another message, and a
//     result would count as delivered that never was. The pool closes a
//     connection on which a wait ended early; the codec also compares control
//     ids.
//   - Receivers close after minutes of silence, and a firewall between often
//     hides the close. The pool finds dead connections before it lends them.
//   - A refusal (AE, AR) is an answer to report to the sender: Keep.
//   - To deliver a message at least once, the sender repeats it with the same
//     control id. That decision depends on the message, so the pool never
//     repeats anything: fn runs once.
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

// deliver shows the use of the pool.
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
		IdleTimeout: time.Minute, // shorter than the receiver's
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
