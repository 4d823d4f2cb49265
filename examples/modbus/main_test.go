package main

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, "registers 0 and 1: [4711 0], <nil>\nregister 60000: modbus: illegal data address\nconnections opened: 1\n", out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

func deviceOn(t *testing.T, p *plc) (*device, *loopback.Server) {
	t.Helper()
	s, err := loopback.Start(p.serve)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	pool, err := newPool()
	require.NoError(t, err)
	t.Cleanup(func() { pool.Close() })
	return &device{pool, s.Addr(), 1}, s
}

// A device that accepts one connection, and many callers that want to read it.
func TestCallersQueueForTheOneConnection(t *testing.T) {
	p := newPLC(64)
	for i := range p.registers {
		p.registers[i] = uint16(1000 + i)
	}
	d, s := deviceOn(t, p)
	var all sync.WaitGroup
	for register := range uint16(64) {
		all.Go(func() {
			for range 10 {
				values, err := d.read(t.Context(), register, 1)
				if err != nil || len(values) != 1 || values[0] != 1000+register {
					t.Errorf("register %d: %v, %v", register, values, err)
				}
			}
		})
	}
	all.Wait()
	require.Equal(t, 1, s.Accepted())
	require.Equal(t, 1, d.pool.Stats().PeakOpen)
}

// The reply to a read that was given up must not become another register's value.
func TestLateValueMeetsNobody(t *testing.T) {
	p := newPLC(2)
	p.registers[0], p.registers[1] = 111, 222
	var first atomic.Bool
	late := make(chan struct{})
	p.before = func() {
		if first.CompareAndSwap(false, true) {
			<-late
		}
	}
	d, s := deviceOn(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := d.read(ctx, 0, 1)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	close(late)
	values, err := d.read(t.Context(), 1, 1)
	require.NoError(t, err)
	require.Equal(t, []uint16{222}, values)
	require.Equal(t, 2, s.Accepted())
}

func TestExceptionCostsNoConnection(t *testing.T) {
	d, s := deviceOn(t, newPLC(1))
	for range 3 {
		_, err := d.read(t.Context(), 9, 1)
		require.ErrorIs(t, err, illegalAddress)
		require.ErrorIs(t, d.write(t.Context(), 9, 1), illegalAddress)
		_, err = d.read(t.Context(), 0, 200)
		require.ErrorContains(t, err, "1 to 125")
	}
	require.Equal(t, 1, s.Accepted())
}
