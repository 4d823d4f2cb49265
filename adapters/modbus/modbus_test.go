//go:build unix

package modbus_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/grid-x/modbus"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	poolmodbus "github.com/seed-ecb488c9/connpool/adapters/modbus"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// ADO-14: Modbus/TCP, with pymodbus.
func TestModbusOverPooledConnections(t *testing.T) {
	srv := realserver.Start(t, realserver.Modbus())
	adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
		cfg.Setup = poolmodbus.Setup
		pool, err := connpool.New(cfg)
		require.NoError(t, err)
		addr := connpool.Addr{Transport: connpool.TCP, Host: host, Port: port}
		device := poolmodbus.New(pool, addr, 1)
		return adaptertest.Client{Pool: pool, Addr: addr,
			Exchange: func(ctx context.Context, n int) error {
				got, err := device.ReadHoldingRegisters(ctx, uint16(n), 2)
				if err == nil && (len(got) != 4 || int(binary.BigEndian.Uint16(got)) != n) {
					err = fmt.Errorf("asked for %d, got % x", n, got)
				}
				return err
			},
			Refused: func(ctx context.Context) error {
				_, err := device.ReadHoldingRegisters(ctx, 60000, 2)
				return err
			},
			IsRefusal: func(err error) bool {
				var e *modbus.Error
				return errors.As(err, &e) && e.ExceptionCode == modbus.ExceptionCodeIllegalDataAddress
			},
		}
	})
}

// ADO-14: a device whose reply is that to another request, or is cut off, costs a connection and
// gives nobody a value that is not his.
func TestAReplyToAnotherRequestClosesTheConnection(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"another transaction": func(b []byte) []byte { b[1]++; return b },
		"another protocol":    func(b []byte) []byte { b[3]++; return b },
		"another unit":        func(b []byte) []byte { b[6]++; return b },
		"no length":           func(b []byte) []byte { b[4], b[5] = 0, 0; return b },
		"half a reply":        func(b []byte) []byte { return b[:9] },
		"a reply and more":    func(b []byte) []byte { return append(b, b...) },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer l.Close()
			go func() {
				for {
					nc, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer nc.Close()
						request := make([]byte, 12)
						if _, err := io.ReadFull(nc, request); err != nil {
							return
						}
						reply := append(request[:4:4], 0, 5, request[6], request[7], 2, 0, 42)
						nc.Write(spoil(reply))
						if len(reply) > 9 && name != "half a reply" {
							io.ReadFull(nc, request) // until the client closes it
						}
					}()
				}
			}()
			pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, Setup: poolmodbus.Setup})
			require.NoError(t, err)
			defer pool.Close()
			device := poolmodbus.New(pool, connpool.MustParseAddr("tcp://"+l.Addr().String()), 1)
			for range 3 {
				got, err := device.ReadHoldingRegisters(t.Context(), 7, 1)
				if name == "a reply and more" { // it is found when the connection is given back, or before it is lent again
					require.NoError(t, err)
					require.Equal(t, []byte{0, 42}, got)
				} else {
					require.Error(t, err)
				}
			}
			require.EqualValues(t, 3, pool.Stats().Dials)
		})
	}
}
