package modbus_test

import (
	"context"
	"log"
	"time"

	"github.com/seed-ecb488c9/connpool"
	poolmodbus "github.com/seed-ecb488c9/connpool/adapters/modbus"
)

func Example() {
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, Setup: poolmodbus.Setup, IdleTimeout: 3 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	device := poolmodbus.New(pool, connpool.MustParseAddr("tcp://192.0.2.7:502"), 1)
	registers, err := device.ReadHoldingRegisters(context.Background(), 100, 8)
	log.Println(registers, err)
}
