// Package modbus gives clients of github.com/grid-x/modbus pooled connections of Modbus/TCP.
//
//	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, Setup: poolmodbus.Setup, IdleTimeout: 3 * time.Second})
//	device := poolmodbus.New(pool, connpool.MustParseAddr("tcp://192.0.2.7:502"), 1)
//	registers, err := device.ReadHoldingRegisters(ctx, 100, 8)
//
// A handler of the library has one connection, which one request at a time uses, and opens it
// again after an error. Here each request borrows one of the connections to its device. Many
// devices take one connection or four (see connpool.Config.LimitsFor for one pool of several
// kinds), and close a connection that was idle for some seconds.
package modbus

import (
	"context"
	"net"

	"github.com/grid-x/modbus"

	"github.com/seed-ecb488c9/connpool"
)

// Setup is for Config.Setup of the pool. The state of a connection is a handler of the library,
// which reads no further than the end of a frame, and does not dial: over a connection that is
// closed each request fails.
func Setup(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	h := modbus.NewTCPClientHandler("", modbus.WithDialer(func(context.Context, string, string) (net.Conn, error) {
		return nc, nil
	}))
	h.IdleTimeout = -1 // the pool knows what is idle; and a frame that is not the reply is an error
	return h, nil
}

// New makes a client of a unit of a device, over a pool whose Config.Setup is Setup, or calls Setup
// for addr. All its methods may be called by many goroutines at once.
//
// A request ends with its ctx, or after 10 seconds; then its connection is closed, and so is one on
// which anything but the reply came. A *modbus.Error is the device's answer, and leaves the
// connection open. After an *connpool.Error nothing was sent. After any other error the device may
// have carried out the request.
func New(pool *connpool.Pool, addr connpool.Addr, unit byte) modbus.Client {
	frames := modbus.NewTCPClientHandler("")
	frames.SetSlave(unit)
	return modbus.NewClient2(frames, transporter{pool, addr})
}

// transporter sends each request over a connection of the pool.
type transporter struct {
	pool *connpool.Pool
	addr connpool.Addr
}

// Send is called with one frame, and returns one: an exception, too, is a frame.
func (t transporter) Send(ctx context.Context, request []byte) (reply []byte, err error) {
	err = t.pool.With(ctx, t.addr, func(nc connpool.Conn) (err error) {
		reply, err = connpool.State[*modbus.TCPClientHandler](nc).Send(ctx, request)
		return err
	})
	return reply, err
}
