package connpooltest_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/connpooltest"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The clients of these tests: a good one, and some with a mistake each that people make,
// and that the pool cannot see.

// reader is a Setup: the reader lives as long as its connection, and the pool sees what
// is left in it.
func reader(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	return bufio.NewReader(nc), nil
}

// values is a server: each key has a value with the key in it.
func values(key string) string { return "value of " + key }

// good makes no mistake.
func good() connpooltest.Harness {
	return connpooltest.Harness{
		Protocol: connpooltest.Lines(values),
		Config:   connpool.Config{Setup: reader},
		Client: func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
			return func(ctx context.Context, key string) (value string, err error) {
				err = pool.With(ctx, addr, func(c connpool.Conn) error {
					if _, err := fmt.Fprintln(c, key); err != nil {
						return err
					}
					value, err = connpool.State[*bufio.Reader](c).ReadString('\n')
					return err
				})
				return value, err
			}, nil
		},
	}
}

// broken are the clients with a mistake, by what it is, each with the shortest script that
// shows it.
var broken = map[string]struct {
	client func() connpooltest.Harness
	script string
}{
	"keeps the connection after a time-out of its own":         {keepsOnTimeout, "late@0 ok"},
	"keeps its readers in a map, beside the state":             {readersBeside, "extra ok"},
	"forgets the second part of a reply":                       {forgetsSecondPart, "split@18 ok"},
	"swallows the error of a malformed reply":                  {swallowsError, "late@1 ok"},
	"matches replies by position after a call was cancelled":   {matchesByPosition, "late@0 ok"},
	"returns after the header, when nobody wants the contents": {returnsAfterHeader, "split@10 ok"},
}

func keepsOnTimeout() connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			err = pool.With(ctx, addr, func(c connpool.Conn) error {
				deadline, _ := ctx.Deadline()
				c.SetReadDeadline(time.Now().Add(time.Until(deadline) / 2))
				if _, err := fmt.Fprintln(c, key); err != nil {
					return err
				}
				value, err = connpool.State[*bufio.Reader](c).ReadString('\n')
				if errors.Is(err, os.ErrDeadlineExceeded) {
					return connpool.Keep(err) // the mistake: the reply is still to come
				}
				return err
			})
			return value, err
		}, nil
	}
	return h
}

func readersBeside() connpooltest.Harness {
	var mu sync.Mutex
	readers := make(map[string]*bufio.Reader) // the mistake: the pool does not see what is left in them
	h := good()
	h.Config.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		readers[nc.LocalAddr().String()] = bufio.NewReader(nc)
		return nil, nil
	}
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			err = pool.With(ctx, addr, func(c connpool.Conn) error {
				if _, err := fmt.Fprintln(c, key); err != nil {
					return err
				}
				mu.Lock()
				r := readers[c.LocalAddr().String()]
				mu.Unlock()
				value, err = r.ReadString('\n')
				return err
			})
			return value, err
		}, nil
	}
	return h
}

func forgetsSecondPart() connpooltest.Harness {
	h := good()
	h.Protocol = connpooltest.Lines(func(key string) string { return values(key) + "\nend of " + key })
	return h // the mistake: its client reads one line
}

func swallowsError() connpooltest.Harness {
	errMalformed := errors.New("malformed reply")
	h := good()
	h.Config.Setup = nil
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			var malformed error
			err = pool.With(ctx, addr, func(c connpool.Conn) error {
				if _, err := fmt.Fprintln(c, key); err != nil {
					return err
				}
				b := make([]byte, 512)
				n, err := c.Read(b)
				if err != nil {
					return err
				}
				value = string(b[:n])
				if !strings.HasSuffix(value, "\n") {
					malformed = errMalformed
					return nil // the mistake: the rest is still to come
				}
				return nil
			})
			return value, errors.Join(err, malformed)
		}, nil
	}
	return h
}

// line is a client with one connection, on which a goroutine of its own reads the
// replies.
type line struct {
	pool *connpool.Pool
	addr connpool.Addr

	readers tasks.Group

	mu    sync.Mutex
	lease *connpool.Lease
	queue []chan string // of those who wait for a reply, in the order of their requests
}

func matchesByPosition() connpooltest.Harness {
	h := good()
	h.Config.Setup = nil
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		l := &line{pool: pool, addr: addr}
		return l.get, l.close
	}
	return h
}

func (l *line) get(ctx context.Context, key string) (string, error) {
	reply, err := l.ask(ctx, key)
	if err != nil {
		return "", err
	}
	select {
	case value, ok := <-reply:
		if !ok {
			return "", io.ErrUnexpectedEOF
		}
		return value, nil
	case <-ctx.Done():
		l.mu.Lock()
		defer l.mu.Unlock()
		for i, waiting := range l.queue {
			if waiting == reply {
				l.queue = append(l.queue[:i], l.queue[i+1:]...) // the mistake: its reply still comes
				break
			}
		}
		return "", ctx.Err()
	}
}

func (l *line) ask(ctx context.Context, key string) (chan string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease == nil {
		lease, err := l.pool.Lease(ctx, l.addr)
		if err != nil {
			return nil, err
		}
		l.lease = lease
		l.readers.Go(func() { l.read(lease) })
	}
	if _, err := fmt.Fprintln(l.lease, key); err != nil {
		return nil, err
	}
	reply := make(chan string, 1)
	l.queue = append(l.queue, reply)
	return reply, nil
}

func (l *line) read(lease *connpool.Lease) {
	r := bufio.NewReader(lease)
	for {
		value, err := r.ReadString('\n')
		l.mu.Lock()
		if err != nil {
			for _, waiting := range l.queue {
				close(waiting)
			}
			l.queue, l.lease = nil, nil
			l.mu.Unlock()
			lease.Discard()
			return
		}
		if len(l.queue) > 0 {
			l.queue[0] <- value
			l.queue = l.queue[1:]
		}
		l.mu.Unlock()
	}
}

func (l *line) close() {
	l.mu.Lock()
	if l.lease != nil {
		l.lease.Discard()
	}
	l.mu.Unlock()
	l.readers.Wait()
}

// stored is the header of a reply of the store: the name of the object, and the length of
// its contents, which follow.
type stored struct {
	Name   [8]byte
	Length uint16
}

func returnsAfterHeader() connpooltest.Harness {
	return connpooltest.Harness{
		Protocol: connpooltest.Protocol{
			ReadRequest: func(r *bufio.Reader) ([]byte, error) {
				name := make([]byte, 8)
				_, err := io.ReadFull(r, name)
				return name, err
			},
			Reply: func(name []byte) []byte {
				contents := strings.Repeat(string(name), 3)
				reply := binary.BigEndian.AppendUint16(append([]byte(nil), name...), uint16(len(contents)))
				return append(reply, contents...)
			},
		},
		Client: func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
			return func(ctx context.Context, name string) (found string, err error) {
				err = pool.With(ctx, addr, func(c connpool.Conn) error {
					if _, err := io.WriteString(c, name); err != nil {
						return err
					}
					var s stored
					if err := binary.Read(c, binary.BigEndian, &s); err != nil {
						return err
					}
					found = string(s.Name[:])
					return nil // the mistake: the contents are still to come
				})
				return found, err
			}, nil
		},
	}
}

// goods are clients without a mistake, each over another part of the pool.
var goods = map[string]func() connpooltest.Harness{
	"a reader in the state":        good,
	"replies read byte by byte":    readsByteByByte,
	"a login and a reset":          logsIn,
	"a lease for each exchange":    leases,
	"a session for each exchange":  sessions,
	"one connection, many waiters": func() connpooltest.Harness { h := good(); h.Config.MaxPerAddr, h.Borrowers = 1, 6; return h },
	"a time-out that it swallows":  givesUpEarly,
}

// withConn is good with another function for the connection.
func withConn(exchange func(ctx context.Context, c connpool.Conn, key string) (string, error)) connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			err = pool.With(ctx, addr, func(c connpool.Conn) (err error) {
				value, err = exchange(ctx, c, key)
				return err
			})
			return value, err
		}, nil
	}
	return h
}

func readsByteByByte() connpooltest.Harness {
	h := withConn(func(_ context.Context, c connpool.Conn, key string) (string, error) {
		if _, err := fmt.Fprintln(c, key); err != nil {
			return "", err
		}
		var value []byte
		for b := make([]byte, 1); b[0] != '\n'; value = append(value, b[0]) {
			if _, err := io.ReadFull(c, b); err != nil {
				return "", err
			}
		}
		return string(value), nil
	})
	h.Config.Setup = nil
	return h
}

// ask sends a line and reads one.
func ask(w io.Writer, r *bufio.Reader, request string) (string, error) {
	if _, err := fmt.Fprintln(w, request); err != nil {
		return "", err
	}
	return r.ReadString('\n')
}

func logsIn() connpooltest.Harness {
	h := withConn(func(_ context.Context, c connpool.Conn, key string) (string, error) {
		return ask(c, connpool.State[*bufio.Reader](c), key)
	})
	h.Protocol.Greeting = []byte("* hello\n")
	h.Config.Setup = func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		r := bufio.NewReader(nc)
		if _, err := r.ReadString('\n'); err != nil {
			return nil, err
		}
		_, err := ask(nc, r, "LOGIN")
		return r, err
	}
	again := func(_ context.Context, c connpool.Conn) error {
		_, err := ask(c, connpool.State[*bufio.Reader](c), "PING")
		return err
	}
	h.Config.Reset, h.Config.Check, h.Config.CheckAfterIdle = again, again, -1
	return h
}

func leases() connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			lease, err := pool.Lease(ctx, addr)
			if err != nil {
				return "", err
			}
			defer lease.Return()
			err = lease.Do(ctx, func(c connpool.Conn) (err error) {
				value, err = ask(c, connpool.State[*bufio.Reader](c), key)
				return err
			})
			return value, err
		}, nil
	}
	return h
}

func sessions() connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, err error) {
			ctx, end := pool.Session(ctx)
			defer end()
			for range 2 {
				err = pool.With(ctx, addr, func(c connpool.Conn) (err error) {
					value, err = ask(c, connpool.State[*bufio.Reader](c), key)
					return err
				})
				if err != nil {
					return "", err
				}
			}
			return value, nil
		}, nil
	}
	return h
}

// givesUpEarly has a time-out of its own, and tells the pool nothing of it. The pool
// sees that the read failed.
func givesUpEarly() connpooltest.Harness {
	h := good()
	h.Client = func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
		return func(ctx context.Context, key string) (value string, failed error) {
			err := pool.With(ctx, addr, func(c connpool.Conn) error {
				deadline, _ := ctx.Deadline()
				c.SetReadDeadline(time.Now().Add(time.Until(deadline) / 3))
				value, failed = ask(c, connpool.State[*bufio.Reader](c), key)
				return nil
			})
			return value, errors.Join(failed, err)
		}, nil
	}
	return h
}
