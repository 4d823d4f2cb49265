package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// counters are the gateway's own counts, in addition to the pool's Stats.
type counters struct {
	accepted, turnedAway, acceptErrors, handshakesFailed atomic.Uint64
	requests, replies                                    atomic.Uint64
	failures                                             [numFailures]atomic.Uint64
	badFrames, idleClients, stalledClients, slowClients  atomic.Uint64
	bytesIn, bytesOut                                    atomic.Uint64
	reloads, reloadsFailed                               atomic.Uint64
	pinned                                               atomic.Int64
	queued                                               atomic.Int64 // sessions that wait for a place
}

// Status is a snapshot of a gateway. Counters start at zero when the gateway is made.
type Status struct {
	Listen  string  `json:"listen"`
	To      string  `json:"to"`
	Framing string  `json:"framing"`
	Uptime  float64 `json:"uptime_seconds"`
	Drains  bool    `json:"draining"`

	Clients   int    `json:"clients"`
	Pinned    int64  `json:"pinned"` // clients that have a connection to themselves
	Accepted  uint64 `json:"accepted"`
	Turned    uint64 `json:"turned_away"` // at MaxClients
	AcceptErr uint64 `json:"accept_errors"`
	Handshake uint64 `json:"handshakes_failed"`

	Requests uint64            `json:"requests"`
	Replies  uint64            `json:"replies"` // replies to Requests, including the gateway's own error replies
	Failures map[string]uint64 `json:"failures"`

	BadFrames uint64 `json:"bad_frames"`      // clients closed because they broke the protocol
	Idle      uint64 `json:"idle_clients"`    // closed after IdleTimeout
	Stalled   uint64 `json:"stalled_clients"` // closed in the middle of a request
	Slow      uint64 `json:"slow_clients"`    // closed because they did not read a reply
	BytesIn   uint64 `json:"bytes_in"`
	BytesOut  uint64 `json:"bytes_out"`
	Memory    int64  `json:"memory_bytes"` // held for clients, of MaxMemory

	Reloads       uint64 `json:"reloads"`
	ReloadsFailed uint64 `json:"reloads_failed"`

	LogDropped uint64 `json:"log_lines_dropped"` // lines that the log did not accept
	MaxClients int    `json:"max_clients"`       // how many clients may be connected, see Config.MaxClients

	Pool connpool.Stats `json:"pool"`
}

// Status may be called at any time.
func (g *Gateway) Status() Status {
	c := &g.count
	st := Status{
		Listen: g.listen.String(), To: g.to.String(), Framing: g.Framing,
		Uptime: time.Since(g.started).Seconds(), Drains: g.draining.Load(),
		Pinned: c.pinned.Load(), Accepted: c.accepted.Load(), Turned: c.turnedAway.Load(),
		AcceptErr: c.acceptErrors.Load(), Handshake: c.handshakesFailed.Load(),
		Requests: c.requests.Load(), Replies: c.replies.Load(), Failures: make(map[string]uint64),
		BadFrames: c.badFrames.Load(), Idle: c.idleClients.Load(), Stalled: c.stalledClients.Load(), Slow: c.slowClients.Load(),
		BytesIn: c.bytesIn.Load(), BytesOut: c.bytesOut.Load(), Memory: g.memory.held.Load(),
		Reloads: c.reloads.Load(), ReloadsFailed: c.reloadsFailed.Load(),
		LogDropped: g.journal.droppedSoFar(), MaxClients: g.MaxClientsNow(),
		Pool: g.pool.Stats(),
	}
	st.Pool.Waiting += int(c.queued.Load())
	if g.listener != nil {
		at := g.listen
		at.address = g.listener.Addr().String() // with the real port if the port was 0
		st.Listen = at.String()
	}
	for f := range numFailures {
		st.Failures[f.String()] = c.failures[f].Load()
	}
	g.mu.Lock()
	st.Clients = len(g.clients)
	g.mu.Unlock()
	return st
}

// metrics returns st in the text format of Prometheus.
func (st *Status) metrics() []byte {
	var b bytes.Buffer
	const prefix = "connpool_gateway_"
	head := func(name, kind, help string) {
		fmt.Fprintf(&b, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, kind)
	}
	gauge := func(name, help string, v any) {
		head(name, "gauge", help)
		fmt.Fprintf(&b, "%s%s %v\n", prefix, name, v)
	}
	count := func(name, help string, v uint64) {
		head(name, "counter", help)
		fmt.Fprintf(&b, "%s%s %d\n", prefix, name, v)
	}
	labelled := func(name, kind, help, label string, values map[string]uint64) {
		head(name, kind, help)
		for _, k := range slices.Sorted(func(yield func(string) bool) {
			for k := range values {
				if !yield(k) {
					return
				}
			}
		}) {
			fmt.Fprintf(&b, "%s%s{%s=%q} %d\n", prefix, name, label, k, values[k])
		}
	}
	gauge("uptime_seconds", "Since the gateway was started.", fmt.Sprintf("%.3f", st.Uptime))
	draining := 0
	if st.Drains {
		draining = 1
	}
	gauge("draining", "1 once the gateway was told to end.", draining)
	gauge("clients", "Clients that are connected.", st.Clients)
	gauge("pinned_clients", "Clients that have a connection to the server to themselves.", st.Pinned)
	gauge("memory_bytes", "Bytes held for clients, which -max-memory bounds.", st.Memory)
	count("clients_total", "Clients let in.", st.Accepted)
	count("clients_turned_away_total", "Clients turned away at -max-clients.", st.Turned)
	count("accept_errors_total", "Errors of the listening socket.", st.AcceptErr)
	count("handshakes_failed_total", "TLS handshakes of clients that failed.", st.Handshake)
	count("requests_total", "Requests of clients.", st.Requests)
	count("replies_total", "Replies to clients, errors made by the gateway included.", st.Replies)
	labelled("failures_total", "counter", "Requests that the server did not answer, by reason.", "reason", st.Failures)
	count("bad_frames_total", "Clients closed because they broke the protocol.", st.BadFrames)
	count("idle_clients_total", "Clients closed after -idle-timeout.", st.Idle)
	count("stalled_clients_total", "Clients closed in the middle of a request.", st.Stalled)
	count("slow_clients_total", "Clients closed because they did not take their replies.", st.Slow)
	count("client_bytes_in_total", "Bytes from clients.", st.BytesIn)
	count("client_bytes_out_total", "Bytes to clients.", st.BytesOut)
	count("reloads_total", "Changes of certificates put into use.", st.Reloads)
	count("reloads_failed_total", "Changes of certificates refused.", st.ReloadsFailed)
	count("log_lines_dropped_total", "Lines that the log did not take.", st.LogDropped)
	gauge("max_clients", "Clients that may be connected: -max-clients, or fewer where the limit of open files is lower.", st.MaxClients)

	p := st.Pool
	labelled("upstream_connections", "gauge", "Connections to the server, by state.", "state", map[string]uint64{
		"dialing": uint64(p.Dialing), "idle": uint64(p.Idle), "in_use": uint64(p.InUse), "closing": uint64(p.Closing)})
	gauge("upstream_peak", "The most connections to the server there were at once.", p.PeakOpen)
	gauge("upstream_waiting", "Requests that wait for a connection.", p.Waiting)
	count("upstream_loans_total", "Loans of connections.", p.Loans)
	count("upstream_loans_reused_total", "Loans of connections that had been lent before.", p.Reused)
	count("upstream_dials_total", "Dials of the server.", p.Dials)
	count("upstream_dial_errors_total", "Dials of the server that failed, and connections whose set-up failed.", p.DialErrors+p.Closed[connpool.ClosedSetupFailed])
	count("upstream_waits_total", "Requests that had to wait for a connection.", p.Waits)
	head("upstream_wait_seconds_total", "counter", "Time spent waiting for a connection.")
	fmt.Fprintf(&b, "%supstream_wait_seconds_total %.6f\n", prefix, p.WaitDuration.Seconds())
	closed := make(map[string]uint64, len(p.Closed))
	for r, n := range p.Closed {
		closed[r.String()] = n
	}
	labelled("upstream_closed_total", "counter", "Connections to the server closed, by reason.", "reason", closed)
	return b.Bytes()
}

// serveStatus serves HTTP until ctx is done.
func (g *Gateway) serveStatus(ctx context.Context) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		st := g.Status()
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(st.metrics())
	})
	mux.HandleFunc("GET /status.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.Encode(g.Status())
	})
	srv := &http.Server{
		Handler:           g.sameMachine(mux),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10,
		ErrorLog: log.New(io.Discard, "", 0), // net/http would write to stderr and wait for it
	}
	few := &crowd{Listener: g.statusListener, most: statusClients}
	srv.ConnState = few.follow
	if err := srv.Serve(few); !g.statusListener.ended.Load() {
		g.Logger.Error("the status is not served any more", "error", err)
	}
	<-ctx.Done() // open connections may go on asking
	srv.Close()
}

// crowd is a listener with a maximum number of connections. One more connection replaces
// the connection that has been silent for longest; if none is silent, the new one is
// closed.
type crowd struct {
	net.Listener
	most int

	mu  sync.Mutex // guards all; sockets are closed after it
	all []*visitor // the one whose state changed longest ago first
}

type visitor struct {
	net.Conn
	asking bool // a request is under way
}

func (c *crowd) Accept() (net.Conn, error) {
	for {
		nc, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		v := &visitor{Conn: nc}
		if out := c.enter(v); out != nil {
			out.Conn.Close()
			if out == v {
				continue
			}
		}
		return v, nil
	}
}

// enter makes room for v, and returns the connection to close for that.
func (c *crowd) enter(v *visitor) (out *visitor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.all) >= c.most {
		i := slices.IndexFunc(c.all, func(v *visitor) bool { return !v.asking })
		if i < 0 {
			return v
		}
		out = c.all[i]
		c.all = slices.Delete(c.all, i, i+1)
	}
	c.all = append(c.all, v)
	return out
}

// follow is called by the HTTP server when a connection changes its state.
func (c *crowd) follow(nc net.Conn, state http.ConnState) {
	v := nc.(*visitor)
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.all, v)
	if i < 0 || state == http.StateNew {
		return // closed to make room, or just accepted
	}
	c.all = slices.Delete(c.all, i, i+1)
	if state != http.StateClosed && state != http.StateHijacked {
		v.asking = state == http.StateActive
		c.all = append(c.all, v)
	}
}

// sameMachine turns away requests that a web page made a browser send (DNS rebinding):
// their Host is a name to which a foreign name server gave the loopback address.
func (g *Gateway) sameMachine(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.status.network == "tcp" {
			host := r.Host
			if h, _, err := net.SplitHostPort(host); err == nil {
				host = h
			}
			ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
			if (err != nil || !ip.Unmap().IsLoopback()) && !strings.EqualFold(host, "localhost") {
				http.Error(w, "ask for localhost", http.StatusForbidden)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}
