package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Clients whose pool comes with its protocol. They are compared with a held connection
// that carries the same bytes, see rawHeld.

// --- go-redis ---

type redisClient struct{ db *redis.Client }

func newRedis(s *Settings) Rival {
	opt := &redis.Options{
		Addr:     s.Servers[0],
		Dialer:   func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx, 0) },
		PoolSize: s.Max,
		// Background traffic to the server and retries of dials are off; retries of
		// commands are at their default.
		Protocol:                 2,
		DisableIdentity:          true,
		DialerRetries:            1,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		PoolTimeout:              time.Minute,
	}
	if s.Max == 0 {
		opt.PoolSize = 1 << 15
	}
	opt.MaxConcurrentDials = opt.PoolSize
	return redisClient{redis.NewClient(opt)}
}

func (r redisClient) Loan(context.Context, int) error { return ErrOwnProtocol }

func (r redisClient) Hold(context.Context, int, func(net.Conn) error) error { return ErrOwnProtocol }

func (r redisClient) Exchange(ctx context.Context, _ int, x *Exchange) error {
	reply, err := r.db.Echo(ctx, x.Request).Result()
	if err != nil {
		return err
	}
	copy(x.reply[:], reply)
	return x.verify()
}

func (r redisClient) fill(ctx context.Context, n int) (err error) {
	for range n {
		c := r.db.Conn()
		defer func() { err = errors.Join(err, c.Close()) }()
		if err := c.Echo(ctx, make([]byte, FrameSize)).Err(); err != nil {
			return err
		}
	}
	return nil
}

func (r redisClient) Close() error { return r.db.Close() }

// --- net/http ---

type httpClient struct {
	t   *http.Transport
	url string
}

func newHTTP(s *Settings) Rival {
	idle := s.Max
	if idle == 0 {
		idle = math.MaxInt
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx, 0) }
	r := &httpClient{url: "http://" + s.Servers[0] + "/"}
	r.t = &http.Transport{
		DialContext: dial, DialTLSContext: dial,
		MaxConnsPerHost: s.Max, MaxIdleConnsPerHost: idle,
		DisableCompression: true,
	}
	if s.TLS {
		r.url = "https://" + s.Servers[0] + "/"
	}
	return r
}

func (r *httpClient) Loan(context.Context, int) error { return ErrOwnProtocol }

func (r *httpClient) Hold(context.Context, int, func(net.Conn) error) error { return ErrOwnProtocol }

func (r *httpClient) Exchange(ctx context.Context, _ int, x *Exchange) error {
	return r.post(ctx, r.url, x)
}

func (r *httpClient) post(ctx context.Context, url string, x *Exchange) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(x.Request))
	if err != nil {
		return err
	}
	resp, err := r.t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, x.reply[:]); err != nil {
		return err
	}
	// Without this read at the end, net/http does not take the connection back.
	if _, err := resp.Body.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("the body does not end: %v", err)
	}
	return x.verify()
}

// fill asks for n replies at once, which the server sends when all requests have come.
func (r *httpClient) fill(ctx context.Context, n int) error {
	done := make(chan error, n)
	for i := range n {
		go func() { done <- r.post(ctx, fmt.Sprintf("%s?together=%d", r.url, n), NewExchange(i)) }()
	}
	var err error
	for range n {
		err = errors.Join(err, <-done)
	}
	return err
}

func (r *httpClient) Close() error {
	r.t.CloseIdleConnections()
	return nil
}

// --- both ---

func init() {
	redis.SetLogger(quietLog{})
	log.SetOutput(io.Discard) // net/http reports each connection that a test cuts
}

type quietLog struct{}

func (quietLog) Printf(context.Context, string, ...any) {}

// Fill makes the rival open n connections at once and give all of them back.
// Each has been used.
func Fill(ctx context.Context, r Rival, n int, key func(i int) int) error {
	if own, ok := r.(interface {
		fill(context.Context, int) error
	}); ok {
		return own.fill(ctx, n)
	}
	x := NewExchange(0)
	var open func(i int) error
	open = func(i int) error {
		if i == n {
			return nil
		}
		return r.Hold(ctx, key(i), func(c net.Conn) error {
			if err := exchange(c, x); err != nil {
				return err
			}
			return open(i + 1)
		})
	}
	// The stack of n loans, one inside the other, goes with its goroutine.
	done := make(chan error)
	go func() { done <- open(0) }()
	return <-done
}

// Same is the key function of [Fill] for one address.
func Same(int) int { return 0 }

// rawHeld is a held connection that carries the bytes of a protocol, made beforehand and
// not parsed: the best possible result for a client that makes and parses them.
type rawHeld struct {
	nc      net.Conn
	request []byte
	reply   []byte
	size    int // of the reply, learned from the first
}

func newRawHeld(s *Settings, protocol string) (*rawHeld, error) {
	nc, err := s.dial(context.Background(), 0)
	if err != nil {
		return nil, err
	}
	h := &rawHeld{nc: nc, reply: make([]byte, 4096)}
	body := NewExchange(1).Request
	switch protocol {
	case "redis":
		h.request = fmt.Appendf(nil, "*2\r\n$4\r\necho\r\n$%d\r\n%s\r\n", FrameSize, body)
	case "http":
		h.request = fmt.Appendf(nil, "POST / HTTP/1.1\r\nHost: %s\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n\r\n%s",
			s.Servers[0], FrameSize, body)
	default:
		h.request, h.size = body, FrameSize
	}
	return h, nil
}

func (h *rawHeld) exchange() error {
	if _, err := h.nc.Write(h.request); err != nil {
		return err
	}
	for n := 0; n == 0 || n < h.size; {
		m, err := h.nc.Read(h.reply[n:])
		if err != nil {
			return err
		}
		n += m
		if h.size == 0 {
			h.size = n // the servers of this package send a reply in one piece
		}
	}
	return nil
}
