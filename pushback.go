package connpool

import (
	"net"
	"sync"
)

// pushback is what a probe took out of crypto/tls, for the loan that follows. It exists
// until the pool has found it empty.
type pushback struct {
	mu    sync.Mutex // guards the fields below; no I/O happens under it
	bytes []byte
	moved bool // a read has returned bytes, from here or from the connection
}

// read reads what was put back, and then from the connection.
func (b *pushback) read(nc net.Conn, p []byte) (n int, err error) {
	if n, ok := b.take(p); ok {
		return n, nil
	}
	n, err = nc.Read(p)
	if n > 0 {
		b.mu.Lock()
		b.moved = true
		b.mu.Unlock()
	}
	return n, err
}

func (b *pushback) take(p []byte) (n int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.bytes) == 0 {
		return 0, false
	}
	n = copy(p, b.bytes)
	b.bytes = b.bytes[n:]
	b.moved = b.moved || n > 0
	return n, true
}

// restart resets moved and returns its old value.
func (b *pushback) restart() (moved bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	moved, b.moved = b.moved, false
	return moved
}

func (b *pushback) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.bytes)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// plaintext is the error of a probe that took plaintext out of crypto/tls, for Push.
type plaintext struct{ bytes []byte }

func (*plaintext) Error() string { return ErrUnread.Error() }
func (*plaintext) Unwrap() error { return ErrUnread }

// wholeRecord takes the rest of a TLS record out of crypto/tls, after a probe has read the
// first byte of it there.
func (p *socket) wholeRecord(first byte) *plaintext {
	rest := make([]byte, 16<<10) // no record is longer than this
	if sock := p.belowTLS(); sock != nil {
		sock.enter(tlsSealed)
	} else if p.tls.SetDeadline(aLongTimeAgo) != nil {
		return &plaintext{[]byte{first}} // the rest stays in order behind the first byte
	}
	n, _ := p.tls.Read(rest)
	return &plaintext{append([]byte{first}, rest[:n]...)}
}
