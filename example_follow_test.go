package connpool_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/dnstest"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// ExampleConfig_followDNS lets a name leave its server. The idle connection to the server is closed,
// and the next loan goes where the name leads then.
func ExampleConfig_followDNS() {
	dns := dnstest.New() // a DNS server of the example's own
	defer dns.Close()
	address, stop := serve(lines(strings.ToUpper))
	defer stop()
	_, port, _ := strings.Cut(address, ":")
	addr := connpool.MustParseAddr("tcp://db.test:" + port)

	closed := make(chan connpool.CloseInfo, 1)
	pool, err := connpool.New(connpool.Config{
		FollowDNS:     true,
		SweepInterval: 10 * time.Millisecond, // how often names are looked up
		Dialer:        &net.Dialer{Resolver: dns.Resolver()},
		Trace:         &connpool.Trace{Closed: func(i connpool.CloseInfo) { closed <- i }},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	use := func() {
		err := pool.With(context.Background(), addr, func(c connpool.Conn) error {
			fmt.Println("the peer is", c.RemoteAddr().(*net.TCPAddr).IP)
			return nil
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	dns.Set("db.test", "127.0.0.1")
	use()
	dns.Set("db.test", "192.0.2.1")
	info := <-closed
	fmt.Println(info.Reason, "-", info.Err)
	dns.Set("db.test", "127.0.0.1")
	use()
	// Output:
	// the peer is 127.0.0.1
	// moved - db.test does not lead to 127.0.0.1 any more
	// the peer is 127.0.0.1
}

// ExampleConfig_tLSExpiry renews a client certificate. The connection that was made with the old one
// is retired by the next sweep.
func ExampleConfig_tLSExpiry() {
	ca := faultnet.NewCA()
	address, stop := serve(func(nc net.Conn) { // it tells each client its name
		server := tls.Server(nc, &tls.Config{
			Certificates: []tls.Certificate{ca.Server("127.0.0.1")},
			ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
		})
		for b := make([]byte, 1); ; {
			if _, err := server.Read(b); err != nil {
				return
			}
			fmt.Fprintf(server, "%-8s", server.ConnectionState().PeerCertificates[0].Subject.CommonName)
		}
	})
	defer stop()

	var current atomic.Pointer[tls.Certificate]
	renew := func(name string) {
		cert := ca.ClientUntil(time.Now().Add(time.Hour), name)
		current.Store(&cert)
	}
	closed := make(chan connpool.CloseInfo, 1)
	pool, err := connpool.New(connpool.Config{
		TLSExpiry:     true,
		SweepInterval: 10 * time.Millisecond, // how often the certificate is compared
		TLS: &tls.Config{
			RootCAs:              ca.Pool(),
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current.Load(), nil },
		},
		Trace: &connpool.Trace{Closed: func(i connpool.CloseInfo) { closed <- i }},
	})
	if err != nil {
		log.Fatal(err)
	}
	use := func() {
		err := pool.With(context.Background(), connpool.MustParseAddr("tls://"+address), func(c connpool.Conn) error {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			name := make([]byte, 8)
			_, err := io.ReadFull(c, name)
			fmt.Println("seen as", strings.TrimSpace(string(name)))
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	renew("monday")
	use()
	renew("tuesday")
	info := <-closed
	fmt.Println(info.Reason, "-", info.Err)
	use()
	pool.Close()
	// Output:
	// seen as monday
	// retired - its client certificate was replaced by another one
	// seen as tuesday
}
