package tlsrecord

import (
	"crypto/tls"
	"io"
	"net"
	"os"
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
)

// The layout of the toolchain that runs the tests is known, so that a new version of Go is
// noticed here: its crypto/tls must be read before its layout is added.
func TestTheLayoutOfTheTLSConnIsKnown(t *testing.T) {
	require.NotNil(t, inside, "crypto/tls of %s has the unknown layout %#x", runtime.Version(), layoutOf(reflect.TypeFor[tls.Conn]()))
	type another struct {
		tls.Conn
		_ int
	}
	require.NotContains(t, layouts, layoutOf(reflect.TypeFor[another]()))
}

// halved is a socket that passes on only the first bytes of each write while keep is positive.
type halved struct {
	net.Conn
	keep int
}

func (h *halved) Write(b []byte) (int, error) {
	if h.keep > 0 {
		if _, err := h.Conn.Write(b[:h.keep]); err != nil {
			return 0, err
		}
		return len(b), nil
	}
	return h.Conn.Write(b)
}

// talk returns the two ends of a TLS connection, and the socket below the server's end.
func talk(t *testing.T, version uint16) (client, server *tls.Conn, below *halved) {
	ca := faultnet.NewCA()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		nc, _ := ln.Accept()
		accepted <- nc
	}()
	nc, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	below = &halved{Conn: <-accepted}
	server = tls.Server(below, &tls.Config{Certificates: []tls.Certificate{ca.Server("localhost")}, MaxVersion: version})
	client = tls.Client(nc, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", MaxVersion: version})
	t.Cleanup(func() {
		below.Close()
		nc.Close()
	})
	require.False(t, Quiet(client), "before the handshake")
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	require.NoError(t, client.Handshake())
	require.NoError(t, <-shaken)
	return client, server, below
}

// readSoon reads what comes within a moment.
func readSoon(t *testing.T, c *tls.Conn, b []byte) (int, error) {
	require.NoError(t, c.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	defer c.SetReadDeadline(time.Time{})
	return c.Read(b)
}

func TestATLSConnIsQuietWhenItHoldsNothing(t *testing.T) {
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			client, server, below := talk(t, version)
			require.True(t, Quiet(client))
			buf := make([]byte, 100)
			for range 3 {
				_, err := server.Write([]byte("0123456789"))
				require.NoError(t, err)
				n, err := client.Read(buf[:4])
				require.NoError(t, err)
				require.Equal(t, 4, n)
				require.False(t, Quiet(client), "six bytes are left")
				require.False(t, Partial(client))
				_, err = io.ReadFull(client, buf[:6])
				require.NoError(t, err)
				require.True(t, Quiet(client))
			}
			// Two records that came at once.
			server.Write([]byte("a"))
			server.Write([]byte("b"))
			time.Sleep(10 * time.Millisecond)
			_, err := client.Read(buf)
			require.NoError(t, err)
			if !Quiet(client) { // the second record has come with the first one
				require.True(t, Partial(client), "a record that was not asked for")
			}
			_, err = client.Read(buf)
			require.NoError(t, err)
			require.True(t, Quiet(client))
			// Half a record.
			below.keep = 7
			server.Write([]byte("half"))
			_, err = readSoon(t, client, buf)
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.False(t, Quiet(client))
			require.True(t, Partial(client))
		})
	}
}

func TestATLSConnThatFailedIsNotQuiet(t *testing.T) {
	client, server, _ := talk(t, tls.VersionTLS13)
	require.NoError(t, server.CloseWrite())
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.False(t, Quiet(client), "close_notify was read")

	client, _, _ = talk(t, tls.VersionTLS13)
	require.NoError(t, client.SetWriteDeadline(time.Unix(1, 0)))
	_, err = client.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, client.SetWriteDeadline(time.Time{}))
	require.False(t, Quiet(client), "crypto/tls refuses every later write")
}

func TestQuietAllocatesNothing(t *testing.T) {
	client, _, _ := talk(t, tls.VersionTLS13)
	require.Zero(t, patience.Allocs(100, func() { require.True(t, Quiet(client)) }))
}

func BenchmarkQuiet(b *testing.B) {
	c := tls.Client(nil, nil)
	for b.Loop() {
		Quiet(c)
	}
}
