package connpool_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/dnstest"
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
