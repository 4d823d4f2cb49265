package main

import (
	"bufio"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// startServer serves each connection on a free port of the loopback. Everything
// has ended when the test has.
func startServer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var (
		running sync.WaitGroup
		mu      sync.Mutex // guards open
		open    = make(map[net.Conn]bool)
	)
	running.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[nc] = true
			mu.Unlock()
			running.Go(func() {
				serve(nc)
				nc.Close()
				mu.Lock()
				delete(open, nc)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for nc := range open {
			nc.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return l.Addr().String()
}

func startEcho(t *testing.T) string {
	return startServer(t, func(nc net.Conn) {
		in := bufio.NewReader(nc)
		for {
			line, err := in.ReadSlice('\n')
			if err != nil {
				return
			}
			if _, err := nc.Write(line); err != nil {
				return
			}
		}
	})
}
