package gateway

import (
	"bytes"
	"log/slog"
	"sync"
	"time"
)

// The gateway never doubts a connection that works while it is busy. To leave a server
// whose role another one has taken over, it needs other reasons: the age of its
// connections (MaxLifetime), the server's own word, and SIGHUP.

// renewal bounds how often a demotion reply may replace all connections. Clients that
// write to a replica on purpose would otherwise cause that with each request.
type renewal struct {
	mu   sync.Mutex // guards last; nothing else happens under it
	last time.Time  // when all connections were last retired because of a demotion reply
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

// demotions are the errors of a Redis server that does not accept writes, or does so no
// longer.
var demotions = [][]byte{[]byte("READONLY "), []byte("MASTERDOWN "), []byte("UNBLOCKED ")}

// isDemotion reports whether a reply says that another server must be asked.
func isDemotion(reply []byte) bool {
	if reply = bare(reply); !isError(reply) {
		return false
	}
	word := reply[1:]
	if reply[0] == '!' { // a length precedes the text
		_, word, _ = bytes.Cut(reply, []byte("\r\n"))
	}
	for _, d := range demotions {
		if bytes.HasPrefix(word, d) {
			return true
		}
	}
	return false
}

// holdsDemotion reports whether isDemotion holds for one of the replies inside a reply to
// EXEC.
func holdsDemotion(reply []byte) bool {
	for _, d := range demotions {
		if bytes.Contains(reply, append([]byte("\r\n-"), d...)) {
			return true
		}
	}
	return false
}

// demoted retires the existing connections: new connections may lead to another server.
// The demotion reply itself is passed on.
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

// retireAll replaces each connection to the server when its loan ends.
func (g *Gateway) retireAll() {
	for addr := range g.pool.Addrs() {
		g.pool.Retire(addr)
	}
}

// Renew handles SIGHUP. It reads the certificates again, see Reload, and replaces each
// connection to the server when its loan ends, whatever the result of Reload. It forgets
// what the gateway has learned about the server.
func (g *Gateway) Renew() error {
	// These come first: opening a certificate file may take long.
	g.greet.forget()
	g.retireAll()
	g.Logger.Info("connections to the server are replaced as they come back")
	return g.Reload()
}
