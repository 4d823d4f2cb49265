package connpool_test

import (
	"bufio"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// chanPool is the pool of docs/why.md. What the page says of it is shown below.
type chanPool struct {
	address string
	idle    chan net.Conn
}

func (p *chanPool) With(fn func(net.Conn) error) error {
	var nc net.Conn
	select {
	case nc = <-p.idle:
	default:
		var err error
		if nc, err = net.Dial("tcp", p.address); err != nil {
			return err
		}
	}
	nc.SetDeadline(time.Now().Add(5 * time.Second))
	if err := fn(nc); err != nil {
		nc.Close()
		return err
	}
	select {
	case p.idle <- nc:
	default:
		nc.Close()
	}
	return nil
}

// ask sends a line and reads one.
func ask(nc net.Conn, line string) (string, error) {
	if _, err := io.WriteString(nc, line+"\n"); err != nil {
		return "", err
	}
	return bufio.NewReader(nc).ReadString('\n')
}

func TestAChannelOfConnectionsLendsDeadOnes(t *testing.T) {
	address, stop := serve(func(nc net.Conn) {
		in := bufio.NewReader(nc)
		if line, err := in.ReadString('\n'); err == nil {
			io.WriteString(nc, line) // one exchange, then the server hangs up
		}
	})
	defer stop()
	p := &chanPool{address, make(chan net.Conn, 1)}
	require.NoError(t, p.With(func(nc net.Conn) error { _, err := ask(nc, "a"); return err }))
	require.Error(t, p.With(func(nc net.Conn) error { _, err := ask(nc, "b"); return err }))
}

func TestAChannelOfConnectionsLendsDirtyOnes(t *testing.T) {
	address, stop := serve(lines(func(line string) string { return "to " + line + "\n" }))
	defer stop()
	p := &chanPool{address, make(chan net.Conn, 1)}
	defer func() { (<-p.idle).Close() }()
	require.NoError(t, p.With(func(nc net.Conn) error { // who asks twice and reads once
		if _, err := io.WriteString(nc, "a\n"); err != nil {
			return err
		}
		var reply [5]byte // "to a\n"
		if _, err := io.ReadFull(nc, reply[:]); err != nil {
			return err
		}
		_, err := io.WriteString(nc, "b\n")
		return err
	}))
	require.NoError(t, p.With(func(nc net.Conn) error {
		reply, err := ask(nc, "c")
		require.Equal(t, "to b\n", reply, "somebody else's")
		return err
	}))
}

func TestAChannelOfConnectionsBelievesNil(t *testing.T) {
	late := make(chan bool)
	address, stop := serve(lines(func(line string) string {
		if line == "a" {
			<-late
		}
		return "to " + line + "\n"
	}))
	defer stop()
	p := &chanPool{address, make(chan net.Conn, 1)}
	defer func() { (<-p.idle).Close() }()
	require.NoError(t, p.With(func(nc net.Conn) error {
		nc.SetDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := ask(nc, "a")
		require.Error(t, err) // it is logged, and that is all
		return nil
	}))
	close(late)
	require.NoError(t, p.With(func(nc net.Conn) error {
		reply, err := ask(nc, "c")
		require.Equal(t, "to a\n", reply, "somebody else's")
		return err
	}))
}
