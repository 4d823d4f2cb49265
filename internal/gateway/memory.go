package gateway

import (
	"context"
	"math"
	"os"
	"runtime/debug"
	"time"
)

// The memory that a gateway needs beyond -max-memory: for itself, for each connected
// client, and for each connection to the server. Measured, with a margin; a TLS
// connection has two buffers of a record each.
const (
	memoryOfItself  = 64 << 20
	memoryOfPeer    = 32 << 10
	memoryOfTLSPeer = 96 << 10
)

// memoryBound returns the memory that the gateway should stay within with so many
// clients.
func (p *plan) memoryBound(clients int) int64 {
	client, server := int64(memoryOfPeer), int64(memoryOfPeer)
	if p.listen.tls {
		client = memoryOfTLSPeer
	}
	if p.framing.name == "session" { // two buffers, one for each direction
		server += 2 * sessionBuffer
	}
	if p.to.Transport == "tls" {
		server += memoryOfTLSPeer - memoryOfPeer
	}
	return p.MaxMemory + memoryOfItself + client*int64(clients) + server*int64(p.MaxOpen)
}

// LimitMemory sets the runtime's memory limit to MaxMemory plus what the connected
// clients need, and keeps it up to date until ctx is done. Without a limit the garbage
// collector lets the heap grow to twice what is in use. A limit from the environment
// (GOMEMLIMIT) is left alone. LimitMemory is for a process that runs a gateway and
// nothing else.
func (g *Gateway) LimitMemory(ctx context.Context) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for last := int64(math.MaxInt64); ; {
		g.mu.Lock()
		clients := len(g.clients)
		g.mu.Unlock()
		if bound := g.memoryBound(clients); bound != last {
			debug.SetMemoryLimit(bound)
			last = bound
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
