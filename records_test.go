package connpool

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// endsInsideARecord is the model of records: it has the whole stream before it
// and needs no memory.
func endsInsideARecord(stream []byte) bool {
	for len(stream) > 0 {
		if len(stream) < 5 {
			return true
		}
		length := 5 + int(binary.BigEndian.Uint16(stream[3:]))
		if len(stream) < length {
			return true
		}
		stream = stream[length:]
	}
	return false
}

func recordOf(body int) []byte {
	return append([]byte{23, 3, 3, byte(body >> 8), byte(body)}, make([]byte, body)...)
}

// G-04
func TestAPartOfARecordIsKnownFromAWholeOne(t *testing.T) {
	var r records
	require.False(t, r.partial(), "before the first byte")
	for _, body := range []int{0, 1, 2, 255, 256, 1<<14 + 256, 1<<16 - 1} {
		record := recordOf(body)
		for i, b := range record {
			r.advance([]byte{b})
			require.Equal(t, i < len(record)-1, r.partial(), "byte %d of a record with a body of %d", i, body)
		}
	}
	r.advance(nil)
	require.False(t, r.partial(), "nothing changes nothing")
}

func TestRecordsInOnePieceAreFollowedAsInMany(t *testing.T) {
	stream := bytes.Join([][]byte{recordOf(0), recordOf(3), recordOf(0), recordOf(700), recordOf(1)}, nil)
	for cut := range len(stream) + 1 {
		var r records
		r.advance(stream[:cut])
		require.Equal(t, endsInsideARecord(stream[:cut]), r.partial(), "up to byte %d", cut)
		r.advance(stream[cut:])
		require.False(t, r.partial(), "after a cut at %d", cut)
	}
}

// The follower must agree not only with our idea of framing, but with what
// crypto/tls puts on the wire, and must not be led astray by the handshake.
func TestRecordsFollowWhatCryptoTLSWrites(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			var wire bytes.Buffer
			near, far := net.Pipe()
			defer near.Close()
			server := tls.Server(recordTap{far, &wire}, &tls.Config{
				Certificates: tlAuthority().Certificates, MinVersion: version, MaxVersion: version,
			})
			served := make(chan error, 1)
			go func() {
				defer far.Close()
				err := server.Handshake()
				for n := 1; err == nil && n < 40_000; n *= 3 {
					_, err = server.Write(make([]byte, n))
				}
				if err == nil {
					err = server.CloseWrite()
				}
				served <- err
			}()
			client := tls.Client(near, &tls.Config{RootCAs: tlAuthority().RootCAs, ServerName: "127.0.0.1"})
			n, err := new(bytes.Buffer).ReadFrom(client)
			require.NoError(t, err)
			require.Positive(t, n)
			require.NoError(t, <-served)

			stream := wire.Bytes()
			require.False(t, endsInsideARecord(stream))
			rng := rand.New(rand.NewPCG(4, uint64(version)))
			var r records
			for done := 0; done < len(stream); {
				n := min(1+rng.IntN(3000), len(stream)-done)
				r.advance(stream[done : done+n])
				done += n
				require.Equal(t, endsInsideARecord(stream[:done]), r.partial(), "after %d bytes", done)
			}
			require.False(t, r.partial())
		})
	}
}

type recordTap struct {
	net.Conn
	wire *bytes.Buffer
}

func (w recordTap) Write(b []byte) (int, error) {
	w.wire.Write(b)
	return w.Conn.Write(b)
}

// FuzzRecords: however the stream is cut into pieces, the follower and a model
// that sees all of it agree after every piece.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{}, []byte{})
	f.Add(recordOf(0), []byte{1})
	f.Add(append(recordOf(7), recordOf(0)...), []byte{3, 0, 200})
	f.Add(append(recordOf(300), 22, 3, 1, 255), []byte{255, 1})
	f.Add([]byte{23, 3, 3, 255, 255, 1, 2, 3}, []byte{5})
	f.Fuzz(func(t *testing.T, stream, cuts []byte) {
		var r records
		for done, i := 0, 0; done < len(stream); i++ {
			n := 1
			if len(cuts) > 0 {
				n = int(cuts[i%len(cuts)])
			}
			if len(cuts) > 0 && i >= len(cuts) {
				n++ // cuts of zeros only would never end
			}
			n = min(n, len(stream)-done)
			r.advance(stream[done : done+n])
			done += n
			if want := endsInsideARecord(stream[:done]); r.partial() != want {
				t.Fatalf("after %d bytes: partial %v, the model says %v", done, r.partial(), want)
			}
		}
	})
}

// The sum of what the records can hold never claims that crypto/tls is empty
// when it is not, and says so whenever the borrower has read everything that is
// application data.
func TestTheSumOfTheRecordsProvesThatNothingIsLeft(t *testing.T) {
	for name, limit := range map[string]func(*tls.Config){
		"TLS 1.3":                      func(*tls.Config) {},
		"TLS 1.3 without tickets":      func(c *tls.Config) { c.SessionTicketsDisabled = true },
		"TLS 1.2, AES-GCM":             only(tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
		"TLS 1.2, ChaCha20":            only(tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
		"TLS 1.2, CBC: never a proof":  only(tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA),
		"TLS 1.2, small first records": only(tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
	} {
		t.Run(name, func(t *testing.T) {
			ca := faultnet.NewCA()
			serverCfg := &tls.Config{Certificates: []tls.Certificate{ca.Server("localhost")}}
			clientCfg := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
			limit(clientCfg)
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
			accepted := make(chan net.Conn, 1)
			go func() {
				c, err := ln.Accept()
				if err != nil {
					t.Error(err)
				}
				accepted <- c
			}()
			nc, err := net.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			defer nc.Close()
			server := tls.Server(<-accepted, serverCfg)
			defer server.Close()
			sock := &tlsSocket{Conn: nc, readNow: readNow}
			client := tls.Client(sock, clientCfg)
			go server.Handshake()
			require.NoError(t, client.Handshake())
			sock.record.spent, sock.record.odd = overhead(client.ConnectionState()), true
			probe := probe{tls: client}

			r := rand.New(rand.NewPCG(1, 6))
			unread, proofs := 0, 0
			for range 400 {
				sent := r.IntN(3) * r.IntN(9000)
				_, err := server.Write(make([]byte, sent))
				require.NoError(t, err)
				unread += sent
				n := unread
				if r.IntN(3) == 0 {
					n = r.IntN(unread + 1)
				}
				_, err = io.ReadFull(client, make([]byte, n))
				require.NoError(t, err)
				sock.record.read.Add(uint32(n))
				if unread -= n; sock.record.drained() {
					// What is still in the kernel is the peek's business.
					sock.enter(sealed)
					_, err := client.Read(make([]byte, 1))
					sock.enter(normal)
					require.ErrorIs(t, err, os.ErrDeadlineExceeded, "crypto/tls held something")
					proofs++
				} else if unread == 0 {
					left, err := probe.leftovers(true)
					require.False(t, left, err)
				}
				if unread == 0 && sock.record.spent > 0 {
					require.True(t, sock.record.drained() || sock.record.odd)
				}
			}
			if sock.record.spent > 0 {
				require.Greater(t, proofs, 100)
			} else {
				require.Zero(t, proofs)
			}
		})
	}
}

func only(suites ...uint16) func(*tls.Config) {
	return func(c *tls.Config) {
		c.MaxVersion = tls.VersionTLS12
		c.CipherSuites = suites
	}
}
