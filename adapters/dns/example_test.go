package dns_test

import (
	"context"
	"log"
	"time"

	"github.com/miekg/dns"

	"github.com/seed-ecb488c9/connpool"
	pooldns "github.com/seed-ecb488c9/connpool/adapters/dns"
)

// The library dials for each query.
func Example_before() {
	ctx, query := context.Background(), new(dns.Msg).SetQuestion("example.org.", dns.TypeA)

	client := &dns.Client{Net: "tcp-tls"}
	reply, _, err := client.ExchangeContext(ctx, query, "192.0.2.53:853")

	log.Println(reply, err)
}

func Example() {
	ctx, query := context.Background(), new(dns.Msg).SetQuestion("example.org.", dns.TypeA)

	pool, err := connpool.New(connpool.Config{Setup: pooldns.Setup, IdleTimeout: 8 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	client := pooldns.New(pool, connpool.MustParseAddr("tls://192.0.2.53:853"))
	reply, err := client.Exchange(ctx, query)

	log.Println(reply, err)
}
