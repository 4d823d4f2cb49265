package main

import (
	"context"
	"crypto/tls"
	"sync"
	"time"
)

// client makes one exchange after the other, without a pause, on a connection of its own.
type client struct {
	leave chan struct{} // closed to end it after the exchange under way
	gone  chan struct{} // closed when it has ended

	// mu guards the client's notes, which the crew reads. It is held briefly; there is no
	// I/O under it.
	mu      sync.Mutex
	record  bool // exchanges that begin now are noted
	during  bool // the current exchange began while record was set
	settled bool // it has had an answer, or an error, since settle was called
	notes
}

// notes are the results of the exchanges that began while the client was recording. The
// client follows them to their end, so that long ones are not missing.
type notes struct {
	seen       latencies
	sum        time.Duration
	errors     uint64
	lastErr    error
	began, end time.Time // of the first exchange, and of the last
}

// perSecond is the client's own rate. It is counted from the start of an exchange to the
// end of another. With a fixed span it would depend on where in an exchange the span
// begins and ends; with peers that answer in step that would be an error of a tenth.
func (n *notes) perSecond() float64 {
	return perSecond(n.seen.count, n.end.Sub(n.began).Seconds())
}

// crew is the clients of a ramp.
type crew struct {
	t        *target
	ctx      context.Context
	sessions tls.ClientSessionCache
	clients  []*client
}

func newCrew(ctx context.Context, t *target) *crew {
	return &crew{t: t, ctx: ctx, sessions: tls.NewLRUClientSessionCache(0)}
}

// pauseAfterError keeps a client whose connection fails from dialing in a
// tight loop.
const pauseAfterError = 100 * time.Millisecond

// resize sets the number of working clients to n. When it returns, surplus clients have
// ended.
func (c *crew) resize(n int) {
	for len(c.clients) < n {
		cl := &client{leave: make(chan struct{}), gone: make(chan struct{})}
		c.clients = append(c.clients, cl)
		go cl.run(c.ctx, c.t, c.sessions)
	}
	leaving := c.clients[n:]
	c.clients = c.clients[:n:n]
	for _, cl := range leaving {
		close(cl.leave)
	}
	for _, cl := range leaving {
		<-cl.gone
	}
}

// run returns when leave is closed, or when ctx is done, which interrupts an exchange.
func (cl *client) run(ctx context.Context, t *target, sessions tls.ClientSessionCache) {
	defer close(cl.gone)
	var o *own
	stop := func() bool { return true }
	hangUp := func() {
		if o != nil {
			stop()
			o.nc.Close()
			o = nil
		}
	}
	defer hangUp()
	for {
		select {
		case <-cl.leave:
			return
		case <-ctx.Done():
			return
		default:
		}
		if o == nil {
			cl.begin()
			fresh, err := t.dial(ctx, sessions)
			if err != nil {
				if !cl.failed(ctx, err) {
					return
				}
				continue
			}
			o = fresh
			stop = context.AfterFunc(ctx, func() { fresh.nc.Close() })
		}
		began := cl.begin()
		more, err := o.ask(t.timeout)
		if err != nil {
			hangUp()
			if !cl.failed(ctx, err) {
				return
			}
			continue
		}
		cl.answered(began)
		if !more {
			hangUp()
		}
	}
}

// begin records that an attempt starts, and returns when.
func (cl *client) begin() time.Time {
	now := time.Now()
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.during = cl.record
	if cl.during && cl.began.IsZero() {
		cl.began = now
	}
	return now
}

func (cl *client) answered(began time.Time) {
	now := time.Now()
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.settled = true
	if cl.during {
		cl.seen.add(now.Sub(began))
		cl.sum += now.Sub(began)
		cl.end = now
	}
	cl.during = false
}

// failed records an error and pauses. It reports whether to continue.
func (cl *client) failed(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	cl.mu.Lock()
	cl.settled = true
	if cl.during {
		cl.errors++
		cl.lastErr = err
		cl.end = time.Now()
	}
	cl.during = false
	cl.mu.Unlock()
	pause := time.NewTimer(pauseAfterError)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-cl.leave:
	case <-ctx.Done():
	}
	return true
}

// settle starts anew: nothing is noted, and no client counts as settled.
func (c *crew) settle() {
	c.each(func(cl *client) { cl.settled, cl.record, cl.during, cl.notes = false, false, false, notes{} })
}

// note makes all clients record the exchanges that begin from now on, or stop recording.
func (c *crew) note(on bool) {
	c.each(func(cl *client) { cl.record = on })
}

func (c *crew) each(do func(*client)) {
	for _, cl := range c.clients {
		cl.mu.Lock()
		do(cl)
		cl.mu.Unlock()
	}
}

// progress is how far the crew has come.
type progress struct {
	answers, errors  uint64
	settled, resting bool // every client has settled; no client has a recorded exchange in flight
}

func (c *crew) progress() progress {
	p := progress{settled: true, resting: true}
	c.each(func(cl *client) {
		p.answers += cl.seen.count
		p.errors += cl.errors
		p.settled = p.settled && cl.settled
		p.resting = p.resting && !cl.during
	})
	return p
}

// level adds up the notes.
func (c *crew) level() level {
	var all latencies
	l := level{Clients: len(c.clients)}
	var sum time.Duration
	c.each(func(cl *client) {
		all.merge(&cl.seen)
		sum += cl.sum
		l.Errors += cl.errors
		if cl.lastErr != nil {
			l.lastErr = cl.lastErr
		}
		if cl.seen.count == 0 {
			l.Starved++
		}
		l.PerSecond += cl.perSecond()
	})
	if l.Answers = all.count; l.Answers > 0 {
		l.Mean = sum.Seconds() / float64(l.Answers)
	}
	l.P50, l.P95, l.P99 = all.quantile(0.50).Seconds(), all.quantile(0.95).Seconds(), all.quantile(0.99).Seconds()
	return l
}
