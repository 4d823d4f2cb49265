package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

var errNil = errors.New("no such key")

// redisError is an error reply: an answer, and no failure of the connection.
type redisError string

func (e redisError) Error() string { return string(e) }

// push is a message that the server sends unasked.
type push []any

const (
	maxBulk  = 64 << 20
	maxItems = 1 << 20
	maxDepth = 8
)

// codec is the state of one connection.
type codec struct {
	*bufio.Reader // its Buffered tells the pool of bytes left unread
	w             io.Writer
	cache         *cache
}

// The pool calls Close when the connection ends, for whatever reason: from then on the
// server no longer reports changes of the keys that this connection has read.
func (c *codec) Close() error {
	c.cache.forgetAll(c)
	return nil
}

// do sends a command and reads its reply.
func (c *codec) do(words ...string) (any, error) {
	return c.exchange(func(any) {}, words...)
}

// get reads a key, and caches the value until an invalidation comes.
func (c *codec) get(key string) (string, error) {
	reply, err := c.exchange(func(reply any) {
		if text, ok := reply.(string); ok {
			c.cache.keep(c, key, text)
		}
	}, "GET", key)
	if err != nil {
		return "", err
	}
	switch reply := reply.(type) {
	case string:
		return reply, nil
	case nil:
		return "", connpool.Keep(fmt.Errorf("%w: %s", errNil, key))
	}
	return "", fmt.Errorf("redis: %T in reply to GET", reply)
}

// exchange calls heard with the reply before it handles the pushes that follow the reply:
// their order keeps the cache correct.
func (c *codec) exchange(heard func(any), words ...string) (any, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(words))
	for _, w := range words {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(w), w)
	}
	if _, err := io.WriteString(c.w, b.String()); err != nil {
		return nil, err
	}
	for {
		v, err := c.value(maxDepth)
		if err != nil {
			return nil, err
		}
		if p, ok := v.(push); ok {
			c.invalidate(p)
			continue
		}
		heard(v)
		for c.Buffered() > 0 { // pushes that came with the reply; otherwise Config.Push would be called for them
			if err := c.hear(); err != nil {
				return nil, err
			}
		}
		if e, ok := v.(redisError); ok {
			return nil, connpool.Keep(e)
		}
		return v, nil
	}
}

// hear reads one push while no reply is outstanding.
func (c *codec) hear() error {
	v, err := c.value(maxDepth)
	if err != nil {
		return err
	}
	p, ok := v.(push)
	if !ok {
		return fmt.Errorf("redis: %v, which nobody has asked for", v)
	}
	c.invalidate(p)
	return nil
}

// invalidate handles a push: keys that have changed, or nil for all keys. It ignores
// other pushes.
func (c *codec) invalidate(p push) {
	if len(p) != 2 || p[0] != "invalidate" {
		return
	}
	keys, ok := p[1].([]any)
	if !ok {
		c.cache.forgetAll(c)
	}
	for _, key := range keys {
		if key, ok := key.(string); ok {
			c.cache.forget(key)
		}
	}
}

// value reads one value of any type that servers send.
func (c *codec) value(depth int) (any, error) {
	line, err := c.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line, ok := strings.CutSuffix(line, "\r\n")
	if !ok || line == "" || depth == 0 {
		return nil, fmt.Errorf("redis: %q is no reply", line)
	}
	kind, text := line[0], line[1:]
	switch kind {
	case '+':
		return text, nil
	case '-':
		return redisError(text), nil
	case ':':
		return strconv.ParseInt(text, 10, 64)
	case '_':
		return nil, nil
	case '#', ',', '(':
		return text, nil
	case '$', '=', '*', '~', '>', '%':
	default:
		return nil, fmt.Errorf("redis: %q is no reply", line)
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < -1 || n > maxBulk {
		return nil, fmt.Errorf("redis: a length of %q", text)
	}
	if n == -1 {
		return nil, nil
	}
	if kind == '$' || kind == '=' {
		b := make([]byte, n+2)
		_, err := io.ReadFull(c, b)
		return string(b[:n]), err
	}
	if kind == '%' {
		n *= 2
	}
	if n > maxItems {
		return nil, fmt.Errorf("redis: %d items", n)
	}
	var items []any
	for range n {
		item, err := c.value(depth - 1)
		if err != nil {
			return nil, err
		}
		items = append(items, item)
	}
	if kind == '>' {
		return push(items), nil
	}
	return items, nil
}

// cache holds what the connections of a client have read and still track.
type cache struct {
	mu   sync.Mutex // guards kept
	kept map[string]entry
}

type entry struct {
	value string
	by    *codec // the connection that gets the invalidation
}

func newCache() *cache { return &cache{kept: make(map[string]entry)} }

func (c *cache) look(key string) (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.kept[key]
	return e.value, ok
}

func (c *cache) keep(by *codec, key, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept[key] = entry{value, by}
}

func (c *cache) forget(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.kept, key)
}

func (c *cache) forgetAll(by *codec) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, e := range c.kept {
		if e.by == by {
			delete(c.kept, key)
		}
	}
}
