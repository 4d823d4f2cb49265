package bench

import (
	"context"
	"crypto/tls"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// Check is how a connection is checked before it is lent.
type Check int

const (
	CheckNone Check = iota // nothing
	CheckPeek              // one non-blocking peek into the socket
	CheckAll               // this pool's default: the peek, and whether the descriptor still is the same socket
)

func (c Check) String() string { return [...]string{"none", "peek", "all"}[c] }

// Settings are the same for every rival of a workload. They must not change while a rival
// is in use.
type Settings struct {
	Servers []string // address number i is at Servers[i%len(Servers)]
	TLS     bool
	OwnTLS  bool // with TLS: the dialer of a rival makes the *tls.Conn, although the rival could
	Fake    bool // connections without a socket, for more addresses than there are descriptors
	Addrs   int  // how many addresses there are; 0: 1
	Max     int  // connections per address, and idle ones; 0: no limit
	MaxOpen int  // connections in all; 0: no limit. Only this pool has that.
	Check   Check

	Sweep  time.Duration  // the period at which idle connections are checked; 0: the rival's default; <0: never
	Delay  atomic.Int64   // extra time of each dial, in nanoseconds
	Opened atomic.Int64   // dials that succeeded
	OnDial func(net.Conn) // sees the socket of every connection; may be nil
}

// connect opens the socket to address number key, without TLS.
func (s *Settings) connect(ctx context.Context, key int) (net.Conn, error) {
	if d := s.Delay.Load(); d > 0 {
		t := time.NewTimer(time.Duration(d))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if s.Fake {
		s.Opened.Add(1)
		return new(fake), nil
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", s.Servers[key%len(s.Servers)])
	if err != nil {
		return nil, err
	}
	s.Opened.Add(1)
	if s.OnDial != nil {
		s.OnDial(nc)
	}
	return nc, nil
}

// dial opens a connection to address number key, ready for use.
func (s *Settings) dial(ctx context.Context, key int) (net.Conn, error) {
	nc, err := s.connect(ctx, key)
	if err != nil || !s.TLS {
		return nc, err
	}
	t := tls.Client(nc, ClientTLS())
	if err := t.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, err
	}
	return t, nil
}

// name is address number key, for rivals with more than one address.
func (s *Settings) name(key int) string {
	if s.Fake {
		return fakeHost(key) + ":80"
	}
	return s.Servers[key%len(s.Servers)] + "#" + strconv.Itoa(key)
}

func fakeHost(key int) string {
	return "10." + strconv.Itoa(key>>16&255) + "." + strconv.Itoa(key>>8&255) + "." + strconv.Itoa(key&255)
}

// fake is a connection without a socket or descriptor. It has a size, so that no two have
// the same address.
type fake struct{ _ int }

func (*fake) Read(b []byte) (int, error)       { return len(b), nil }
func (*fake) Write(b []byte) (int, error)      { return len(b), nil }
func (*fake) Close() error                     { return nil }
func (*fake) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*fake) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*fake) SetDeadline(time.Time) error      { return nil }
func (*fake) SetReadDeadline(time.Time) error  { return nil }
func (*fake) SetWriteDeadline(time.Time) error { return nil }

// line is a connection as held by rivals that lend any resource.
type line struct {
	net.Conn
	raw  syscall.RawConn
	look func(uintptr) // made once, because a closure allocates
	dead bool
}

func (s *Settings) open(ctx context.Context, key int) (*line, error) {
	nc, err := s.dial(ctx, key)
	if err != nil {
		return nil, err
	}
	l := &line{Conn: nc}
	if s.Check == CheckNone || s.Fake {
		return l, nil
	}
	under := nc
	if t, ok := nc.(*tls.Conn); ok {
		under = t.NetConn()
	}
	l.raw, err = under.(syscall.Conn).SyscallConn()
	l.look = func(fd uintptr) { l.dead = quiet(fd) != nil }
	return l, err
}

// alive peeks into the socket, if the settings ask for it. It is the cheapest check there
// is, and the one that this pool uses.
func (l *line) alive() bool {
	if l.raw == nil {
		return true
	}
	return l.raw.Control(l.look) == nil && !l.dead
}
