package tlsrecord

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// endsInsideARecord is a model of Tracker: it has the whole stream and needs no state.
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
	var r Tracker
	require.False(t, r.Partial(), "before the first byte")
	for _, body := range []int{0, 1, 2, 255, 256, 1<<14 + 256, 1<<16 - 1} {
		record := recordOf(body)
		for i, b := range record {
			r.Saw([]byte{b})
			require.Equal(t, i < len(record)-1, r.Partial(), "byte %d of a record with a body of %d", i, body)
		}
	}
	r.Saw(nil)
	require.False(t, r.Partial(), "nothing changes nothing")
}

func TestRecordsInOnePieceAreFollowedAsInMany(t *testing.T) {
	stream := bytes.Join([][]byte{recordOf(0), recordOf(3), recordOf(0), recordOf(700), recordOf(1)}, nil)
	for cut := range len(stream) + 1 {
		var r Tracker
		r.Saw(stream[:cut])
		require.Equal(t, endsInsideARecord(stream[:cut]), r.Partial(), "up to byte %d", cut)
		r.Saw(stream[cut:])
		require.False(t, r.Partial(), "after a cut at %d", cut)
	}
}

// The Tracker must agree not only with the tests' idea of framing, but with what
// crypto/tls sends, and the handshake must not confuse it.
func TestRecordsFollowWhatCryptoTLSWrites(t *testing.T) {
	ca := faultnet.NewCA()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			var wire bytes.Buffer
			near, far := net.Pipe()
			defer near.Close()
			server := tls.Server(recordTap{far, &wire}, &tls.Config{
				Certificates: []tls.Certificate{ca.Server("localhost")}, MinVersion: version, MaxVersion: version,
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
			client := tls.Client(near, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"})
			n, err := new(bytes.Buffer).ReadFrom(client)
			require.NoError(t, err)
			require.Positive(t, n)
			require.NoError(t, <-served)

			stream := wire.Bytes()
			require.False(t, endsInsideARecord(stream))
			rng := rand.New(rand.NewPCG(4, uint64(version)))
			var r Tracker
			for done := 0; done < len(stream); {
				n := min(1+rng.IntN(3000), len(stream)-done)
				r.Saw(stream[done : done+n])
				done += n
				require.Equal(t, endsInsideARecord(stream[:done]), r.Partial(), "after %d bytes", done)
			}
			require.False(t, r.Partial())
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

// FuzzRecords: however the stream is cut into pieces, the Tracker and a model that sees
// the whole stream agree after every piece.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{}, []byte{})
	f.Add(recordOf(0), []byte{1})
	f.Add(append(recordOf(7), recordOf(0)...), []byte{3, 0, 200})
	f.Add(append(recordOf(300), 22, 3, 1, 255), []byte{255, 1})
	f.Add([]byte{23, 3, 3, 255, 255, 1, 2, 3}, []byte{5})
	f.Fuzz(func(t *testing.T, stream, cuts []byte) {
		var r Tracker
		for done, i := 0, 0; done < len(stream); i++ {
			n := 1
			if len(cuts) > 0 {
				n = int(cuts[i%len(cuts)])
			}
			if len(cuts) > 0 && i >= len(cuts) {
				n++ // cuts of length zero would never end
			}
			n = min(n, len(stream)-done)
			r.Saw(stream[done : done+n])
			done += n
			if want := endsInsideARecord(stream[:done]); r.Partial() != want {
				t.Fatalf("after %d bytes: partial %v, the model says %v", done, r.Partial(), want)
			}
		}
	})
}

// A renegotiation may change the cipher, and with it how much plaintext a record can
// hold.
//
// TRY-46
func TestAfterAnotherHandshakeTheSumOfTheRecordsProvesNothing(t *testing.T) {
	for _, kind := range []byte{handshakeRecord, changeCipherSpec} {
		r := Tracker{overhead: 24} // AES-GCM, by the first handshake
		r.Saw([]byte{kind, 3, 3, 0, 1, 0})
		require.False(t, r.Untouched())
		r.Reset()
		require.True(t, r.Untouched())
		// ChaCha20-Poly1305: 16 bytes of overhead, 100 of plaintext.
		r.Saw(append([]byte{applicationData, 3, 3, 0, 116}, make([]byte, 116)...))
		r.Delivered(92)
		require.False(t, r.Drained(), "8 bytes are left")
	}
	// A session ticket or a key update of TLS 1.3 is no application data and changes
	// nothing.
	r := Tracker{overhead: 17}
	r.Saw(append([]byte{applicationData, 3, 3, 0, 217}, make([]byte, 217)...))
	require.False(t, r.Drained())
	r.Reset()
	r.Saw(append([]byte{applicationData, 3, 3, 0, 117}, make([]byte, 117)...))
	r.Delivered(100)
	require.True(t, r.Drained())
}
