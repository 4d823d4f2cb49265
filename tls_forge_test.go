package connpool

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// tlForger writes TLS 1.3 records that a server of crypto/tls never would,
// with that server's own keys. After it has written, the server itself cannot
// any more: their record numbers differ.
type tlForger struct {
	c      *tlConn
	secret []byte
	seq    uint64
	aead   cipher.AEAD
	iv     []byte
}

const tlHandshakeRecord = 22

func tlForge(t testing.TB, c *tlConn) *tlForger {
	t.Helper()
	if suite := c.stream.(*tls.Conn).ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("crypto/tls prefers %s on this processor, and only AES-128 can be forged here", tls.CipherSuiteName(suite))
	}
	f := &tlForger{c: c}
	for line := range strings.Lines(c.keyLog.String()) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "SERVER_TRAFFIC_SECRET_0" {
			secret, err := hex.DecodeString(fields[2])
			require.NoError(t, err)
			f.secret = secret
		}
	}
	require.NotEmpty(t, f.secret)
	// A forger that takes over from another goes on where that one stopped.
	if c.forged != nil {
		return c.forged
	}
	f.rekey()
	c.mu.Lock()
	f.seq = c.records
	c.forged = f
	c.mu.Unlock()
	return f
}

// expand is HKDF-Expand-Label with an empty context (RFC 8446, section 7.1).
func (f *tlForger) expand(label string, n int) []byte {
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(append(info, byte(len(label))), label...)
	out, err := hkdf.Expand(sha256.New, f.secret, string(append(info, 0)), n)
	if err != nil {
		panic(err)
	}
	return out
}

func (f *tlForger) rekey() {
	block, err := aes.NewCipher(f.expand("key", 16))
	if err != nil {
		panic(err)
	}
	if f.aead, err = cipher.NewGCM(block); err != nil {
		panic(err)
	}
	f.iv, f.seq = f.expand("iv", 12), 0
}

// seal makes the record of a message.
func (f *tlForger) seal(typ byte, message []byte) []byte {
	plain := append(append([]byte(nil), message...), typ)
	header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(plain)+f.aead.Overhead()))
	nonce := append([]byte(nil), f.iv...)
	for i := range 8 {
		nonce[11-i] ^= byte(f.seq >> (8 * i))
	}
	f.seq++
	return f.aead.Seal(header, nonce, plain, header)
}

func (f *tlForger) send(record []byte) error {
	_, err := f.c.Conn.Write(record)
	return err
}

// ticket is a NewSessionTicket; n is roughly its size, up to 16 KiB.
func (f *tlForger) ticket(n int) []byte {
	n = min(n, 1<<14-100)
	body := []byte{0, 0, 1, 0, 1, 2, 3, 4, 1, byte(f.seq)} // lifetime, age_add, nonce
	body = binary.BigEndian.AppendUint16(body, uint16(n))
	body = append(body, make([]byte, n)...)
	body = append(body, 0, 0) // no extensions
	return f.seal(tlHandshakeRecord, append([]byte{4, 0, byte(len(body) >> 8), byte(len(body))}, body...))
}

// keyUpdate changes the keys of this direction, and may ask for the other's.
func (f *tlForger) keyUpdate(requested bool) []byte {
	message := []byte{24, 0, 0, 1, 0}
	if requested {
		message[4] = 1
	}
	record := f.seal(tlHandshakeRecord, message)
	f.secret = f.expand("traffic upd", 32)
	f.rekey()
	return record
}
