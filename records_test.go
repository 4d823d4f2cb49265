package connpool

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
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
