package gateway

import (
	"context"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// redial keeps an interval between the end of a connection and the opening of the next
// one, for devices that accept one connection at a time and need a while to notice that
// it has ended.
type redial struct {
	delay time.Duration

	mu   sync.Mutex // guards last; nothing else happens under it
	last time.Time  // when a connection was closed
}

// closed runs when a connection has been closed, before its slot is free.
func (r *redial) closed() {
	r.mu.Lock()
	r.last = time.Now()
	r.mu.Unlock()
}

// dial is a connpool.DialFunc for TCP (also under TLS) and Unix sockets.
func (r *redial) dial(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
	r.mu.Lock()
	end := r.last.Add(r.delay)
	r.mu.Unlock()
	if err := pauseFor(ctx, time.Until(end)); err != nil {
		return nil, err
	}
	network, address := "tcp", net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port)))
	if addr.Transport == connpool.Unix {
		network, address = "unix", addr.Host
	}
	nc, err := sock.Options(addr.QoS).Dial(ctx, network, address)
	if err != nil {
		r.closed() // the server may have noticed the failed dial
	}
	return nc, err
}
