//go:build unix

package modbus_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/grid-x/modbus"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// ADO-14: the library as it is, with its dialer replaced by one that lends: a handler that keeps no
// idle connection dials for each request, and gives the connection back after it.
func TestTheLibraryItselfOverADialerThatLends(t *testing.T) {
	srv := realserver.Start(t, realserver.Modbus())
	adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
		pool, err := connpool.New(cfg)
		require.NoError(t, err)
		address := fmt.Sprintf("%s:%d", host, port)
		// A handler makes one request at a time, so each request has a handler of its own here.
		read := func(ctx context.Context, timeout time.Duration, n uint16) ([]byte, error) {
			h := modbus.NewTCPClientHandler(address, modbus.WithDialer(pool.LeaseContext))
			h.IdleTimeout = 0 // it closes the connection after each request
			h.Timeout = timeout
			h.SetSlave(1)
			return modbus.NewClient(h).ReadHoldingRegisters(ctx, n, 2)
		}
		exchange := func(ctx context.Context, timeout time.Duration, n int) error {
			got, err := read(ctx, timeout, uint16(n))
			if err == nil && (len(got) != 4 || int(binary.BigEndian.Uint16(got)) != n) {
				err = fmt.Errorf("asked for %d, got % x", n, got)
			}
			return err
		}
		return adaptertest.Client{Pool: pool, Addr: connpool.Addr{Transport: connpool.TCP, Host: host, Port: port}, IgnoresCtx: true,
			Exchange: func(ctx context.Context, n int) error { return exchange(ctx, time.Minute, n) },
			Hasty:    func(ctx context.Context, n int) error { return exchange(ctx, 20*time.Millisecond, n) },
			Refused: func(ctx context.Context) error {
				_, err := read(ctx, time.Minute, 60000)
				return err
			},
			IsRefusal: func(err error) bool {
				var e *modbus.Error
				return errors.As(err, &e) && e.ExceptionCode == modbus.ExceptionCodeIllegalDataAddress
			},
		}
	})
}
