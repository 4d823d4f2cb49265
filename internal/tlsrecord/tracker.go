// Package tlsrecord tells, without asking crypto/tls, whether crypto/tls may hold
// plaintext that nobody has read, or a part of a record.
//
// It follows the framing of TLS records: the Tracker sees the bytes that crypto/tls reads
// from the socket, and counts the plaintext that crypto/tls delivers. The Tracker reads
// nothing itself, has no socket, decrypts nothing, and copies nothing except a record's
// header.
//
// Nothing here blocks, locks or allocates. The methods of a Tracker are for one goroutine
// at a time, except Delivered.
//
// The zero value of a Tracker is ready for the first byte of a connection. Partial works
// at once; Drained is false until Start.
package tlsrecord

import (
	"crypto/tls"
	"sync/atomic"
)

// Tracker follows the framing of TLS records. A record has a header of 5 bytes: the type,
// two bytes of version, and two that give the length of the body. crypto/tls reports
// neither that it has read a part of a record nor that it holds unread plaintext. In both
// cases the next borrower would get data that is not its own. The pool could ask
// crypto/tls for unread plaintext with a read, which costs more than the rest of a loan.
// Usually a sum answers the question: a record of application data holds at most its body
// less the cipher's overhead. If the borrower has read as many bytes as all records
// together can hold, then crypto/tls holds nothing, and no record was of another type.
//
// The overhead depends on the cipher. TLS 1.3 keeps its cipher for the life of a
// connection, also across key updates; a renegotiation of TLS 1.2 may change it. The
// renegotiation's own records show that it happens, and from the first of them on Drained
// is false.
type Tracker struct {
	header    [5]byte
	have      int8  // bytes of the header read so far
	uncertain bool  // since the last Reset there was a record of another type, or Lost was called
	touched   bool  // since the last Reset something was read
	overhead  int16 // of a record under the cipher; 0: unknown, so nothing can be proven
	body      int32 // bytes of the body still to come

	// Both count modulo 2^32. That is enough, because crypto/tls holds no more than a
	// record or two.
	capacity uint32        // the most plaintext that the records since the last Reset can hold
	read     atomic.Uint32 // the plaintext delivered since the last Reset
}

// Start tells r what the first handshake has negotiated. The Tracker does not know how
// much of the data that came with the handshake crypto/tls still holds, so Drained stays
// false until the first Reset. Start must not be called for a connection that may
// renegotiate, since its cipher may change.
func (r *Tracker) Start(state tls.ConnectionState) {
	r.uncertain = true
	r.overhead = overheadOf(state)
}

// Saw is called with each piece of the stream that crypto/tls reads from the socket.
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
					r.overhead = 0 // Start sets it after the first handshake
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

// The types of records. In TLS 1.3 all encrypted records have type applicationData.
const (
	changeCipherSpec = 20
	handshakeRecord  = 22
	applicationData  = 23
)

// Lost is called when a read from the socket failed, or when something else happened that
// makes the sum useless until the next Reset.
func (r *Tracker) Lost() { r.uncertain = true }

// Delivered is called with the number of plaintext bytes that crypto/tls has delivered.
// It may be called while another goroutine is in Saw.
func (r *Tracker) Delivered(n int64) { r.read.Add(uint32(n)) }

// Partial reports whether crypto/tls has read a part of a record.
func (r *Tracker) Partial() bool { return r.have > 0 }

// CanProve reports whether the cipher's overhead is known. If it is not, Drained is
// always false.
func (r *Tracker) CanProve() bool { return r.overhead > 0 }

// Drained reports whether it is certain that crypto/tls holds no plaintext and no part of
// a record.
func (r *Tracker) Drained() bool {
	return r.CanProve() && !r.uncertain && r.have == 0 && r.capacity == r.read.Load()
}

// Untouched reports whether, since the last Reset, crypto/tls has read nothing and no
// read has failed.
func (r *Tracker) Untouched() bool { return !r.touched && !r.uncertain }

// Reset starts the count anew. Call it when crypto/tls was asked and holds nothing.
func (r *Tracker) Reset() {
	r.uncertain, r.touched, r.capacity = false, false, 0
	r.read.Store(0)
}

// overheadOf returns how many bytes of a record the nonce, the tag and, in TLS 1.3, the
// inner type take; 0 if that depends on the record.
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
