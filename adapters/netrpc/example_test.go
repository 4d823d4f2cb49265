//go:build unix

package netrpc_test

import (
	"context"
	"log"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/adapters/netrpc"
)

func Example() {
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 8, Setup: netrpc.Setup})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	client := netrpc.New(pool, connpool.MustParseAddr("tcp://127.0.0.1:7000"))
	var sum int
	err = client.Call(context.Background(), "Echo.Add", Pair{N: 1, M: 2}, &sum)
	log.Println(sum, err)
}
