package connpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// Peers of the model's world that accept connections and keep none, and how many
// dials they may cause. TRY-10, TRY-11.

// modelHollow adds up world.hollow of all worlds.
var modelHollow int

// corrupt makes host i one that hangs up at once, speaks at once, or does either to
// every third connection.
func (w *world) corrupt(i int) {
	h := w.hosts[i]
	every := []int{1, 3}[w.pick(2)]
	speaks := w.pick(2) == 1
	w.mu.Lock()
	w.crooked[w.addrs[i].Host] = true
	w.mu.Unlock()
	h.Up()
	h.BlackHole(false)
	h.Serve(func(c *faultnet.Conn) {
		if c.Serial()%every == 0 {
			if !speaks {
				return
			}
			c.Write([]byte("x"))
		}
		io.Copy(io.Discard, c)
	})
}

func (w *world) mend(i int) {
	w.mu.Lock()
	delete(w.crooked, w.addrs[i].Host)
	w.mu.Unlock()
	w.serve(i)
}

// setup does for such a peer what the watcher would do for a socket.
func (w *world) setup(_ context.Context, a Addr, nc net.Conn) (any, error) {
	w.mu.Lock()
	crooked := w.crooked[a.Host]
	w.setups++
	lasts := w.setups%8 == 0
	w.mu.Unlock()
	if !crooked {
		if lasts {
			return pass{time.Now().Add(20 * time.Second)}, nil
		}
		return nil, nil
	}
	time.Sleep(time.Millisecond)
	c := nc.(Conn).c
	if errors.Is(c.nc.(Prober).Probe(), io.EOF) {
		c.word.Or(flagHungUp)
		w.mu.Lock()
		w.hollow++
		w.vain[a.Host] = true
		w.mu.Unlock()
	}
	return nil, nil
}

// stormed looks at the dials of one step. Of 14 borrowers each causes three at
// most, and one more for each time that a dial of its own is broken off; the rest
// are Warm's, DialContext's and the reserves', of which each address may try one
// per sweep and one per new connection that has proven good.
func (w *world) stormed(p *Pool, before uint64, took time.Duration) error {
	dials := p.Stats().Dials - before
	if limit := 100 + 8*uint64(took/defaultSweepInterval); dials > limit {
		return fmt.Errorf("%d dials in one step of %v", dials, took)
	}
	return nil
}
