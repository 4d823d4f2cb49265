// Package tlsrecord knows, without asking crypto/tls, whether crypto/tls may hold
// plaintext that nobody has read, or a part of a record.
//
// Behind the door is the framing of TLS records: the Tracker sees the bytes that
// crypto/tls takes from the socket, and how much plaintext it hands out. It reads
// nothing itself, has no socket, decrypts nothing and takes no copy but of a header.
//
// Nothing here blocks, locks or allocates. All methods of a Tracker are for one
// goroutine at a time, but for Delivered.
//
// The zero value of a Tracker is ready for the first byte of a connection. It knows of
// a part of a record at once; until Start it proves nothing (Drained is false).
package tlsrecord

import (
	"crypto/tls"
	"sync/atomic"
)

// Tracker follows the framing of TLS records (a header of 5 bytes: the type, two
// of the version, two that count the bytes of the body), because crypto/tls tells
// neither whether it has read a part of one nor whether plaintext is left over.
// The former is data that the next borrower would get. The latter can be asked,
// by a read that costs more than the rest of a loan; but mostly the sum proves it:
// a record of application data holds at most its body less the cipher's overhead.
// So if the borrower read as much as all records together can hold, there is
// nothing left in crypto/tls, and there was no record of another kind. The
// overhead is that of the cipher: TLS 1.3 keeps it for life, also over key
// updates, but a renegotiation of TLS 1.2 may change it. Its records tell, so
// from the first of them on nothing is proven by the sum any more.
type Tracker struct {
	header    [5]byte
	have      int8  // bytes of the header
	uncertain bool  // since the last Reset there was something that is no such record
	touched   bool  // since the last Reset something was read
	overhead  int16 // of a record under the cipher; 0: not known, nothing can be proven
	body      int32 // bytes of the body still to come

	// Both count modulo 2^32: crypto/tls holds no more than a record or two.
	capacity uint32        // what the records since the last Reset can hold
	read     atomic.Uint32 // what was read of it
}

// Start is told what the first handshake, which is over, has agreed on. Of what came
// with it, it is not known what is left in crypto/tls. A connection that may be
// renegotiated is never started, since its cipher may change.
func (r *Tracker) Start(state tls.ConnectionState) {
	r.uncertain = true
	r.overhead = overheadOf(state)
}

// Saw is told each piece of the stream that crypto/tls takes from the socket.
func (r *Tracker) Saw(b []byte) {
	r.touched = r.touched || len(b) > 0
	for len(b) > 0 {
		if int(r.have) < len(r.header) {
			n := copy(r.header[r.have:], b)
			r.have += int8(n)
			b = b[n:]
			if int(r.have) == len(r.header) {
				r.body = int32(r.header[3])<<8 | int32(r.header[4])
				room := r.body - int32(r.overhead)
				r.capacity += uint32(room)
				r.uncertain = r.uncertain || r.header[0] != applicationData || room < 0
				if r.header[0] == handshakeRecord || r.header[0] == changeCipherSpec {
					r.overhead = 0 // which the end of the first handshake sets
				}
			}
		} else {
			n := min(int(r.body), len(b))
			r.body -= int32(n)
			b = b[n:]
		}
		if int(r.have) == len(r.header) && r.body == 0 {
			r.have = 0
		}
	}
}

// The type of a record; in TLS 1.3 all that are encrypted are of the last.
const (
	changeCipherSpec = 20
	handshakeRecord  = 22
	applicationData  = 23
)

// Lost is told that a read from the socket failed, or that something else happened
// after which the sum proves nothing until the next Reset.
func (r *Tracker) Lost() { r.uncertain = true }

// Delivered is told how many bytes of plaintext crypto/tls has handed out. It may be
// called while another goroutine is in Saw.
func (r *Tracker) Delivered(n int64) { r.read.Add(uint32(n)) }

// Partial reports whether crypto/tls has read a part of a record.
func (r *Tracker) Partial() bool { return r.have > 0 }

// CanProve reports whether the overhead of the cipher is known. If it is not, Drained
// is false, whatever was read.
func (r *Tracker) CanProve() bool { return r.overhead > 0 }

// Drained reports whether it is certain that crypto/tls holds nothing.
func (r *Tracker) Drained() bool {
	return r.CanProve() && !r.uncertain && r.have == 0 && r.capacity == r.read.Load()
}

// Untouched reports whether crypto/tls has neither read anything nor tried to in
// vain since it was asked last.
func (r *Tracker) Untouched() bool { return !r.touched && !r.uncertain }

// Reset begins anew, when crypto/tls was asked and holds nothing.
func (r *Tracker) Reset() {
	r.uncertain, r.touched, r.capacity = false, false, 0
	r.read.Store(0)
}

// overheadOf is what a record spends on its nonce, its tag and, in TLS 1.3, its
// inner type; 0 if that depends on the record.
func overheadOf(s tls.ConnectionState) int16 {
	const tag, nonce, innerType = 16, 8, 1
	if s.Version == tls.VersionTLS13 {
		return innerType + tag
	}
	switch s.CipherSuite {
	case tls.TLS_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:
		return nonce + tag
	case tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256:
		return tag
	}
	return 0
}
