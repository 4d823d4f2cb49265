package connpool

import (
	"crypto/tls"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

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
			sock := &tlsSocket{Conn: nc, readNow: sock.ReadNow}
			client := tls.Client(sock, clientCfg)
			go server.Handshake()
			require.NoError(t, client.Handshake())
			sock.record.Start(client.ConnectionState())
			probe := socket{tls: client}

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
				sock.record.Delivered(int64(n))
				if unread -= n; sock.record.Drained() {
					// What is still in the kernel is the peek's business.
					sock.enter(tlsSealed)
					_, err := client.Read(make([]byte, 1))
					sock.enter(tlsNormal)
					require.ErrorIs(t, err, os.ErrDeadlineExceeded, "crypto/tls held something")
					proofs++
				} else if unread == 0 {
					left, err := probe.leftovers(true)
					require.False(t, left, err)
				}
				if unread == 0 && sock.record.CanProve() {
					require.True(t, sock.record.Drained())
				}
			}
			if sock.record.CanProve() {
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
