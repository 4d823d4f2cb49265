package gateway

import (
	"bytes"
	"log/slog"
	"sync"
	"time"
)

// A connection that works is never doubted while it is busy, so something else
// must make the gateway leave a server that another one has taken over from:
// the age of its connections (MaxLifetime), the server's own word, and SIGHUP.

// renewal bounds how often the server's word may cost all connections: clients
// that write to a replica, and are meant to be refused, would ask for that with
// each request.
type renewal struct {
	mu   sync.Mutex // guards last; nothing else happens under it
	last time.Time  // when all connections were retired for a word of the server
}

const renewEvery = time.Second

func (r *renewal) due() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if !r.last.IsZero() && now.Sub(r.last) < renewEvery {
		return false
	}
	r.last = now
	return true
}

// demotions are the errors of a Redis that is not, or not any more, the one that
// writes are for.
var demotions = [][]byte{[]byte("READONLY "), []byte("MASTERDOWN "), []byte("UNBLOCKED ")}

// isDemotion reports whether a reply says that the server is not the one to ask.
func isDemotion(reply []byte) bool {
	if reply = bare(reply); !isError(reply) {
		return false
	}
	word := reply[1:]
	if reply[0] == '!' { // a length comes first
		_, word, _ = bytes.Cut(reply, []byte("\r\n"))
	}
	for _, d := range demotions {
		if bytes.HasPrefix(word, d) {
			return true
		}
	}
	return false
}

// holdsDemotion is isDemotion for one of the replies in that to EXEC.
func holdsDemotion(reply []byte) bool {
	for _, d := range demotions {
		if bytes.Contains(reply, append([]byte("\r\n-"), d...)) {
			return true
		}
	}
	return false
}

// demoted leaves the connections that there are: those that are opened from now
// on may lead to another server. The reply that said so is passed on.
func (g *Gateway) demoted(reply []byte) {
	if !g.renewal.due() {
		return
	}
	word := reply[:min(len(reply), 80)]
	if i := bytes.IndexByte(word, '\r'); i > 0 {
		word = word[:i]
	}
	g.notice(slog.LevelWarn, "demoted", "the server says that it is not the one to ask: its connections are replaced", "said", string(word))
	g.retireAll()
}

// retireAll replaces the connections to the server as they come back.
func (g *Gateway) retireAll() {
	for addr := range g.pool.Addrs() {
		g.pool.Retire(addr)
	}
}

// Renew is what SIGHUP asks for: the certificates are read again, see Reload,
// and all connections to the server are replaced as they come back, whatever
// came of that. What was learned of the server is forgotten.
func (g *Gateway) Renew() error {
	// First what cannot wait: a certificate file may not open for long.
	g.greet.forget()
	g.retireAll()
	g.Logger.Info("connections to the server are replaced as they come back")
	return g.Reload()
}
